"""``lit-lora evaluate`` on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_lora import LoRAConfig, LoRALightningModule, inject_lora, load_adapter, load_base_model, save_adapter
from lit_lora.__main__ import main
from lit_lora.adapters.layers import lora_layers
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.callbacks._support.displays import TerminalLine
from lit_lora.data.datamodule import SFTDataModule
from tests.terminal import terminal
from tests.tiny import config


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config("Llama", vocab_size=260)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = load_base_model(str(tmp_path / "base"))
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [json.dumps({"prompt": f"say {i}", "completion": "it is " + "x" * i}) for i in range(7)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_loss_before_and_after_is_that_of_a_validation(adapter, data, tmp_path, capsys):
    main(
        [
            "evaluate",
            str(data),
            str(adapter),
            "--max_new_tokens=2",
            "--batch_size=3",
            f"--output={tmp_path / 'out.json'}",
        ]
    )
    losses = json.loads((tmp_path / "out.json").read_text())["mean_loss"]
    assert (
        f"mean loss per target token: {losses['before']:.3f} before, {losses['after']:.3f} after"
        in capsys.readouterr().out
    )
    assert losses["before"] != losses["after"]
    validated = {"before": _validated(None, data), "after": _validated(adapter, data)}
    assert losses == pytest.approx({side: found["val_loss"] for side, found in validated.items()}, rel=1e-5)
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    for side, found in validated.items():
        assert scores["perplexity"][side]["value"] == pytest.approx(found["val_perplexity"], rel=1e-5)
        assert scores["token accuracy"][side]["value"] == pytest.approx(100 * found["val_token_accuracy"], rel=1e-5)
        low, high = scores["perplexity"][side]["low"], scores["perplexity"][side]["high"]
        assert low < found["val_perplexity"] < high


def _validated(adapter: Path | None, data: Path) -> dict[str, float]:
    module = LoRALightningModule(str(data.parent / "base"), lora=LoRAConfig(r=4))
    module.configure_model()
    if adapter is not None:
        source = load_base_model(str(data.parent / "base"))
        load_adapter(source, adapter)
        for (_, target), (_, layer) in zip(lora_layers(module), lora_layers(source), strict=True):
            for own, loaded in zip(target.factors(), layer.factors(), strict=True):
                own.data.copy_(loaded)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    datamodule = SFTDataModule(
        train=str(data), validation=str(data), cache_dir=str(data.parent / "cache"), batch_size=3
    )
    return dict(trainer.validate(module, datamodule=datamodule, verbose=False)[0])


def test_adapters_stand_side_by_side_with_their_base(adapter, data, tmp_path, capsys):
    torch.manual_seed(1)
    model = load_base_model(str(tmp_path / "base"))
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    save_adapter(model, tmp_path / "other")
    shared = ["--max_new_tokens=2", "--metrics=perplexity,exact_match,rouge", f"--output={tmp_path / 'out.json'}"]
    alone = {}
    for name in ("adapter", "other"):
        main(["evaluate", str(data), str(tmp_path / name), *shared])
        alone[str(tmp_path / name)] = json.loads((tmp_path / "out.json").read_text())
    capsys.readouterr()
    names = list(alone)
    main(["evaluate", str(data), *names, *shared])
    assert json.loads((tmp_path / "out.json").read_text()) == {"adapters": alone}
    said = capsys.readouterr()
    assert [line.rpartition(" ")[0] for line in said.err.splitlines() if line.endswith("7/7")] == [
        f"without {names[0]}", f"with {names[0]}", f"with {names[1]}",
    ]  # fmt: skip
    table = said.out[said.out.index("95 % confidence") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["perplexity", *names]
    assert "base" in table[1]
    assert re.search(
        rf"^{names[1]}, perplexity: (better|worse) than {names[0]}, p|cannot be told apart", said.out, re.M
    )
    by_name = ["evaluate", "--adapter", names[0], "--data", str(data), "--adapter", names[1], *shared]
    main(by_name)
    assert json.loads((tmp_path / "out.json").read_text()) == {"adapters": alone}


def _other_base(tmp_path):
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config("Llama", vocab_size=260)).save_pretrained(tmp_path / "another")
    byte_tokenizer().save_pretrained(tmp_path / "another")
    model = load_base_model(str(tmp_path / "another"))
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    save_adapter(model, tmp_path / "other")
    return [str(tmp_path / "other")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda place: ["--metrics=rogue"], "no metric 'rogue': known are exact_match, rouge"),
        (lambda place: ["--metrics=,"], "no metric is named"),
        (lambda place: ["--metrics=json"], "answer 1 of those expected is none: 'it is'"),
        (lambda place: ["--metrics=bleu", "--limit=1"], "no expected answer has so many"),
        (lambda place: ["--metrics=rouge", "--min_gain=1"], "add exact_match to --metrics rouge"),
        (lambda place: [str(place / "adapter")], "an adapter is named twice"),
        (_other_base, "one base cannot stand beside both: evaluate them one at a time"),
    ],
)
def test_what_cannot_be_scored_is_refused(adapter, data, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["evaluate", str(data), str(adapter), *arguments(tmp_path), f"--output={tmp_path / 'out.json'}"])
    said = capsys.readouterr()
    assert message in said.err
    assert "the adapter 7/7" not in said.err
    assert not (tmp_path / "out.json").exists()


def test_scores_of_tokens_alone_need_no_answers(adapter, data, capsys):
    main(["evaluate", str(data), str(adapter), "--metrics=token_accuracy"])
    said = capsys.readouterr()
    assert "exact match" not in said.out
    assert "7/7" not in said.err
    assert re.search(r"token accuracy +before +[\d.]+ % \[[\d.]+, [\d.]+\]", said.out)


def test_bad_rows_can_be_left_out(adapter, data, capsys):
    data.write_text(data.read_text() + '{"nothing": "known"}\n')
    arguments = ["evaluate", str(data), str(adapter), "--max_new_tokens=1"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "or --on_bad_rows drop to skip them" in capsys.readouterr().err
    main([*arguments, "--on_bad_rows=drop"])
    assert "on 7 held-out examples" in capsys.readouterr().out


def test_a_loss_that_is_no_number_ends_it_before_anything_is_generated(adapter, data, tmp_path, capsys):
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    options = ["--max_new_tokens=1", f"--output={tmp_path / 'out.json'}", "--other_base=true"]
    with (
        pytest.warns(UserWarning, match="its weights or its config are not the same"),
        pytest.raises(SystemExit) as ended,
    ):
        main(["evaluate", str(data), str(adapter), *options])
    assert ended.value.code != 0
    assert "are not numbers (NaN): are its weights whole?" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_gain_that_is_no_number_is_refused(adapter, data, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(data), str(adapter), "--min_gain=.nan"])
    assert "min_gain must be a finite number" in capsys.readouterr().err


def test_progress_is_lines_in_a_pipe_and_one_line_on_a_terminal(adapter, data, capsys, monkeypatch):
    arguments = ["evaluate", str(data), str(adapter), "--max_new_tokens=1", "--batch_size=3"]
    main(arguments)
    piped = capsys.readouterr()
    assert "\r" not in piped.err + piped.out
    assert piped.err.splitlines() == ["without the adapter 7/7", "with the adapter 7/7"]
    monkeypatch.setattr(TerminalLine, "interval_s", 0.0)
    with terminal(monkeypatch, 80) as screen:
        main(arguments)
    drawn = [re.search(r"with(out)? the adapter (\d)/7", frame) for frame in screen.frames]
    assert [f"{match[1]} {match[2]}" for match in drawn if match] == [
        f"{name} {count}" for name in ("out", None) for count in (3, 6, 7, 7)
    ]
    assert len([row for row in screen.rows if "the adapter " in row]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "hi", "--adapter={adapter}", "--max_new_tokens=1"],
        ["merge", "{adapter}", "{out}"],
        ["export", "{adapter}", "{out}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_verb_draws_into_a_pipe(adapter, tmp_path, capsys, arguments):
    capsys.readouterr()
    main([argument.format(adapter=adapter, out=tmp_path / "out") for argument in arguments])
    said = capsys.readouterr()
    assert "\r" not in said.out + said.err
