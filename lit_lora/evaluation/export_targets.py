"""An adapter, or the model that it makes of its base, written for those who serve it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import AutoConfig, GenerationConfig

from lit_lora.base.load import load_config
from lit_lora.evaluation.export import export
from lit_lora.evaluation.merge import merge
from lit_lora.interchange.adapter_folder import base_of_adapter, folder_record, local_folder
from lit_lora.interchange.adapter_tokenizer import tokenizer_for
from lit_lora.interchange.gguf_architecture import Architecture
from lit_lora.interchange.gguf_file import Kind, write_adapter, write_model
from lit_lora.interchange.gguf_vocabulary import vocabulary
from lit_lora.interchange.ollama import modelfile, wrapping
from lit_lora.interchange.plain_adapter import check_plain, check_vllm_model, read_portable, vllm_rank, write_mlx
from lit_lora.wording import setting

Into = Literal["auto", "base", "dequantized"]
Target = Literal["peft", "portable", "hf", "gguf", "ollama", "vllm", "mlx"]


@dataclass(frozen=True)
class Source:
    """An adapter and the base that it goes with."""

    adapter: str
    """A checkpoint of a run, or the folder of an adapter."""
    base: str | None = None
    """Base model, as in ``load_base_model``; None for the one that the adapter names."""
    revision: str | None = None
    """Of the base on the Hub; None for the one that the adapter names."""
    other_base: bool = False
    """Take a base whose weights are not those of training."""
    trust_remote_code: bool = False
    """Run code that comes with the base."""

    @property
    def options(self) -> dict[str, Any]:
        """For merging and exporting."""
        names = ("base", "revision", "other_base", "trust_remote_code")
        return {name: getattr(self, name) for name in names}


class Shipped(NamedTuple):
    """What was written."""

    path: Path
    what: str
    """In words."""
    notes: list[str]
    """Commands and figures to print."""


def export_to(
    source: Source,
    output: str | Path,
    to: Target,
    *,
    into: Into = "auto",
    gguf_type: Kind = "f16",
    adapter_only: bool = False,
) -> Shipped:
    """Write an adapter, or its merged model, for a target.

    Args:
        source: what.
        output: where to: a folder, or for "gguf" a file.
        to: who is to read it.
        into: which weights of a quantized base are merged into, as for ``merge``.
        gguf_type: what the weights of a GGUF file are stored as.
        adapter_only: with "gguf", the adapter alone.

    Raises:
        ValueError: naming what the target cannot express.
    """
    if adapter_only and to != "gguf":
        raise ValueError(f"{setting('adapter_only', True)} is for {setting('to', 'gguf')}, and this is for {to}")
    if to in ("peft", "portable"):
        written = export(source.adapter, output, portable=to == "portable", **source.options)
        return Shipped(written.folder, f"adapter for {written.base}", [])
    path = Path(output)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: give a new name as output")
    if to == "gguf" and path.suffix != ".gguf":
        raise ValueError(f"output {path} is the name of a file for {setting('to', 'gguf')}: let it end in .gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path) as scratch:
        source = _in_a_folder(source, scratch)
        if to == "hf":
            merged = merge(source.adapter, path, into=into, **source.options)
            return Shipped(path, "merged model", merged.said())
        if to in ("vllm", "mlx") or adapter_only:
            return _adapter_alone(source, path, to, scratch, gguf_type)
        return _merged_gguf(source, path, to, scratch, into, gguf_type)


def _adapter_alone(source: Source, path: Path, to: Target, scratch: Path, gguf_type: Kind) -> Shipped:
    place = base_of_adapter(source.adapter, source.base, source.revision)
    target = {"vllm": "vLLM", "mlx": "mlx-lm", "gguf": "a GGUF adapter"}[to]
    check_plain(Path(source.adapter), target)
    config = load_config(place.name, revision=place.revision, trust_remote_code=source.trust_remote_code)
    architecture = Architecture(config) if to == "gguf" else None
    if to == "vllm":
        check_vllm_model(config)
    written = export(source.adapter, scratch / "portable", portable=True, **source.options)
    adapter = read_portable(written.folder)
    if to == "vllm":
        rank = vllm_rank(adapter.r)
        written.folder.replace(path)
        revision = f" --revision {place.revision}" if place.revision else ""
        serve = f"vllm serve {place.name}{revision} --enable-lora --max-lora-rank {rank} --lora-modules tuned={path}"
        return Shipped(path, f"adapter for {place.name}", [f"serve it: {serve}"])
    if architecture is not None:
        write_adapter(adapter.tensors, adapter.lora_alpha, scratch / path.name, gguf_type, architecture)
        (scratch / path.name).replace(path)
        return Shipped(path, f"adapter for {place.name}", [f"run it: llama-cli -m BASE.gguf --lora {path}"])
    (scratch / "mlx").mkdir()
    write_mlx(adapter, scratch / "mlx", place.name, config.num_hidden_layers)
    (scratch / "mlx").replace(path)
    run = f"mlx_lm.generate --model {place.name} --adapter-path {path} --prompt ..."
    return Shipped(path, f"adapter for {place.name}", [f"run it: {run}"])


def _merged_gguf(source: Source, path: Path, to: Target, scratch: Path, into: Into, kind: Kind) -> Shipped:
    place = base_of_adapter(source.adapter, source.base, source.revision)
    trust = source.trust_remote_code
    tokenizer = tokenizer_for(place, source.adapter, folder_record(source.adapter), trust_remote_code=trust)
    config = load_config(place.name, revision=place.revision, trust_remote_code=trust)
    Architecture(config)
    found = vocabulary(tokenizer, max(config.vocab_size, len(tokenizer)))
    if to == "ollama":
        wrapping(tokenizer)
    merged = merge(source.adapter, scratch / "merged", into=into, **source.options)
    config = AutoConfig.from_pretrained(merged.folder)
    ends = _ends(merged.folder)
    found = found if config.vocab_size == len(found.tokens) else vocabulary(tokenizer, config.vocab_size)
    found = found._replace(ids=found.ids | _end_of_turn(ends, found.ids.get("eos")))
    result = scratch / "result"
    result.mkdir()
    name = "model.gguf" if to == "ollama" else path.name
    write_model(merged.folder, result / name, kind, Architecture(config), found)
    if to == "gguf":
        (result / name).replace(path)
        return Shipped(path, f"merged model ({kind})", merged.said())
    stops = [*tokenizer.convert_ids_to_tokens(ends), *merged.stop_strings]
    text = modelfile(name, tokenizer, stops, adds_bos=found.adds_bos)
    (result / "Modelfile").write_text(text, encoding="utf-8")
    if path.exists():
        path.rmdir()
    result.replace(path)
    notes = [*merged.said(), f"serve it: ollama create tuned -f {path / 'Modelfile'}"]
    return Shipped(path, f"merged model ({kind}) and its Modelfile", notes)


def _ends(folder: Path) -> list[int]:
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def _end_of_turn(ends: list[int], eos: int | None) -> dict[str, int]:
    others = [end for end in ends if end != eos]
    return {"eot": others[0]} if others else {}


def _in_a_folder(source: Source, scratch: Path) -> Source:
    """With the adapter of a checkpoint written as a folder."""
    if Path(source.adapter).suffix != ".ckpt":
        return replace(source, adapter=local_folder(source.adapter))
    written = export(source.adapter, scratch / "checkpoint", portable=False, **source.options)
    return replace(source, adapter=str(written.folder), base=source.base or written.base)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder on the disk of what is to be written, which goes."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
