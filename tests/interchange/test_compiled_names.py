"""A model that ``torch.compile`` or a checkpoint wrapper has wrapped: the same names in every file as without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.demos.boring_classes import RandomDataset
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader

from lit_lora import LoRAConfig, LoRALightningModule, inject_lora, load_adapter, merge_lora, save_adapter
from lit_lora.adapters.layers import adapter_modules
from lit_lora.base.base_hash import base_hash
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.module import LossOutput
from tests.tiny import language_model

# torch 2.13's compiler uses what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
IDS = torch.arange(3, 17).view(2, 7)
FIELDS: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "model.layers.1.mlp.up_proj"],
    "modules_to_save": ["norm", "layers.0.mlp"],
    "layers_to_transform": [0],
    "rank_pattern": {"q_proj": 2},
    "init_lora_weights": False,
}


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def _layers_compiled(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = _compiled(layer)
    return model


def _targets_compiled(model: Any) -> Any:
    model.model.layers[0].self_attn.q_proj = _compiled(model.model.layers[0].self_attn.q_proj)
    model.model.norm = _compiled(model.model.norm)
    model.model.layers[0].mlp.gate_proj = _compiled(model.model.layers[0].mlp.gate_proj)  # inside of a saved one
    return model


def _checkpointed(model: Any) -> Any:
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    return model


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "whole": _compiled,
    "layers": _layers_compiled,
    "targets": _targets_compiled,
    "checkpoint wrapper": _checkpointed,
    "layers and whole": lambda model: _compiled(_layers_compiled(model)),
}


@pytest.fixture
def without_compiling() -> Iterator[None]:
    """Names are what it is about; the checkpoint test below really compiles."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _adapted(wrap: Callable[[Any], Any] = lambda model: model) -> Any:
    model = wrap(language_model())
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(**FIELDS))
    for name, parameter in sorted(model.named_parameters()):
        if ".copy." in name:
            parameter.data.mul_(1.5)
    return model


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.usefixtures("without_compiling")
def test_files_are_those_of_a_plain_model_and_are_read_both_ways(wrap, tmp_path):
    plain, model = _adapted(), _adapted(wrap)
    assert dict(adapter_modules(model)).keys() == dict(adapter_modules(plain)).keys()
    expected = plain(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    for source, folder in ((plain, tmp_path / "plain"), (model, tmp_path / "wrapped")):
        save_adapter(source, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    theirs = peft.PeftModel.from_pretrained(language_model(), tmp_path / "wrapped")
    assert (theirs(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    read = wrap(language_model())
    load_adapter(read, tmp_path / "plain")
    assert torch.equal(read(IDS).logits, expected)
    merge_lora(read)
    assert not list(adapter_modules(read))
    assert (read(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.usefixtures("without_compiling")
def test_what_peft_writes_of_a_compiled_model_is_read(tmp_path):
    model = peft.get_peft_model(
        _compiled(language_model()), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    assert all("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = language_model()
    load_adapter(ours, tmp_path)
    assert torch.equal(ours(IDS).logits, model(IDS).logits)


class Project(LoRALightningModule):
    def __init__(self, compiled: bool) -> None:
        super().__init__("plain", lora=LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
        self.compiled = compiled

    def load_base(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        return _compiled(model) if self.compiled else model

    def on_train_start(self) -> None:
        super().on_train_start()
        self.at_start = {name: p.detach().clone() for name, p in self.trainable_parameters().items()}

    def compute_loss(self, batch: Any, *, accuracy: bool = False) -> LossOutput:
        return LossOutput(self(batch).square().sum(), len(batch))


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_a_compiled_model_goes_on_uncompiled_and_the_reverse(first, tmp_path):
    def fit(compiled: bool, steps: int, ckpt_path: Any = None) -> Project:
        module = Project(compiled)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(accelerator="cpu", max_steps=steps, enable_model_summary=False, **quiet)
        trainer.fit(module, DataLoader(RandomDataset(4, 64), batch_size=4), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    module = fit(first, 3)
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert saved["state_dict"].keys() == module.trainable_parameters().keys()
    assert not any("_orig_mod" in name for name in saved["state_dict"])
    assert "_orig_mod" not in json.dumps(saved["lit_lora"]["settings"])
    resumed = fit(not first, 6, tmp_path / "last.ckpt")
    assert resumed.model is not None
    assert module.model is not None
    assert base_hash(resumed.model).value == base_hash(module.model).value
    before, after = module.trainable_parameters(), resumed.trainable_parameters()
    assert before.keys() == after.keys()
    assert all(torch.equal(resumed.at_start[name], before[name]) for name in before)
    assert all(not torch.equal(after[name], before[name]) for name in before)
