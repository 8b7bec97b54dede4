"""Fused experts in 4 and 8 bits compute, train and merge as those of the dequantized weights."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, merge_lora
from lit_lora.adapters.layers import lora_layers
from lit_lora.base import expert_codes
from lit_lora.base.load import load_base_model
from lit_lora.base.quantize import dequantize_, quantize_
from lit_lora.base.quantized_experts import QuantizedExperts
from lit_lora.base.shards import held_bytes
from lit_lora.memory.traced_step import StepSettings, trace_step
from lit_lora.rewrites.routed_experts import check_routed_experts
from tests.adapters.test_routed_memory import Largest
from tests.tiny import language_model

pytestmark = pytest.mark.filterwarnings("ignore:not adapted")

IDS = torch.arange(3, 24).view(3, 7)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "hidden_size": 64, "intermediate_size": 128},
    "Qwen3Moe": {
        "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 16, "hidden_size": 64,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 16, "hidden_size": 64, "intermediate_size": 64},
}  # fmt: skip
WAYS = ["grouped_mm", "batched_mm", "eager"]
QUANTIZATIONS = {
    "nf4": QuantizationConfig(),
    "fp4 in blocks of 32": QuantizationConfig(quant_type="fp4", double_quant=False, block_size=32),
    "int8": QuantizationConfig(bits=8),
}
each_mixture = pytest.mark.parametrize("kind", MIXTURES)
each_way = pytest.mark.parametrize("way", WAYS)
each_quantization = pytest.mark.parametrize("name", QUANTIZATIONS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each mixture, with the tensors that its files have on the Hub: one of each expert."""
    folders = {}
    for kind, sizes in MIXTURES.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        language_model(kind, std=0.1, **sizes).save_pretrained(folders[kind])
    return folders


def _loaded(folder: Any, name: str, way: str = "grouped_mm", dtype: str = "float32") -> Any:
    model: Any = load_base_model(str(folder), quantization=QUANTIZATIONS[name], dtype=dtype)
    model.set_experts_implementation(way)
    return model.requires_grad_(False)


def _experts(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if isinstance(parameter, QuantizedExperts)]


def _run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (got - expected).norm() <= tolerance * expected.norm()


@each_mixture
@each_way
@each_quantization
def test_adapted_experts_compute_and_train_as_their_dequantized_weights(saved, kind, way, name):
    model = _loaded(saved[kind], name, way)
    assert len(_experts(model)) == 4
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS))
    for _, layer in lora_layers(model):
        layer.start_at_random()
    assert check_routed_experts(model) == {}
    plain = copy.deepcopy(model)
    dequantize_(plain)
    assert not _experts(plain)
    (got, gradients), (expected, of_plain) = _run(model), _run(plain)
    _close(got, expected)
    assert gradients.keys() == of_plain.keys()
    for key, gradient in gradients.items():
        _close(gradient, of_plain[key], 1e-3)


@each_way
@each_quantization
def test_experts_without_adapters_compute_as_their_dequantized_weights(saved, way, name):
    model = _loaded(saved["Mixtral"], name, way)
    plain = copy.deepcopy(model)
    dequantize_(plain)
    with torch.no_grad():
        _close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@each_mixture
def test_codes_are_those_of_bitsandbytes_expert_by_expert(saved, kind):
    model, plain = _loaded(saved[kind], "nf4"), load_base_model(str(saved[kind]))
    weights = dict(plain.named_parameters())
    quantized = {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedExperts)}
    assert len(quantized) == 4
    for name, parameter in quantized.items():
        for expert, weight in enumerate(weights[name].detach()):
            expected = bnb.functional.dequantize_4bit(
                *bnb.functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
            )
            assert torch.equal(parameter[expert].values(), expected)
            assert torch.equal(parameter[expert] + 0, expected)


def test_blocks_may_run_over_the_ends_of_rows():
    module: Any = MixtralExperts.__new__(MixtralExperts)
    torch.nn.Module.__init__(module)
    module.weight = torch.nn.Parameter(torch.randn(3, 8, 96))
    in_whole_blocks = module.weight.detach().reshape(3, 12, 64)
    expert_codes.quantize_experts_("", module, QuantizationConfig(double_quant=False))
    for expert, weight in enumerate(in_whole_blocks):
        codes, state = bnb.functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
        assert torch.equal(module.weight[expert] + 0, bnb.functional.dequantize_4bit(codes, state).reshape(8, 96))


@pytest.mark.parametrize(("name", "share"), [("nf4", 0.27), ("int8", 0.55)])
def test_what_is_held_of_experts_is_a_quarter_or_half_of_bfloat16(saved, name, share):
    model = _loaded(saved["Mixtral"], name, dtype="bfloat16")
    experts = _experts(model)
    in_bfloat16 = sum(parameter.numel() * 2 for parameter in experts)
    held = sum(tensor.untyped_storage().nbytes() for p in experts for tensor in p.held.tensors.values())
    assert 0 < held <= share * in_bfloat16
    dequantized = copy.deepcopy(model)
    dequantize_(dequantized)
    assert held_bytes(dequantized) - held_bytes(model) >= (1 - share) * in_bfloat16


@each_way
@each_quantization
def test_a_step_keeps_no_values_of_experts_and_makes_one_expert_at_a_time(saved, way, name):
    model = _loaded(saved["Mixtral"], name, way)
    inject_lora(model, LoRAConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    sizes = MIXTURES["Mixtral"]
    of_an_expert = 2 * sizes["hidden_size"] * sizes["intermediate_size"]
    kept: list[torch.Tensor] = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        loss = model(input_ids=IDS).logits.square().mean()
        plain = [tensor for tensor in kept if not isinstance(tensor, QuantizedExperts)]
        loss.backward()
    assert any(isinstance(tensor, QuantizedExperts) for tensor in kept)
    assert max(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in plain) < of_an_expert
    assert largest.numbers <= 2 * of_an_expert  # bytes of tables that look two values up count for more numbers


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_each_parameter_is_quantized_before_the_next_one_is_read(saved, name, monkeypatch):
    alive: list[int] = []
    weights: list[weakref.ref[torch.UntypedStorage]] = []
    quantized = expert_codes._quantized

    def counted(parameter: torch.nn.Parameter, *others: Any) -> torch.nn.Parameter:
        alive.append(sum(weight() is not None for weight in weights))
        weights.append(weakref.ref(parameter.untyped_storage()))
        return quantized(parameter, *others)

    monkeypatch.setattr(expert_codes, "_quantized", counted)
    _loaded(saved["Mixtral"], name)
    assert len(alive) == 4
    assert max(alive) <= 1  # the last one's, which transformers drops when it has set the next


def test_skip_modules_leave_experts_in_full_precision(saved):
    for skip, left in (("experts", 4), ("model.layers.1.mlp", 2)):
        model: Any = load_base_model(str(saved["Mixtral"]), quantization=QuantizationConfig(skip_modules=[skip]))
        assert sum(p.ndim == 3 and not isinstance(p, QuantizedExperts) for p in model.parameters()) == left


def test_a_convolution_is_no_expert():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(64, 64), "conv": torch.nn.Conv1d(8, 8, 4)})
    quantize_(model, QuantizationConfig())
    assert type(model["conv"].weight) is torch.nn.Parameter


@each_quantization
def test_experts_of_random_weights_are_quantized_too(saved, name):
    config = f"random:{saved['Mixtral'] / 'config.json'}"
    model, plain = load_base_model(config, quantization=QUANTIZATIONS[name]), load_base_model(config)
    assert len(_experts(model)) == 4
    for parameter, weight in zip(_experts(model), (p for p in plain.parameters() if p.ndim == 3), strict=True):
        assert 0 < (parameter - weight).norm() < 0.2 * weight.norm()


def test_merging_is_into_dequantized_weights(saved):
    model = _loaded(saved["Mixtral"], "nf4")
    inject_lora(model, LoRAConfig(r=2, target_modules=[], target_parameters=EXPERTS))
    for _, layer in lora_layers(model):
        layer.start_at_random()
    expected = model(input_ids=IDS).logits.detach()
    with pytest.raises(ValueError, match="quantized"):
        merge_lora(model)
    dequantize_(model)
    merge_lora(model)
    assert not _experts(model)
    _close(model(input_ids=IDS).logits.detach(), expected)


def test_it_is_moved_copied_and_converted_as_codes_but_not_written_to(saved, tmp_path):
    model = _loaded(saved["Mixtral"], "nf4")
    experts = model.model.layers[0].mlp.experts
    experts.to(torch.bfloat16)
    assert isinstance(experts.gate_up_proj, QuantizedExperts)
    assert experts.gate_up_proj.dtype is torch.bfloat16
    assert (experts.gate_up_proj.float() + 0).dtype is torch.float32
    with pytest.raises(TypeError, match="held in nf4: they are frozen"):
        experts.gate_up_proj.mul_(2)
    with pytest.raises(TypeError, match="held in nf4 are written to no file: merge"):
        model.save_pretrained(tmp_path / "saved")


def test_a_quantized_mixture_generates(saved):
    model = _loaded(saved["Mixtral"], "nf4").eval()
    plain = copy.deepcopy(model)
    dequantize_(plain)
    ids = [m.generate(IDS[:1], max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*ids)


def test_the_estimate_counts_codes(saved):
    model = _loaded(saved["Mixtral"], "nf4", dtype="bfloat16")
    settings = StepSettings(
        f"random:{saved['Mixtral'] / 'config.json'}",
        LoRAConfig(r=2, target_modules=[], target_parameters=EXPERTS),
        (8, 8),
        quantization=QuantizationConfig(),
        dtype="bfloat16",
    )
    base = trace_step(settings).tracker.peak("forward").by_category["base"]
    assert base == pytest.approx(held_bytes(model), rel=0.02)
