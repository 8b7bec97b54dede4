"""Give modules back what a forward pass changed on them.

Some models note on themselves how long a row was (rotary frequencies) or switch to another kind of attention for short
rows. A trial, or a pass on tensors without values, must not leave that behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module of ``model`` has the attributes, parts and tensors that it had before."""
    saved = [(module, dict(vars(module)), [dict(vars(module)[name]) for name in _TABLES]) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, tables in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in zip(_TABLES, tables, strict=True):
                table = vars(module)[name]
                table.clear()
                table.update(entries)
