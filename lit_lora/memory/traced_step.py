"""One training step on fake tensors: what it makes and drops, in order.

The step that is traced is the step that trains: the model is built from its config, quantized, given adapters, run on
a packed batch, differentiated and updated by the same functions, at its full size, on tensors that have shapes but no
memory. A model of 7 billion parameters takes ten seconds on a CPU.

A build of torch without CUDA cannot trace CUDA tensors through autograd. There the trace for ``device="cuda"`` runs on
fake CPU tensors in the types and with the attention that CUDA would use; operators' own choices are a CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_lora.base import base_weight
from lit_lora.base.architectures import architecture
from lit_lora.base.expert_codes import is_experts
from lit_lora.base.left_plain import is_left_plain
from lit_lora.base.load import RANDOM, resolve_base, resolve_dtype
from lit_lora.base.quantize import quantize_
from lit_lora.base.shards import Sharding, gathered_modules, shares
from lit_lora.base.whole_model import readable
from lit_lora.build import make_trainable
from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig
from lit_lora.interchange.stored_adapter import StoredAdapter
from lit_lora.kernels.cuda_cards import STAND_IN
from lit_lora.kernels.cuda_way import HALF
from lit_lora.language_model.cuda_graphs import is_recorded, why_not
from lit_lora.language_model.fixed_shape import FixedBatch, shape_for
from lit_lora.language_model.forward import Batch, ForwardPath, language_model_loss, placeholder_batch
from lit_lora.memory.storage_tracker import GATHERED, WORKSPACE, Peak, StorageTracker
from lit_lora.memory.valueless import without_values

PHASES = ("load", "forward", "backward", "optimizer")
CATEGORIES = ("base", GATHERED, "adapters", "gradients", "optimizer", "activations", WORKSPACE)


@dataclass(frozen=True)
class StepSettings:
    """All that decides how much memory a training step takes."""

    base: str
    lora: LoRAConfig
    lengths: tuple[int, ...]
    """Tokens of each example of a micro-batch."""
    adapter: StoredAdapter | None = None
    """That training starts from, with ``lora`` as its configuration; None for a new one."""
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
    devices: int = 1
    """Processes that the base is divided among; 1 for a base that each of them has whole."""
    cpu_offload: bool = False
    """Whether the base, or a process's share, lies in the memory of the host while it is not computed with."""

    def __str__(self) -> str:
        base = "16- or 32-bit base" if self.quantization is None else f"{self.quantization.bits}-bit base"
        count = self.step.recomputed_layers
        recomputed = "all layers" if count is None else f"{count or 'no'} layers"
        tokens = f"{len(self.lengths)} examples of up to {max(self.lengths)} tokens"
        divided = f" divided among {self.devices} devices" if self.devices > 1 else ""
        divided += " in the memory of the host" if self.cpu_offload else ""
        return f"{self.base} on {self.device}, {base}{divided}, rank {self.lora.r}, {tokens}, {recomputed} recomputed"


class TracedStep(NamedTuple):
    """What was seen of a step."""

    tracker: StorageTracker
    """Every storage, by phase."""
    load: Peak
    """The highest moment of loading."""
    path: ForwardPath
    """How the batch was run, as far as the model's structure tells."""
    notes: tuple[str, ...]
    """What the trace could not do."""
    host_bytes: int
    """Of the base in the memory of the host."""


def trace_step(settings: StepSettings) -> TracedStep:
    """Trace one step with these settings.

    Raises:
        ValueError: for settings that the step itself would refuse.
    """
    if not settings.lengths or min(settings.lengths) < 2:
        raise ValueError(f"examples need at least 2 tokens each, got lengths {settings.lengths}")
    if settings.cpu_offload and settings.device == "cpu":
        raise ValueError(
            "cpu_offload keeps the base in the memory of the CPU, and on a CPU it is there anyway: estimate it with "
            "device cuda"
        )
    tracker, host_bytes = StorageTracker(), 0
    device = settings.device if settings.device == "cpu" or torch.cuda.is_available() else "cpu"
    notes = []
    as_on_cuda = device != settings.device
    if as_on_cuda:
        notes.append(
            "traced without CUDA: operators chosen as on a CPU, types and attention as on a card of capability "
            f"{'.'.join(map(str, STAND_IN))}"
        )
    purpose = "its step cannot be traced. Run a short fit instead, which reports its peak"
    with (
        processes_imagined(settings.devices, device, cpu_offload=settings.cpu_offload) as sharding,
        without_values(purpose, as_on_cuda=as_on_cuda),
        tracker,
    ):
        model, load_peak = _load(settings, device, tracker)
        if sharding is not None:
            load_peak, host_bytes = _divide(model, sharding, tracker, load_peak)
        built = make_trainable(
            model, settings.lora, settings.step, packing=settings.packing, valueless=True, adapter=settings.adapter
        )
        path = built.path
        assert path is not None
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if sharding is not None and settings.devices == 1:
            for module in gathered_modules(model, lambda _: True):
                tracker.follow(p for p in module.parameters(recurse=False) if p.ndim and not p.requires_grad)
        tracker.claim("adapters", trainable)
        tracker.forget_the_dead()
        tracker.name_modules(model)
        batch = placeholder_batch(settings.lengths, packed=path.packed, device=device, supervised=settings.supervised)
        half = resolve_dtype(settings.dtype, torch.device(settings.device)) in HALF  # else attention needs the lengths
        recorded = half and settings.device == "cuda" and settings.devices == 1 and sharding is None
        recorded = recorded and not why_not(settings.step, path) and is_recorded(settings.step, batch)
        if recorded:
            batch = FixedBatch(shape_for(batch), torch.device(device)).batch
        autocast = torch.autocast(device, getattr(torch, settings.autocast)) if settings.autocast else None
        keeps_gradients = recorded or settings.accumulate_grad_batches > 1
        run_step(model, batch, path, tracker, autocast, keeps_gradients=keeps_gradients)
    return TracedStep(tracker, load_peak, path, tuple(notes), host_bytes)


def run_step(
    model: PreTrainedModel,
    batch: Batch,
    path: ForwardPath,
    tracker: StorageTracker,
    autocast: Any = None,
    *,
    keeps_gradients: bool = False,
) -> None:
    """Run a training step as ``LoRALightningModule`` under Lightning's Trainer does, not the first of the run.

    The gradients of the step before are there until the forward pass is over, and beyond where they are kept; the
    optimizer has its state.
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
    if not keeps_gradients:
        optimizer.zero_grad()
    with tracker.phase("backward"):
        loss.backward()
    tracker.claim("gradients", _gradients(parameters))
    with tracker.phase("optimizer"):
        torch._foreach_mul_(_gradients(parameters), 1.0)
        torch._foreach_norm(_gradients(parameters))
        optimizer.step()


def _load(settings: StepSettings, device: str, tracker: StorageTracker) -> tuple[PreTrainedModel, Peak]:
    """The base, and the peak of loading it: weights come one after the other, and are quantized as they come."""
    name = settings.base.removeprefix(RANDOM)
    if name == settings.base:
        name, gguf_file = resolve_base(settings.base)
        if gguf_file:
            raise ValueError(f"a GGUF file holds no config to trace: name its architecture, as {RANDOM}llama-2-7b")
    config = architecture(name, None, settings.trust_remote_code)
    dtype = resolve_dtype(settings.dtype, torch.device(settings.device))
    with torch.device(device):
        model = readable(
            settings.base,
            lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code),
        )
    at_once = 0
    if settings.quantization is not None:
        at_once = max(
            (
                parameter.nbytes
                for name, module in model.named_modules()
                for key, parameter in module.named_parameters(recurse=False)
                if (base_weight.is_linear_like(module) and key == "weight") or is_experts(module, parameter)
                if not is_left_plain(f"{name}.{key}", settings.quantization)
            ),
            default=0,
        )
        if settings.quantization.embedding_bits is not None and settings.devices == 1:  # of divided ones, rows alone
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            at_once = sum({id(m.weight): m.weight.nbytes for m in ends if m is not None}.values())
            del ends
        quantize_(model, settings.quantization, experts=settings.devices == 1 and not settings.cpu_offload)
    tracker.claim("base")
    tracker.forget_the_dead()
    loaded = tracker.alive_bytes
    where = "before the last weight is quantized" if at_once else "weights"
    return model, Peak(loaded + at_once, {"base": loaded, WORKSPACE: at_once}, where)


@contextmanager
def processes_imagined(count: int, device: str, *, cpu_offload: bool = False) -> Iterator[Sharding | None]:
    """This process as the first of so many, of which the others answer at once and with nothing.

    None for one, if it is not to have its base in the memory of the host.
    """
    if count == 1 and not cpu_offload:
        yield None
        return
    if dist.is_initialized():
        raise RuntimeError("a step of several processes is traced in a process of its own, and this one has company")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        # What has no values cannot be pinned.
        yield Sharding(init_device_mesh(device, (count,)), CPUOffloadPolicy(pin_memory=False) if cpu_offload else None)
    finally:
        dist.destroy_process_group()


def _divide(model: PreTrainedModel, sharding: Sharding, tracker: StorageTracker, whole: Peak) -> tuple[Peak, int]:
    """Keep the first process's share; the peak of loading it, where a weight is divided before the next one comes.

    Of shares in the memory of the host, also their bytes, which torch rounds up to powers of two to pin them.
    """
    sharding.shard_(model.requires_grad_(False))
    host_bytes = 0
    if sharding.offload:
        offloaded = shares(model)
        tracker.leave_out(offloaded)
        host_bytes = sum(1 << (share.nbytes - 1).bit_length() for share in offloaded if share.nbytes)
    tracker.claim("base")
    tracker.forget_the_dead()
    share, at_once = tracker.alive_bytes, whole.by_category[WORKSPACE]
    return Peak(share + at_once, {"base": share, WORKSPACE: at_once}, whole.where), host_bytes


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
