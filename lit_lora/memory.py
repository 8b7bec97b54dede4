"""Predict the peak memory of a training step, by tracing one with fake tensors.

The step that is traced is the step that trains: the model is built from its config, quantized, given adapters, run on
a packed batch, differentiated and updated by the same functions, at its full size, on tensors that have shapes but no
memory. What is alive when is counted, not modelled (``storage_tracker.py``). A model of 7 billion parameters takes a
minute on a CPU.

Not counted: what a kernel takes and gives back within one operator, the CUDA context (some hundred MB) and the
workspace of cuBLAS (8 to 64 MiB), the interpreter and its libraries.

A build of torch without CUDA cannot trace CUDA tensors through autograd. There the trace for ``device="cuda"`` runs on
fake CPU tensors in the types and with the attention that CUDA would use; operators' own choices are a CPU's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedModel

from lit_lora import attention, causal_lm
from lit_lora.activation_checkpointing import checkpoint_layers
from lit_lora.adapters.inject import inject_lora
from lit_lora.config import LoRAConfig, QuantizationConfig
from lit_lora.cuda_allocator import CudaPeak, replay
from lit_lora.models import RANDOM, load_base_model, resolve_base
from lit_lora.storage_tracker import WORKSPACE, Peak, StorageTracker

PHASES = ("load", "forward", "backward", "optimizer")
CATEGORIES = ("base", "adapters", "gradients", "optimizer", "activations", WORKSPACE)

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


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
    gradient_checkpointing: bool | int = False
    """Layers that are recomputed in the backward pass: all, none, or the first so many."""
    packing: bool = True
    supervised: float = 1.0
    """Share of tokens that the loss counts."""
    accumulate_grad_batches: int = 1
    autocast: Literal["bfloat16", "float16"] | None = None
    trust_remote_code: bool = False

    def __str__(self) -> str:
        base = "16- or 32-bit base" if self.quantization is None else f"{self.quantization.bits}-bit base"
        recomputed = {True: "all layers recomputed", False: "no layer recomputed"}.get(
            self.gradient_checkpointing, f"{int(self.gradient_checkpointing)} layers recomputed"
        )
        tokens = f"{len(self.lengths)} examples of up to {max(self.lengths)} tokens"
        return f"{self.base} on {self.device}, {base}, rank {self.lora.r}, {tokens}, {recomputed}"


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training step will take, in bytes."""

    settings: StepSettings
    phases: dict[str, Peak]
    """The highest moment of load, forward, backward and optimizer, and what is alive then by category."""
    cuda: CudaPeak
    """The same as CUDA's allocator would count it: in blocks of 512 bytes, and reserved in segments."""
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
        return "\n".join([*lines, *self.notes])


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
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        with tracker.phase("load"):
            model = _load(settings, device, tracker)
            random_peak = tracker.peak("load")
        tracker.forget_the_dead()
        loaded = tracker.alive_bytes
        inject_lora(model, settings.lora)
        model.train()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tracker.claim("adapters", trainable)
        tracker.forget_the_dead()
        tracker.name_modules(model)
        path = _path(model, settings)
        if settings.gradient_checkpointing:
            count = settings.gradient_checkpointing
            checkpoint_layers(model, None if count is True else count)
        batch = _batch(settings, device)
        with ExitStack() as stack:
            if settings.device == "cuda" and device == "cpu" and path.packed:
                stack.enter_context(_cuda_attention())
            autocast = torch.autocast(device, getattr(torch, settings.autocast)) if settings.autocast else None
            run_step(model, batch, path, tracker, autocast, settings.accumulate_grad_batches)
    phases = {"load": _load_peak(model, settings, loaded, random_peak)}
    phases.update({phase: tracker.peak(phase) for phase in PHASES[1:]})
    cuda = replay((event.key, event.num_bytes) for event in tracker.events)
    return MemoryEstimate(settings, phases, cuda, tuple(notes))


def run_step(
    model: PreTrainedModel,
    batch: causal_lm.Batch,
    path: causal_lm.Path,
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
            nll_sum = causal_lm.language_model_loss(model, batch, path).nll_sum
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


def parse_bytes(text: int | str) -> int:
    """Bytes in "12GB" (10^9), "8GiB" (2^30), "512 MB" or a number.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"expected an amount of memory such as 12GB or 8GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


# ---------------------------------------------------------------------- parts of the traced step


def _load(settings: StepSettings, device: str, tracker: StorageTracker) -> PreTrainedModel:
    """The base with the right sizes: what ``load_base_model`` makes of random weights, whatever the base."""
    name = settings.base
    if not name.startswith(RANDOM):
        location, gguf_file = resolve_base(name)
        if gguf_file:
            raise ValueError(f"a GGUF file holds no config to trace: name its architecture, as {RANDOM}llama-2-7b")
        name = RANDOM + location
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if settings.device == "cuda" else "float32"
    model = load_base_model(
        name,
        dtype=dtype,
        quantization=settings.quantization,
        device=device,
        trust_remote_code=settings.trust_remote_code,
    )
    tracker.claim("base")
    return model


def _load_peak(model: nn.Module, settings: StepSettings, loaded: int, random_peak: Peak) -> Peak:
    if settings.base.startswith(RANDOM):
        categories = {"base": loaded, WORKSPACE: random_peak.total - loaded}
        return Peak(random_peak.total, categories, "random weights")
    if settings.quantization is None:
        return Peak(loaded, {"base": loaded}, "weights")
    # transformers quantizes one weight after the other as it reads them.
    dtype = torch.float32 if settings.dtype == "float32" or settings.device == "cpu" else torch.bfloat16
    shapes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    largest = max(num_in * num_out for num_in, num_out in shapes) * dtype.itemsize
    return Peak(loaded + largest, {"base": loaded, WORKSPACE: largest}, "largest weight before it is quantized")


def _path(model: PreTrainedModel, settings: StepSettings) -> causal_lm.Path:
    """What ``choose_path`` finds for the usual model; it cannot try on tensors without values."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    changes = [name for name in causal_lm._HEAD_CHANGES_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
    direct = type(head) is nn.Linear and head.bias is None and not changes
    if settings.packing:
        attention.use_packed_attention(model)
    return causal_lm.Path(settings.packing, direct, "")


def _batch(settings: StepSettings, device: str) -> causal_lm.Batch:
    lengths = settings.lengths
    rows, columns = (1, sum(lengths)) if settings.packing else (len(lengths), max(lengths))
    num_targets = max(1, int(settings.supervised * sum(length - 1 for length in lengths)))
    integers: dict[str, Any] = {"dtype": torch.int64, "device": device}
    batch: causal_lm.Batch = {
        "input_ids": torch.zeros(rows, columns, **integers),
        "target_positions": torch.zeros(num_targets, **integers),
        "target_ids": torch.zeros(num_targets, **integers),
    }
    if settings.packing:
        batch["position_ids"] = torch.zeros(rows, columns, **integers)
        batch["cu_seq_lens"] = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
        batch["seq_lens"] = list(lengths)
    else:
        batch["attention_mask"] = torch.ones(rows, columns, **integers)
    return batch


@contextmanager
def _cuda_attention() -> Iterator[None]:
    """Attention as on CUDA, for fake tensors that are not."""

    def forward(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if q.dtype not in (torch.float16, torch.bfloat16):
            return attention.packed_attention_forward(module, q, k, v, mask, **kwargs)  # type: ignore[return-value]
        longest = max(kwargs["seq_lens"])
        return attention._varlen(q, k, v, kwargs["cu_seq_lens_q"], longest, kwargs.get("scaling"), None), None

    AttentionInterface.register(attention.IMPLEMENTATION, forward)
    try:
        yield
    finally:
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
        settings = dict(_changes(current.settings)).get(suggestion.change)
        if settings is None or current.fits(limit):
            continue
        changed = trace(settings)
        if changed.peak_bytes < current.peak_bytes:
            names, current = [*names, suggestion.change], changed
    return [Suggestion(" + ".join(names), current), *found] if len(names) > 1 else found


def _changes(settings: StepSettings) -> Iterator[tuple[str, StepSettings]]:
    if settings.gradient_checkpointing is not True:
        yield "model.gradient_checkpointing true", replace(settings, gradient_checkpointing=True)
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
