"""Layers whose weight a model reads without calling them: an adapter there would not be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from lit_lora import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter
from lit_lora.adapters.direct_reads import direct_reads
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.module_names import named_modules
from tests.tiny import config, language_model

STATE_SPACE = {"state_size": 4, "time_step_rank": 4}
JAMBA = {
    "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1,
}  # fmt: skip
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "attn_layer_indices": [1]}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}
ARCHITECTURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Mamba": (STATE_SPACE, ["dt_proj", "out_proj"]),
    "FalconMamba": (STATE_SPACE, ["dt_proj", "out_proj"]),
    "Mamba2": (MAMBA2, ["out_proj"]),
    "Jamba": (JAMBA, ["dt_proj"]),
    "Bamba": (BAMBA, []),  # reads weights in kernels for CUDA alone
    "Bloom": ({}, []),  # reads weights where pretraining was split over devices, which it was not here
    "Llama": ({}, []),
}
IDS = torch.arange(3, 17).view(2, 7)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:not adapted")
def test_all_linear_names_what_cannot_be_adapted_and_works_without_it(kind, tmp_path):
    """Merged, an adapted Mamba would differ by as much as its outputs are large."""
    sizes, refused = ARCHITECTURES[kind]
    model = language_model(kind, **sizes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if refused:
        with pytest.raises(ValueError, match=rf"exclude_modules: \{str(refused)[:-1]}\]"):
            inject_lora(model, LoRAConfig(r=4))
    assert not list(adapter_modules(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    inject_lora(model, LoRAConfig(r=4, exclude_modules=refused or None, init_lora_weights=False))
    model.train()(IDS).logits.square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    expected = model.eval()(IDS).logits
    save_adapter(model, tmp_path)
    read = language_model(kind, **sizes)
    load_adapter(read, tmp_path)
    merge_lora(model)
    for same in (read, model):
        assert (same(IDS).logits - expected).abs().max() < 1e-4 * expected.abs().max()


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.embed = nn.Embedding(8, 4)


class ByFunction(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(F.linear(x, self.fc.weight, self.fc.bias))


class Transposed(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x @ self.fc.weight.t())


class CalledToo(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) @ self.fc.weight.to(x.dtype)


class InAnotherMethod(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.fc.bias, x, self.fc.weight)


class OfAList(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layers[0].weight


class OfAChild(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner[0].weight


class TiedByHand(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(x.long()) @ self.embed.weight.T


class Inherited(ByFunction):
    pass


class Metadata(Reads):
    """Nothing of this computes with the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fc.weight is None or not isinstance(self.fc.weight, torch.Tensor):
            raise ValueError
        x = x.to(self.fc.weight.dtype).to(self.fc.weight.data.device).view(-1, self.fc.weight.shape[1])
        return self.fc(x)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.fc.weight)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (ByFunction, "fc"),
        (Transposed, "fc"),
        (CalledToo, "fc"),
        (InAnotherMethod, "fc"),
        (OfAList, "layers.0"),
        (OfAChild, "inner.0"),
        (TiedByHand, "embed"),
        (Inherited, "fc"),
    ],
)
def test_any_module_that_reads_a_target_is_refused(kind: Callable[[], nn.Module], target: str):
    model = nn.ModuleDict({"body": kind()})
    with pytest.raises(ValueError, match=rf"body.{target} cannot be adapted: {kind.__name__} reads its weight"):
        inject_lora(model, LoRAConfig(r=2, target_modules=[target]))
    assert not list(adapter_modules(model))
    inject_lora(model, LoRAConfig(r=2, target_modules=["other"]))


class ReadsItsHead(LlamaForCausalLM):
    """Calls the head, and where its config says so also reads it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.config.reads_head:
            output.logits = output.logits + self.lm_head.weight.mean()
        return output


@pytest.mark.parametrize("reads", [True, False])
def test_a_transformers_model_is_run_to_see_which_of_its_paths_it_takes(reads):
    model = ReadsItsHead(config("Llama", reads_head=reads))
    settings = LoRAConfig(r=2, target_modules=["lm_head"])
    if reads:
        with pytest.raises(ValueError, match="lm_head cannot be adapted: ReadsItsHead reads its weight"):
            inject_lora(model, settings)
    else:
        assert list(inject_lora(model, settings).adapted) == ["lm_head"]


class Shared(nn.Module):
    """Not called at one of its two places, as soon as an adapter takes the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.again = self.fc
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.block_again = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_again(self.block(self.again(self.fc(x))))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_layer_that_is_used_in_several_places_is_refused(field):
    model = Shared()
    with pytest.raises(ValueError, match="fc cannot be adapted: the model uses it in several places"):
        inject_lora(model, LoRAConfig(**{"target_modules": ["block.0"], field: ["fc"]}))
    assert not list(adapter_modules(model))
    inject_lora(
        model, LoRAConfig(r=2, target_modules=["block.0"], init_lora_weights=False)
    )  # in a block that is shared
    x = torch.ones(2, 4)
    expected = model(x)
    assert not torch.equal(expected, Shared()(x))
    merge_lora(model)
    assert (model(x) - expected).abs().max() < 1e-5


def test_metadata_of_a_weight_may_be_read():
    model = Metadata()
    inject_lora(model, LoRAConfig(r=2, target_modules=["fc"]))
    assert model(torch.ones(3, 4)).shape == (3, 4)


def test_looking_leaves_modes_and_random_numbers_as_they_were():
    model = language_model("Bloom", hidden_dropout=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    modules = named_modules(model)
    names = [name for name in modules if name.endswith("dense")]
    torch.manual_seed(0)
    assert direct_reads(model, modules, names) == {}
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(()), after)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_encoder_computes_its_adapters_in_evaluation_too(masked):
    """In evaluation it reads the weights of its linear layers, where PEFT then computes without the adapters."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    assert {name.rpartition(".")[2] for name, _ in adapter_modules(model)} == {"linear1", "linear2"}
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = masked
    options = {"src_key_padding_mask": mask}
    kept = ~mask[..., None]
    expected = model.train()(x, **options) * kept
    with torch.no_grad():
        assert (model.eval()(x, **options) * kept - expected).abs().max() < 1e-5
    merge_lora(model)
    with torch.no_grad():
        assert (model(x, **options) * kept - expected).abs().max() < 1e-5
