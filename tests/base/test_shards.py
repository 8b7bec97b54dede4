"""What one process does with its share of a base; the others are imagined."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM

from lit_lora import LoRALightningModule, QuantizationConfig, StepConfig
from lit_lora.base.base_weight import hold_plainly_, num_weights, read_weight
from lit_lora.base.load import load_base_model
from lit_lora.base.quantize import quantize_
from lit_lora.base.shards import held_bytes, is_sharded, recover_, shares
from lit_lora.base.streamed import load_sharded_base
from lit_lora.callbacks._support import checksum
from lit_lora.data.batches.loaders import prompts_of_rank
from lit_lora.memory.storage_tracker import StorageTracker
from lit_lora.memory.traced_step import processes_imagined
from lit_lora.training.sharded_strategy import NAME, OFFLOADED, LoRAShardedStrategy
from tests.tiny import config, language_model

KINDS = {
    "float32": None,
    "NF4, double quantization": QuantizationConfig(),
    "FP4": QuantizationConfig(quant_type="fp4", double_quant=False),
    "8 bits": QuantizationConfig(bits=8),
}
LAYERS = 8


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    made = config("Llama", hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, vocab_size=64)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.mark.parametrize("source", ["files", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divided_base_is_loaded_a_weight_at_a_time(stored, kind, source):
    """Beyond its share, a process never has more than one weight at a time, and what quantizing it takes."""
    base = str(stored) if source == "files" else f"random:{stored}"
    with processes_imagined(4, "cpu") as sharding, StorageTracker() as tracker:
        assert sharding is not None
        model = load_sharded_base(base, sharding, quantization=KINDS[kind], device="cpu")
        held = held_bytes(model)
        assert is_sharded(model)
    weight = 4 * 64 * 128
    assert tracker.peak().total < held + (1.1 if KINDS[kind] is None else 4) * weight


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32"])
def test_a_quantized_weight_that_is_held_plainly_is_the_same(kind):
    model = language_model(hidden_size=64)
    quantize_(model, KINDS[kind])
    layers = [module for module in model.modules() if hasattr(module, "state") or hasattr(module, "quant_state")]
    assert layers
    before, num = [read_weight(layer) for layer in layers], num_weights(model)
    record = checksum.checksums(checksum.frozen_tensors(model).values()), list(checksum.frozen_tensors(model))
    for layer in layers:
        hold_plainly_(layer)
        assert type(layer.weight) is torch.nn.Parameter
    assert all(torch.equal(read_weight(layer), weight) for layer, weight in zip(layers, before, strict=True))
    assert num_weights(model) == num
    assert (checksum.checksums(checksum.frozen_tensors(model).values()), list(checksum.frozen_tensors(model))) == record


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(64, 3), (101, 4), (7, 1), (2, 5), (1,), (90_000, 1)])
@pytest.mark.parametrize("count", [2, 3])
def test_checksums_of_shares_add_up_to_that_of_the_whole(dtype, shape, count):
    whole = torch.randint(-100, 100, shape).to(dtype)
    expected = checksum.checksum(whole)
    rows = -(-len(whole) // count)
    total = torch.zeros_like(expected)
    for rank in range(count):
        start = min(len(whole), rank * rows)
        total += checksum.share_of_checksum(whole[start : start + rows], start * whole[0].numel(), whole)
    assert torch.equal(total, expected)


def test_a_share_is_half_of_two(stored):
    with processes_imagined(2, "cpu") as sharding:
        assert sharding is not None
        model = load_sharded_base(str(stored), sharding, device="cpu")
        whole = sum(4 * p.numel() for p in model.parameters())
        assert all(isinstance(p, DTensor) and not p.requires_grad for p in model.parameters())
        assert held_bytes(model) == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (StepConfig(recompute="1GiB"), "base that is whole.* set it to true"),
        (StepConfig(compile_layers=True), "does not work on a base that is divided"),
    ],
)
def test_what_a_divided_base_cannot_do_is_refused(stored, monkeypatch, step, message):
    """Before anything is loaded."""
    monkeypatch.setattr("lit_lora.module.load_sharded_base", lambda *_, **__: pytest.fail("it was loaded"))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=NAME, logger=False, barebones=False, enable_progress_bar=False
    )
    assert isinstance(trainer.strategy, LoRAShardedStrategy)
    module = LoRALightningModule(str(stored), step=step)
    try:
        with pytest.raises(ValueError, match=message):
            trainer.fit(module, [0])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("source", ["files", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_whose_shares_lie_on_the_host_computes_as_a_whole_one(stored, kind, source):
    base, ids = str(stored) if source == "files" else f"random:{stored}", torch.arange(12)[None]
    with torch.no_grad(), processes_imagined(1, "cpu", cpu_offload=True) as sharding:
        assert sharding is not None
        model = load_sharded_base(base, sharding, quantization=KINDS[kind], device="cpu").eval()
        assert all(isinstance(p, DTensor) for p in model.parameters() if p.ndim)
        expected = load_base_model(base, quantization=KINDS[kind], device="cpu").eval()
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)
        beside = held_bytes(model) - sum(share.nbytes for share in shares(model))
        assert 0 <= beside <= 1200 * 7 * LAYERS  # tables of codes, scales of scales, scales of rows


@pytest.mark.parametrize("strategy", [OFFLOADED, LoRAShardedStrategy(cpu_offload=True)])
def test_an_offload_to_where_the_base_is_anyway_is_refused(stored, monkeypatch, strategy):
    """Before processes find each other, and before anything is loaded."""
    monkeypatch.setattr("lit_lora.module.load_sharded_base", lambda *_, **__: pytest.fail("it was loaded"))
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="on a CPU it is there anyway: it needs a CUDA device"):
        trainer.fit(LoRALightningModule(str(stored)), [0])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("num_prompts", "world_size"), [(7, 2), (8, 2), (1, 3), (5, 4)])
def test_every_rank_predicts_equally_often(num_prompts, world_size):
    prompts = [{"reference": str(number)} for number in range(num_prompts)]
    shares = [prompts_of_rank(prompts, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    answered = [entry["reference"] for share in shares for entry in share if not entry.get("filler")]
    assert sorted(answered) == sorted(entry["reference"] for entry in prompts)


@pytest.mark.parametrize("source", ["files", "random"])
def test_a_torch_that_divides_no_codes_is_refused_by_name(stored, monkeypatch, source):
    monkeypatch.setattr("torch.__version__", TorchVersion("2.11.0+cu130"))
    base = str(stored) if source == "files" else f"random:{stored}"
    with processes_imagined(2, "cpu") as sharding:
        assert sharding is not None
        with pytest.raises(ValueError, match=r"by torch 2\.11\.0\+cu130, .* needs torch 2\.12 or newer"):
            load_sharded_base(base, sharding, quantization=QuantizationConfig(), device="cpu")
        whole = load_base_model(base, quantization=QuantizationConfig(), device="cpu").requires_grad_(False)
        with pytest.raises(ValueError, match=r"needs torch 2\.12 or newer"):
            sharding.shard_(whole)
        load_sharded_base(base, sharding, device="cpu")


def test_a_divided_model_runs_again_after_an_exception_in_any_torch(stored, monkeypatch):
    """Before 2.13 there was no ``reset_iter_state``."""
    ids = torch.arange(12)[None]
    with torch.no_grad(), processes_imagined(1, "cpu", cpu_offload=True) as sharding:
        assert sharding is not None
        model = load_sharded_base(str(stored), sharding, device="cpu").eval()
        expected = model(ids).logits
        for old in (False, True):
            if old:
                monkeypatch.delattr(FSDPModule, "reset_iter_state")
            hook = model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids)
            hook.remove()
            recover_(model)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert torch.equal(model(ids).logits, expected)
