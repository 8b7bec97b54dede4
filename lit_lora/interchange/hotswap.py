"""Another adapter of the same shapes, copied into the one that is in a model: nothing is wrapped or compiled again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.matching import resolve_pattern
from lit_lora.adapters.named_adapters import active_adapters
from lit_lora.adapters.parameters import targeted_layers
from lit_lora.adapters.trainable_tokens import TrainableTokens
from lit_lora.interchange.adapter_state import adapter_state_dict, check_state, load_adapter_state_dict
from lit_lora.interchange.stored_adapter import read_adapter, stored_values


@torch.no_grad()
def hotswap_adapter(model: nn.Module, folder_or_hub_id: str | Path) -> None:
    """Copy the values of an adapter into the active one of a model, which keeps its name, and its tensors their places.

    A compiled model runs on as it was compiled. It has the scale of each layer built in, so where that of the new
    adapter is another one, B is multiplied by their ratio; the product is the same.

    Args:
        model: with one active adapter.
        folder_or_hub_id: of an adapter for the same layers, of the same ranks.

    Raises:
        ValueError: if not one adapter is active, or the other one has other layers, ranks, rows or kinds. The model is
            then unchanged.
    """
    active = active_adapters(model)
    if len(active) != 1:
        raise ValueError(f"adapters {active} are active: set_adapter the one to copy into")
    if any(not module.enabled for _, module in adapter_modules(model)):
        raise ValueError("the adapter is switched off: leave disable_lora before it is exchanged")
    stored = read_adapter(folder_or_hub_id)
    own = adapter_state_dict(model)
    shapes = {tensor.name: tensor.shape for tensor in stored.header.values()}
    check_state({name: tuple(tensor.shape) for name, tensor in own.items()}, shapes, stored.source)
    rows = {name: module.token_ids for name, module in adapter_modules(model) if isinstance(module, TrainableTokens)}
    wanted = stored.config.rows_to_train("")
    if any(ids not in wanted.values() for ids in rows.values()):
        raise ValueError(f"{stored.source} trains other rows than {active[0]!r}: {wanted}, there {rows}")
    values = stored_values(stored)
    layers = list(targeted_layers(model))
    alphas = resolve_pattern("alpha_pattern", stored.config.alpha_pattern, dict(layers))
    named = {id(layer): layer.factors()[1] for _, layer in layers}
    places = {tensor.data_ptr(): name for name, tensor in own.items()}
    for name, layer in layers:
        ratio = layer.scale(stored.config, layer.r, alphas.get(name, stored.config.lora_alpha)) / layer.scaling
        if ratio != 1:
            key = places[named[id(layer)].data_ptr()]
            values[key] = values[key] * ratio
            if layer.added_bias is not None:
                values[f"{key.removesuffix('weight')}bias"] *= ratio
    load_adapter_state_dict(model, {name: values[name] for name in own})
