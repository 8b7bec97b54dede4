"""``lit-lora init`` writes what ``fit`` takes as it is and learns with, within the memory that was named."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_lora.__main__ import main
from lit_lora.files import strict_yaml
from lit_lora.metrics import TrainingMetrics
from lit_lora.tools.starting_values import learning_rate
from tests.tiny import config

pytestmark = [
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning, about loggers, workers and short runs
]

MODEL = ("--model", "random:tiny.json", "--tokenizer", "bytes", "--cache_dir", "cache", "--trainer.accelerator", "cpu")
ANSWERS = ["it is " + "xyz"[n % 3] * (n % 7) for n in range(40)]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


DATA: dict[str, list[dict[str, Any]]] = {
    "pairs.jsonl": [{"prompt": f"say {n}", "completion": answer} for n, answer in enumerate(ANSWERS)],
    "turns.jsonl": [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(ANSWERS)
    ],
    "plain.jsonl": [{"text": answer} for answer in ANSWERS],
    "few.jsonl": [{"prompt": "say", "completion": answer} for answer in ANSWERS[:5]],
    "uneven.jsonl": [
        {"prompt": "say", "completion": "it is " + "x" * (300 if n % 9 == 0 else n % 5)} for n in range(40)
    ],
    "chosen.jsonl": [{"prompt": "say", "chosen": "it is", "rejected": "is it"}] * 3,
    "bad.jsonl": [{"prompt": "say", "completion": "it is"}, {"prompt": "say"}],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    fields = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    config("Llama", **fields).to_json_file("tiny.json")
    for name, rows in DATA.items():
        Path(name).write_text(jsonl(rows))
    with open("asked.csv", "w", newline="") as file:
        csv.writer(file).writerows([("instruction", "output"), *((f"say {n}", text) for n, text in enumerate(ANSWERS))])


def written(*arguments: str, path: str = "fit.yaml") -> dict[str, Any]:
    main(["init", *arguments])
    return strict_yaml.read(Path(path))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, int]:
    with pytest.raises(SystemExit) as ended:
        main(["init", *arguments])
    return capsys.readouterr().err, int(ended.value.code or 0)


@pytest.mark.parametrize("data", ["turns.jsonl", "few.jsonl", "uneven.jsonl", "asked.csv"])
def test_fit_takes_the_config_as_it_is_and_learns(data: str, capsys) -> None:
    made = written(data, *MODEL, "--memory", "4GB")
    assert ("validation_fraction" in made["data"]) == (data != "few.jsonl")
    assert ("max_tokens_per_batch" in made["data"]) == (data == "uneven.jsonl")
    main(["fit", "--config", "fit.yaml", "--report", "false"])
    assert not made["model"].keys() & {"dtype", "quantization", "step"}  # all that fits
    run = Path("runs") / Path(data).stem
    losses = TrainingMetrics.load(run / "metrics.jsonl").losses
    assert 3 <= len(losses) <= 40
    third = len(losses) // 3
    assert sum(losses[-third:]) < sum(losses[:third])
    assert "lit_lora: proved" in capsys.readouterr().out


BUDGETS: dict[str, tuple[int, dict[str, Any]]] = {
    "1.65MB": (2, {}),
    "0.87MB": (1, {"quantization": {"bits": 4, "embedding_bits": 8}, "step": {"recompute": True}}),
}
"""Memory -> examples of a micro-batch, and what is set for the base and the step."""


@pytest.mark.parametrize("budget", BUDGETS)
def test_less_memory_is_met_by_what_costs_least(budget: str, capsys) -> None:
    # The process itself takes more than such a budget, so what the run is held to is another.
    made = written("pairs.jsonl", *MODEL, "--memory", budget, "--memory.budget_mib", "4000")
    size, of_model = BUDGETS[budget]
    assert made["data"]["batch_size"] == size
    assert {
        name: made["model"].get(name) for name in ("dtype", "quantization", "step") if name in made["model"]
    } == of_model
    assert size * made["trainer"]["accumulate_grad_batches"] == pytest.approx(5, abs=1)  # an eighth of the examples
    if budget == "0.87MB":
        main(["estimate", "--config", "fit.yaml", "--fits", budget])
        assert f"fits in {budget}: yes" in capsys.readouterr().out
        main(
            ["fit", "--config", "fit.yaml", "--trainer.max_steps", "5", "--trainer.max_epochs", "-1", "--report=false"]
        )


def test_what_does_not_fit_at_all_is_refused_with_what_would_help(capsys) -> None:
    error, code = refusal(capsys, "pairs.jsonl", *MODEL, "--memory", "50kB")
    assert code == 1
    assert "fits in 50kB: the smallest that init knows takes" in error
    assert "model.quantization.bits 4" in error
    assert "It would take less with" in error
    assert not Path("fit.yaml").exists()


def test_what_was_given_is_written_and_nothing_is_chosen_beside_it() -> None:
    given = [
        "--model.lora.r",
        "4",
        "--model.quantization.bits",
        "8",
        "--max_tokens_per_batch",
        "128",
        "--max_length",
        "64",
    ]
    given += ["--trainer.max_steps", "5", "--validation", "few.jsonl", "--output", "deep/my.yaml", "--data.seed=3"]
    made = written("pairs.jsonl", *MODEL, *given, path="deep/my.yaml")
    assert made["model"]["lora"] == {"r": 4, "target_modules": "all-linear", "lora_alpha": 32}
    assert made["model"]["quantization"] == {"bits": 8}
    assert made["data"]["max_tokens_per_batch"] == 128
    assert made["data"]["max_length"] == 64
    assert made["data"]["seed"] == 3
    assert not made["data"].keys() & {"batch_size", "validation_fraction"}
    assert made["trainer"]["max_steps"] == 5
    assert "max_epochs" not in made["trainer"]


def test_a_config_for_another_machine_says_so_and_needs_its_memory(capsys) -> None:
    error, _ = refusal(capsys, "pairs.jsonl", *MODEL[:-2], "--device", "cuda")
    assert "say how much it has, --memory 24GB" in error
    made = written("pairs.jsonl", *MODEL[:-2], "--device", "cuda", "--memory", "24GB")
    assert made["trainer"]["accelerator"] == "gpu"
    assert made["memory"] == {"budget_mib": 24_000_000_000 // 2**20}
    assert "model" in made
    assert "dtype" not in made["model"]


def test_every_choice_has_its_reason_and_the_header_what_was_measured() -> None:
    written("pairs.jsonl", *MODEL, "--memory", "2GB")
    lines = Path("fit.yaml").read_text().splitlines()
    assert lines[0].startswith("# Written by: lit-lora init pairs.jsonl --model")
    assert "within 2GB" in lines[3]
    given = {"base:", "tokenizer:", "train:", "cache_dir:", "accelerator:"}
    for before, line in itertools.pairwise(lines):
        if not line.lstrip().startswith("#") and not line.endswith(":") and line.split()[0] not in given:
            assert before.lstrip().startswith("#"), line


def test_without_a_budget_it_is_what_is_free() -> None:
    made = written("pairs.jsonl", *MODEL)
    assert "memory" not in made
    assert "were free on this machine" in Path("fit.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pairs.jsonl"], ["missing: --model MODEL"]),
        ([*MODEL], ["missing: FILE"]),
        (["pairs.jsonl", *MODEL, "--output", "."], ["is a folder"]),
        (["pairs.jsonl", *MODEL, "--output", "fit.json"], ["expected the name of a .yaml file"]),
        (["pairs.jsonl", *MODEL, "--output", "there.yaml"], ["there.yaml is there already", "--overwrite"]),
        (["pairs.jsonl", *MODEL, "--config", "there.yaml"], ["--model.lora.r 32"]),
        (["pairs.jsonl", *MODEL, "--trainer.callbacks+=EarlyStopping"], ["add to a list in the file"]),
        (["pairs.jsonl", *MODEL, "--model.lora.rank", "3"], ["model.lora.rank", "'model.lora.r'"]),
        (["pairs.jsonl", *MODEL, "--formatt", "text"], ["did you mean '--format'"]),
        (["pairs.jsonl", *MODEL, "--memory", "much"], ["'much'", "8GiB"]),
        (["missing.jsonl", *MODEL], ["missing.jsonl"]),
        (["chosen.jsonl", *MODEL], ["chosen"]),
        (["bad.jsonl", *MODEL], ["1 rows of the data cannot be used", "lit-lora data bad.jsonl", "--on_bad_rows drop"]),
        (["pairs.jsonl", "--model", "random:nothing.json", "--tokenizer", "bytes"], ["nothing.json"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistakes_are_named_and_nothing_is_written(capsys, arguments: list[str], words: list[str]) -> None:
    Path("there.yaml").write_text("mine\n")
    error, code = refusal(capsys, *arguments)
    assert code in (1, 2)
    assert [word for word in words if word not in error] == [], error
    assert Path("there.yaml").read_text() == "mine\n"
    assert not Path("fit.yaml").exists()


def test_a_file_is_replaced_when_that_is_asked_for() -> None:
    Path("fit.yaml").write_text("mine\n")
    assert written("--overwrite", "pairs.jsonl", *MODEL)["model"]["base"] == "random:tiny.json"


@pytest.mark.parametrize(
    ("hidden_size", "model_type", "rate"),
    [
        (2000, "llama", 5e-4),
        (4096, "llama", 2.9e-4),
        (576, "llama", 1.3e-3),
        (4096, "qwen3", 4.7e-4),
        (2000, "gemma3", 5e-4),
    ],
)
def test_the_rate_falls_with_the_width_as_it_was_measured(hidden_size: int, model_type: str, rate: float) -> None:
    assert learning_rate(hidden_size, model_type) == rate
