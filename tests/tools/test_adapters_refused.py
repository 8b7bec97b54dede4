"""Adapters that cannot share a base, or be asked as it was meant: said before anything is answered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from lit_lora import QuantizationConfig
from tests.chat_tokenizers import chat_tokenizer
from tests.several_adapters import ADAPTERS, folder_of, make_adapter, make_place
from tests.started_runs import make_base, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("several"))


def _other_base(place: Path, to: Path) -> str:
    make_base(to / "base", attention_bias=True, num_hidden_layers=1)
    return str(make_adapter(to / "one_layer", to / "base", ADAPTERS["linear"], seed=1))


def _of_peft_on_another(place: Path, to: Path) -> str:
    make_base(to / "base", attention_bias=True, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(to / "base")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(str(to / "peft"))
    return str(to / "peft")


def _in_bits(place: Path, to: Path) -> str:
    quantization = QuantizationConfig(bits=4, block_size=32)
    options = {"quantization": quantization}
    return str(make_adapter(to / "bits", place / "base", ADAPTERS["linear"], seed=1, **options))


def _in_half(place: Path, to: Path) -> str:
    return str(make_adapter(to / "half", place / "base", ADAPTERS["linear"], seed=1, dtype="bfloat16"))


def _with_another_tokenizer(place: Path, to: Path) -> str:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["brown"])
    return str(make_adapter(to / "brown", place / "base", ADAPTERS["linear"], seed=1, tokenizer=tokenizer))


def _damaged(place: Path, to: Path) -> str:
    shutil.copytree(place / "other", to / "damaged")
    weights = to / "damaged" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    return str(weights.parent)


REFUSED: dict[str, tuple[Callable[[Path, Path], str], str]] = {
    "twice": (lambda place, to: folder_of(place, "linear"), "an adapter is named twice"),
    "twice, written differently": (
        lambda place, to: str(place / "other" / ".." / "linear" / "adapter") + "/", "an adapter is named twice"),
    "a run folder": (lambda place, to: str(place / "other"), "did you mean"),
    "no folder": (lambda place, to: str(place / "othr" / "adapter"), "no adapter in"),
    "a model": (lambda place, to: str(place / "base"), "it holds a model; a base is given as --base"),
    "another base": (_other_base, "them one at a time"),
    "another base, of PEFT": (_of_peft_on_another, "them one at a time"),
    "quantized": (_in_bits, "(quantization: none and 4 bits)"),
    "another dtype": (_in_half, "(dtype: float32 and bfloat16), so one base cannot stand beside both: --dtype"),
    "damaged": (_damaged, "checksum"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["evaluate", "chat"])
@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_cannot_share_a_base_are_refused_before_anything_is_answered(
    verb: str, what: str, place: Path, tmp_path: Path, said: Callable[..., tuple[str, str]], capsys: Any
) -> None:
    make, message = REFUSED[what]
    first, second = folder_of(place, "linear"), make(place, tmp_path)
    arguments: dict[str, list[object]] = {
        "evaluate": [place / "data.jsonl", first, second],
        "chat": ["--adapter", first, second],
    }
    with pytest.raises(SystemExit):
        said(verb, *arguments[verb], "--max_new_tokens=1", stdin="why\n")
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(("make", "what"), [(_with_another_tokenizer, "tokenizer"), (None, "chat template")])
def test_scores_are_compared_in_the_same_tokens_only(
    make: Any, what: str, place: Path, tmp_path: Path, said: Any, capsys: Any
) -> None:
    other = make(place, tmp_path) if make else folder_of(place, "template")
    arguments = ["evaluate", place / "data.jsonl", folder_of(place, "linear"), other, "--max_new_tokens=1"]
    with pytest.raises(SystemExit):
        said(*arguments)
    captured = capsys.readouterr()
    assert f"({what}: " in captured.err
    assert "--tokenizer sets one for all" in captured.err


def test_what_differs_can_be_set_for_all(place: Path, tmp_path: Path, said: Callable[..., tuple[str, str]]) -> None:
    other = _in_half(place, tmp_path)
    out, _ = said("generate", "so", "--adapter", folder_of(place, "linear"), "--adapter", other, "--dtype=float32",
                  "--max_new_tokens=2")  # fmt: skip
    assert "--- linear" in out
    assert "--- half" in out


ROWS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "why", "adapter": "linaer"}, "prompts.jsonl:2: no adapter 'linaer': did you mean 'linear'?"),
    ({"prompt": "why", "adapter": 3}, "no adapter 3: there are linear, other, and null for the base alone"),
    ({"prompt": "why"}, "no field 'adapter': name one of linear, other, or null for the base alone"),
    ({"question": "why", "adapter": "other"}, "no field 'prompt' or 'messages', got ['adapter', 'question']"),
    ({"prompt": " ", "adapter": "other"}, "the prompt is ' ', expected a text"),
    ({"messages": [{"content": "why"}], "adapter": "other"}, "expected a text, or turns"),
]


@pytest.mark.parametrize(("row", "message"), ROWS)
def test_a_row_that_cannot_be_asked_is_named(
    row: dict[str, Any], message: str, place: Path, tmp_path: Path, said: Any, capsys: Any
) -> None:
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "so", "adapter": "linear"}, row])
    with pytest.raises(SystemExit):
        said("generate", file, "--adapter", folder_of(place, "linear"), "--adapter", folder_of(place, "other"))
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere.jsonl"], "no data file at nowhere.jsonl"),
        (["generate", "{data}", "--compare"], "--compare is for one prompt"),
        (["generate", "{data}", "--system", "x"], "--system is for one prompt"),
        (["generate", "why", "--output", "x.jsonl"], "--output is for a file of prompts"),
        (["generate", "why", "--batch_size", "2"], "--batch_size is for a file of prompts"),
        (["generate", "{data}", "--batch_size", "0"], "batch_size must be at least 1"),
        (["chat", "--adapter", "off={linear}"], "'off' cannot be the name of an adapter"),
        (["chat", "--adapter", "a={other}"], "two adapters are called 'a'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    arguments: list[str], message: str, place: Path, said: Any, capsys: Any
) -> None:
    words = {"data": place / "data.jsonl", "linear": folder_of(place, "other"), "other": folder_of(place, "other")}
    given = [argument.format(**words) for argument in arguments]
    with pytest.raises(SystemExit):
        said(*given, "--adapter", f"a={folder_of(place, 'linear')}")
    assert message in capsys.readouterr().err
