"""QLoRA on tiny models: configuration, exact gradients, memory, stability, checkpoints, errors."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, SFTDataModule, inject_lora, load_base_model
from lit_lora.base import base_weight
from lit_lora.base.quantize import dequantize_, finish_quantization_, quantize_
from lit_lora.callbacks import MemoryProfiler
from lit_lora.callbacks.memory_profiler import MemoryBudgetExceeded
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.files.checkpoint import AtomicCheckpointIO
from lit_lora.rewrites.gated_mlp import recompute_gated_mlps
from lit_lora.rewrites.recompute import checkpoint_layers
from tests.large_tensors import LargeTensors
from tests.tiny import config, examples, grouped, language_model

IDS = torch.arange(3, 24).view(3, 7)
KINDS = {
    "nf4 double": QuantizationConfig(),
    "nf4": QuantizationConfig(double_quant=False),
    "fp4 double": QuantizationConfig(quant_type="fp4"),
    "blocks of 128": QuantizationConfig(block_size=128),
    "8 bits": QuantizationConfig(bits=8),
    "8-bit embedding": QuantizationConfig(embedding_bits=8),
}
each_kind = pytest.mark.parametrize("quantization", KINDS.values(), ids=KINDS)


@pytest.fixture(params=["AVX512", "AVX2"])
def capability(request, monkeypatch):
    """The dequantization of either kind of CPU."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny Llama's config; its weights are random, from a fixed seed."""
    folder = tmp_path_factory.mktemp("base")
    config("Llama", initializer_range=0.1, vocab_size=260, hidden_size=128, intermediate_size=128).save_pretrained(
        folder
    )
    return f"random:{folder}"


def _quantized(quantization: QuantizationConfig, **sizes: Any) -> Any:
    size = quantization.block_size
    model = language_model(**{"hidden_size": size, "intermediate_size": 2 * size, **sizes})
    quantize_(model, quantization)
    return model


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize("in_file", [False, True])
def test_bits_are_set_from_the_command_line(in_file, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {base: 'random:smollm2-135m'}\n")
    arguments = ["--config", str(path), "--model.quantization.bits", "4"]
    if in_file:
        path.write_text("model: {quantization: {bits: 8, skip_modules: [v_proj]}}\n")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(LoRALightningModule, "model")
    quantization = parser.parse_args(arguments).model.quantization
    assert QuantizationConfig(**quantization) == QuantizationConfig(
        bits=4, skip_modules=["v_proj"] if in_file else None
    )


def test_a_random_base_is_the_plain_one_quantized_and_draws_like_it(base):
    expected = load_base_model(base)
    quantize_(expected, QuantizationConfig())
    got = load_base_model(base, quantization=QuantizationConfig())
    assert torch.equal(got.eval()(IDS).logits, expected.eval()(IDS).logits)


@pytest.fixture
def folder(tmp_path):
    language_model(hidden_size=128, intermediate_size=128, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@each_kind
def test_loading_quantizes_all_but_what_is_named(quantization, folder):
    quantization = QuantizationConfig(**{**vars(quantization), "skip_modules": ["k_proj", "layers.1.mlp"]})
    model = load_base_model(folder, quantization=quantization)
    quantized = {n for n, m in model.named_modules() if base_weight.is_quantized(m)}
    kept = {"self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    names = {"self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"} | kept - {"self_attn.k_proj"}
    first = {f"model.layers.0.{name}" for name in names}
    assert quantized == first | {f"model.layers.1.{name}" for name in names - kept}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert head.weight.dtype == (torch.int8 if quantization.embedding_bits else torch.float32)
    if quantization.bits == 4:
        state = model.model.layers[0].self_attn.q_proj.weight.quant_state
        assert (state.blocksize, state.quant_type, state.nested) == (
            quantization.block_size,
            quantization.quant_type,
            quantization.double_quant,
        )


def test_a_prequantized_folder_loads_as_it_is(folder, tmp_path):
    model = load_base_model(folder, quantization=QuantizationConfig(quant_type="fp4")).eval()
    model.save_pretrained(tmp_path / "4bit")
    again = load_base_model(str(tmp_path / "4bit")).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    report = inject_lora(again, LoRAConfig(r=4))
    assert len(report.adapted) == 14
    with pytest.raises(ValueError, match=r"quantized already \(bitsandbytes\).*leave out quantization"):
        load_base_model(str(tmp_path / "4bit"), quantization=QuantizationConfig())


# ---------------------------------------------------------------------- the same bits as bitsandbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block_size", "nested"), [
    ((96, 64), 64, True), ((96, 64), 64, False), ((64, 256), 128, True), ((33, 50), 64, True), ((7, 9), 32, False),
])  # fmt: skip
def test_looked_up_weights_are_bit_for_bit_those_of_bitsandbytes(shape, block_size, nested, quant_type, dtype):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    codes, state = bnb.functional.quantize_4bit(
        torch.randn(shape, dtype=dtype), blocksize=block_size, compress_statistics=nested, quant_type=quant_type
    )
    expected = bnb.functional.dequantize_4bit(codes, state)
    got = base_weight.look_up_4bit(codes, state)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


# ---------------------------------------------------------------------- gradients


@each_kind
def test_gradients_are_exactly_those_of_the_dequantized_base(quantization, capability):
    """The input gradient is dY @ dequantize(W): the weight is frozen, so nothing is estimated."""
    quantized = _quantized(quantization, tie_word_embeddings=True)
    plain = copy.deepcopy(quantized)
    dequantize_(plain)
    assert not any(base_weight.is_quantized(module) for module in plain.modules())
    results = []
    for model in (quantized, plain):
        torch.manual_seed(3)
        inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = model.train()(inputs_embeds=embedded).logits
        F.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"logits": logits.detach(), "input": embedded.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, got in results[0].items():
        assert got.isfinite().all(), name
        assert got.any(), name
        torch.testing.assert_close(got, results[1][name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("double_quant", [True, False])
def test_five_hundred_steps_are_stable(base, tmp_path, double_quant):
    module = _module(base, quantization=QuantizationConfig(double_quant=double_quant), learning_rate=0.003)
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    _trainer(tmp_path, max_steps=500, max_epochs=-1, gradient_clip_val=1.0).fit(module, _loader(4))
    losses = torch.tensor(module.training_metrics.losses)
    assert len(losses) == 500
    assert losses.isfinite().all()
    assert losses[-25:].mean() < 0.3 * losses[:25].mean()
    assert losses[-100:].max() < losses[:25].mean()
    assert all(torch.equal(p, frozen[n]) for n, p in module.named_parameters() if n in frozen)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("recompute_mlp", [False, True])
def test_one_weight_at_a_time_is_dequantized(recompute_mlp, bits, checkpointing, capability):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "vocab_size": 32}
    model = _quantized(QuantizationConfig(bits=bits), **sizes)
    inject_lora(model, LoRAConfig(r=2))
    if recompute_mlp:
        recompute_gated_mlps(model)
    if checkpointing:
        checkpoint_layers(model)
    ids = torch.arange(3, 8)[None]
    model.train()
    with LargeTensors(128 * 128 * 4) as tracked:
        loss = model(input_ids=ids, labels=ids).loss
        forward = tracked.num_made
        loss.backward()
    assert forward >= 14  # every layer's weight was made, in both directions
    assert tracked.num_made >= 14 + 11  # the first three have no input that needs a gradient
    assert tracked.most == 1


# ---------------------------------------------------------------------- checkpoints


def _loader(batch_size: int) -> Any:
    rows = [
        TokenizedExample(i, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
        for i, (ids, mask) in enumerate(examples((7, 12, 5, 9, 14, 6, 8, 11)))
    ]
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate_packed)


def _module(base: str, **options: Any) -> LoRALightningModule:
    torch.manual_seed(1)
    defaults = {"lora": LoRAConfig(r=4), "learning_rate": 0.01, "lr_schedule": "constant", "warmup_ratio": 0.0}
    module = LoRALightningModule(base, **grouped(**{**defaults, **options}))
    module.configure_model()
    return module


def _trainer(folder: Any, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu", "max_steps": 4, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
        "plugins": [AtomicCheckpointIO()],
    }  # fmt: skip
    return L.Trainer(**{**defaults, **options})


@each_kind
def test_a_resumed_run_goes_on_and_another_base_is_refused(quantization, base, tmp_path):
    train = str(Path(__file__).parents[2] / "configs" / "data" / "requests_train.jsonl")

    def data() -> SFTDataModule:
        return SFTDataModule(train, tokenizer="bytes", limit=16, batch_size=2, cache_dir=tmp_path)

    whole = _module(base, quantization=quantization)
    _trainer(tmp_path, max_steps=6).fit(whole, data())
    first = _trainer(tmp_path, max_steps=4)
    first.fit(_module(base, quantization=quantization), data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = _module(base, quantization=quantization)
    _trainer(tmp_path, max_steps=6).fit(resumed, data(), ckpt_path=tmp_path / "a.ckpt")
    for name, parameter in whole.trainable_parameters().items():
        assert torch.equal(parameter, resumed.trainable_parameters()[name]), name

    other = None if quantization.bits == 8 else QuantizationConfig(bits=8)
    with pytest.raises(ValueError, match=r"quantization.* was .*Set them as saved to resume"):
        _trainer(tmp_path).fit(_module(base, quantization=other), data(), ckpt_path=tmp_path / "a.ckpt")
    different = LoRALightningModule(base, lora=LoRAConfig(r=4), quantization=quantization)
    changed = load_base_model(base, quantization=quantization, seed=9)
    different.load_base = lambda: changed  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="belongs to another base"):
        _trainer(tmp_path).fit(different, data(), ckpt_path=tmp_path / "a.ckpt")


# ---------------------------------------------------------------------- errors


def test_missing_bitsandbytes_says_what_to_do(base, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in (base, folder):
        with pytest.raises(ImportError, match=r"needs bitsandbytes.*pip install bitsandbytes"):
            load_base_model(name, quantization=QuantizationConfig())


class _Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x).sigmoid()


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 64))


def test_a_layer_that_transformers_passed_over_is_named():
    model = nn.ModuleDict({"plain": nn.Linear(64, 64)})
    quantize_(model, QuantizationConfig())
    model["gate"] = _Gated(64, 64)
    with pytest.raises(ValueError, match=r"gate is a _Gated, which cannot be quantized.*skip_modules"):
        finish_quantization_(model, QuantizationConfig())
    finish_quantization_(model, QuantizationConfig(skip_modules=["gate"]))


def test_experts_of_a_divided_base_have_to_be_left_in_full_precision():
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "experts": _Experts()})
    with pytest.raises(ValueError, match=r"experts.gate_up_proj holds fused experts.*add experts to quantization.skip"):
        quantize_(model, QuantizationConfig(), experts=False)
    quantize_(model, QuantizationConfig(skip_modules=["experts"]), experts=False)


def test_a_layer_that_cannot_be_quantized_is_named():
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "gate": _Gated(64, 64)})
    with pytest.raises(ValueError, match=r"gate is a _Gated, which cannot be quantized.*skip_modules"):
        quantize_(model, QuantizationConfig())
    quantize_(model, QuantizationConfig(skip_modules=["gate"]))
    assert base_weight.is_quantized(model["plain"])
    assert type(model["gate"]) is _Gated


BASES = {
    "in memory": lambda model, folder: quantize_(model, QuantizationConfig()),
    "random": lambda model, folder: load_base_model(f"random:{folder}", quantization=QuantizationConfig()),
    "folder": lambda model, folder: load_base_model(str(folder), quantization=QuantizationConfig()),
}


@pytest.mark.parametrize("load", BASES.values(), ids=BASES)
def test_a_block_size_that_does_not_divide_rows_is_refused(load, tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 64}
    model = language_model(**sizes)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"block_size 64 does not divide the \d+ inputs of model.layers.0.*32"):
        load(model, tmp_path)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_skipped_module_that_is_not_there_is_refused(loaded, folder):
    quantization = QuantizationConfig(skip_modules=["v_proj", "q_porj"])
    with pytest.raises(ValueError, match=r"skip_modules \['q_porj'\] match no module"):
        load_base_model(folder, quantization=quantization) if loaded else _quantized(quantization)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"block_size": 48}, "power of two from 32 to 4096"),
        ({"block_size": 8192}, "power of two from 32 to 4096"),
        ({"bits": 8, "quant_type": "fp4"}, "only apply to 4 bits"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        QuantizationConfig(**fields)


def test_a_memory_bound_that_is_exceeded_stops_the_run_and_says_what_to_change(base, tmp_path):
    profiler = MemoryProfiler(budget_mib=1, on_exceeded="stop")
    with pytest.raises(MemoryBudgetExceeded, match=r"used \d+ MiB.*budget 1 MiB: load a smaller or a quantized base"):
        _trainer(tmp_path, callbacks=[profiler]).fit(_module(base, quantization=QuantizationConfig()), _loader(2))
    assert profiler.verdict is not None
    assert profiler.verdict.passed is False
