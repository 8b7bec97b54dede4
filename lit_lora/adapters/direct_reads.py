"""Layers whose weight a model reads without calling them, such as ``self.dt_proj.weight @ x`` in Mamba.

An adapter around such a layer is not computed where the weight is read, and merging it would change the model. Which
layers may be read so, the source of the model's classes says, on any hardware and without a run. Some of these reads
are on paths that are not taken: a forward of a transformers model on a few tokens shows those that are. What is read
through a local variable (``layer.weight``) is not seen.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.task_heads import as_pretrained
from lit_lora.base.shards import is_sharded

_METADATA = {
    "data_ptr", "device", "dim", "dtype", "element_size", "grad", "is_contiguous", "is_cuda", "is_floating_point",
    "is_meta", "itemsize", "layout", "nbytes", "ndim", "numel", "requires_grad", "shape", "size", "stride",
}  # fmt: skip
"""What may be read of a weight without computing with it."""

_TORCH_ENCODER = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Read weights in evaluation, unless :func:`call_adapted_layers` tells them not to."""


def direct_reads(model: nn.Module, modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """Layers among ``names`` that an adapter cannot serve -> why.

    Args:
        model: without adapters.
        modules: of the model, by name.
        names: of the layers that are to be adapted.
    """
    pretrained = as_pretrained(model)
    suspected: dict[str, str] = {}
    for name in names:
        for owner, path in _seen_from_above(name):
            reader = type(modules[owner])
            if any(_same(chain, path) for chain in _weights_read_by(reader)):  # type: ignore[arg-type]
                suspected[name] = (
                    f"{reader.__name__} reads its weight without calling it, so that an adapter would not be computed "
                    "and merging it would change the model"
                )
    if not suspected:
        return {}
    can_be_watched = pretrained is not None and not is_sharded(model)  # whose weights are others within a forward
    sound = _sound_in_a_forward(pretrained, modules, suspected) if can_be_watched else None
    if sound is None:
        # One without values may need them for its forward only, which then says nothing.
        valueless = any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters())
        sound = set(suspected) if valueless else set()
    return {name: reason for name, reason in suspected.items() if name not in sound}


def call_adapted_layers(model: nn.Module) -> None:
    """Let ``nn.TransformerEncoderLayer`` call adapted layers in evaluation too, where it would read their weights.

    PEFT does not: in evaluation it silently computes such a layer without its adapters.
    """
    for module in model.modules():
        if isinstance(module, _TORCH_ENCODER) and next(adapter_modules(module), None) is not None:
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # a condition of torch's fast path
            else:
                module.use_nested_tensor = False  # only the fast path takes nested tensors


# ---------------------------------------------------------------------- in the source

_Chain = tuple[str, ...]


@cache
def _weights_read_by(kind: type[nn.Module]) -> frozenset[_Chain]:
    """Paths from ``self`` to layers whose weight a forward of this class may read; "?" where they do not start there.

    An index in a path is "*".
    """
    methods: dict[str, ast.FunctionDef] = {}
    for base in kind.__mro__:
        if not issubclass(base, nn.Module) or base is nn.Module or base in _TORCH_ENCODER:
            continue
        for node in getattr(_definition(base), "body", []):
            if isinstance(node, ast.FunctionDef):
                methods.setdefault(node.name, node)
    read: set[_Chain] = set()
    waiting, done = ["forward"], set()
    while waiting:
        name = waiting.pop()
        if name in done or name not in methods:
            continue
        done.add(name)
        arguments = methods[name].args.args
        for root, chain in _chains(methods[name]):
            if arguments and root == arguments[0].arg:
                waiting.append(chain[0])
            else:
                chain = ("?", *chain[-2:])
            if chain[-1] == "weight" and len(chain) > 1:
                read.add(chain[:-1])
    return frozenset(read)


def _same(chain: _Chain, path: _Chain) -> bool:
    if chain[0] == "?":
        return chain[1:] == path[-1:]
    return len(chain) == len(path) and all(
        c == p or (c == "*" and p.isdigit()) for c, p in zip(chain, path, strict=True)
    )


def _chains(node: ast.AST) -> Iterator[tuple[str, _Chain]]:
    """Every ``name.part.part`` in the code below ``node``, up to a weight; where only its metadata are read, none."""
    if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("hasattr", "id", "isinstance", "len", "type"):
        return
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        parts: list[str] = []
        start: ast.AST = node
        while isinstance(start, (ast.Attribute, ast.Subscript)):
            if isinstance(start, ast.Subscript):
                yield from _chains(start.slice)
            parts.insert(0, start.attr if isinstance(start, ast.Attribute) else "*")
            start = start.value
        if not isinstance(start, ast.Name):
            yield from _chains(start)
            return
        if "weight" in parts:
            end = parts.index("weight") + 1
            if any(part in _METADATA for part in parts[end : end + 2]):
                return
            parts = parts[:end]
        yield start.id, tuple(parts)
        return
    for child in ast.iter_child_nodes(node):
        yield from _chains(child)


def _definition(kind: type) -> ast.ClassDef | None:
    """None where there is no source, as for classes that were typed in."""
    try:
        path = inspect.getsourcefile(kind)
        return _classes_in(path).get(kind.__qualname__) if path is not None else None
    except (OSError, TypeError, SyntaxError):
        return None


@cache
def _classes_in(path: str) -> dict[str, ast.ClassDef]:
    found: dict[str, ast.ClassDef] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[f"{prefix}{child.name}"] = child
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                walk(child, f"{prefix}{child.name}.<locals>.")
            else:
                walk(child, prefix)

    walk(ast.parse(Path(path).read_bytes()), "")
    return found


def _seen_from_above(name: str) -> Iterator[tuple[str, _Chain]]:
    """Every module that ``name`` lies in, and the path from there."""
    parts = name.split(".")
    for count in range(len(parts)):
        yield ".".join(parts[:count]), tuple(parts[count:])


# ---------------------------------------------------------------------- in a forward


def _sound_in_a_forward(model: Any, modules: Mapping[str, nn.Module], names: Collection[str]) -> set[str] | None:
    """Layers that are called and not read otherwise, in a forward of training and one of evaluation.

    None where the model cannot be run on the inputs that transformers has for it.
    """
    watch = _Watch({name: modules[name] for name in names})
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
        for mode in (True, False):
            model.train(mode)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # its statistics would move
            with torch.no_grad(), torch.random.fork_rng(devices), watch.calls(model), watch:
                model(**inputs)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError, KeyError):
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return watch.called - watch.read


class _Watch(TorchDispatchMode):
    """Sees every operation, and whether a weight goes into one outside of the layers that hold it."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.read: set[str] = set()
        self._layers = layers
        self._names: dict[int, set[str]] = {}
        for name, layer in layers.items():
            self._names.setdefault(_storage(layer.weight), set()).add(name)  # type: ignore[arg-type]
        self._inside: list[int] = []

    @contextmanager
    def calls(self, model: nn.Module) -> Iterator[None]:
        """Within the context, calls of the layers and of those that share their weights are told from reads."""
        holders = [
            module
            for module in model.modules()
            if any(_storage(p) in self._names for p in module.parameters(recurse=False))
        ]
        names = {id(layer): name for name, layer in self._layers.items()}

        def entered(module: nn.Module, _: Any) -> None:
            self._inside.append(id(module))
            if id(module) in names:
                self.called.add(names[id(module)])

        def left(*_: Any) -> None:
            self._inside.pop()

        hooks = [module.register_forward_pre_hook(entered) for module in holders]
        hooks += [module.register_forward_hook(left, always_call=True) for module in holders]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, Tensor):
                    self.read |= self._names.get(_storage(leaf), set())
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
