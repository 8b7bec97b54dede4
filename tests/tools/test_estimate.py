"""``lit-lora estimate`` looks at the batches that the run would see, for any architecture, or says why not."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lit_lora.__main__ import main
from lit_lora.cli.lightning_cli import parse_fit
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.tools.estimate import largest_batches
from tests.sweep.configs import tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:not adapted"),
]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Arguments of a fit of an architecture, on thirty examples of lengths that differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    rows = [{"prompt": "say", "completion": "it is " + "x" * (7 * i % 40)} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(model_type: str = "llama", **options: Any) -> list[str]:
        fields = tiny_config(model_type, vocab_size=260).to_dict()
        (tmp_path / f"{model_type}.json").write_text(json.dumps(fields))
        settings = {
            "model.base": f"random:{model_type}.json", "data.train": "data.jsonl", "data.tokenizer": "bytes",
            "data.cache_dir": "cache", "trainer.accelerator": "cpu", **options,
        }  # fmt: skip
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return made


def largest(arguments: Sequence[str], cost: Callable[[list[int]], int], num_epochs: int) -> int:
    """The largest cost of a batch that a loader gives, over some epochs."""
    config = parse_fit(arguments)
    data = SFTDataModule(**config.data)
    data.setup("fit")
    found = 0
    for epoch in range(num_epochs):
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for batch in loader:
            mask = batch.get("attention_mask")
            found = max(found, cost(batch["seq_lens"] if mask is None else mask.sum(1).tolist()))
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"data.batch_size": 3}, {"data.max_tokens_per_batch": 150}, {"data.packing": "false", "data.batch_size": 4}],
    ids=str,
)
def test_the_batch_is_the_largest_of_the_runs_own_plan(arguments, options):
    given = arguments(**options, **{"trainer.max_epochs": 3})
    batches = largest_batches(parse_fit(given))
    assert sum(batches.packed.lengths) == largest(given, sum, 3)
    padded = batches.padded.lengths
    assert max(padded) * len(padded) == largest(given, lambda lengths: max(lengths) * len(lengths), 3)
    assert 0 < batches.packed.supervised < 1
    assert "of 30 examples in data.jsonl" in batches.origin


def test_lengths_are_those_of_the_data_not_of_the_settings(arguments, capsys):
    main(["estimate", *arguments()])
    text = capsys.readouterr().out
    assert "the largest of" in text
    assert "4 examples of up to 1024 tokens" not in text
    main(["estimate", *arguments(), "--lengths", "20", "30"])
    assert "2 examples of up to 30 tokens" in capsys.readouterr().out


def test_what_is_assumed_without_data_is_said(arguments, capsys):
    main(["estimate", *arguments(**{"data.tokenizer": "null", "data.max_length": 64})])
    text = capsys.readouterr().out
    assert "assumed the largest micro-batch that the settings allow" in text
    assert "has no tokenizer of its own" in text
    assert "4 examples of up to 64 tokens" in text


@pytest.mark.parametrize(
    ("model_type", "traced"),
    [
        ("mixtral", "packed without padding; loss from hidden states"),
        ("qwen3_moe", "packed without padding; loss from hidden states"),
        ("bloom", "padded; loss from hidden states, in chunks (not packed: its attention cannot be chosen)"),
        ("mamba", "padded; loss from hidden states"),
        ("gpt_oss", "padded; loss from hidden states, in chunks (not packed: its attention takes s_aux)"),
        ("jamba", "padded"),
        ("gemma2", "packed without padding; loss from the model's logits"),
        ("llama4", "padded"),
        ("mpt", "padded"),
        ("gptj", "padded"),
        ("qwen3_next", "padded"),  # a norm with a gate
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_architecture_can_be_estimated(arguments, capsys, model_type, traced, dtype):
    left_out = {"mamba": '["out_proj", "dt_proj"]', "jamba": '["out_proj", "dt_proj"]', "qwen3_next": ".*mlp.*"}
    options = {"model.dtype": dtype, "model.lora.exclude_modules": left_out.get(model_type, "null")}
    main(["estimate", *arguments(model_type, **options), "--lengths", "20", "30"])
    assert f"traced {traced}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "fields", "because"),
    [
        ("t5", {}, "no causal language model"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            r"does not run on tensors without values .* in modeling_rope_utils.py, line \d+",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused_with_the_reason(arguments, capsys, tmp_path, model_type, fields, because):
    given = arguments(model_type)
    path = tmp_path / f"{model_type}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(SystemExit):
        main(["estimate", *given, "--lengths", "20", "30"])
    assert re.search(because, capsys.readouterr().err)
