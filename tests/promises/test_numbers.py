"""The numbers of the README and of ``docs/`` are those of the files that were measured, or of the code."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from statistics import median

import pytest
import torch

from lit_lora import LoRAConfig, inject_lora
from lit_lora.base.load import load_base_model
from tests.promises.sentences import PROJECT

README = (PROJECT / "README.md").read_text()
RESULTS = PROJECT / "benchmarks/results"


def cells_below(header: str, text: str) -> Iterator[list[str]]:
    """Rows of the table whose header line begins so."""
    lines = text.split(header, 1)[1].splitlines()[2:]
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip().strip("*`") for cell in line.strip().strip("|").split("|")]


def measured(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def prose(document: str) -> str:
    return " ".join((PROJECT / document).read_text().split())


def medians(name: str) -> dict[str, dict[str, float]]:
    """Column medians of each framework."""
    rows = measured(name)
    return {
        framework: {
            column: median(float(row[column]) for row in rows if row["framework"] == framework)
            for column in rows[0]
            if column not in ("round", "framework")
        }
        for framework in {row["framework"] for row in rows}
    }


def test_the_faults_of_the_readme_are_those_of_the_suite():
    header = "| fault | tried | survived |"
    faults = list(cells_below(header, README))
    assert faults == list(cells_below(header, (RESULTS / "faults.md").read_text()))
    assert sum(int(tried) for _, tried, _ in faults) >= 900
    assert all(tried == survived for _, tried, survived in faults)


def test_the_table_of_speed_is_what_was_measured():
    rows = list(cells_below("| | real tokens/s | step |", README))
    speed = medians("train_natural_lora")
    for row, framework in zip(rows, ("lit_lora", "peft", "trl", "trl_tuned", "limit"), strict=True):
        of = speed[framework]
        assert row[1] == f"{of['tokens_per_s']:.0f}"
        assert row[2] in (f"{of['median_step_s']:.1f} s", f"{math.floor(of['median_step_s'] * 10) / 10} s")
        if framework != "limit":
            assert (
                row[3] == f"{of['peak_rss_mib'] * 2**20 / 2**30:.1f} GB"
                or row[3] == f"{of['peak_rss_mib'] / 1000:.1f} GB"
            )
            losses = [float(loss) for loss in row[4].split(", ")]
            assert losses == pytest.approx([of["first_loss"], of["last_loss"]], abs=1e-4)


def test_the_ratios_of_speed_follow_from_what_was_measured():
    natural, dense, quantized = map(medians, ("train_natural_lora", "train_dense_lora", "train_natural_qlora"))
    rounds: dict[str, list[float]] = {"lit_lora": [], "peft": [], "trl": []}
    for row in measured("train_natural_lora"):
        rounds.get(row["framework"], []).append(float(row["tokens_per_s"]))

    def faster_than(other: str) -> float:
        return median(a / b for a, b in zip(rounds["lit_lora"], rounds[other], strict=True))

    memory = [natural[name]["peak_rss_mib"] for name in ("lit_lora", "peft")]
    for sentence, ratio in {
        "{:.1f} times PEFT + Trainer": faster_than("peft"),
        "and {:.1f} times TRL": faster_than("trl"),
        "in {:.2f} of the memory": memory[0] / memory[1],
    }.items():
        (said,) = re.findall(
            re.escape(sentence.split("{")[0]) + r"([\d.]+)" + re.escape(sentence.split("}")[1]), prose("README.md")
        )
        assert float(said) == pytest.approx(ratio, abs=0.6 * 10 ** -len(said.split(".")[1])), sentence
    for name, found in (("367 tokens/s against 194", dense), ("479 against PEFT's 136", quantized)):
        assert name in prose("README.md")
        assert [int(number) for number in re.findall(r"\d+", name)] == [
            round(found[framework]["tokens_per_s"]) for framework in ("lit_lora", "peft")
        ]


def test_the_table_of_memory_is_what_was_estimated():
    estimates = measured("memory_estimates")
    assert f"has {len(estimates)} rows" in prose("README.md")
    rows = list(cells_below("| model | batch (examples x tokens) |", README))
    assert len(rows) == 4
    for model, batch, recomputed, lora, qlora, bound in rows:
        examples, tokens = batch.split(" x ")
        of = {
            row["method"]: row
            for row in estimates
            if (row["model"], row["examples"], row["tokens_each"], row["recomputed"], row["r"])
            == (model.lower(), examples, tokens, recomputed, "16")
        }
        lora_mb, qlora_mb, bound_mb = (float(cell.replace(",", "")) for cell in (lora, qlora, bound))
        assert lora_mb == pytest.approx(float(of["LoRA, bf16"]["reserved_mb"]), abs=0.6)
        assert qlora_mb == pytest.approx(float(of["QLoRA, NF4-DQ"]["reserved_mb"]), abs=0.6)
        assert qlora_mb < bound_mb == float(of["QLoRA, NF4-DQ"]["bound_mb"])


def test_the_shares_of_memory_are_those_estimated():
    said = prose("docs/memory.md")
    by_case = {
        (r["model"], r["method"], r["tokens_each"], r["recomputed"]): r
        for r in measured("memory_estimates")
        if r["examples"] != "2"
    }
    for words, key in {
        "Llama-2-7B with 4 x 512 tokens, ": ("llama-2-7b", "QLoRA, NF4-DQ", "512", "all"),
        "TinyLlama with 4 x 512 tokens, ": ("tinyllama-1.1b", "QLoRA, NF4-DQ", "512", "all"),
        "with an 8-bit embedding ": ("tinyllama-1.1b", "QLoRA, NF4-DQ, 8-bit embedding", "512", "all"),
        "adapters on q_proj and v_proj, ": ("smollm2-135m", "QLoRA, NF4-DQ", "128", "all"),
    }.items():
        shares = re.search(re.escape(words) + r"(\d+)% and (\d+)%", said)
        assert shares, words
        row = by_case[key]
        for share, column in zip(shares.groups(), ("allocated_of_lora", "reserved_of_lora"), strict=True):
            assert int(share) == pytest.approx(100 * float(row[column]), abs=0.51), (words, column)
    saved = {
        row["model"]: float(row["saved_by_double_quant_mb"])
        for row in measured("memory_estimates")
        if row["saved_by_double_quant_mb"]
    }
    assert [round(saved[model]) for model in ("smollm2-135m", "tinyllama-1.1b", "llama-2-7b")] == [5, 45, 302]
    assert "saves 5 MB (SmolLM2), 45 MB (TinyLlama) and 302 MB (Llama-2-7B)" in said


def test_qlora_against_lora_is_what_was_measured():
    rows = list(cells_below("| | validation loss, start and end |", (PROJECT / "docs/qlora.md").read_text()))
    for row, found in zip(rows, measured("qlora_vs_lora"), strict=True):
        of = {name: float(value) for name, value in found.items() if name != "method" and value}
        assert [float(n) for n in row[1].split(", ")] == pytest.approx(
            [of["val_loss_start"], of["val_loss_end"]], abs=6e-4
        )
        assert float(row[2].rstrip("%")) == pytest.approx(100 * of["val_loss_drop"], abs=0.06)
        if row[3]:
            assert [float(n) for n in row[3].split(", ")] == pytest.approx([of["gap_start"], of["gap_end"]], abs=6e-4)
        assert float(row[4]) == pytest.approx(of["base_mib"], abs=0.6)
        assert [float(n) for n in row[5].split(", ")] == pytest.approx(
            [of["tensors_mib"], of["estimate_mib"]], abs=0.06
        )
        assert float(row[6]) == pytest.approx(of["tokens_per_s"], abs=0.6)


def test_trainable_parameters_are_those_of_the_model():
    rows = list(cells_below("| config | adapts |", README))
    assert len(rows) == 4
    with torch.device("meta"):
        for _, adapts, counts in rows:
            targets = re.findall(r"\w+_proj", adapts)
            for rank, count in zip((4, 8, 16, 32), re.findall(r"[\d,]+\d", counts), strict=True):
                model = load_base_model("random:smollm2-135m")
                report = inject_lora(model, LoRAConfig(r=rank, target_modules=targets))
                assert f"{report.num_trainable:,}" == count


def test_the_limits_of_yaml_are_those_of_the_code():
    from lit_lora.files import strict_yaml

    said = prose("docs/command_line.md")
    assert f"more than {strict_yaml.MAX_NODES:,} values" in said
    assert f"more than {strict_yaml.MAX_DEPTH} levels" in said
    assert f"more than {strict_yaml.MAX_CHARACTERS // 1024} KiB" in said


def test_about_as_many_other_names_are_answered_as_is_said():
    from lit_lora.cli import synonyms

    assert "about two hundred and fifty other names" in prose("docs/command_line.md")
    assert len(synonyms.SYNONYMS) == pytest.approx(250, abs=15)
