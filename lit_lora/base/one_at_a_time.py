"""A base of which one part at a time has its weights: a decoder layer, or what lies outside of the layers.

The model is made without values. A part is read from its safetensors files, quantized if asked for, and dropped again.
What transformers must rearrange while it loads cannot be read so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from lit_lora.base import base_hash, load
from lit_lora.base.filled import fill_part_
from lit_lora.base.module_state import attributes_kept
from lit_lora.base.quantize import check_skipped
from lit_lora.base.quantized_forward import prepare_base_layer
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.base.stored import Stored, opened, why_whole
from lit_lora.config import QuantizationConfig

Held = Callable[["Part"], object]
"""Called with a part while it has its weights."""


class Part:
    """Some of a model's modules: a decoder layer, or what lies outside of all of them."""

    def __init__(self, module: nn.Module, name: str, owner: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
        self.module = module
        self.name = name
        """Empty for what lies outside of the layers."""
        self.owner = owner
        """The model of transformers that it is a part of."""
        self._layers = layers

    def has(self, name: str) -> bool:
        """Whether the module of this name belongs to it."""
        if self.name:
            return f"{name}.".startswith(f"{self.name}.")
        return not any(f"{name}.".startswith(f"{layer}.") for layer in self._layers)

    @property
    def left_out(self) -> set[int]:
        """``id`` of modules in it that belong to others."""
        return set() if self.name else {id(layer) for layer in self._layers.values()}


class OneAtATime:
    """A base in files, read a part at a time.

    Attributes:
        model: without values, but for the part that is held.
        layers: the decoder layers, in order.
        rest: embedding, last norm, head, and whatever else there is.
    """

    def __init__(self, model: PreTrainedModel, stored: Stored, device: torch.device) -> None:
        self.model = model
        self.stored = stored
        self._device = device
        names = {id(module): name for name, module in model.named_modules()}
        layers = {names[id(layer)]: layer for layer in repeated_layers(model)}
        self.layers = [Part(layer, name, _owner(model, name), layers) for name, layer in layers.items()]
        self.rest = Part(model, "", model, layers)

    @contextmanager
    def held(self, part: Part, quantization: QuantizationConfig | None = None) -> Iterator[None]:
        """Within the context a part has its weights; afterwards it is again as it was.

        Args:
            part: which.
            quantization: how to quantize its linear layers.
        """
        with attributes_kept(part.module):
            fill_part_(
                part.module,
                part.name,
                part.owner,
                self.stored,
                device=self._device,
                quantization=quantization,
                left_out=part.left_out,
            )
            if not part.name:
                self.model.tie_weights()
            for name, module in part.module.named_modules():
                prepare_base_layer(name, module)
            yield

    @torch.no_grad()
    def logits(
        self,
        sample: Sequence[list[int]],
        *,
        quantization: QuantizationConfig | None = None,
        put: Held | None = None,
        dropped: Callable[[], object] = lambda: None,
    ) -> list[Tensor]:
        """As :func:`lit_lora.evaluation.drift.sample_logits`, with one layer in memory at a time.

        Args:
            sample: token ids of each text.
            quantization: how to quantize the linear layers.
            put: puts adapters on a part that has its weights.
            dropped: called when it has them no more.
        """
        longest = max(map(len, sample))
        # Filled up on the right, where a causal model does not look.
        ids = torch.tensor([[*text, *text[-1:] * (longest - len(text))] for text in sample], device=self._device)
        stacks: dict[str, ExitStack] = {}

        def take(part: Part) -> None:
            stacks[part.name] = ExitStack()
            stacks[part.name].enter_context(self.held(part, quantization))
            if put is not None:
                put(part)

        def drop(part: Part) -> None:
            stacks.pop(part.name).close()
            dropped()

        self.model.eval()
        hooks = []
        try:
            take(self.rest)
            for part in self.layers:
                hooks.append(part.module.register_forward_pre_hook(lambda *_, part=part: take(part)))
                hooks.append(part.module.register_forward_hook(lambda *_, part=part: drop(part)))
            logits = self.model(input_ids=ids, use_cache=False).logits
            return [rows[: len(text)].float().cpu() for rows, text in zip(logits, sample, strict=True)]
        finally:
            for hook in hooks:
                hook.remove()
            for name in list(stacks):
                stacks.pop(name).close()
                dropped()


def open_base(
    base: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    quantization: QuantizationConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> OneAtATime | str:
    """A base to be read a part at a time, or the reason why it has to be loaded whole.

    Args:
        base: as in :func:`lit_lora.base.load.load_base_model`, and all that follows.
        dtype: of the weights.
        device: where a part lies.
        quantization: how the linear layers of a part will be quantized.
        revision: on the Hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        FileNotFoundError: as there.
        ValueError: as there.
    """
    if base.startswith(load.RANDOM):
        return "its weights are random, and in no file"
    if quantization is not None and quantization.embedding_bits is not None:
        return "its embedding is held in 8 bits"
    location, gguf_file = load.resolve_base(base)
    if reason := why_whole(location, gguf_file, revision):
        return reason
    asked = load.wanted(base, dtype, quantization, device, revision, trust_remote_code)
    model, stored = opened(asked, location)
    if reason := _why_not_in_parts(model, stored):
        return reason
    if quantization is not None:
        check_skipped(model, quantization)
    base_hash.note_base(model, base_hash.hash_weights(location, None, revision))
    load.note_loaded(model, asked, location)
    return OneAtATime(model, stored, device)


def _why_not_in_parts(model: PreTrainedModel, stored: Stored) -> str:
    if get_model_conversion_mapping(model, add_legacy=False):
        return "transformers stores other tensors than the model has"
    if reason := stored.why_whole(model):
        return reason
    if model.is_custom_code():
        return "it comes with code of its own"
    if not repeated_layers(model):
        return "it has no list of equal layers"
    return ""


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model of transformers around a module."""
    owner: Any = model
    module: Any = model
    for part in name.split("."):
        module = getattr(module, part)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner
