"""The loss on each source of the validation data, from the command line to the record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from lit_lora.__main__ import main
from lit_lora.metrics import TrainingMetrics
from lit_lora.training.step_metrics import EvaluationMeans, LossOutput

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 259,
}  # fmt: skip


def output(loss: float, targets: int) -> LossOutput:
    return LossOutput(loss_sum=torch.tensor(loss * targets), num_targets=targets, num_tokens=targets)


def test_each_source_has_its_mean_and_the_whole_is_over_all_tokens() -> None:
    means = EvaluationMeans(["a", "b", "unseen"])
    for loss, targets, source in ((1.0, 10, 0), (3.0, 30, 0), (5.0, 20, 1), (0.0, 0, 1)):
        means.add(output(loss, targets), source)
    results = {name: round(value.item(), 5) for name, value in means.results("val").items()}
    assert results["val_loss/a"] == 2.5
    assert results["val_loss/b"] == 5.0
    assert results["val_loss"] == round(200 / 60, 5)
    assert "val_loss/unseen" not in results


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, count in (("own", 12), ("general", 30)):
        rows = [{"prompt": f"{name} {i}", "completion": "answer " * (1 + i % 3)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    content = {
        "model": {"base": f"random:{tmp_path / 'tiny.json'}"},
        "data": {
            "train": [
                {"path": str(tmp_path / "own.jsonl"), "epochs": 2},
                {"path": str(tmp_path / "general.jsonl"), "weight": 0.1, "name": "replay"},
            ],
            "validation_fraction": 0.25, "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"),
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run")},
        "convergence": {"min_decrease": -9.0},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.report
def test_a_run_on_several_sources_of_yaml_logs_their_losses(config, capsys) -> None:
    main(["fit", "--config", str(config)])
    run = config.parent / "run"
    metrics = TrainingMetrics.load(run / "metrics.jsonl")
    first, last = metrics.validation[0], metrics.validation[-1]
    verdict, page = capsys.readouterr().out, (run / "report.html").read_text()
    for source in ("own", "replay"):
        losses = first[f"val_loss/{source}"], last[f"val_loss/{source}"]
        assert re.search(rf"^    on {source} +{losses[0]:.3f} -> {losses[1]:.3f}$", verdict, re.MULTILINE)
        assert f"validation loss on {source}" in page
        assert f"{losses[0]:.3f} → {losses[1]:.3f}" in page
    assert {"val_loss", "val_loss/own", "val_loss/replay"} <= first.keys()
    low, high = sorted((first["val_loss/own"], first["val_loss/replay"]))
    assert low <= first["val_loss"] <= high


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ('[{"path": "own.jsonl", "wieght": 2}]', "wieght"),
        ('[{"path": "own.jsonl", "weight": "much"}, "general.jsonl"]', "weight"),
        ('["own.jsonl", "genreal.jsonl"]', "did you mean"),
        ('[{"weight": 2}]', "path"),
        ('["own.jsonl", {"path": "general.jsonl", "weight": 2}]', "leaves nothing of an epoch for own"),
    ],
)
def test_mistakes_in_sources_are_told_before_anything_is_loaded(config, monkeypatch, capsys, train, told) -> None:
    monkeypatch.chdir(config.parent)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--data.train", train])
    error = capsys.readouterr().err
    assert error.startswith("lit-lora: error: ")
    assert "data" in error
    assert told in error
