"""Fields of a dataclass as plain values of the types that their annotations name, which a file can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def convert_fields(config: Any) -> None:
    """Give every field the plain type of its annotation, so that what is set can also be written to a file.

    Sets and tuples become lists, numbers of numpy plain ones, ``torch.bfloat16`` its name. Whatever else is not of the
    type is refused: a bool is no integer, a string no number and no list.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _converted(value, hint))  # frozen for everyone else
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name} must be {_described(hint)}, got {repr(value)[:80]}") from error


def _converted(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``; TypeError if it is something else, OverflowError if it is not finite."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return _converted(value, part)
            except TypeError:
                continue
    elif origin is Literal:
        if isinstance(parts[0], str):
            value = str(value).removeprefix("torch.")
        for known in parts:
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return known
    elif origin is list and isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        items = [_converted(item, parts[0]) for item in value]
        return sorted(items) if isinstance(value, Set) else items  # a set's own order differs from run to run
    elif origin is dict and isinstance(value, Mapping):
        return {_converted(key, parts[0]): _converted(item, parts[1]) for key, item in value.items()}
    elif hint is str and isinstance(value, str) and value:
        return str(value)
    elif hint in (bool, NoneType) and isinstance(value, hint):
        return value
    elif hint in (int, float) and not isinstance(value, bool):
        if isinstance(value, Integral):
            float(value)  # one that has no float has no place in a formula
            return int(value)
        if hint is float and isinstance(value, Real):
            if not math.isfinite(value):
                raise OverflowError(f"{value} is not finite")
            return float(value)
    raise TypeError(f"{value!r} is not {_described(hint)}")


_WORDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false", NoneType: "null"}
_PLURALS = {int: "integers", float: "finite numbers", str: "names", list[int]: "lists of integers"}


def _described(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        several = len(parts) > 1 and isinstance(parts[0], str)
        return f"one of {', '.join(parts)}" if several else " or ".join(map(str, parts))
    if origin is list:
        return f"a list of {_PLURALS[parts[0]]}"
    if origin is dict:
        return f"a mapping of {_PLURALS[parts[0]]} to {_PLURALS[parts[1]]}"
    return " or ".join(map(_described, parts)) if parts else _WORDS[hint]
