"""Starts that need more than the layer: what comes into it (EVA, CorDA), or what its weight was (LoftQ).

Until then such a layer starts as any other, and comes to nothing. One class and one entry of ``OF_INPUTS`` for each
start of the inputs; they are taken on the base's own, padded way, for as many layers at a time as memory allows.

Shapes: I inputs, O outputs, N rows of input, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.adapters.layers import LoRALayer, LoRALinear, lora_layers
from lit_lora.adapters.subtracted_start import StartedLinear
from lit_lora.base import base_weight
from lit_lora.config import LATER_STARTS, LoRAConfig

StartFrom = Iterable[Mapping[str, Any]] | Callable[[str], Tensor]
"""Batches, as the model takes them; or what gives the weight of a layer before it was quantized, ``(O, I)``, by name.
No batches leave adapters as they are, to be filled otherwise."""

HELD_BYTES = 2 << 30
"""Memory for the sums of those layers that are looked at together; the batches are run once for each such group."""


class InputStart(ABC):
    """What is kept of the inputs of a layer, and the A and B that follow from it."""

    needs_targets: bool
    """Whether only the tokens that are learned count, where a batch says which; else all but padding."""

    @abstractmethod
    def take(self, rows: Tensor) -> None:
        """Note inputs, float32 ``(N, I)``."""

    @abstractmethod
    def start(self, layer: Any) -> None:
        """Fill A and B."""


class EVA(InputStart):
    """A is the principal components of the inputs (EVA, arXiv:2410.07170, eq. 3), B is zero.

    As PEFT's ``initialize_lora_eva_weights``, which comes near to them a batch at a time.
    """

    needs_targets = True

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.scatter: Any = 0.0

    def take(self, rows: Tensor) -> None:
        """Add to the scatter about the mean (Chan et al. 1979, eq. 2.1)."""
        mean = rows.mean(0)
        away, total = mean - self.mean, self.count + len(rows)
        centred = rows - mean
        self.scatter = self.scatter + centred.T @ centred
        if self.count:
            self.scatter += torch.outer(away, away) * (self.count * len(rows) / total)
        self.mean, self.count = self.mean + away * (len(rows) / total), total

    def start(self, layer: LoRALinear) -> None:
        """The components with the most variance."""
        lora_A, lora_B = layer.factors()
        lora_A.copy_(self.components(layer.r)[0])
        lora_B.zero_()

    def components(self, r: int) -> tuple[Tensor, Tensor]:
        """``(R, I)``, those with the most variance first, and the share of it that each explains, ``(R,)``.

        The largest entry of each is positive, as in PEFT.
        """
        if self.count <= r:
            raise ValueError(f"rank {r} needs more than {r} tokens that are learned, got {self.count}")
        values, vectors = self._decomposed
        components = vectors[:r]
        signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        return components * signs, values[:r] / self.scatter.trace()

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.scatter)
        return values.flip(0), vectors.T.flip(0)


class CorDA(InputStart):
    """The part of the weight that acts most on such inputs (CorDA, arXiv:2406.05223, eq. 2 to 5), as PEFT's "ipm"."""

    needs_targets = False

    def __init__(self) -> None:
        self.count = 0
        self.products: Any = 0.0

    def take(self, rows: Tensor) -> None:
        """Add to the products of inputs, each batch brought to the same size."""
        rows = rows / rows.max().abs()
        self.products = self.products + rows.T @ rows
        self.count += 1

    def start(self, layer: StartedLinear) -> None:
        """The largest singular values of ``W C``, with ``C`` taken out again on the right."""
        damped, inverse = self._damped
        U, S, Vh = torch.linalg.svd(layer.whole_weight() @ damped, full_matrices=False)
        root = (S[: layer.r] / layer.scaling).sqrt()
        layer.start_as(root[:, None] * (Vh[: layer.r] @ inverse), U[:, : layer.r] * root)

    @cached_property
    def _damped(self) -> tuple[Tensor, Tensor]:
        """``C`` and its inverse."""
        products, damping = self.products / self.count, 0.01
        unit = torch.eye(len(products), device=products.device)
        while True:  # until the inverse is one, as the paper's code and PEFT
            damped = products + unit * (products.diagonal().mean() * damping)
            inverse = torch.linalg.inv(damped)
            if torch.dist(damped @ inverse, unit) < 0.05:
                return damped, inverse
            damping *= 2
            if damping > 1e6:
                raise ValueError("the inputs are so unlike in size that their products have no inverse")


OF_INPUTS: dict[bool | str, type[InputStart]] = {"eva": EVA, "corda": CorDA}
"""``LoRAConfig.init_lora_weights`` -> what is kept of the inputs."""


def loftq(layer: LoRALinear, original: Tensor) -> None:
    """A and B make up for most of what quantization took (LoftQ, arXiv:2310.08659, Algorithm 1 with T = 1).

    As PEFT's ``replace_lora_weights_loftq``, at any scale. More rounds would quantize another weight, and the adapter
    would be one of a base that nobody has.
    """
    lost = original.to(layer.lora_A.weight.device, torch.float32) - layer.read_base().float()
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    root = (S[: layer.r] / layer.scaling).sqrt()
    lora_A, lora_B = layer.factors()
    lora_A.copy_(root[:, None] * Vh[: layer.r])
    lora_B.copy_(U[:, : layer.r] * root)


def check_start_from(config: LoRAConfig, start_from: StartFrom | None) -> None:
    """Refuse a start without what it is made of, and that without such a start.

    Raises:
        ValueError: naming the setting.
    """
    start = config.init_lora_weights
    if start not in LATER_STARTS:
        if start_from is not None:
            raise ValueError(f"start_from has no effect with init_lora_weights {start!r}: it is for {LATER_STARTS}")
        return
    if start_from is None or (callable(start_from) and start != "loftq"):
        needed = "the weights before quantization, by name" if start == "loftq" else "batches of the training data"
        raise ValueError(f"init_lora_weights {start!r} is made of {needed}: give them as start_from")


@torch.no_grad()
def start_later_(model: nn.Module, config: LoRAConfig, start_from: StartFrom) -> None:
    """Fill A and B of all layers.

    Raises:
        ValueError: naming a layer that cannot start so.
    """
    layers = {name: layer for name, layer in lora_layers(model) if isinstance(layer, LoRALinear)}
    if callable(start_from):
        if not any(layer.is_quantized for layer in layers.values()):
            raise ValueError(
                "init_lora_weights 'loftq' makes up for what quantization takes, and no adapted layer is quantized: "
                "set quantization, or leave it out"
            )
        for name, layer in layers.items():
            if layer.is_quantized:
                loftq(layer, start_from(name))
                layer.finish_start()
        return
    batches = list(start_from)
    for group in groups({name: layer.base_layer for name, layer in layers.items()}) if batches else ():
        taken = inputs_of(model, group, batches, OF_INPUTS[config.init_lora_weights])
        for name in group:
            with named_errors(config, name, len(batches)):
                taken[name].start(layers[name])
            layers[name].finish_start()


@contextmanager
def named_errors(config: LoRAConfig, name: str, num_batches: int) -> Iterator[None]:
    """Within the context, an error says which layer it is of."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"init_lora_weights {config.init_lora_weights!r} is made of what comes into a layer, and nothing came into "
            f"{name} in {num_batches} batches: leave it out of target_modules"
        ) from error
    except ValueError as error:
        raise ValueError(f"init_lora_weights {config.init_lora_weights!r}, {name}: {error}") from error


def groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Layers of the base that are looked at together."""
    group: dict[str, nn.Module] = {}
    held = 0
    for name, layer in layers.items():
        needed = 4 * base_weight.linear_shape(layer)[1] ** 2
        if group and held + needed > HELD_BYTES:
            yield group
            group, held = {}, 0
        group[name] = layer
        held += needed
    if group:
        yield group


def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Mapping[str, Any]], kind: type[InputStart]
) -> dict[str, InputStart]:
    """What the inputs of these layers of the base come to; it is the same thing for those that share an input."""
    taken: dict[str, InputStart] = {}
    owners: set[str] = set()  # of those that share an input (query, key and value), the first one
    counted: list[Tensor | None] = [None]
    last: list[Any] = [None, None]

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, mask = args[0], counted[0]
            if x is last[0] and name not in taken:
                taken[name] = last[1]
            if name in taken and name not in owners:
                return
            rows = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
            if len(rows):
                owners.add(name)
                taken.setdefault(name, kind()).take(rows.float())
                last[:] = x, taken[name]

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    training, adapted = model.training, [layer for _, layer in lora_layers(model)]
    enabled: list[tuple[LoRALayer, bool]] = [(layer, layer.enabled) for layer in adapted]
    device = next(model.parameters()).device
    try:
        model.eval()
        for layer in adapted:
            layer.enabled = False
        for batch in batches:
            there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            counted[0] = _counted(there, needs_targets=kind.needs_targets)
            model(**there)
    finally:
        for handle in handles:
            handle.remove()
        for layer, was in enabled:
            layer.enabled = was
        model.train(training)
    return taken


def _counted(batch: Mapping[str, Any], *, needs_targets: bool) -> Tensor | None:
    """Which tokens of a batch count, ``(B, T)``; None where nothing says so."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    counted = None if mask is None else mask.bool()
    if needs_targets and labels is not None and labels.ndim == 2:
        targets = labels != -100
        counted = targets if counted is None or counted.shape != targets.shape else counted & targets
    return counted
