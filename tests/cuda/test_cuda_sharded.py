"""On a GPU: a base divided among one process over NCCL trains as a whole one, with its shares on the host or not."""

from __future__ import annotations

import gc
import json
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, SFTDataModule, load
from lit_lora.base.shards import is_sharded, takes_codes
from lit_lora.callbacks._support.checksum import checksums, frozen_tensors
from lit_lora.evaluation.divided import among_processes
from lit_lora.language_model.generation import complete, turn_end
from lit_lora.training.sharded_strategy import NAME, OFFLOADED
from tests.tiny import config, grouped
from tests.training.sharded_project import run
from tests.training.test_sharded_verbs import free_ports

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # other versions of libraries
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
STRATEGIES = [NAME, OFFLOADED]
QUANTIZED = pytest.mark.skipif(not takes_codes(), reason="fully_shard of this torch takes no integer weights")
FLOAT32: dict[str, Any] = {"dtype": "float32"}
CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_ratio": 0.0}
"""A rate that does not depend on where a run is to end."""
NF4_DQ = {"double_quant": True, "compute_dtype": "float32"}

KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "lora, float32": ({"module_options": FLOAT32}, 1e-5),
    "qlora, NF4-DQ, float32": ({"quantization": NF4_DQ, "module_options": FLOAT32}, 1e-5),
    "qlora, NF4-DQ, bfloat16": ({"quantization": {"double_quant": True}}, 1e-2),
    "8 bits, tied ends too": (
        {"quantization": {"bits": 8, "embedding_bits": 8}, "module_options": FLOAT32, "stored": "tied"}, 1e-2,
    ),
    "from files, recomputed, accumulated, validated": (
        {
            "stored": "untied", "accumulate": 2, "module_options": {**FLOAT32, "recompute": True},
            "data": {"validation_fraction": 0.4},
            "trainer_options": {"num_sanity_val_steps": -1, "val_check_interval": 4},
        },
        1e-5,
    ),
    "the head trained, DoRA": (
        {"lora": {"modules_to_save": ["lm_head"], "use_dora": True}, "module_options": FLOAT32}, 1e-5,
    ),
}  # fmt: skip
"""Settings of a run, and how far its losses may be from those of a whole base: kernels add up in any order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded_on_cuda")
    torch.manual_seed(0)
    for name, tied in (("untied", False), ("tied", True)):
        sizes = {"vocab_size": 260, "hidden_size": 128, "num_hidden_layers": 3, "tie_word_embeddings": tied}
        AutoModelForCausalLM.from_config(config("Llama", initializer_range=0.2, **sizes)).save_pretrained(folder / name)
    rows = [{"prompt": f"say {i} " * (i % 4 + 1), "completion": f"{i * i} it is " * (i % 3 + 1)} for i in range(14)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _processes_part():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def trained(folder, name, strategy="auto", **settings):
    """A run on the GPU, of six steps."""
    stored = settings.pop("stored", None)
    base = str(folder / stored) if stored else f"random:{folder / 'untied'}"
    place = {"folder": str(folder / f"{name} {strategy}"), "train": str(folder / "train.jsonl")}
    settings = {"max_steps": 6, **settings}
    gc.collect()  # modules and trainers refer to each other
    before = torch.cuda.memory_allocated()
    try:
        result = run(**place, base=base, strategy=strategy, accelerator="gpu", **settings)
        result["allocated"] = result["allocated"][0] - before
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=QUANTIZED if "quantization" in KINDS[kind][0] else ()) for kind in KINDS]
)
def test_losses_are_those_of_a_whole_base(folder, kind):
    settings, rel = KINDS[kind]
    whole = trained(folder, kind, **settings)
    assert whole["strategy"] == "SingleDeviceStrategy"
    for strategy in STRATEGIES:
        found = trained(folder, kind, strategy, **settings)
        assert found["strategy"] == "LoRAShardedStrategy"
        assert found["path"] == whole["path"]
        assert found["losses"] == pytest.approx(whole["losses"], rel=rel)
        for entry, expected in zip(found["validation"], whole["validation"], strict=True):
            assert entry == pytest.approx(expected, rel=rel)
        assert found["base"] == whole["base"]
        assert found["verdict"][1]


@pytest.mark.parametrize(
    "quantization",
    [None, *(pytest.param(each, marks=QUANTIZED) for each in (NF4_DQ, {"bits": 8, "embedding_bits": 8}))],
)
def test_of_an_offloaded_base_the_device_holds_next_to_nothing_between_steps(folder, quantization):
    settings = {"quantization": quantization, "module_options": FLOAT32}
    trained(folder, f"held {quantization}", NAME, **{**settings, "max_steps": 1})  # what libraries keep for themselves
    kept, offloaded = (trained(folder, f"held {quantization}", strategy, **settings) for strategy in STRATEGIES)
    assert kept["held_on_device"] == pytest.approx(kept["held"], rel=0.01)
    assert offloaded["held"] == pytest.approx(kept["held"], rel=0.01)
    assert offloaded["held_on_device"] <= 0.1 * kept["held"]  # scales and tables of codes: less of it in a wider model
    assert kept["allocated"] - offloaded["allocated"] >= 0.9 * kept["held"]


@pytest.mark.parametrize("quantization", [None, pytest.param(NF4_DQ, marks=QUANTIZED)])
@pytest.mark.parametrize("chain", [(OFFLOADED, "auto"), ("auto", OFFLOADED), (NAME, OFFLOADED)])
def test_a_run_goes_on_under_another_strategy(folder, chain, quantization):
    settings = {"quantization": quantization, "module_options": {**FLOAT32, **CONSTANT}}
    name = f"chain {chain} {quantization}"
    whole = trained(folder, f"{name} whole", max_steps=8, **settings)
    first = trained(folder, name, chain[0], max_steps=4, **settings)
    end = trained(folder, name, chain[1], max_steps=8, ckpt_path=first["ckpt_path"], **settings)
    assert end["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for key, expected in whole["weights"].items():
        torch.testing.assert_close(end["weights"][key], expected, rtol=0, atol=1e-4)
    assert end["base"] == whole["base"]


class Pinned(L.Callback):
    """Where shares lie once training has begun, and the sums over what is frozen at its start."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        shares = [p.to_local() for p in pl_module.parameters() if isinstance(p, DTensor)]
        assert shares
        assert all(share.is_pinned() for share in shares if share.numel())


def module_of(folder, *, quantized: bool) -> LoRALightningModule:
    torch.manual_seed(1)
    return LoRALightningModule(
        str(folder / "tied"),
        lora=LoRAConfig(r=4, init_lora_weights=False),
        quantization=QuantizationConfig(**NF4_DQ) if quantized else None,
        **grouped(dtype="float32", max_new_tokens=8, learning_rate=0.01, **CONSTANT),
    )


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=QUANTIZED)])
def test_it_trains_validates_and_answers_as_a_whole_one(folder, tmp_path, quantized):
    found = {}
    for strategy in ("auto", *STRATEGIES):
        trainer = L.Trainer(
            accelerator="gpu", devices=1, strategy=strategy, max_steps=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[Pinned()] if strategy == OFFLOADED else [], use_distributed_sampler=False,
        )  # fmt: skip
        train = str(folder / "train.jsonl")
        data = SFTDataModule(
            train, validation=train, test=train, tokenizer="bytes", batch_size=2, cache_dir=str(tmp_path / "cache")
        )
        module = module_of(folder, quantized=quantized)
        trainer.fit(module, datamodule=data)
        metrics = dict(trainer.validate(module, datamodule=data, verbose=False)[0])
        answers = [answer["completion"] for batch in trainer.predict(module, datamodule=data) for answer in batch]
        found[strategy] = metrics, answers, checksums(frozen_tensors(module).values())
        if dist.is_initialized():
            dist.destroy_process_group()
    whole = found["auto"]
    assert len(set(whole[1])) > 1
    for strategy in STRATEGIES:
        assert found[strategy][0] == pytest.approx(whole[0], rel=1e-4)
        assert found[strategy][1] == whole[1]
        assert found[strategy][2] == whole[2]


@pytest.mark.parametrize("quantization", [None, pytest.param(QuantizationConfig(**NF4_DQ), marks=QUANTIZED)])
def test_generate_divides_the_base_among_processes(folder, monkeypatch, quantization):
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_ports(1)[0],
    }.items():
        monkeypatch.setenv(name, str(value))
    options: dict[str, Any] = {
        "base": str(folder / "untied"), "tokenizer": "bytes", "quantization": quantization, "dtype": "float32",
    }  # fmt: skip

    def written() -> list[str]:
        model, tokenizer, _ = load(**options)
        assert is_sharded(model) == dist.is_initialized()
        prompts = [[*text.encode()] for text in ("say one", "and two")]
        found = complete(model, tokenizer, prompts, end=turn_end(tokenizer), max_new_tokens=8)
        return [each.text for each in found]

    alone = written()
    with among_processes():
        assert written() == alone
