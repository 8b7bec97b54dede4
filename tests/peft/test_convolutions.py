"""Convolutions of a module of one's own, beside PEFT: values, gradients, files, merged and taken out again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lit_lora import (
    LoRAConfig,
    LoRALightningModule,
    hotswap_adapter,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from lit_lora.adapters.layers import adapter_modules
from lit_lora.interchange.peft_format import adapter_state_dict
from lit_lora.module import LossOutput

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor:UserWarning"),  # its own lora_B.bias
]
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Convolved(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, dims: int, **fields: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind: Any = KINDS[dims]
        self.dims = dims
        self.first = kind(4, 8, **{"kernel_size": 3, **fields})
        self.second = kind(8, 4, 2 if dims == 3 else 1)  # a kernel of one in 3d is what PEFT (0.21) fails to merge
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).flatten(2).mean(2))


def _input(dims: int) -> torch.Tensor:
    return torch.randn(5, 4, *[7] * dims, generator=torch.Generator().manual_seed(1))


# dimensions, of the convolution, of the adapter, why it is not merged
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "1d": (1, {}, {}, ""),
    "2d": (2, {}, {}, ""),
    "3d": (3, {}, {}, ""),
    "stride and padding": (2, {"stride": 2, "padding": 1, "kernel_size": (3, 2)}, {}, ""),
    "same size": (1, {"padding": "same", "bias": False}, {}, ""),
    "dilation of a kernel of one": (2, {"kernel_size": 1, "dilation": 2}, {}, ""),
    "rsLoRA": (2, {"stride": 2}, {"use_rslora": True, "rank_pattern": {"first": 2}}, ""),
    "gaussian": (2, {}, {"init_lora_weights": "gaussian"}, ""),
    "lora_bias": (2, {"stride": 2}, {"lora_bias": True}, ""),
    "biases": (1, {}, {"bias": "lora_only"}, ""),
    "DoRA, 1d": (1, {"stride": 2}, {"use_dora": True}, ""),
    "DoRA, 2d": (2, {"padding": 1, "bias": False}, {"use_dora": True, "use_rslora": True}, ""),
    "DoRA, 3d": (3, {}, {"use_dora": True}, ""),
    "beside a linear layer": (2, {}, {"target_modules": ["first", "head"], "use_dora": True}, ""),
    "saved head": (2, {}, {"modules_to_save": ["head"]}, ""),
    "groups": (2, {"groups": 2}, {}, "reads the inputs of all groups"),
    "one group for each channel": (1, {"groups": 4}, {"lora_bias": True}, "reads the inputs of all groups"),
    "padded by reflection": (2, {"padding": 1, "padding_mode": "reflect"}, {}, "neither dilation nor another padding"),
    "dilation": (2, {"padding": "same", "dilation": 2}, {}, "neither dilation nor another padding"),
}
each_case = pytest.mark.parametrize(("dims", "layer", "fields", "unmergeable"), CASES.values(), ids=CASES)


def _equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _theirs(dims: int, layer: dict[str, Any], fields: dict[str, Any]) -> Any:
    start = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": False, **fields}
    torch.manual_seed(2)
    return _moved(peft.get_peft_model(Convolved(dims, **layer), peft.LoraConfig(**start)))  # type: ignore[arg-type]


def _ours(dims: int, layer: dict[str, Any], fields: dict[str, Any]) -> Any:
    model = Convolved(dims, **layer)
    start = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": False, **fields}
    torch.manual_seed(3)
    inject_lora(model, LoRAConfig(**start))
    return _moved(model)


def _moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@each_case
def test_what_peft_writes_is_read_with_the_same_values_gradients_and_tensors(
    dims, layer, fields, unmergeable, tmp_path
):
    theirs, x = _theirs(dims, layer, fields), _input(dims)
    theirs.save_pretrained(tmp_path)
    ours = Convolved(dims, **layer)
    load_adapter(ours, tmp_path, trainable=True)
    _equal(ours(x), theirs(x))
    for model in (ours, theirs):
        model(x).square().sum().backward()
    expected = {
        name.removeprefix("base_model.model.")
        .replace("magnitude_vector.default.weight", "magnitude_vector")
        .replace(".default", "")
        .replace(".modules_to_save", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    got = {n.replace(".copy.", "."): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() == adapter_state_dict(ours).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)


@each_case
def test_peft_reads_what_we_write(dims, layer, fields, unmergeable, tmp_path):
    ours, x = _ours(dims, layer, fields), _input(dims)
    save_adapter(ours, tmp_path)
    _equal(peft.PeftModel.from_pretrained(Convolved(dims, **layer), tmp_path)(x), ours(x))  # type: ignore[arg-type]


@each_case
def test_it_is_merged_as_peft_does_and_taken_out_again(dims, layer, fields, unmergeable, tmp_path):
    theirs, x = _theirs(dims, layer, fields), _input(dims)
    theirs.save_pretrained(tmp_path)
    ours = Convolved(dims, **layer)
    load_adapter(ours, tmp_path)
    before = ours(x)
    if unmergeable:
        with pytest.raises(ValueError, match=f"cannot merge into first: .*{unmergeable}"):
            merge_lora(ours)
        assert torch.equal(ours(x), before)
        if layer.get("groups"):
            with pytest.raises(NotImplementedError, match="groups > 1"):
                theirs.merge_and_unload()
        else:  # PEFT merges into another function
            assert not torch.allclose(copy.deepcopy(theirs).merge_and_unload()(x), theirs(x), atol=1e-2)
        return
    merge_lora(ours, unload=False)
    _equal(ours(x), before)
    unmerge_lora(ours)
    assert torch.equal(ours(x), before)
    merge_lora(ours)
    assert not list(adapter_modules(ours))
    _equal(ours(x), theirs.merge_and_unload()(x))


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_it_starts_as_the_base_with_the_spread_of_peft(start):
    fields = {"r": 16, "init_lora_weights": start}
    model, x = Convolved(2), _input(2)
    expected = model(x)
    inject_lora(model, LoRAConfig(target_modules=["first"], **fields))
    assert torch.equal(model(x), expected)
    theirs = peft.get_peft_model(Convolved(2), peft.LoraConfig(target_modules=["first"], **fields))
    theirs_A = theirs.get_parameter("base_model.model.first.lora_A.default.weight")
    assert model.get_parameter("first.lora_A.weight").std().item() == pytest.approx(theirs_A.std().item(), rel=0.2)


def test_dropout_falls_on_what_the_adapter_sees_as_in_peft(tmp_path):
    for dora in (False, True):
        theirs, x = _theirs(2, {}, {"lora_dropout": 0.4, "use_dora": dora}), _input(2)
        theirs.save_pretrained(tmp_path)
        ours = Convolved(2)
        load_adapter(ours, tmp_path, trainable=True)
        outputs = []
        for model in (ours.train(), theirs.train()):
            torch.manual_seed(5)
            outputs.append(model(x))
        _equal(*outputs)


REFUSED = {
    "dilation": ({"dilation": 2}, {}, "dilation is unknown to PEFT's adapter, whose output then has another size"),
    "a rank that is none of its groups": ({"groups": 4}, {"r": 2}, "rank 2 has to be a multiple of its 4 groups"),
    "DoRA of groups": ({"groups": 2}, {"use_dora": True}, "a weight that a grouped convolution does not have"),
    "a start of linear layers": ({}, {"init_lora_weights": "pissa"}, "'pissa' is for linear layers, and first is none"),
    "orthogonal": ({}, {"init_lora_weights": "orthogonal"}, "'orthogonal' is for linear layers, and first is none"),
}


@pytest.mark.parametrize(("layer", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_compute_is_refused_by_name(layer, fields, message):
    model, names = Convolved(2, **layer), {"r": 4, "target_modules": ["first"], "init_lora_weights": False, **fields}
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**names))
    assert not list(adapter_modules(model))
    if "pissa" in message:
        return  # PEFT fails on the shapes, or adapts another weight
    with pytest.raises((ValueError, RuntimeError, AssertionError, NotImplementedError)):
        _merge_with_peft(layer, names)


def _merge_with_peft(layer: dict[str, Any], names: dict[str, Any]) -> None:
    theirs: Any = peft.get_peft_model(Convolved(2, **layer), peft.LoraConfig(**names))  # type: ignore[arg-type]
    x = _input(2)
    _equal(copy.deepcopy(theirs).merge_and_unload()(x), theirs(x))


def test_a_class_that_does_more_than_convolve_is_refused():
    class Standardized(nn.Conv2d):
        def forward(self, input):
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Standardized(4, 4, 3))
    with pytest.raises(ValueError, match=r"type Standardized, which cannot be adapted; .*nn\.Conv2d"):
        inject_lora(model, LoRAConfig(target_modules=["0"]))


def test_several_are_added_up_and_exchanged_and_a_portable_form_is_refused(tmp_path):
    one, two, x = _ours(2, {}, {}), _ours(2, {}, {"lora_alpha": 3}), _input(2)
    for name, model in (("one", one), ("two", two)):
        save_adapter(model, tmp_path / name)
    both = Convolved(2)
    for name in ("one", "two"):
        load_adapter(both, tmp_path / name, name=name)
    set_adapter(both, "two")
    _equal(both(x), two(x))
    set_adapter(both, ["one", "two"])
    assert not torch.allclose(both(x), two(x), atol=1e-3)
    hotswap_adapter(one, tmp_path / "two")
    _equal(one(x), two(x))
    with pytest.raises(ValueError, match="no portable form: first is a Conv2d"):
        save_adapter(two, tmp_path / "portable", portable=True)


class _Pictures(LoRALightningModule):
    def load_base(self) -> nn.Module:
        return Convolved(2)

    def compute_loss(self, batch: Any, *, accuracy: bool = False) -> LossOutput:
        x, target = batch
        return LossOutput(nn.functional.cross_entropy(self.forward(x), target, reduction="sum"), len(target), None)


def test_a_module_of_ones_own_learns_through_the_hooks(tmp_path: Path):
    x = _input(2)
    data = [(row, index % 3) for index, row in enumerate(x)]
    module = _Pictures("", lora=LoRAConfig(r=4, target_modules=["first", "second"]))
    trainer = Trainer(
        max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module.configure_model()
    model: Any = module.model
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    targets = torch.tensor([index for _, index in data])
    before = nn.functional.cross_entropy(model(x), targets).item()
    trainer.fit(module, DataLoader(data, batch_size=5))  # type: ignore[arg-type]
    assert nn.functional.cross_entropy(model(x), targets).item() < before
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
    save_adapter(model, tmp_path / "adapter")
    _equal(peft.PeftModel.from_pretrained(Convolved(2), tmp_path / "adapter")(x), model(x))  # type: ignore[arg-type]
