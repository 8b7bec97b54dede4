"""Adapters on disk, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT writes is read (``stored_adapter.py``), and what is written here (``adapter_writing.py``) PEFT reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.adapters.layers import adapter_modules, lora_layers
from lit_lora.adapters.matching import some
from lit_lora.adapters.module_names import named_modules
from lit_lora.adapters.named_adapters import active_adapters
from lit_lora.adapters.subtracted_start import with_starts
from lit_lora.adapters.task_heads import as_pretrained, task_type
from lit_lora.base import base_weight
from lit_lora.base.trained_on import noted, noted_metadata
from lit_lora.interchange.adapter_state import adapter_state_dict, load_adapter_state_dict
from lit_lora.interchange.adapter_writing import write_adapter
from lit_lora.interchange.checksum import check_adapter
from lit_lora.interchange.peft_config import from_peft_config, to_peft_config
from lit_lora.interchange.peft_folder import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    find_folder,
    find_weights,
    read_config,
    read_tensors,
)
from lit_lora.interchange.stored_adapter import load_adapter
from lit_lora.interchange.tokenizer_files import tokenizer_files
from lit_lora.interchange.written_adapter import config_to_write, portable_state

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "adapter_state_dict",
    "find_folder",
    "from_peft_config",
    "load_adapter",
    "load_adapter_state_dict",
    "save_adapter",
    "to_peft_config",
]

CARD_NAME = "README.md"


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model_name: str | None = None,
    model_card: str | None = None,
    portable: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Write the adapter of a model as a folder that PEFT, transformers and vLLM load.

    Args:
        model: a model with adapters.
        folder: where to; made if missing. Other files in it are left alone.
        base_model_name: Hub id or folder of the base; taken from a transformers model if None.
        model_card: text of ``README.md``; none is written if None.
        portable: fold every layer's scale into B and pad to one rank, for tools without rsLoRA and rank or alpha
            patterns (vLLM, llama.cpp).
        tokenizer: what it was trained with, saved beside it with its chat template; None leaves it out.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no adapter, or it holds nothing but zeros, NaN or infinity.
        OSError: if the folder cannot be written to. An earlier adapter in it is then as it was.
    """
    modules = dict(adapter_modules(model))
    if not modules:
        raise ValueError("the model has no adapters: call inject_lora first")
    if len(active := active_adapters(model)) > 1:
        raise ValueError(f"adapters {active} are active: set_adapter the one to save")
    config = config_to_write(model, next(iter(modules.values())).config, portable)
    config, state = with_starts(model, config, adapter_state_dict(model))
    state = portable_state(model, state, config.r) if portable else state
    tensors = {f"{PREFIX}{name}": tensor.detach() for name, tensor in state.items()}
    _check_worth_saving(model, tensors)
    content = to_peft_config(
        config,
        base_model_name or _name_of_base(model),
        revision=noted(model).revision,
        task_type=task_type(model, config.modules_to_save or (), named_modules(model)),
        fan_in_fan_out=any(base_weight.is_conv1d(layer.base_layer) for _, layer in lora_layers(model)),
    )
    more = {} if tokenizer is None else tokenizer_files(tokenizer)  # what is complete has its tokenizer
    if model_card is not None:
        more[CARD_NAME] = model_card.encode()
    return write_adapter(Path(folder), tensors, content, noted_metadata(model), more)


def is_whole_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter just as it was written, by its checksum."""
    try:
        weights = find_weights(folder)
        check_adapter(weights, read_tensors(weights), from_peft_config(read_config(folder / CONFIG_NAME)))
    except (OSError, ValueError):
        return False
    return True


def _check_worth_saving(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the adapter holds NaN or infinity in {some(broken)}: it is not saved")
    layers = list(lora_layers(model))
    # All zero means not gathered, or never initialised.
    if layers and not any(layer.starts_nonzero.any() for _, layer in layers):
        raise ValueError("every A of the adapter is zero: it was not gathered or never initialised, nothing is saved")


def _name_of_base(model: nn.Module) -> str | None:
    pretrained = as_pretrained(model)
    return (pretrained.config.name_or_path or None) if pretrained is not None else None
