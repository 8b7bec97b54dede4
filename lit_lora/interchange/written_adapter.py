"""What is written of an adapter: its configuration in words that every reader understands, and its tensors for all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lit_lora.adapters.layers import LoRALayer, adapter_modules, lora_layers
from lit_lora.adapters.matching import resolve_pattern
from lit_lora.adapters.module_names import named_modules
from lit_lora.adapters.parameters import LoRAParameter, targeted_layers
from lit_lora.config import LoRAConfig
from lit_lora.wording import in_words_of


def config_to_write(model: nn.Module, config: LoRAConfig, portable: bool) -> LoRAConfig:
    """The configuration in words that every reader understands alike.

    Names are written as they were given. Whatever has to be worked out ("all-linear", expressions, exclusions, indices
    of layers) is written as the names that it came to: readers do that in other ways. PEFT (0.21) makes ends of names
    of an expression on some mixtures of experts, and versions of it differ in which number is a layer's index.

    Args:
        model: with adapters.
        config: as it was injected.
        portable: without what tools do not know.
    """
    if portable and (config.use_dora or config.bias != "none" or config.lora_bias):
        what = "what DoRA adds is no product of two small matrices" if config.use_dora else "other tools refuse biases"
        raise ValueError(
            f"this adapter has no portable form: {what}. "
            + in_words_of(
                python="Write it with portable=False for PEFT, or merge it",
                command_line="Write it with --portable false for PEFT, or merge it with lit-lora merge",
            )
        )
    layers = dict(targeted_layers(model))
    others = [
        f"{name} is a {type(layer.base_layer).__name__}" for name, layer in lora_layers(model) if not layer.is_portable
    ]
    if portable and others:
        raise ValueError(
            f"this adapter has no portable form: {others[0]}, and other tools put A and B on linear layers. "
            + in_words_of(
                python="Write it with portable=False for PEFT, or merge it",
                command_line="Write it with --portable false for PEFT, or merge it with lit-lora merge",
            )
        )
    modules = {name: layer for name, layer in layers.items() if not isinstance(layer, LoRAParameter)}
    resolved = isinstance(config.target_modules, str) or config.layers_to_transform is not None
    resolved = resolved or bool(config.exclude_modules) or config.ensure_weight_tying
    # Of adapters that PEFT began as one, both are written, by their names.
    config = replace(config, ensure_weight_tying=config.ensure_weight_tying and bool(config.modules_to_save))
    if layers and not modules:
        resolved, config = False, replace(config, target_modules=[])
    if modules and (portable or resolved):
        config = replace(
            config,
            target_modules=_shortest_names(model, modules),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    if portable and layers:
        r = max(layer.r for layer in layers.values())
        return replace(config, r=r, lora_alpha=r, use_rslora=False, rank_pattern={}, alpha_pattern={})
    # Keys are sorted in the file, and of several patterns that match a layer the first one counts.
    ranks, alphas = dict(sorted(config.rank_pattern.items())), dict(sorted(config.alpha_pattern.items()))
    as_read = resolve_pattern("rank_pattern", ranks, layers), resolve_pattern("alpha_pattern", alphas, layers)
    if any(as_read[0].get(name, config.r) != layer.r for name, layer in layers.items()):
        ranks = {name: layer.r for name, layer in layers.items() if layer.r != config.r}
    if any(as_read[1].get(name, config.lora_alpha) != layer.lora_alpha for name, layer in layers.items()):
        alphas = {name: layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != config.lora_alpha}
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _shortest_names(model: nn.Module, layers: Mapping[str, LoRALayer]) -> list[str] | str:
    """The last parts of the paths where they say it all, which every reader understands; else whole paths.

    An expression where a whole path is also the end of another one.
    """
    inside = tuple(f"{name}." for name, _ in adapter_modules(model))
    names = [name for name in named_modules(model) if name and not name.startswith(inside)]
    outside = {name.rpartition(".")[2] for name in names if name not in layers}
    chosen = {end if (end := name.rpartition(".")[2]) not in outside else name for name in layers}
    mistakable = any(name not in layers and name.endswith(tuple(f".{entry}" for entry in chosen)) for name in names)
    return "|".join(map(re.escape, sorted(layers))) if mistakable else sorted(chosen)


def portable_state(model: nn.Module, state: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
    """The tensors of the adapter at one rank, with every layer's scale in B.

    Args:
        model: with adapters.
        state: of its adapter.
        r: at least the highest rank.
    """
    state = dict(state)
    for name, layer in lora_layers(model):
        name_of_A, name_of_B = (f"{name}.{tensor}" for tensor in layer.tensor_names)
        lora_A, lora_B = state[name_of_A], state[name_of_B]
        scaled = (lora_B.float() * layer.scaling).to(lora_B.dtype)
        state[name_of_A], state[name_of_B] = layer.widened(lora_A, scaled, r)
    return state
