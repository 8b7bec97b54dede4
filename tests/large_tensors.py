"""Which large tensors are alive at once while a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LargeTensors(TorchDispatchMode):
    """Counts how many storages of at least ``num_bytes`` that ran operations made are alive at once."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.made: dict[int, StorageWeakRef] = {}
        self.num_made = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.made = {key: ref for key, ref in self.made.items() if not ref.expired()}
        for tensor in tree_iter(out):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().nbytes() < self.num_bytes:
                continue
            key = tensor.untyped_storage()._cdata
            if key not in inputs and key not in self.made:
                self.made[key] = StorageWeakRef(tensor.untyped_storage())
                self.num_made += 1
        self.most = max(self.most, len(self.made))
        return out
