"""Several adapters around one base: asked by name, mixed in a batch, compared, talked to; each as if it were alone."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import lit_lora
from lit_lora import QuantizationConfig, load_base_model, set_adapter
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.merge import disable_lora
from lit_lora.evaluation import load as loading
from lit_lora.evaluation.chat import Chat
from lit_lora.evaluation.load import Loaded, load_in_turn
from lit_lora.language_model import generation
from tests.chat_tokenizers import chat_tokenizer
from tests.several_adapters import ADAPTERS, PROMPTS, folder_of, make_place
from tests.started_runs import write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("several"))


@cache
def by_itself(place: Path, name: str) -> Loaded:
    return lit_lora.load(folder_of(place, name))


@cache
def alone(place: Path, name: str | None, prompt: str) -> str:
    """What an adapter answers that is by itself on its base; the base alone is asked as the linear one."""
    loaded = by_itself(place, name or "linear")
    with disable_lora(loaded.model) if name is None else nullcontext():
        return lit_lora.generate(loaded, prompt, max_new_tokens=8)[0].text


# ---------------------------------------------------------------------- generate


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("full", [True, False], ids=["in turn", "in one batch"])
def test_each_prompt_is_answered_as_by_its_adapter_alone(
    full: bool, batch_size: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kind it is, and with the tokenizer, the template and the end that it was trained with."""
    if not full:
        monkeypatch.setattr(generation, "can_be_kept_full", lambda model: False)
    names = ["linear", "text", None, "template", "dora", "rows", "biases", "other"]
    loaded = lit_lora.load([folder_of(place, name) for name in names if name])
    found = lit_lora.generate(loaded, PROMPTS, adapter_names=names, max_new_tokens=8, batch_size=batch_size)
    texts = [completion.text for completion in found]
    assert texts == [alone(place, name, prompt) for name, prompt in zip(names, PROMPTS, strict=True)]
    assert lit_lora.active_adapters(loaded.model) == ["linear"]
    if batch_size == 16:
        one = [lit_lora.generate(loaded, "why", adapter_names=n or "__base__", max_new_tokens=8)[0].text for n in names]
        assert one == [alone(place, name, "why") for name in names]
        assert len({*one}) >= 6, "the adapters matter"


def test_a_batch_with_an_adapter_for_each_prompt_is_that_of_peft(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "can_be_kept_full", lambda model: False)
    names = ["linear", "__base__", "other"]
    loaded = lit_lora.load({name: folder_of(place, name) for name in ("linear", "other")})
    found = lit_lora.generate(loaded, PROMPTS[:3], adapter_names=names, max_new_tokens=8)
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    theirs = peft.PeftModel.from_pretrained(base, folder_of(place, "linear"), "linear")
    theirs.load_adapter(folder_of(place, "other"), "other")
    tokenizer = chat_tokenizer()
    tokenizer.padding_side = "left"
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    ids = theirs.generate(**inputs, adapter_names=names, max_new_tokens=8, do_sample=False)
    written = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [completion.text for completion in found] == written


def test_names_are_checked_before_anything_is_written(place: Path) -> None:
    loaded = lit_lora.load([folder_of(place, "linear"), folder_of(place, "other")])
    with pytest.raises(ValueError, match=r"no adapter 'othr'; there are 'linear', 'other': did you mean 'other'\?"):
        lit_lora.generate(loaded, PROMPTS[:2], adapter_names=["linear", "othr"])
    with pytest.raises(ValueError, match="adapter_names has 1 names for 2 prompts"):
        lit_lora.generate(loaded, PROMPTS[:2], adapter_names=["linear"])


def test_the_active_adapter_is_asked_as_it_was_trained(place: Path) -> None:
    loaded = lit_lora.load([folder_of(place, "linear"), folder_of(place, "text")])
    set_adapter(loaded.model, "text")
    assert lit_lora.generate(loaded, "why", max_new_tokens=8)[0].text == alone(place, "text", "why")


def test_the_verb_shows_what_each_answers(place: Path, said: Callable[..., tuple[str, str]]) -> None:
    folders = ["--adapter", f"a={folder_of(place, 'linear')}", "--adapter", folder_of(place, "other")]
    expected = [alone(place, name, "why") for name in (None, "linear", "other")]
    for stream in ("true", "false"):
        out, _ = said("generate", "why", *folders, "--compare", "--max_new_tokens=8", f"--stream={stream}")
        base, first, second = expected
        assert out == f"--- without an adapter\n{base}\n--- a\n{first}\n--- other\n{second}\n"


def test_rows_of_a_file_name_their_adapters(place: Path, tmp_path: Path, said: Callable[..., tuple[str, str]]) -> None:
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "say one", "adapter": "linear"}, {"messages": turns, "adapter": "other"},
        {"prompt": "so", "adapter": None}, {"prompt": "why", "adapter": "__base__"}, {"prompt": "?", "adapter": "text"},
    ]  # fmt: skip
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    folders = [word for name in ("linear", "other", "text") for word in ("--adapter", folder_of(place, name))]
    out, err = said("generate", file, *folders, "--max_new_tokens=8")
    answers = [json.loads(line) for line in out.splitlines()]
    asked = [("linear", "say one"), ("other", "why"), (None, "so"), (None, "why"), ("text", "?")]
    assert [(a["adapter"], a["completion"]) for a in answers] == [(name, alone(place, name, p)) for name, p in asked]
    assert "answered 5/5" in err
    assert said("generate", file, *folders, "--max_new_tokens=8", "--output", tmp_path / "out" / "a.jsonl")[0] == ""
    assert (tmp_path / "out" / "a.jsonl").read_text() == out
    unnamed = write_rows(tmp_path / "unnamed.jsonl", [{"prompt": "why"}])
    (one,) = said("generate", unnamed, "--adapter", folder_of(place, "other"), "--max_new_tokens=8")[0].splitlines()
    assert json.loads(one)["completion"] == alone(place, "other", "why")


# ---------------------------------------------------------------------- evaluate


def test_scores_of_many_adapters_are_those_of_each_alone_and_the_base_is_loaded_once(
    place: Path, tmp_path: Path, said: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [folder_of(place, name) for name in ("linear", "dora", "biases")]
    shared = [
        "--max_new_tokens=4",
        "--limit=3",
        "--metrics=exact_match,perplexity",
        f"--output={tmp_path / 'scores.json'}",
    ]
    one_by_one = {}
    for name in names:
        said("evaluate", place / "data.jsonl", name, *shared)
        one_by_one[name] = json.loads((tmp_path / "scores.json").read_text())
    assert len({scores["mean_loss"]["after"] for scores in one_by_one.values()}) == len(names)
    num_loaded = 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal num_loaded
        num_loaded += 1
        return load_base_model(*arguments, **options)

    monkeypatch.setattr(loading, "load_base_model", counting)
    said("evaluate", place / "data.jsonl", *names, *shared)
    assert json.loads((tmp_path / "scores.json").read_text()) == {"adapters": one_by_one}
    assert num_loaded == 1


@pytest.mark.parametrize("quantization", [None, QuantizationConfig(bits=4, block_size=32)])
def test_an_adapter_in_turn_computes_what_it_does_alone_and_leaves_nothing(
    quantization: QuantizationConfig | None, place: Path
) -> None:
    ids = torch.arange(24).view(2, 12) + 3
    folders = {name: folder_of(place, name) for name in ADAPTERS}
    take = load_in_turn(folders, quantization=quantization)
    held: list[weakref.ref[torch.nn.Module]] = []
    for name in [*folders, "linear"]:
        loaded = take(name)
        gc.collect()
        assert not [module for module in held if module() is not None], "memory grows with the adapters"
        held = [weakref.ref(module) for _, module in adapter_modules(loaded.model)]
        own = (
            by_itself(place, name) if quantization is None else lit_lora.load(folders[name], quantization=quantization)
        )
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, own.model(ids).logits), name


def test_tokens_that_an_adapter_adds_are_gone_with_it(place: Path, tmp_path: Path) -> None:
    """PEFT writes the whole embedding then, which only fits a base without these rows."""
    ids = torch.arange(24).view(2, 12) + 3
    folders = {}
    for seed, name in enumerate(("first", "second")):
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(base.config.vocab_size + 2 + seed, mean_resizing=False)
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(str(tmp_path / name), save_embedding_layers=True)
        chat_tokenizer().save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    take = load_in_turn(folders, base=str(place / "base"))
    for name in ("first", "second", "first"):
        with torch.no_grad():
            expected = lit_lora.load(folders[name], base=str(place / "base")).model(ids).logits
            assert torch.equal(take(name).model(ids).logits, expected)


# ---------------------------------------------------------------------- chat


def test_a_conversation_goes_on_with_another_adapter(place: Path, said: Callable[..., tuple[str, str]]) -> None:
    folders = ["--adapter", folder_of(place, "linear"), f"t={folder_of(place, 'template')}", "--max_new_tokens=8"]
    turns = [
        "say one",
        "/adapter t",
        "why",
        "/adapter off",
        "so",
        "/adapter on",
        "?",
        "/adapter",
        "/adapter linear",
        ".",
    ]
    out, err = said("chat", *folders, "--stream=false", stdin="".join(turn + "\n" for turn in turns))
    loaded = lit_lora.load({"linear": folder_of(place, "linear"), "t": folder_of(place, "template")})
    chat = Chat(loaded, sampling={"max_new_tokens": 8})
    answers = []
    for text, who in (("say one", "linear"), ("why", "t"), ("so", None), ("?", "t"), (".", "linear")):
        before = [*chat.messages, {"role": "user", "content": text}]
        chat.switch(who)
        answers.append(chat.say(text).text)
        own = by_itself(place, "template" if who == "t" else "linear")
        with disable_lora(own.model) if who is None else nullcontext():
            assert lit_lora.generate(own, before, format="chat", max_new_tokens=8)[0].text == answers[-1]
    assert out == "".join(answer + "\n" for answer in answers)
    assert "linear answers; /adapter NAME switches to another of linear, t" in err
    assert "  linear\n> t\n  off: the base alone\n" in err
    assert "the adapter is on: t" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter linaer", "no adapter 'linaer'; there are 'linear', 'other': did you mean 'linear'?"),
        ("/adapter french", "/adapter takes NAME, on or off: no adapter 'french'; there are 'linear', 'other'"),
    ],
)
def test_a_name_that_no_adapter_has_ends_no_conversation(line: str, message: str, place: Path, said: Any) -> None:
    folders = ["--adapter", folder_of(place, "linear"), "--adapter", folder_of(place, "other"), "--max_new_tokens=4"]
    out, err = said("chat", *folders, stdin=f"{line}\nwhy\n")
    assert message in err
    assert out == lit_lora.generate(by_itself(place, "linear"), "why", max_new_tokens=4)[0].text + "\n"


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_run_may_have_an_equals_sign_in_its_name(verb: str, place: Path, said: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "linear", tmp_path / "02,r=8")
    prompt = ["why"] if verb == "generate" else []
    out, _ = said(verb, *prompt, "--adapter", folder / "adapter", "--max_new_tokens=4", "--stream=false", stdin="why\n")
    assert out == lit_lora.generate(by_itself(place, "linear"), "why", max_new_tokens=4)[0].text + "\n"
