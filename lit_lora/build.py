"""A loaded base made trainable, in the one order in which it can be done.

Kernels are replaced before adapters wrap what they replace; adapters come before what is rewritten around them; the
trial runs what training will run, in training mode; compilation takes layers as they then are, and recomputation wraps
what was compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_lora.adapters.frozen_statistics import keep_batch_norm_frozen
from lit_lora.adapters.inject import InjectionReport, inject_lora
from lit_lora.adapters.later_starts import StartFrom
from lit_lora.adapters.layers import lora_layers
from lit_lora.config import LATER_STARTS, LoRAConfig, StepConfig
from lit_lora.interchange.stored_adapter import StoredAdapter, inject_stored
from lit_lora.kernels.cuda_way import HALF, computes_half, takes_cuda_way
from lit_lora.language_model.forward import ForwardPath
from lit_lora.language_model.trial import choose_path, likely_path
from lit_lora.rewrites import compilation, liger_kernels
from lit_lora.rewrites.fused_elementwise import fuse_elementwise
from lit_lora.rewrites.gated_mlp import recompute_gated_mlps
from lit_lora.rewrites.recompute import checkpoint_layers
from lit_lora.rewrites.routed_experts import check_routed_experts
from lit_lora.rewrites.shared_inputs import share_inputs
from lit_lora.wording import setting


class Built(NamedTuple):
    """What was made of a model."""

    report: InjectionReport
    """What was adapted."""
    path: ForwardPath | None
    """How batches are run; None for a loss of one's own."""
    compile_clock: compilation.CompileClock | None
    """Of compiled layers."""


def check_device(step: StepConfig, device: torch.device) -> None:
    """Refuse a step that this machine cannot compute, before anything is loaded.

    Raises:
        ValueError: naming the setting.
    """
    if step.compile_layers:
        compilation.check_compiler(device)
    if step.liger:
        liger_kernels.check_available(device)


def check_sharded(step: StepConfig, lora: LoRAConfig) -> None:
    """Refuse what a base that is divided among processes cannot do, before anything is loaded.

    Raises:
        ValueError: naming the setting.
    """
    if step.compile_layers:
        raise ValueError(
            f"{setting('model.step.compile_layers')} does not work on a base that is divided: leave it out"
        )
    if lora.init_lora_weights in LATER_STARTS:
        start = setting("model.lora.init_lora_weights", lora.init_lora_weights)
        raise ValueError(f"{start} needs a base that is whole, and this one is divided among processes: leave it out")
    if lora.freeze_A:
        raise ValueError(f"{setting('model.lora.freeze_A')} does not work on a base that is divided: leave it out")
    if step.activation_budget is not None:
        raise ValueError(
            f"{setting('model.step.recompute', step.activation_budget)} measures a step on a base that is whole: with "
            "one that is divided among processes set it to true, or to a number of layers"
        )


def make_trainable(
    model: nn.Module,
    lora: LoRAConfig,
    step: StepConfig = StepConfig(),  # noqa: B008 (frozen)
    *,
    packing: bool = True,
    own_loss: bool = False,
    valueless: bool = False,
    adapter: StoredAdapter | None = None,
    start_from: StartFrom | None = None,
) -> Built:
    """Inject adapters, freeze everything else, and let the model compute as ``step`` says; it is in training mode then.

    Args:
        model: a base without adapters, on its device.
        lora: which layers get adapters, of what rank.
        step: how a step is computed. Where it gives memory for activations, ``ActivationBudget`` does the rest.
        packing: False to pad without trying.
        own_loss: whether its loss is another than that of next tokens; then nothing is tried.
        valueless: whether its tensors have no values, so that nothing can be tried, compiled or measured.
        adapter: to start from, with ``lora`` as its configuration; None for a new one.
        start_from: what a new one starts from, as :func:`lit_lora.adapters.inject.inject_lora` takes it.

    Raises:
        ValueError: if layers to adapt are not there, the model cannot be trained on next tokens, or ``step`` asks for
            what it cannot do.
    """
    if step.liger and not valueless:
        rank_zero_info(f"Liger kernels: {', '.join(liger_kernels.apply(model))}")
    if valueless and lora.init_lora_weights in LATER_STARTS:
        start_from = ()
    if adapter is None:
        report = inject_lora(model, lora, start_from=start_from)
    else:
        report = inject_stored(model, adapter, lora, valueless=valueless)
    if not step.fused_lora:
        for _, layer in lora_layers(model):
            layer.has_fast_path = False
    if step.recompute_mlp:
        recompute_gated_mlps(model, trial=not valueless)
    # The compiler fuses such chains itself, and finds its code no more in an attention that was changed.
    if step.fused_kernels and not step.compile_layers:
        has_kernels = _has_kernels(model)
        if has_kernels:
            share_inputs(model)
        if not step.liger:  # which has kernels for the same
            fuse_elementwise(model, norms_too=has_kernels)
    model.train()
    if not valueless:
        check_routed_experts(model)
    path = None if own_loss else _path(model, step, packing=packing, valueless=valueless)
    clock = compilation.compile_layers(model) if step.compile_layers and not valueless else None
    if step.recompute and step.activation_budget is None:
        checkpoint_layers(model, step.recomputed_layers)
    keep_batch_norm_frozen(model)
    return Built(report, path, clock)


def _has_kernels(model: nn.Module) -> bool:
    """Whether it is on CUDA, or in half precision on a CPU."""
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)  # is whole in any case
    dtypes = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    return takes_cuda_way(trained) or (computes_half(trained) and not dtypes.isdisjoint(HALF))


def _path(model: nn.Module, step: StepConfig, *, packing: bool, valueless: bool) -> ForwardPath:
    if valueless:
        return likely_path(model, packing=packing, direct_head=step.chunked_loss)
    path = choose_path(model, packing=packing, direct_head=step.chunked_loss, shared_prefix=step.shared_prefix)
    rank_zero_info(f"Forward path: {path}")
    return path
