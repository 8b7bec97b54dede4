"""One framework, one process: ``python -m benchmarks.peers.frameworks NAME job.json`` prints what it measured.

Every runner trains on the job's examples in their order, four to a step, from the job's adapter, with AdamW, a constant
learning rate and clipping at 1.0. The first steps (``warm_up``, one by default) are not counted.

A job runs on the CPU in float32 unless it says ``device`` and ``dtype``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Job, clock_of, device_of, examples_of, num_steps, result_of
from benchmarks.peers.limit import limit

# ---------------------------------------------------------------------- lit_lora


def lit_lora(
    job: Job,
    *,
    huge_pages: bool = True,
    onednn: bool = True,
    packing: bool = True,
    precision: Any = "32-true",
    **step: Any,
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
    from lit_lora.data.batches.packing import collate_packed, collate_padded
    from lit_lora.data.prepared.dataset import TokenizedExample
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

    clock = clock_of(job)

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.end()

    examples = [
        TokenizedExample(i, np.array(ids, dtype=np.int32), np.array(mask))
        for i, (ids, mask) in enumerate(examples_of(job))
    ]
    module = FromAdapter(
        job["base"],
        lora=LoRAConfig(r=8, lora_alpha=16),
        quantization=QuantizationConfig() if job["quantized"] else None,
        dtype="auto" if clock.on_cuda else job.get("dtype", "float32"),
        optimization=OptimizationConfig(job["learning_rate"], lr_schedule="constant", warmup_ratio=0.0),
        step=StepConfig(**step),
    )
    memory = MemoryProfiler()
    trainer = L.Trainer(
        accelerator="gpu" if clock.on_cuda else "cpu", devices=1, max_steps=num_steps(job), gradient_clip_val=1.0,
        precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=Path(job["adapter"]).parent,
        callbacks=[GradientNormLogger(), memory, GradientFlowAssertion(), ThroughputLogger(), Clock()],
    )  # fmt: skip
    collate = collate_packed if packing else collate_padded
    trainer.fit(module, DataLoader(examples, batch_size=job["batch_size"], collate_fn=collate))
    result = result_of(job, clock, module.flush_metrics().losses)
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
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        model = load_base_model(job["base"], dtype=job.get("dtype", "float32"), device=device_of(job))
        torch.backends.cuda.enable_cudnn_sdp(cudnn)  # attention is PEFT's and torch's choice, not what lit_lora sets
        model.set_attn_implementation(attention)
        return PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, job.get("dtype", "float32"))
    options: dict[str, Any] = {"dtype": dtype}
    if job["quantized"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(resolve_base(job["base"])[0], **options)
    return PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)


def _rows(job: Job) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": ids, "labels": [t if keep else -100 for t, keep in zip(ids, mask, strict=True)]}
        for ids, mask in examples_of(job)
    ]


def _arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(Path(job["adapter"]).parent / "trainer"),
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": num_steps(job),
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1 if device_of(job) == "cpu" else num_steps(job),  # each reading waits for the device
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": device_of(job) == "cpu",
        "bf16": device_of(job) == "cpu" and job.get("dtype") == "bfloat16",
        "disable_tqdm": True,
    }


def _train(job: Job, make_trainer: Callable[..., Any]) -> dict[str, Any]:
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    clock = clock_of(job)
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
    return result_of(job, clock, losses)


def peft(job: Job, **options: Any) -> dict[str, Any]:
    """PEFT and transformers' Trainer: at their defaults, unless ``options`` of TrainingArguments say otherwise."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    from lit_lora import load_tokenizer

    attention = "sdpa"
    collator: Any = DataCollatorForSeq2Seq(load_tokenizer(job.get("tokenizer", job["base"])), padding=True)
    if options and device_of(job) == "cuda" and find_spec("flash_attn") is not None:
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


def peft_without_cudnn(job: Job, **options: Any) -> dict[str, Any]:
    """As :func:`peft`, without cuDNN's attention, which torch prefers on some devices and plans anew for each shape."""
    os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"  # torch reads it at the process's first attention
    return peft(job, **options)


def trl(job: Job, **options: Any) -> dict[str, Any]:
    """TRL's SFTTrainer, at its defaults (activation checkpointing on)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lit_lora import load_tokenizer

    model = _peft_model(job)
    rows = [{"input_ids": ids, "completion_mask": [int(m) for m in mask]} for ids, mask in examples_of(job)]
    arguments = {**_arguments(job), "max_length": None, "completion_only_loss": True, **options}
    return _train(
        job,
        lambda clock: SFTTrainer(
            model=model, args=SFTConfig(**arguments), train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(job["base"]), callbacks=[clock],
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------- parity


def parity(job: Job) -> dict[str, Any]:
    """Adapter gradients of the first batch: lit_lora's step against PEFT's model on padded rows, in float32."""
    import numpy as np
    import torch

    from lit_lora import QuantizationConfig, load_base_model
    from lit_lora.data.batches.packing import collate_packed
    from lit_lora.data.prepared.dataset import TokenizedExample
    from lit_lora.interchange.peft_format import load_adapter
    from lit_lora.language_model.forward import language_model_loss
    from lit_lora.language_model.trial import choose_path

    job = {**job, "dtype": "float32"}
    first = examples_of(job)[: job["batch_size"]]
    device = torch.device(device_of(job))
    quantization = QuantizationConfig() if job["quantized"] else None
    # On the device, as PEFT's side: random weights are other ones there.
    model = load_base_model(job["base"], dtype="float32", device=device, quantization=quantization)
    load_adapter(model, job["adapter"], trainable=True)
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


FRAMEWORKS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "lit_lora": lit_lora,
    "peft": peft,
    "peft_without_cudnn": peft_without_cudnn,
    "peft_liger": lambda job: peft_without_cudnn(job, bf16=True, logging_nan_inf_filter=False, use_liger_kernel=True),
    "peft_tuned": lambda job: peft_without_cudnn(
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
    "no_cuda_graphs": lambda job: lit_lora(job, cuda_graphs=False),
    "liger": lambda job: lit_lora(job, liger=True),
    "lit_lora_bf16": lambda job: lit_lora(job, precision="bf16-mixed"),
    "liger_bf16": lambda job: lit_lora(job, liger=True, precision="bf16-mixed"),
    "no_huge_pages": lambda job: lit_lora(job, huge_pages=False),
    "no_onednn": lambda job: lit_lora(job, onednn=False),
    "checkpointing": lambda job: lit_lora(job, recompute=True),
}


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        print(json.dumps(FRAMEWORKS[sys.argv[1]](json.load(file))))
