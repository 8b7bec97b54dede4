"""A base on the Hub is pinned: weights and tokenizer of the revision that was trained on, by every verb."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_lora import load_adapter, load_base_model
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.evaluation.load import load
from tests.chat_tokenizers import CHATML, KINDS
from tests.started_runs import fit, lit_lora, make_base, questions

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

OLD, NEW = "a" * 40, "b" * 40
IDS = torch.arange(3, 24).view(3, 7)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The Hub's cache, offline, with a model of two revisions: other weights, another template."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    folder = tmp_path / "hub" / "models--acme--tiny"
    make_base(folder / "snapshots" / OLD, CHATML)
    make_base(folder / "snapshots" / NEW, KINDS["end of sequence"].template, initializer_range=0.3)
    (folder / "refs").mkdir()
    for name, commit in (("v1", OLD), ("main", NEW)):
        (folder / "refs" / name).write_text(commit)
    questions(tmp_path / "data.jsonl")
    return folder


def _train(tmp_path: Path, **options: object) -> Path:
    return fit("acme/tiny", str(tmp_path / "data.jsonl"), tmp_path / "run", max_steps=2, **options)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def _expected(adapter: Path, snapshot: Path) -> torch.Tensor:
    model = load_base_model(str(snapshot))
    load_adapter(model, adapter)
    return _logits(model)


@pytest.mark.parametrize(
    ("given", "commit", "recorded"), [("v1", OLD, "v1"), (None, NEW, NEW), (OLD, OLD, OLD)], ids=str
)
def test_the_revision_of_training_is_used_by_every_verb(given, commit, recorded, hub, tmp_path, capsys):
    adapter = _train(tmp_path, **({"model__revision": given} if given else {}))
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == recorded
    template = (hub / "snapshots" / commit / "chat_template.jinja").read_text()
    assert (adapter / "chat_template.jinja").read_text() == template  # the tokenizer is pinned too
    if given is None:
        (hub / "refs" / "main").write_text(OLD)  # the model on the Hub moves on
    expected = _expected(adapter, hub / "snapshots" / commit)
    for path in (*adapter.glob("token*"), adapter / "chat_template.jinja"):
        path.unlink()  # so that the base's is asked
    model, tokenizer, _ = load(str(adapter))
    assert torch.equal(_logits(model), expected)
    assert tokenizer.chat_template == template
    lit_lora("merge", adapter, tmp_path / "merged", num_samples=1)
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == (turn_end(tokenizer).ids, tokenizer.pad_token_id)
    assert not written.get("_from_model_config")
    lit_lora("export", adapter, tmp_path / "exported")
    exported = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert exported["revision"] == recorded
    lit_lora("export", next((tmp_path / "run" / "checkpoints").glob("*.ckpt")), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["revision"] == recorded


@pytest.mark.filterwarnings("ignore:the adapter in .* was trained on")  # the other of two warnings
def test_another_revision_is_named_and_has_other_weights(hub, tmp_path):
    adapter = str(_train(tmp_path, model__revision="v1"))
    other = str(hub / "snapshots" / NEW)
    named = "was trained on revision v1, and is put on main"
    for base, revision, warning in ((None, "main", named), (other, None, "its weights or its config are not the same")):
        with pytest.warns(UserWarning, match=warning):
            model, _, _ = load(adapter, base=base, revision=revision, other_base=True)
        assert torch.equal(_logits(model), _expected(Path(adapter), Path(other)))
    with (
        pytest.raises(ValueError, match="its weights or its config are not the same"),
        pytest.warns(UserWarning, match=named),
    ):
        load(adapter, revision="main")


def test_an_adapter_on_the_hub_is_run_as_it_was_trained(hub, tmp_path, capsys):
    adapter = _train(tmp_path, model__revision="v1", model__dtype="bfloat16")
    folder = hub.parent / "models--acme--adapter"
    shutil.copytree(adapter, folder / "snapshots" / OLD)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(OLD)
    model, tokenizer, record = load("acme/adapter")
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template == CHATML
    assert record.revision == "v1"
    lit_lora("evaluate", tmp_path / "data.jsonl", "acme/adapter", max_new_tokens=1)
    assert "exact match on 4" in capsys.readouterr().out
