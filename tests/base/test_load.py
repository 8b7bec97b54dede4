"""Base models: from a folder, random weights, and folders that are damaged or mean harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_lora.base.load import load_base_model, load_tokenizer, resolve_base, resolve_dtype
from tests.tiny import language_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    language_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "model"))


def _config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _index(file_name):
    def change(folder):
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file_name)}
        (folder / INDEX).write_text(json.dumps(content))

    return change


def _pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _cut(size):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _both(first, second):
    return lambda folder: (first(folder), second(folder))


DAMAGED = [
    ("truncated weights", _cut(5000), "cannot load"),
    ("empty weights", _cut(0), "cannot load"),
    ("oversized header", _write(WEIGHTS, (1 << 62).to_bytes(8, "little") + b"{}"), "cannot load"),
    ("pickle in place of safetensors", _pickle, "pytorch_model.bin may run code when loaded and is not read"),
    ("pickle under a false name", lambda folder: torch.save({"x": torch.ones(2)}, folder / WEIGHTS), "cannot load"),
    ("wrong vocabulary", _config(vocab_size=130), "cannot load|misshapen"),
    ("wrong width", _config(hidden_size=64), "cannot load|misshapen"),
    ("more layers than weights", _config(num_hidden_layers=3), r"missing model\.layers\.2"),
    ("fewer layers than weights", _config(num_hidden_layers=1), r"left over model\.layers\.1"),
    ("wrong type in config", _config(hidden_size="x"), "cannot load"),
    ("nested config", _write("config.json", b"[" * 100000), "cannot load"),
    ("index out of the folder", _index("../good/model.safetensors"), r"points to '\.\./good"),
    ("index to an absolute path", _index("/tmp/model.safetensors"), "points to '/tmp"),
    ("index to a pickle", _index("evil.bin"), "points to 'evil.bin'"),
    ("index to a missing shard", _index("b.safetensors"), "which is not there"),
    ("broken index", _both(_index("a.safetensors"), _write(INDEX, b"{")), "is damaged"),
    ("index of the wrong type", _both(_index("a.safetensors"), _write(INDEX, b"[]")), "is damaged"),
    ("quantization of the wrong type", _config(quantization_config=3), "cannot load"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_a_damaged_folder_is_refused_in_one_line(folder, change, message):
    change(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_base_model(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("base", [str, lambda folder: str(folder / "model.gguf")], ids=["folder", "GGUF"])
def test_an_adapter_beside_the_weights_is_refused(base, folder):
    """transformers would put it on the model, where PEFT is installed, and training would adapt the adapter."""
    torch.manual_seed(0)
    model = peft.get_peft_model(language_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert any("lora_A" in name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for load in (load_base_model, resolve_base):  # the latter is asked before anything long begins
        with pytest.raises(ValueError, match=f"{folder} holds an adapter beside the model.*move adapter_config.json"):
            load(base(folder))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    assert load_base_model(str(folder)).lm_head is not None


def test_the_folder_of_an_adapter_is_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter and no model: give the adapter's base"):
        load_base_model(str(tmp_path))


def test_code_of_a_model_runs_only_when_asked_for(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    _config(model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})(folder)
    with pytest.raises((ValueError, OSError), match=r"trust_remote_code"):
        load_base_model(str(folder))
    assert not ran.exists()


def test_a_good_folder_and_its_shards_load_as_saved(folder):
    expected = language_model()
    for change in (lambda folder: None, _index("a.safetensors")):
        change(folder)
        loaded = load_base_model(str(folder))
        assert loaded.training
        for (name, a), (_, b) in zip(expected.named_parameters(), loaded.named_parameters(), strict=True):
            assert torch.equal(a, b), name


def test_random_weights_depend_on_the_seed_alone(good):
    torch.manual_seed(1)
    first = load_base_model(f"random:{good}")
    torch.manual_seed(2)
    second, other = load_base_model(f"random:{good / 'config.json'}"), load_base_model(f"random:{good}", seed=1)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'"),
        ("./no/such/folder", "no model folder"),
        ("no.gguf", "no GGUF file"),
        ("random:tinyllama-1.1", "did you mean 'tinyllama-1.1b'"),
    ],
)
def test_a_mistyped_base_gets_a_suggestion(base, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_base_model(base)


def test_random_weights_by_name_have_no_tokenizer():
    with pytest.raises(ValueError, match=r"set tokenizer"):
        load_tokenizer("random:llama-2-7b")
    assert load_tokenizer("bytes").eos_token_id is not None


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=str(folder)):
        load_tokenizer(str(folder))


def test_dtypes_by_name():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be"):
        resolve_dtype("int8", torch.device("cpu"))


def test_a_hub_id_is_left_to_the_hub():
    assert resolve_base("someone/some-model") == ("someone/some-model", None)
