"""Predict the peak memory of a training step, by tracing one with fake tensors.

The step that is traced is the step that trains: the model is built from its config, quantized, given adapters, run on
a packed batch, differentiated and updated by the same functions, at its full size, on tensors that have shapes but no
memory. What is alive when is counted, not modelled (``storage_tracker.py``). A model of 7 billion parameters takes ten
seconds on a CPU.

Not counted: what a kernel takes and gives back within one operator, the CUDA context (some hundred MB) and the
workspace of cuBLAS (8 to 64 MiB), the interpreter and its libraries.

A build of torch without CUDA cannot trace CUDA tensors through autograd. There the trace for ``device="cuda"`` runs on
fake CPU tensors in the types, by the code and with the attention that CUDA would use; operators' own choices are a
CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from lit_lora.base import base_weight
from lit_lora.base.load import RANDOM, _architecture, resolve_base
from lit_lora.base.quantize import is_left_plain, quantize_
from lit_lora.base.whole_model import readable
from lit_lora.build import make_trainable
from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig, parse_bytes
from lit_lora.kernels.cuda_way import as_on_cuda
from lit_lora.language_model import attention
from lit_lora.language_model.forward import Batch, ForwardPath, language_model_loss, placeholder_batch
from lit_lora.memory.cuda_allocator import CudaPeak, replay
from lit_lora.memory.storage_tracker import WORKSPACE, Peak, StorageTracker
from lit_lora.memory.valueless import without_values

PHASES = ("load", "forward", "backward", "optimizer")
CATEGORIES = ("base", "adapters", "gradients", "optimizer", "activations", WORKSPACE)


@dataclass(frozen=True)
class StepSettings:
    """All that decides how much memory a training step takes."""

    base: str
    lora: LoRAConfig
    lengths: tuple[int, ...]
    """Tokens of each example of a micro-batch."""
    quantization: QuantizationConfig | None = None
    dtype: str = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    step: StepConfig = StepConfig()  # noqa: RUF009 (frozen)
    packing: bool = True
    supervised: float = 1.0
    """Share of tokens that the loss counts."""
    accumulate_grad_batches: int = 1
    autocast: Literal["bfloat16", "float16"] | None = None
    trust_remote_code: bool = False

    def __str__(self) -> str:
        base = "16- or 32-bit base" if self.quantization is None else f"{self.quantization.bits}-bit base"
        count = self.step.recomputed_layers
        recomputed = "all layers" if count is None else f"{count or 'no'} layers"
        tokens = f"{len(self.lengths)} examples of up to {max(self.lengths)} tokens"
        return f"{self.base} on {self.device}, {base}, rank {self.lora.r}, {tokens}, {recomputed} recomputed"


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training step will take, in bytes."""

    settings: StepSettings
    phases: dict[str, Peak]
    """The highest moment of load, forward, backward and optimizer, and what is alive then by category."""
    cuda: CudaPeak
    """The same as CUDA's allocator would count it: in blocks of 512 bytes, and reserved in segments."""
    path: ForwardPath
    """How the batch was run, as far as the model's structure tells."""
    notes: tuple[str, ...] = field(default=())

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase].total)

    @property
    def peak(self) -> Peak:
        """The highest moment of all."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        """What must be there: on CUDA in whole blocks of its allocator."""
        return max(self.peak.total, self.cuda.allocated) if self.settings.device == "cuda" else self.peak.total

    def fits(self, limit: int | str) -> bool:
        """Whether the step stays within so many bytes, or within "12GB" or "8GiB"; on CUDA, what is reserved does."""
        needed = self.cuda.reserved if self.settings.device == "cuda" else self.peak_bytes
        return max(needed, self.peak_bytes) <= parse_bytes(limit)

    def __str__(self) -> str:
        lines = [str(self.settings), f"{'MB':<12}" + "".join(f"{phase:>11}" for phase in self.phases)]
        for category in CATEGORIES:
            values = [peak.by_category.get(category, 0) for peak in self.phases.values()]
            lines.append(f"{category:<12}" + "".join(f"{_mb(value):>11}" for value in values))
        lines.append(f"{'total':<12}" + "".join(f"{_mb(peak.total):>11}" for peak in self.phases.values()))
        lines.append(f"peak: {_mb(self.peak.total)} MB in {self.peak_phase} ({self.peak.where})")
        if self.settings.device == "cuda":
            lines.append(
                f"CUDA: {_mb(self.cuda.allocated)} MB allocated in blocks of 512 bytes, {_mb(self.cuda.reserved)} MB "
                "reserved in segments; the CUDA context and cuBLAS's workspace come on top"
            )
        return "\n".join([*lines, f"traced {self.path}", *self.notes])


def estimate_memory(
    base: str,
    *,
    lengths: Sequence[int],
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008 (frozen)
    **settings: Any,
) -> MemoryEstimate:
    """Predict the peak memory of a training step.

    Args:
        base: as in ``load_base_model``; only its config is read. "random:" reads no file for a known architecture.
        lengths: tokens of each example of a micro-batch.
        lora: which layers get adapters, of what rank.
        settings: the other fields of :class:`StepSettings`.

    Raises:
        ValueError: for settings that the step itself would refuse.
    """
    return trace(StepSettings(base, lora, tuple(lengths), **settings))


def trace(settings: StepSettings) -> MemoryEstimate:
    """Trace one step with these settings."""
    if not settings.lengths or min(settings.lengths) < 2:
        raise ValueError(f"examples need at least 2 tokens each, got lengths {settings.lengths}")
    tracker = StorageTracker()
    device = settings.device if settings.device == "cpu" or torch.cuda.is_available() else "cpu"
    notes = []
    if device != settings.device:
        notes.append("traced without CUDA: operators chosen as on a CPU, types and attention as on CUDA")
    way = as_on_cuda() if device != settings.device else nullcontext()
    with without_values("its step cannot be traced. Run a short fit instead, which reports its peak"), tracker, way:
        model, load_peak = _load(settings, device, tracker)
        built = make_trainable(model, settings.lora, settings.step, packing=settings.packing, valueless=True)
        path = built.path
        assert path is not None
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tracker.claim("adapters", trainable)
        tracker.forget_the_dead()
        tracker.name_modules(model)
        batch = placeholder_batch(settings.lengths, packed=path.packed, device=device, supervised=settings.supervised)
        with ExitStack() as stack:
            if device != settings.device:
                stack.enter_context(_as_on_cuda())
            autocast = torch.autocast(device, getattr(torch, settings.autocast)) if settings.autocast else None
            run_step(model, batch, path, tracker, autocast, settings.accumulate_grad_batches)
    phases = {"load": load_peak}
    phases.update({phase: tracker.peak(phase) for phase in PHASES[1:]})
    cuda = replay((event.key, event.num_bytes) for event in tracker.events)
    return MemoryEstimate(settings, phases, cuda, path, tuple(notes))


def run_step(
    model: PreTrainedModel,
    batch: Batch,
    path: ForwardPath,
    tracker: StorageTracker,
    autocast: Any = None,
    accumulate_grad_batches: int = 1,
) -> None:
    """Run a training step as ``LoRALightningModule`` under Lightning's Trainer does, not the first of the run.

    The gradients of the step before are there until the forward pass is over, and the optimizer has its state.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    tracker.claim("gradients", _gradients(parameters))
    with tracker.phase("optimizer"):
        optimizer.step()
    tracker.claim("optimizer", [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)])
    with tracker.phase("forward"):
        with autocast or ExitStack():
            nll_sum = language_model_loss(model, batch, path).nll_sum
        loss = nll_sum / 1024.0
        del nll_sum
    tracker.claim("activations")
    if accumulate_grad_batches == 1:
        optimizer.zero_grad()
    with tracker.phase("backward"):
        loss.backward()
    tracker.claim("gradients", _gradients(parameters))
    with tracker.phase("optimizer"):
        torch._foreach_mul_(_gradients(parameters), 1.0)
        torch._foreach_norm(_gradients(parameters))
        optimizer.step()


# ---------------------------------------------------------------------- parts of the traced step


def _load(settings: StepSettings, device: str, tracker: StorageTracker) -> tuple[PreTrainedModel, Peak]:
    """The base, and the peak of loading it: weights come one after the other, and are quantized as they come."""
    name = settings.base.removeprefix(RANDOM)
    if name == settings.base:
        name, gguf_file = resolve_base(settings.base)
        if gguf_file:
            raise ValueError(f"a GGUF file holds no config to trace: name its architecture, as {RANDOM}llama-2-7b")
    config = _architecture(name, None, settings.trust_remote_code)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if settings.device == "cuda" else "float32"
    with torch.device(device):
        model = readable(
            settings.base,
            lambda: AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=settings.trust_remote_code
            ),
        )
    at_once = 0
    if settings.quantization is not None:
        at_once = max(
            (
                module.weight.nbytes
                for name, module in model.named_modules()
                if base_weight.is_linear_like(module) and not is_left_plain(name, settings.quantization)
            ),
            default=0,
        )
        if settings.quantization.embedding_bits is not None:
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            at_once = sum({id(m.weight): m.weight.nbytes for m in ends if m is not None}.values())
            del ends
        quantize_(model, settings.quantization)
    tracker.claim("base")
    tracker.forget_the_dead()
    loaded = tracker.alive_bytes
    where = "before the last weight is quantized" if at_once else "weights"
    return model, Peak(loaded + at_once, {"base": loaded, WORKSPACE: at_once}, where)


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Where our code asks for the device, it takes CUDA's way, for fake tensors that are not on it."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1]:
            return attention.packed_attention_forward(module, q, k, v, mask, **kwargs)
        longest = max(kwargs["seq_lens"].lengths)
        return attention._varlen(q, k, v, kwargs["cu_seq_lens_q"], longest, kwargs.get("scaling"), None), None

    on_cpu = base_weight._dequantize_4bit
    AttentionInterface.register(attention.IMPLEMENTATION, attend)
    base_weight._dequantize_4bit = lambda *args: base_weight.bitsandbytes().functional.dequantize_4bit(*args)
    try:
        yield
    finally:
        base_weight._dequantize_4bit = on_cpu
        AttentionInterface.register(attention.IMPLEMENTATION, attention.packed_attention_forward)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"


# ---------------------------------------------------------------------- what to change


@dataclass(frozen=True)
class Suggestion:
    """A change, and what a step with it takes: traced, not guessed."""

    change: str
    estimate: MemoryEstimate

    def __str__(self) -> str:
        return f"{self.change}: {_mb(self.estimate.peak_bytes)} MB"


def suggest(estimate: MemoryEstimate, limit: int | str | None = None) -> list[Suggestion]:
    """Changes that lower the peak, best first; with a limit, also the shortest row of them together that meets it.

    Each is traced, so this takes a few times as long as the estimate.
    """
    found = []
    for name, settings in _changes(estimate.settings):
        changed = trace(settings)
        if changed.peak_bytes < estimate.peak_bytes:
            found.append(Suggestion(name, changed))
    found.sort(key=lambda suggestion: suggestion.estimate.peak_bytes)
    if limit is None or not found or any(suggestion.estimate.fits(limit) for suggestion in found):
        return found
    names, current = [found[0].change], found[0].estimate
    for suggestion in found[1:]:
        change = dict(_changes(current.settings)).get(suggestion.change)
        if change is None or current.fits(limit):
            continue
        changed = trace(change)
        if changed.peak_bytes < current.peak_bytes:
            names, current = [*names, suggestion.change], changed
    return [Suggestion(" + ".join(names), current), *found] if len(names) > 1 else found


def _changes(settings: StepSettings) -> Iterator[tuple[str, StepSettings]]:
    if settings.step.recompute is not True:
        yield "model.step.recompute true", replace(settings, step=replace(settings.step, recompute=True))
    if settings.quantization is None:
        yield "model.quantization.bits 4", replace(settings, quantization=QuantizationConfig())
    elif settings.quantization.embedding_bits is None:
        eight_bit = replace(settings.quantization, embedding_bits=8)
        yield "model.quantization.embedding_bits 8", replace(settings, quantization=eight_bit)
    count = len(settings.lengths)
    if count > 1:
        yield "half as many examples in a batch", replace(settings, lengths=settings.lengths[: count // 2])
    elif settings.lengths[0] >= 64:
        yield "data.max_length halved", replace(settings, lengths=(settings.lengths[0] // 2,))
    if settings.lora.r >= 4:
        rank = settings.lora.r // 4
        yield f"model.lora.r {rank}", replace(settings, lora=replace(settings.lora, r=rank))
