"""Which implementation of attention a model of transformers computes by, for a while.

transformers lets it be chosen by name in a model's configs, so nothing of the model is patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedConfig, PreTrainedModel


def attention_implementation(model: PreTrainedModel, name: str) -> AbstractContextManager[None]:
    """Within, ``model`` computes its attention by the implementation that is registered under this name.

    Unlike ``set_attn_implementation`` this does not ask whether the model says that it supports it, and gives back what
    each part of the model had.
    """
    return _Selection(_configs(model), name)


def implementations(model: PreTrainedModel) -> set[str | None]:
    """Those that the parts of a model compute their attention by."""
    return {config._attn_implementation_internal for config in _configs(model)}


def selection_for_recompute() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For ``torch.utils.checkpoint``: contexts of the forward pass and of its repetition in the backward pass.

    The backward pass runs outside of ``attention_implementation``, and its attention must be that of the forward pass.
    """
    active = _Selection.active
    return nullcontext(), nullcontext() if active is None else _Selection(active.configs, active.name)


class _Selection(AbstractContextManager[None]):
    """Context in which all these configs name one implementation of attention."""

    active: _Selection | None = None

    def __init__(self, configs: Sequence[PreTrainedConfig], name: str) -> None:
        self.configs = configs
        self.name = name

    def __enter__(self) -> None:
        self._before = [config._attn_implementation_internal for config in self.configs]
        self._outer, _Selection.active = _Selection.active, self
        for config in self.configs:
            config._attn_implementation_internal = self.name  # the public property would set others with it

    def __exit__(self, *_: object) -> None:
        _Selection.active = self._outer
        for config, name in zip(self.configs, self._before, strict=True):
            config._attn_implementation_internal = name


_CONFIGS: WeakKeyDictionary[PreTrainedModel, list[PreTrainedConfig]] = WeakKeyDictionary()


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that a part of the model may ask for its attention."""
    if model not in _CONFIGS:
        found: dict[int, PreTrainedConfig] = {}
        waiting = [
            config for module in model.modules() if isinstance(config := vars(module).get("config"), PreTrainedConfig)
        ]
        while waiting:
            config = waiting.pop(0)
            if id(config) not in found:
                found[id(config)] = config
                waiting += [
                    sub
                    for name in config.sub_configs
                    if isinstance(sub := getattr(config, name, None), PreTrainedConfig)
                ]
        _CONFIGS[model] = list(found.values())
    return _CONFIGS[model]
