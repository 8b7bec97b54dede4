"""Checkpoints that survive kills and can be told apart: atomic, checksummed, and tied to their base model.

What is in one: adapter parameters, optimizer and schedule (Lightning's part), the random state of every rank and the
gradients of an unfinished accumulation window (ours), and who the base is. The base itself is not in it.

Each file carries the SHA-256 of its own content, so that damage is found on reading; a file under a final name was
complete when it took that name. Only tensors and plain types go in: files are read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn

from lit_lora.atomic import atomic_write

CHECKSUM = "lit_lora_checksum"
SUFFIX = ".ckpt"
_SAMPLES = 64


class DamagedCheckpointError(ValueError):
    """A checkpoint file that cannot be read, or whose content is not what was written."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint reading and writing, atomic and with a checksum.

    Lightning's own goes through the system's temporary folder and swallows a PermissionError
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``path`` whole or not at all.

        Raises:
            OSError: naming the folder, for a full disk or missing permission; an older file is as it was.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {**checkpoint, CHECKSUM: checksum(checkpoint)}
        atomic_write(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint and verify it, without running code from the file.

        Raises:
            DamagedCheckpointError: if the file is incomplete or was changed.
            FileNotFoundError: if there is none.
        """
        return read_checkpoint(path, map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file, if it is there."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """See :meth:`AtomicCheckpointIO.load_checkpoint`. Files of other Lightning projects have no checksum to verify."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a broken file
        # The first sentence: what follows advises to run what is in the file.
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise DamagedCheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise DamagedCheckpointError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    expected = content.pop(CHECKSUM, None)
    if expected is not None and checksum(content) != expected:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: its content does not match its checksum")
    return content


def newest_checkpoint(*folders: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in these folders that is complete and undamaged.

    Returns:
        Its path (None if there is none), and what was wrong with each newer one.
    """
    problems = []
    candidates = [path for folder in folders for path in Path(folder).glob(f"*{SUFFIX}")]
    for path in sorted(candidates, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            read_checkpoint(path)
        except (DamagedCheckpointError, OSError) as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def checksum(content: Any) -> str:
    """SHA-256 over a nest of dicts, lists, tensors and plain values, independent of how it is stored."""
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        yield f"tensor {data.dtype} {tuple(data.shape)};".encode()
        if data.numel():
            yield data.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, dict):
        yield b"{"
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
        yield b"}"
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from _pieces(item)
        yield b"]"
    else:
        yield repr(value).encode()


def base_fingerprint(model: nn.Module) -> str:
    """Tells one frozen base from another: its parameters' names, shapes, and a sample of their values.

    Values are rounded to bfloat16 first, so that a base is the same whether it was loaded in 16 or 32 bits; a
    quantized one is another.
    """
    digest = hashlib.sha256()
    named = [(n.replace(".base_layer", "").replace("_orig_mod.", ""), p) for n, p in model.named_parameters()]
    for name, parameter in sorted(named, key=lambda item: item[0]):
        if parameter.requires_grad:
            continue
        data = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        if parameter.is_meta or data.numel() == 0:
            continue
        sample = data[:: max(1, data.numel() // _SAMPLES)][:_SAMPLES].cpu()
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process that training may draw from, as tensors and plain types."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            str(numpy_state[0]),
            torch.from_numpy(numpy_state[1].astype(np.int64)),
            *(float(part) for part in numpy_state[2:]),
        ],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), int(position), int(has_gauss), cached))


def describe_mismatch(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Fields that differ between two plain configurations, each as "name: saved X, now Y"."""
    plain = [json.loads(json.dumps(fields)) for fields in (saved, current)]
    keys = sorted(plain[0].keys() | plain[1].keys())
    return [
        f"{key}: saved {plain[0].get(key)!r}, now {plain[1].get(key)!r}"
        for key in keys
        if plain[0].get(key) != plain[1].get(key)
    ]
