"""Several adapters around one base: asked by name, mixed in a batch, compared, talked to; each as if it were alone."""

from __future__ import annotations

import gc
import io
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
from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_base_model, save_adapter, set_adapter
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.merge import disable_lora
from lit_lora.base.trained_on import note
from lit_lora.evaluation import load as loading
from lit_lora.evaluation.chat import Chat
from lit_lora.evaluation.load import Loaded, load_in_turn
from lit_lora.interchange.adapter_naming import named_folders
from tests.chat_tokenizers import KINDS, chat_tokenizer
from tests.started_runs import lit_lora as run
from tests.started_runs import make_base, write_rows

LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LAYERS},
    "other": {"target_modules": ["v_proj", "down_proj"], "r": 4, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rows": {"target_modules": LAYERS, "trainable_token_indices": {"embed_tokens": [97, 101]}},
    "copy": {"target_modules": ["o_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
}
PROMPTS = [
    "say one",
    "tell me something longer than that",
    "why",
    "what is it?",
    "again, please",
    "and now?",
    "so",
    "?",
]


def make_adapter(folder: Path, base: Path, settings: dict[str, Any], *, seed: int, **options: Any) -> Path:
    """An adapter with random values in all that it may change, in the run folder of its name."""
    record = {"format": options.pop("format", "messages")}
    tokenizer = options.pop("tokenizer", None) or chat_tokenizer()
    model = load_base_model(str(base), **options)
    torch.manual_seed(seed)
    inject_lora(model, LoRAConfig(**{"r": 8, "lora_alpha": 16, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    note(model, **record)
    return save_adapter(model, folder / "adapter", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    make_base(folder / "base", attention_bias=True)
    chat_tokenizer().save_pretrained(folder / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        make_adapter(folder / name, folder / "base", settings, seed=seed)
    own = chat_tokenizer(KINDS["text"].template)
    make_adapter(folder / "template", folder / "base", ADAPTERS["linear"], seed=20, tokenizer=own)
    make_adapter(folder / "text", folder / "base", ADAPTERS["linear"], seed=21, format="text")
    write_rows(folder / "data.jsonl", [{"prompt": p, "completion": "it is " + "x" * i} for i, p in enumerate(PROMPTS)])
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    def said(*arguments: object, stdin: str = "") -> tuple[str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        run(*arguments)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return said


def folder_of(place: Path, name: str) -> str:
    return str(place / name / "adapter")


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
def test_each_prompt_is_answered_as_by_its_adapter_alone(batch_size: int, place: Path) -> None:
    """Whatever kind it is, and with the tokenizer, the template and the end that it was trained with."""
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


def test_a_batch_with_an_adapter_for_each_prompt_is_that_of_peft(place: Path) -> None:
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


# ---------------------------------------------------------------------- what cannot be


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


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["runs/a/adapter", "runs/b/adapter"], ["a", "b"]),
        (["x/a/adapter", "y/a/adapter", "y/b"], ["x/a", "y/a", "b"]),
        (["runs/a/adapter", "runs/a/best_adapter"], ["a", "best_adapter"]),
        (["one=runs/a/adapter", "runs/b/adapter"], ["one", "b"]),
        (["b=runs/a/adapter", "runs/b/adapter"], ["b", "runs/b"]),
        (["lr=0.1/adapter", "lr=0.2/adapter"], ["lr=0.1", "lr=0.2"]),
        (["acme/french", "acme/poems"], ["french", "poems"]),
        (["runs/off/adapter"], ["runs/off"]),
        (["adapter/"], ["{here}"]),
        (["a/adapter", "a"], ["adapter", "a"]),
    ],
)
def test_an_adapter_is_called_after_its_run(
    given: list[str], names: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for one in given:
        folder = Path(one if one.startswith("lr=") else one.rpartition("=")[2])
        if folder.parts[0] != "acme":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter_config.json").touch()
    assert list(named_folders(given)) == [name.format(here=tmp_path.name) for name in names]
