"""One framework, one process: ``python -m benchmarks.peers.frameworks NAME job.json`` prints what it measured.

Every runner trains on the job's examples in their order, four to a step, from the job's adapter, with AdamW, a constant
learning rate and clipping at 1.0. The first steps (``warm_up``, one by default) are not counted.

A job runs on the CPU in float32 unless it says ``device`` and ``dtype``; that part is unverified on hardware.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.step_clock import StepClock

Job = dict[str, Any]
STARTED_S = psutil.Process().create_time()


def _examples(job: Job) -> list[tuple[list[int], list[bool]]]:
    return [(ids, mask) for ids, mask in json.loads(Path(job["examples"]).read_text())]


def _counts(job: Job) -> dict[str, int]:
    """Real and supervised tokens of the counted steps; the same for every framework."""
    counted = _examples(job)[job["batch_size"] * _warm_up(job) :]
    return {
        "num_tokens": sum(len(ids) for ids, _ in counted),
        "num_target_tokens": sum(sum(mask) for _, mask in counted),
    }


def _result(job: Job, ends_s: list[float], losses: list[float]) -> dict[str, Any]:
    result = {
        **_counts(job),
        "step_times_s": [b - a for a, b in itertools.pairwise(ends_s[_warm_up(job) - 1 :])],
        "time_to_first_step_s": ends_s[0] - STARTED_S,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_loss": sum(losses) / len(losses),
    }
    if _device(job) == "cuda":
        import torch

        result["peak_allocated_mb"] = torch.cuda.max_memory_allocated() / 1e6
        result["peak_reserved_mb"] = torch.cuda.memory_reserved() / 1e6  # never given back, so its highest
    return result


def _device(job: Job) -> str:
    return job.get("device", "cpu")


def _warm_up(job: Job) -> int:
    return job.get("warm_up", 1)


def _clock(job: Job) -> StepClock:
    return StepClock(on_cuda=_device(job) == "cuda", warm_up=_warm_up(job))


# ---------------------------------------------------------------------- lit_lora


def lit_lora(
    job: Job, *, huge_pages: bool = True, onednn: bool = True, packing: bool = True, **step: Any
) -> dict[str, Any]:
    from lit_lora.files.environment import ALLOCATION_VARIABLES

    os.environ.update(ALLOCATION_VARIABLES)  # what the command line does
    if not huge_pages:
        del os.environ["THP_MEM_ALLOC_ENABLE"]
    import lightning as L
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader

    from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, QuantizationConfig, StepConfig
    from lit_lora.callbacks import GradientFlowAssertion, GradientNormLogger, MemoryProfiler, ThroughputLogger
    from lit_lora.data.dataset import TokenizedExample
    from lit_lora.data.packing import collate_packed, collate_padded
    from lit_lora.interchange.peft_format import load_adapter_state_dict

    torch.set_num_threads(job["threads"])
    torch.backends.mkldnn.enabled = onednn

    class FromAdapter(LoRALightningModule):
        """Starts from the job's adapter instead of a random one."""

        def configure_model(self) -> None:
            if self.model is not None:
                return
            super().configure_model()
            tensors = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
            state = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
            load_adapter_state_dict(self.model, state)

    clock = _clock(job)

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.end()

    examples = [
        TokenizedExample(i, np.array(ids, dtype=np.int32), np.array(mask))
        for i, (ids, mask) in enumerate(_examples(job))
    ]
    module = FromAdapter(
        job["base"],
        lora=LoRAConfig(r=8, lora_alpha=16),
        quantization=QuantizationConfig() if job["quantized"] else None,
        optimization=OptimizationConfig(job["learning_rate"], lr_schedule="constant", warmup_ratio=0.0),
        step=StepConfig(**step),
    )
    memory = MemoryProfiler()
    trainer = L.Trainer(
        accelerator="gpu" if clock.on_cuda else "cpu", devices=1, max_steps=job["steps"], gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=Path(job["adapter"]).parent,
        callbacks=[GradientNormLogger(), memory, GradientFlowAssertion(), ThroughputLogger(), Clock()],
    )  # fmt: skip
    collate = collate_packed if packing else collate_padded
    trainer.fit(module, DataLoader(examples, batch_size=job["batch_size"], collate_fn=collate))
    result = _result(job, clock.ends_s(), module.flush_metrics().losses)
    if clock.on_cuda:
        result["peak_allocated_mb"] = memory.peak_mib * 1.048576  # it resets the allocator's own peak at every phase
    return result


# ---------------------------------------------------------------------- PEFT and what stands on it


def _peft_model(job: Job, attention: str = "sdpa") -> Any:
    import torch
    from peft import PeftModel

    from lit_lora.base.load import RANDOM, load_base_model, resolve_base

    torch.set_num_threads(job["threads"])
    if job["base"].startswith(RANDOM):
        assert not job["quantized"], "PEFT's side of a quantized base is read from a folder"
        model = load_base_model(job["base"], dtype=job.get("dtype", "float32"), device=_device(job))
        model.set_attn_implementation(attention)
        return PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if job["quantized"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(resolve_base(job["base"])[0], **options)
    return PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)


def _rows(job: Job) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": ids, "labels": [t if keep else -100 for t, keep in zip(ids, mask, strict=True)]}
        for ids, mask in _examples(job)
    ]


def _arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(Path(job["adapter"]).parent / "trainer"),
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1 if _device(job) == "cpu" else job["steps"],  # each reading waits for the device
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": _device(job) == "cpu",
        "disable_tqdm": True,
    }


def _train(job: Job, make_trainer: Callable[..., Any]) -> dict[str, Any]:
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    clock = _clock(job)
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    trainer = make_trainer(Clock())
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.train()
    return _result(job, clock.ends_s(), losses)


def peft(job: Job, **options: Any) -> dict[str, Any]:
    """PEFT and transformers' Trainer: at their defaults, unless ``options`` of TrainingArguments say otherwise."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    from lit_lora import load_tokenizer

    attention = "sdpa"
    collator: Any = DataCollatorForSeq2Seq(load_tokenizer(job.get("tokenizer", job["base"])), padding=True)
    if options and _device(job) == "cuda" and find_spec("flash_attn") is not None:
        attention, collator = "flash_attention_2", DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    model = _peft_model(job, attention)
    arguments = TrainingArguments(**{**_arguments(job), **options})
    result = _train(
        job,
        lambda clock: Trainer(
            model=model, args=arguments, train_dataset=_rows(job), data_collator=collator, callbacks=[clock]
        ),
    )
    return {**result, "attention": attention}


def trl(job: Job, **options: Any) -> dict[str, Any]:
    """TRL's SFTTrainer, at its defaults (activation checkpointing on)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lit_lora import load_tokenizer

    model = _peft_model(job)
    rows = [{"input_ids": ids, "completion_mask": [int(m) for m in mask]} for ids, mask in _examples(job)]
    arguments = {**_arguments(job), "bf16": False, "max_length": None, "completion_only_loss": True, **options}
    return _train(
        job,
        lambda clock: SFTTrainer(
            model=model, args=SFTConfig(**arguments), train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(job["base"]), callbacks=[clock],
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------- parity and the limit


def parity(job: Job) -> dict[str, Any]:
    """Adapter gradients of the first batch: lit_lora's step against PEFT's model on padded rows, in float32."""
    import numpy as np
    import torch

    from lit_lora import QuantizationConfig, load_base_model
    from lit_lora.data.dataset import TokenizedExample
    from lit_lora.data.packing import collate_packed
    from lit_lora.interchange.peft_format import load_adapter
    from lit_lora.language_model.forward import language_model_loss
    from lit_lora.language_model.trial import choose_path

    first = _examples(job)[: job["batch_size"]]
    model = load_base_model(
        job["base"], dtype="float32", quantization=QuantizationConfig() if job["quantized"] else None
    )
    load_adapter(model, job["adapter"], trainable=True)
    device = torch.device(_device(job))
    model.to(device)
    batch = collate_packed(
        [TokenizedExample(i, np.array(x, dtype=np.int32), np.array(m)) for i, (x, m) in enumerate(first)]
    )
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    nll_sum = language_model_loss(model, batch, choose_path(model)).nll_sum
    (nll_sum / batch["target_ids"].numel()).backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    del model, batch, nll_sum
    theirs_model = _peft_model(job).train()  # in evaluation bitsandbytes may compute in bfloat16 on a CPU
    length = max(len(ids) for ids, _ in first)
    if length * len(first) > 4096:  # the same gradients, in a memory that holds them
        theirs_model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.tensor([x + [0] * (length - len(x)) for x, _ in first])
    mask = torch.tensor([[1] * len(x) + [0] * (length - len(x)) for x, _ in first])
    labels = torch.tensor(
        [[t if k else -100 for t, k in zip(x, m, strict=True)] + [-100] * (length - len(x)) for x, m in first]
    )
    ids, mask, labels = (rows.to(device) for rows in (ids, mask, labels))
    theirs_model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs_model.named_parameters()
        if p.grad is not None
    }
    assert ours.keys() == theirs.keys(), "different parameters train"
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return {"gradient_difference": difference, "largest_gradient": largest}


def limit(job: Job, *, onednn: bool = True) -> dict[str, Any]:
    """The products that no exact step can do without, alone, in the job's shapes.

    Base forward and input gradient, the adapters' six narrow products, the head at supervised positions in both
    directions, and attention per example in both directions. No other work. Each by the fastest kernel that is known
    here: the ones that lit_lora uses, or, without oneDNN, those of any torch program.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch
    from torch import nn

    from lit_lora import load_base_model
    from lit_lora.kernels.products import linear, matmul
    from lit_lora.language_model.attention import SeqLens, packed_attention_forward

    torch.set_num_threads(job["threads"])
    torch.backends.mkldnn.enabled = onednn
    model = load_base_model(job["base"], dtype="float32")
    config = model.config
    layers = [[m.weight.detach() for m in layer.modules() if isinstance(m, nn.Linear)] for layer in model.model.layers]
    head = model.get_output_embeddings().weight.detach()
    examples, size = _examples(job), job["batch_size"]
    ends_s, attention_s = [], []
    widths = {n for weights in layers for w in weights for n in w.shape}
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        lengths = [max(i for i, keep in enumerate(mask) if keep) + 1 for _, mask in batch]
        x = {n: torch.randn(sum(lengths), n) for n in widths}
        down = torch.randn(sum(lengths), 8)
        hidden = torch.randn(sum(sum(mask) for _, mask in batch), config.hidden_size)
        query, key, value = (
            torch.randn(1, num_heads, sum(lengths), config.head_dim, requires_grad=True)
            for num_heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        )
        attention_s.append(0.0)
        for weights in layers:
            for weight in weights:
                out, inner = weight.shape
                a, b = weight[:8], weight[:, :8].contiguous()
                linear(x[inner], weight)
                matmul(x[out], weight)
                for left, right in ((x[inner], a.t()), (down, b.t()), (x[out], b), (down, a)):
                    matmul(left, right)
                matmul(down.t(), x[inner])
                matmul(down.t(), x[out])
            began_s = time.time()
            attended, _ = packed_attention_forward(
                nn.Module(), query, key, value, None, cu_seq_lens_q=torch.zeros(1), seq_lens=SeqLens(lengths)
            )
            attended.backward(attended.detach())
            attention_s[-1] += time.time() - began_s
        for row in range(0, len(hidden), 512):
            for block in head.split(4096):
                matmul(linear(hidden[row : row + 512], block), block)
        ends_s.append(time.time())
    return {**_result(job, ends_s, [0.0]), "attention_s": attention_s[_warm_up(job) :]}


FRAMEWORKS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "lit_lora": lit_lora,
    "peft": peft,
    "peft_liger": lambda job: peft(job, bf16=True, logging_nan_inf_filter=False, use_liger_kernel=True),
    "peft_tuned": lambda job: peft(
        job, bf16=True, logging_nan_inf_filter=False, use_liger_kernel=True, torch_compile=True
    ),
    "trl": trl,
    "trl_tuned": lambda job: trl(job, gradient_checkpointing=False),
    "limit": limit,
    "limit_mkl": lambda job: limit(job, onednn=False),
    "parity": parity,
    "no_packing": lambda job: lit_lora(job, packing=False),
    "no_shared_prefix": lambda job: lit_lora(job, shared_prefix=False),
    "model_logits": lambda job: lit_lora(job, chunked_loss=False),
    "plain_linear": lambda job: lit_lora(job, fused_lora=False),
    "no_mlp_recompute": lambda job: lit_lora(job, recompute_mlp=False),
    "compiled": lambda job: lit_lora(job, compile_layers=True),
    "liger": lambda job: lit_lora(job, liger=True),
    "no_huge_pages": lambda job: lit_lora(job, huge_pages=False),
    "no_onednn": lambda job: lit_lora(job, onednn=False),
    "checkpointing": lambda job: lit_lora(job, recompute=True),
}


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        print(json.dumps(FRAMEWORKS[sys.argv[1]](json.load(file))))
