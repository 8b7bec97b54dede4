"""Which base an adapter belongs to: a SHA-256 over all of its weights, and the configuration that computes with them.

Weights in files are hashed as they are stored, tensor by tensor, so that the dtype they are loaded in, quantizing, and
the way they are divided into shards change nothing. That happens in the background while the model is loaded, and once:
what was found is kept in the cache, by all that a file system knows of the file (place, size, times of change, inode).
Random weights are told by what makes them. Other models are hashed in memory.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from lit_lora.files.atomic import atomic_write
from lit_lora.files.environment import cache_folder

NOTE = "lit_lora_base_hash"
"""Attribute of a model that was loaded with :func:`note_base`."""

_BUFFER = 2**24  # bytes


class BaseHash:
    """The hash of a base, computed in the background."""

    def __init__(self, compute: Callable[[], str], num_bytes: int = 0) -> None:
        self.num_bytes = num_bytes
        self.elapsed_s = 0.0
        """Seconds that the computation took, beside everything else; next to nothing where it was known."""
        self._found: str | Exception = ""
        self._compute = compute
        self._thread = threading.Thread(target=self._run, name="base-hash", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._found = self._compute()
        except Exception as error:  # raised where it is asked for
            self._found = error
        self.elapsed_s = time.perf_counter() - started

    @property
    def value(self) -> str:
        """Kind of source and SHA-256, as in ``files:1a2b...``. Waits for the computation.

        Raises:
            OSError: if a file could not be read.
            ValueError: if it is damaged.
        """
        self._thread.join()
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def __str__(self) -> str:
        return f"{short(self.value)} ({self.num_bytes / 1e6:,.0f} MB hashed in {self.elapsed_s:.1f} s beside loading)"

    def __deepcopy__(self, memo: Any) -> BaseHash:
        return self


def short(value: str) -> str:
    """A hash as people compare it."""
    kind, _, digest = value.rpartition(":")
    return f"{kind}:{digest[:12]}" if kind else digest[:12]


def note_base(model: nn.Module, found: BaseHash | None) -> None:
    """Note on a model which base it is; None if that is not known, so that it is hashed in memory when asked for."""
    if found is not None:
        setattr(model, NOTE, found)


def forget_base(model: nn.Module) -> None:
    """Take the note away: nothing is known."""
    vars(model).pop(NOTE, None)


def known_hash(model: nn.Module) -> BaseHash | None:
    """The hash of a model's base as it was noted."""
    return vars(model).get(NOTE)


def base_hash(model: nn.Module) -> BaseHash:
    """The hash of a model's base: as noted when it was loaded, else of its frozen tensors as they are in memory."""
    return known_hash(model) or _in_memory(model)


def hash_weights(location: str, gguf_file: str | None, revision: str | None) -> BaseHash | None:
    """The hash of weights in files.

    Args:
        location: folder or Hub id.
        gguf_file: name of the GGUF file in it, if it is one.
        revision: branch, tag or commit on the Hub.

    Returns:
        None if the files are not on this machine.
    """
    paths = weight_files(location, gguf_file, revision)
    configs = [] if gguf_file else _files(location, ["config.json"], revision)
    return hash_files(paths, configs[0] if configs else None) if paths else None


def hash_files(paths: Sequence[Path], config: Path | None = None) -> BaseHash:
    """The hash of weights that are stored in these files (safetensors or GGUF), and of a ``config.json``."""
    folder = cache_folder("hashes")

    def compute() -> str:
        entries = [entry for path in paths for entry in _known_or_hashed(path, folder)]
        return f"files:{_combined(entries + ([] if config is None else [_of_config(config)]))}"

    return BaseHash(compute, sum(path.stat().st_size for path in paths))


def hash_recipe(**recipe: Any) -> BaseHash:
    """The hash of random weights, by what makes them."""
    recipe |= {"torch": torch.__version__, "machine": platform.machine()}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
    return BaseHash(lambda: f"random:{digest}")


def _in_memory(model: nn.Module) -> BaseHash:
    names = {name for name, _ in model.named_parameters()}
    tensors = {
        name.replace(".base_layer", "").replace("_orig_mod.", ""): tensor.detach()
        for name, tensor in model.named_parameters()
        if not tensor.requires_grad
        and not tensor.is_meta
        and ".lora_" not in name
        and name.replace(".base_layer.", ".copy.") not in names - {name}  # a trained copy stands for it
    }

    def compute() -> str:
        return f"memory:{_combined(_described(tensors))}"

    return BaseHash(compute, sum(tensor.nbytes for tensor in tensors.values()))


_NO_EFFECT = re.compile(
    r"_.*|.*_token_id|architectures|auto_map|dtype|torch_dtype|quantization_config|transformers_version|use_cache"
)
"""Fields of a ``config.json`` that change nothing in what a forward pass computes, or are compared elsewhere."""


def _of_config(path: Path) -> tuple[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # loading the model says what is wrong with it
        content = {}
    fields = {name: value for name, value in content.items() if not _NO_EFFECT.fullmatch(name)}
    return "config", hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _described(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, str]]:
    for name, tensor in tensors.items():
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}", hashlib.sha256(data).hexdigest()


def _combined(tensors: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for described, value in sorted(tensors):
        digest.update(f"{described} {value}\n".encode())
    return digest.hexdigest()


def _known_or_hashed(path: Path, cache_dir: Path) -> list[tuple[str, str]]:
    """Description and SHA-256 of each tensor in a file; a GGUF file counts as one."""
    path = path.resolve()
    stat = path.stat()
    identity = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]
    kept = cache_dir / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.json"
    with _one_at_a_time(kept):
        if (known := _read_known(kept)) is not None:
            return known
        found = _hashed(path)
        if path.stat().st_mtime_ns != stat.st_mtime_ns:
            raise ValueError(f"{path} changed while it was read: load the model again when it is complete")
        with suppress(OSError):  # a cache that cannot be written to costs time and nothing else
            atomic_write(kept, lambda file: file.write(json.dumps(found).encode()))
    return found


def _read_known(kept: Path) -> list[tuple[str, str]] | None:
    try:
        return [(described, value) for described, value in json.loads(kept.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # not there, or damaged: it is found again
        return None


@contextmanager
def _one_at_a_time(kept: Path) -> Iterator[None]:
    """Of several processes that load one model, one hashes it, and the others take what it found."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(kept.with_suffix(".lock"))
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _hashed(path: Path) -> list[tuple[str, str]]:
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return [(path.suffix, _stream(file, path.stat().st_size))]
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path} is not a whole safetensors file: its header does not end")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        found = []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            file.seek(8 + size + start)
            found.append((f"{name} {entry['dtype']} {tuple(entry['shape'])}", _stream(file, end - start)))
        return found


def _stream(file: Any, num_bytes: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_BUFFER, num_bytes) or 1))
    while num_bytes:
        read = file.readinto(buffer[: min(len(buffer), num_bytes)])
        if not read:
            raise ValueError(f"{file.name} ends {num_bytes} bytes too early")
        digest.update(buffer[:read])
        num_bytes -= read
    return digest.hexdigest()


def weight_files(location: str, gguf_file: str | None, revision: str | None) -> list[Path]:
    """The files that transformers reads weights from, in a folder or in the Hub's cache; empty if not all are there."""
    if gguf_file:
        return _files(location, [gguf_file], revision)
    if single := _files(location, ["model.safetensors"], revision):
        return single
    if not (index := _files(location, ["model.safetensors.index.json"], revision)):
        return []
    try:
        names = sorted(set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):  # loading the model says what is wrong with it
        return []
    return _files(location, names, revision)


def _files(location: str, names: Sequence[str], revision: str | None) -> list[Path]:
    folder = Path(location)
    found = []
    for name in names:
        path: Path | str | object = folder / name
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(location, name, revision=revision)
        if not isinstance(path, (str, Path)) or not Path(path).is_file():
            return []
        found.append(Path(path))
    return found
