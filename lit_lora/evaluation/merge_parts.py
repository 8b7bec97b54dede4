"""An adapter folded into a base that is read, merged and written a part at a time.

In memory are one decoder layer, or what lies outside of the layers, and one file of the result; of each part, what
merges is :func:`lit_lora.adapters.merge.merge_lora`, as of a whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_lora.adapters.inject import put_adapters_
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.matching import some
from lit_lora.adapters.merge import merge_lora
from lit_lora.adapters.part_of_plan import part_of_plan
from lit_lora.adapters.trained_biases import forget_biases, trained_biases
from lit_lora.base.one_at_a_time import OneAtATime, Part
from lit_lora.base.quantize import dequantize_
from lit_lora.base.whole_model import INDEX
from lit_lora.config import QuantizationConfig
from lit_lora.interchange.adapter_state import adapter_state_dict, load_adapter_state_dict
from lit_lora.interchange.stored_adapter import fit_adapter, read_adapter

MOST_BYTES = 10**9
"""Of one file of the result, where those of the base are not smaller."""


class PartsMerge:
    """A base in parts and an adapter on it.

    Args:
        base: whose vocabulary gets the rows that the adapter needs.
        adapter: folder in PEFT's format.
        quantization: how the base was quantized in training.

    Raises:
        ValueError: if they do not belong together.
    """

    def __init__(self, base: OneAtATime, adapter: str, quantization: QuantizationConfig | None) -> None:
        self.base = base
        self.quantization = quantization

        def value(name: str, parameter: Tensor) -> Tensor:
            with base.held(next(part for part in self.parts if part.has(name))):
                return base.model.get_parameter(name).detach()

        self._plan, state = fit_adapter(base.model, read_adapter(adapter), values=value)
        assert state is not None, "it lies in a folder"
        self._state = state
        spread = [
            name
            for name in self._plan.saved
            if any(layer.name.startswith(f"{name}.") for layer in base.layers) or not name
        ]
        if spread:
            raise ValueError(f"{some(spread)} is trained in full, and holds more than one layer")

    @property
    def parts(self) -> list[Part]:
        """Of the base, in the order in which they are merged: ties are settled at last."""
        return [*self.base.layers, self.base.rest]

    def logits(self, sample: Sequence[list[int]], *, quantized: bool) -> list[Tensor]:
        """Of the unmerged model, on its base as it was quantized in training if asked for."""
        quantization = self.quantization if quantized else None
        return self.base.logits(sample, quantization=quantization, put=self._put, dropped=self._forget)

    def _put(self, part: Part) -> None:
        model = self.base.model
        put_adapters_(model, part_of_plan(model, self._plan, part.has))
        load_adapter_state_dict(model, {name: self._state[name] for name in adapter_state_dict(model)})

    def _forget(self) -> None:
        forget_biases(self.base.model)

    def merged_logits(self, sample: Sequence[list[int]], *, dequantized: bool) -> list[Tensor]:
        """Of the merged model, as :meth:`write` would write it."""

        def put(part: Part) -> None:
            if dequantized:
                dequantize_(part.module)
            self._merge(part)

        quantization = self.quantization if dequantized else None
        with _ties_kept(self.base.model):
            return self.base.logits(sample, quantization=quantization, put=put, dropped=self._forget)

    def _merge(self, part: Part) -> None:
        """Put the adapters of a part that has its weights on it, and into it."""
        model: Any = self.base.model
        self._put(part)
        if any(True for _ in adapter_modules(model)) or trained_biases(model):
            merge_lora(model)

    def write(self, folder: Path, *, dequantized: bool) -> None:
        """Write the weights of the merged model.

        Args:
            folder: that is there.
            dequantized: into the weights that a quantized base computes with.

        Raises:
            ValueError: if an adapter cannot be merged, or anything holds NaN or infinity.
        """
        model: Any = self.base.model
        quantization = self.quantization if dequantized else None
        files = Files(folder, self.base.stored.largest_file)
        for part in self.parts:
            with self.base.held(part, quantization):
                if quantization is not None:
                    dequantize_(part.module)
                self._merge(part)
                tensors = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
                check_finite(tensors, "the base")
                tied = set() if part.name else set(model.all_tied_weights_keys)
                for name, tensor in tensors.items():
                    if name not in tied:
                        files.add(name, tensor)
                # What merging has found of ties; the part is given back as it was.
                keys = model.all_tied_weights_keys
            model.all_tied_weights_keys = keys
        files.close()


class Files:
    """Safetensors files of about one size with an index, as transformers reads them; one without if all fits into it.

    Args:
        folder: where to.
        most_bytes: of one file, unless a tensor is larger.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder = folder
        self._most_bytes = min(most_bytes, MOST_BYTES)
        self._pending: dict[str, Tensor] = {}
        self._written: list[tuple[Path, dict[str, int]]] = []
        self._num_parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is kept until its file is full."""
        held = sum(other.nbytes for other in self._pending.values())
        if self._pending and held + tensor.nbytes > self._most_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._num_parameters += tensor.numel()

    def _flush(self) -> None:
        path = self._folder / f"{len(self._written)}.safetensors.partial"
        save_file(self._pending, path, {"format": "pt"})
        self._written.append((path, {name: tensor.nbytes for name, tensor in self._pending.items()}))
        self._pending = {}

    def close(self) -> None:
        """Write what is left, and the index."""
        if self._pending:
            self._flush()
        number = len(self._written)
        if number == 1:
            self._written[0][0].replace(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for at, (path, sizes) in enumerate(self._written, 1):
            name = f"model-{at:05}-of-{number:05}.safetensors"
            path.replace(self._folder / name)
            weight_map |= dict.fromkeys(sizes, name)
        total = {
            "total_parameters": self._num_parameters,
            "total_size": sum(sum(sizes.values()) for _, sizes in self._written),
        }
        content = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _ties_kept(model: Any) -> Iterator[None]:
    """Afterwards a model says of its tied weights what it said before, whatever merging found."""
    keys = model.all_tied_weights_keys
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    ties = [getattr(config, "tie_word_embeddings", None) for config in configs]
    try:
        yield
    finally:
        model.all_tied_weights_keys = keys
        for config, tie in zip(configs, ties, strict=True):
            if tie is not None:
                config.tie_word_embeddings = tie


def check_finite(tensors: Mapping[str, Tensor], base: str) -> None:
    """Check what is to be written.

    Raises:
        ValueError: naming the base, and what of it is NaN or infinity.
    """
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"{base} holds NaN or infinity in {some(broken)}: nothing is merged. Take an undamaged copy")
