"""Several adapters of one base, by name: one is in the model, some are, or none; the others lie beside it.

An adapter is the wrappers that injection has put around layers. Switching takes those of one out of the model and puts
those of another in, around the same frozen layers: a few attributes are set, no weight is moved or copied. So a model
with one active adapter is just what it is with that one alone, at the same speed, and whatever an adapter may consist
of (experts, DoRA, rows of embeddings, copies, biases) can be switched. The alternative, a table of adapters in every
layer, would cost each forward a look-up, and every kind of layer a second way of computing.

Several adapters are active at once as wrappers around each other; rows of one batch with different ones are in
``mixed_batch.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_lora.adapters.convolution import LoRAConv
from lit_lora.adapters.layers import LoRAEmbedding, LoRALayer, LoRALinear, TrainableCopy, adapter_modules
from lit_lora.adapters.module_names import some, uncompiled
from lit_lora.adapters.subtracted_start import StartedLinear
from lit_lora.adapters.trainable_tokens import TrainableTokens
from lit_lora.adapters.trained_biases import TakenBiases, put_biases, take_biases
from lit_lora.files.meant import closest, did_you_mean

DEFAULT = "default"
"""Name of an adapter that was given none, as in PEFT."""

_KEY = "lit_lora_named_adapters"
_WRAPPERS = (LoRALayer, TrainableCopy, TrainableTokens)
_SUMS = (LoRALinear, LoRAEmbedding, LoRAConv, StartedLinear)
"""What adds to the output of whatever it stands around."""


@dataclass(frozen=True)
class Slot:
    """One place of a model with a wrapper of an adapter."""

    parent: nn.Module
    attribute: str
    wrapper: Any
    """The outermost one that the adapter has there."""

    @property
    def base(self) -> nn.Module:
        """What the wrapper stands around."""
        return innermost(self.wrapper)

    @property
    def place(self) -> tuple[int, str]:
        """Equal for two adapters of one layer."""
        return id(self.parent), self.attribute

    def fill(self, module: nn.Module) -> None:
        """Put a module into the place."""
        setattr(self.parent, self.attribute, module)

    def follow(self) -> None:
        """Let the wrapper be where its layer is, and in its mode: what lies beside a model does not move along."""
        weights = [*self.base.parameters()]
        if weights and any(parameter.device != weights[0].device for parameter in self.wrapper.parameters()):
            self.wrapper.to(weights[0].device)
        self.wrapper.train(self.base.training)


@dataclass
class Adapter:
    """All that an adapter puts into a model."""

    slots: list[Slot]
    biases: TakenBiases = field(default_factory=TakenBiases)


@dataclass
class _Adapters:
    active: list[str]
    beside: dict[str, Adapter]
    """Those that are not in the model."""
    stacked: dict[str, Adapter] = field(default_factory=dict)
    """Those that are, where there are several."""


def innermost(module: Any) -> nn.Module:
    """The layer of the base that wrappers stand around."""
    while isinstance(module, _WRAPPERS):
        module = module.base_layer
    return module


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters of a model, active or not."""
    known = _known(model)
    return [*known.active, *known.beside]


def active_adapters(model: nn.Module) -> list[str]:
    """Names of those that the model computes with."""
    return list(_known(model).active)


def set_adapter(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Choose the adapters that a model computes with.

    Args:
        model: with adapters.
        names: one; several, whose changes are added up, in this order; or None for the base alone.

    Raises:
        ValueError: if there is none of a name, an active one is merged, or several cannot be active together.
    """
    wanted = [names] if isinstance(names, str) else list(names or [])
    known = _known(model)
    check_names(model, wanted)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"adapters {wanted}: each can be active once")
    if wanted == known.active:
        return
    before = list(known.active)
    take_out(model)
    try:
        put_in(model, wanted)
    except ValueError:
        put_in(model, before)
        raise


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; where it was active, the others that were stay so.

    Raises:
        ValueError: if there is none of that name.
    """
    check_names(model, [name])
    known = _known(model)
    if name in known.active:
        set_adapter(model, [other for other in known.active if other != name])
    del known.beside[name]


def unload_lora(model: nn.Module) -> None:
    """Take all adapters out without merging them: the model is then the base as it was, biases and heads too.

    Raises:
        ValueError: if an active adapter is merged into the base.
    """
    take_out(model)
    vars(model).pop(_KEY, None)


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that no adapter has.

    Raises:
        ValueError: naming those that there are.
    """
    there = adapter_names(model)
    if unknown := [name for name in names if name not in there]:
        meant = did_you_mean(closest(unknown[0], there))
        raise ValueError(
            f"no adapter {some(map(repr, unknown))}; there are {some(map(repr, there), 9) or 'none'}"
            + (f": {meant}" if meant else "")
        )


def forget_active(model: nn.Module) -> None:
    """What was active is part of the base now."""
    known = _known(model)
    known.active, known.stacked = [], {}


@contextmanager
def named(model: nn.Module, name: str | None) -> Iterator[bool]:
    """Within, an adapter is put into a model; it is called ``name`` then, and lies beside the others, if there are any.

    Args:
        model: with adapters or without.
        name: a new one; None for a model without adapters, whose adapter is called "default".

    Yields:
        Whether the model has no other adapters.

    Raises:
        ValueError: if the name is taken.
    """
    others = adapter_names(model)
    if name in others or (name is None and DEFAULT in _known(model).beside):
        raise ValueError(
            f"the model already has an adapter {name or DEFAULT!r}: give this one another name, or take that one away, "
            f"delete_adapter(model, {name or DEFAULT!r})"
        )
    if not others or name is None:
        yield not others
        _known(model).active = [name or DEFAULT]
        return
    known = _known(model)
    before = take_out(model)
    try:
        yield False
        known.active = [name]
        take_out(model)
    finally:
        put_in(model, before)


def adapters_of(model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
    """The adapters of these names, none of which is in the model."""
    known = _known(model)
    return {name: known.beside[name] for name in names}


def take_out(model: nn.Module) -> list[str]:
    """Leave the base alone in a model; the names of those that were active.

    Raises:
        ValueError: if one of them is merged.
    """
    known = _known(model)
    merged = [name for name, m in adapter_modules(model) if not isinstance(m, TrainableCopy) and m.merged]
    if merged:
        raise ValueError(f"the adapter is merged in {some(merged)}: call unmerge_lora first")
    active = list(known.active)
    if len(active) == 1:
        known.beside[active[0]] = Adapter(list(_slots(model)), take_biases(model))
    for name, adapter in reversed(known.stacked.items()):
        adapter.biases = take_biases(model, adapter.biases)
        known.beside[name] = adapter
    for name in active:
        for slot in known.beside[name].slots:
            _unstack(slot)
            slot.fill(slot.base)
    known.active, known.stacked = [], {}
    return active


def put_in(model: nn.Module, names: Sequence[str]) -> None:
    """Let adapters that lie beside a base be its active ones."""
    known = _known(model)
    adapters = {name: known.beside[name] for name in names}
    if len(adapters) > 1:
        _check_stackable(adapters)
    top: dict[tuple[int, str], nn.Module] = {}
    for name, adapter in adapters.items():
        for slot in adapter.slots:
            slot.follow()
            if (below := top.get(slot.place)) is not None:
                _stack(slot, below)
            slot.fill(slot.wrapper)
            top[slot.place] = slot.wrapper
        del known.beside[name]
    for adapter in adapters.values():  # whose names depend on all wrappers
        put_biases(model, adapter.biases)
    known.active = list(names)
    known.stacked = adapters if len(adapters) > 1 else {}


def _check_stackable(adapters: dict[str, Adapter]) -> None:
    seen: dict[tuple[int, str], list[tuple[str, Any]]] = {}
    for name, adapter in adapters.items():
        for slot in adapter.slots:
            seen.setdefault(slot.place, []).append((name, slot.wrapper))
    for (_, attribute), wrappers in seen.items():
        kinds = {type(wrapper).__name__ for _, wrapper in wrappers if type(wrapper) not in _SUMS}
        if len(wrappers) > 1 and kinds:
            raise ValueError(
                f"adapters {some([repr(name) for name, _ in wrappers])} cannot be active together: both change "
                f"{attribute}, one as {kinds.pop()}, which is no sum. Set one of them"
            )
    trained: dict[int, str] = {}
    for name, adapter in adapters.items():
        for bias in adapter.biases.held:
            if (other := trained.setdefault(id(bias), name)) != name:
                raise ValueError(f"adapters {other!r} and {name!r} cannot be active together: both train one bias")


def _stack(slot: Slot, below: nn.Module) -> None:
    """Let a wrapper stand around that of another adapter, which it calls as its base."""
    wrapper = slot.wrapper
    wrapper.base_layer = below
    wrapper.__dict__["alone"] = wrapper.has_fast_path, getattr(wrapper, "may_be_quantized", False)
    wrapper.has_fast_path = wrapper.may_be_quantized = False  # the one below sees to the frozen weight


def _unstack(slot: Slot) -> None:
    wrapper = slot.wrapper
    if (alone := wrapper.__dict__.pop("alone", None)) is not None:
        wrapper.base_layer = innermost(wrapper)
        wrapper.has_fast_path, wrapper.may_be_quantized = alone


def _slots(model: nn.Module) -> Iterator[Slot]:
    for parent in list(model.modules()):
        if isinstance(parent, _WRAPPERS):
            continue
        for attribute, child in parent.named_children():
            if isinstance(child, _WRAPPERS):
                yield Slot(parent, attribute, child)


def _known(model: Any) -> _Adapters:
    model = uncompiled(model)
    known: _Adapters | None = vars(model).get(_KEY)
    if known is None:
        known = vars(model)[_KEY] = _Adapters([], {})
    if not known.active and next(adapter_modules(model), None) is not None:
        known.active = [DEFAULT]
    return known
