"""The five tiers: their configs say what they promise, the first two pass on the real model, the rest is told apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_lora import QuantizationConfig, TrainingMetrics
from lit_lora.tools import tiers as tool
from lit_lora.tools.tiers import TIERS, Tier, tiers, why_not

FOLDER = Path(__file__).parents[2] / "configs" / "tiers"
CONFIGS = {number: yaml.safe_load((FOLDER / f"{tier.config}.yaml").read_text()) for number, tier in TIERS.items()}
PROMISED = {
    1: ("smollm2-135m-instruct", 10, None, 0.0),
    2: ("smollm2-135m-instruct", 100, None, 0.3),
    3: ("random:tinyllama-1.1b", 50, 2e9, None),
    4: ("random:tinyllama-1.1b", 500, 4e9, 0.4),
    5: ("random:llama-2-7b", 1000, 12e9, 0.3),
}


def test_every_tier_has_a_config_and_the_other_way_round():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {tier.config for tier in TIERS.values()}


@pytest.mark.parametrize("number", TIERS)
def test_configs_keep_what_the_tiers_promise(number):
    config = CONFIGS[number]
    base, steps, budget, decrease = PROMISED[number]
    assert config["model"]["base"] == base
    assert config["trainer"]["max_steps"] == steps
    quantization = QuantizationConfig(**config["model"]["quantization"])
    assert (quantization.bits, quantization.quant_type, quantization.double_quant) == (4, "nf4", True)
    if budget is not None:
        assert config["memory"]["budget_mib"] <= budget / 2**20
        assert config["memory"]["on_exceeded"] == "stop"
    if decrease is not None:
        assert config["convergence"]["min_decrease"] >= decrease
    if number == 4:
        assert config["memory"]["max_growth_mib_per_1000_steps"] < 100
    if number == 5:
        assert config["checkpoint"]["every_n_steps"] <= steps / 4
    text = (FOLDER / f"{TIERS[number].config}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    assert "lit-lora fit --config tiers/" in text
    assert ("random weights" in text) == base.startswith("random:")


@pytest.mark.parametrize(
    ("tier", "cuda_gib", "reason"),
    [
        (Tier("x", 5, 1), None, ""),
        (Tier("x", 500, 1), None, "takes about 500 minutes without CUDA: --max_minutes 500"),
        (Tier("x", None, 1), None, "needs a CUDA device"),
        (Tier("x", None, 12), 80, ""),
        (Tier("x", None, 12), 8, "needs 12 GiB of GPU memory, there are 8"),
        (Tier("x", 5, 1, "smollm2-135m-instruct"), None, "run `lit-lora fetch smollm2-135m-instruct` first"),
    ],
)
def test_what_a_machine_cannot_run_is_skipped_with_the_reason(tier, cuda_gib, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_LORA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_gib is not None)
    properties = type("Properties", (), {"total_memory": (cuda_gib or 0) * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert why_not(tier, 20) == reason


def test_a_failed_tier_is_in_the_table_and_fails_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "TIERS", {1: Tier("no_such_config", 1, 0), 2: Tier("2_convergence", 9e9, 1)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="tiers failed: no_such_config"):
        tiers(output=str(tmp_path))
    table = capsys.readouterr().out
    assert re.search(r"no_such_config  FAILED   \d\.\d min; random weights; stopped before it wrote anything", table)
    assert "2_convergence   skipped" in table
    with pytest.raises(ValueError, match=r"no tiers \[9\]"):
        tiers(only=[9])


def _fit(number: int, folder: Path) -> tuple[TrainingMetrics, dict[str, bool | None]]:
    command = [sys.executable, "-m", "lit_lora", "fit", "--config", f"tiers/{TIERS[number].config}.yaml"]
    overrides = ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    finished = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    verdicts = {
        entry["name"]: entry["passed"] for entry in json.loads((folder / "verdict.json").read_text())["verdicts"]
    }
    return TrainingMetrics.load(folder / "metrics.jsonl"), verdicts


@pytest.mark.real_model
@pytest.mark.parametrize("number", [1, 2])
def test_tier_passes_on_a_cpu(number, real_model, tmp_path):
    metrics, verdicts = _fit(number, tmp_path / "run")
    assert len(metrics.steps) == PROMISED[number][1]
    assert verdicts["convergence"]
    assert verdicts["gradient flow"]
    assert verdicts["adapter export"]
    if number == 2:
        first, last = (sum(part) / 25 for part in (metrics.losses[:25], metrics.losses[-25:]))
        assert last < 0.7 * first
        assert metrics.validation[-1]["val_loss"] < 0.7 * metrics.validation[0]["val_loss"]
