"""Load a base model and its tokenizer, from wherever the name points to.

=============================  ==========================================================================
``base``                       what is loaded
=============================  ==========================================================================
``smollm2-135m-instruct``      a model that ``lit-lora fetch`` has brought
``path/to/folder``             a folder with ``config.json`` and safetensors
``path/to/model.gguf``         a GGUF file, dequantized
``random:NAME_OR_PATH``        the architecture with random weights: a name in ``ARCHITECTURES``, a folder, a
                               ``config.json``, or a Hub id. For memory studies and tests
``owner/name``                 a model on the Hugging Face Hub
=============================  ==========================================================================

Left out: pickled weights (``.bin``, ``.pt``). They can run code when loaded, so only safetensors and GGUF are read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from lit_lora.base import base_hash, quantize
from lit_lora.base.architectures import ARCHITECTURES, architecture
from lit_lora.base.expert_codes import quantized_while_loading
from lit_lora.base.filled import fill_, random_values
from lit_lora.base.quantized_forward import compute_in_half_, prepare_base_layer
from lit_lora.base.shards import Sharding
from lit_lora.base.trained_on import note
from lit_lora.base.whole_model import check_no_adapter, load_whole, readable
from lit_lora.config import QuantizationConfig
from lit_lora.files.meant import closest, did_you_mean
from lit_lora.kernels.cpu_features import multiplies_bfloat16
from lit_lora.kernels.cuda_cards import half_dtype, prepare_attention
from lit_lora.wording import advice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANDOM = "random:"
BYTE_TOKENIZER = "bytes"

_MOST_GROWTH = 10_000.0
_SAY_NOTHING = ("_name_or_path", "architectures", "transformers_version")
"""Of a config: where it lay and who wrote it."""


def load_base_model(
    base: str,
    *,
    dtype: str | torch.dtype = "auto",
    quantization: QuantizationConfig | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Load a causal language model for training: frozen by nobody yet, in training mode.

    Args:
        base: see the table at the top of this file.
        dtype: of the weights; "auto" is bfloat16 on CUDA, or float16 on cards that have none (before capability 8.0);
            on a CPU bfloat16 where its products are faster (AMX, AVX512-BF16 of AMD), else float32.
        quantization: how to quantize fused experts, while loading, and linear layers: while loading too, or after it
            where transformers cannot (other block sizes than 64, GGUF files), which needs memory for all of them first.
        device: where to; the default device if None.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code that comes with the model. Off unless you ask for it.
        seed: for random weights.

    Raises:
        FileNotFoundError: if the folder or file is not there, or the model was not fetched.
        ValueError: if the folder holds no safetensors, ``dtype`` is no float type, or the model cannot be quantized.
    """
    return load_wanted(wanted(base, dtype, quantization, device, revision, trust_remote_code, seed))


@dataclass(frozen=True)
class Wanted:
    """A base, and how it is to be held: the arguments of :func:`load_base_model`, looked up."""

    base: str
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    device: torch.device
    revision: str | None
    trust_remote_code: bool
    seed: int

    def valueless(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model on the meta device."""
        trust = self.trust_remote_code
        with torch.device("meta"):
            return readable(
                self.base,
                lambda: AutoModelForCausalLM.from_config(config, dtype=self.dtype, trust_remote_code=trust),
            )


def wanted(
    base: str,
    dtype: str | torch.dtype,
    quantization: QuantizationConfig | None,
    device: torch.device | str | None,
    revision: str | None,
    trust_remote_code: bool,
    seed: int = 0,
) -> Wanted:
    """What was asked for, on a device that is made ready for it."""
    device = torch.device(device) if device is not None else torch.get_default_device()
    torch_dtype = resolve_dtype(dtype, device)
    prepare_attention(device)
    return Wanted(base, torch_dtype, quantization, device, revision, trust_remote_code, seed)


def load_wanted(wanted: Wanted, *, experts: bool = True) -> PreTrainedModel:
    """As :func:`load_base_model`.

    Args:
        wanted: what.
        experts: with quantization, also that of fused experts.
    """
    base, quantization, revision = wanted.base, wanted.quantization, wanted.revision
    if base.startswith(RANDOM):
        return random_model(wanted).train()
    location, gguf_file = resolve_base(base)
    options: dict[str, Any] = {
        "dtype": wanted.dtype,
        "revision": revision,
        "trust_remote_code": wanted.trust_remote_code,
        "use_safetensors": True,
    }
    if gguf_file:
        options["gguf_file"] = gguf_file
        del options["use_safetensors"]
    in_transformers = None
    if quantization is not None:
        _check_not_quantized(location, revision)
        if not gguf_file:
            in_transformers = quantize.transformers_quantization_config(quantization, wanted.dtype)
        if in_transformers is not None:
            options["quantization_config"] = in_transformers
    beside_loading = base_hash.hash_weights(location, gguf_file, revision)
    at_once = quantized_while_loading(quantization) if quantization is not None and experts else nullcontext()
    with torch.device(wanted.device), at_once:
        model = load_whole(location, options)
    # A model of the Hub may have come only now.
    base_hash.note_base(model, beside_loading or base_hash.hash_weights(location, gguf_file, revision))
    if gguf_file:  # the weights are plain now
        quantize.forget_quantization(model)
    if quantization is not None:
        finish = quantize.quantize_ if in_transformers is None else quantize.finish_quantization_
        finish(model, quantization, experts=experts)
    else:
        for name, module in model.named_modules():
            prepare_base_layer(name, module)  # of a folder that is stored quantized
        if wanted.device.type == "cuda":
            compute_in_half_(model, wanted.dtype)
    note_loaded(model, wanted, location)
    return model.train()


def load_config(base: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of ``base``, without its weights."""
    if base.startswith(RANDOM):
        return readable(base, lambda: architecture(base.removeprefix(RANDOM), revision, trust_remote_code))
    location, gguf_file = resolve_base(base)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    return readable(location, lambda: AutoConfig.from_pretrained(location, **options))


def note_loaded(model: Any, wanted: Wanted, location: str) -> None:
    """Note on a model that was loaded from files what it is, and how it is held."""
    from lit_lora.base.known_models import KNOWN_MODELS

    if wanted.base in KNOWN_MODELS:
        model.config.name_or_path = KNOWN_MODELS[wanted.base].hub_id  # what an adapter tells the world
    _note_held(model, wanted, wanted.revision or _commit_of(location))


def _note_held(model: Any, wanted: Wanted, revision: str | None) -> None:
    dtype = str(wanted.dtype).removeprefix("torch.")
    note(model, quantization=wanted.quantization or "none", dtype=dtype, revision=revision)


def load_tokenizer(
    base: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``base``; "bytes" is a built-in one for models with random weights.

    Raises:
        ValueError: for random weights by name, which have no tokenizer of their own, and for files that are damaged
            or made to fill the memory.
    """
    if base == BYTE_TOKENIZER:
        from lit_lora.base.byte_tokenizer import byte_tokenizer

        return byte_tokenizer()
    if base.startswith(RANDOM):
        name = base.removeprefix(RANDOM)
        if name in ARCHITECTURES or name.endswith(".json"):
            fix = advice("set {}, for example to 'bytes'", "data.tokenizer", otherwise="give a base that has one")
            raise ValueError(f"{base!r} has no tokenizer of its own: {fix}")
        base = name
    location, gguf_file = resolve_tokenizer(base)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = readable(location, lambda: AutoTokenizer.from_pretrained(location, **options))
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    growth = 1.0 if normalizer is None else _growth(json.loads(normalizer.__getstate__()))
    if growth > _MOST_GROWTH:
        raise ValueError(f"the tokenizer in {location} would make up to {growth:.0e} characters of one: take another")
    return tokenizer


def _growth(normalizer: Mapping[str, Any]) -> float:
    """How many characters the replacements of a tokenizer make of one at most: what doubles forty times fills memory.

    Args:
        normalizer: as in ``tokenizer.json``.
    """
    if normalizer.get("type") == "Sequence":
        return math.prod(map(_growth, normalizer["normalizers"]))
    if normalizer.get("type") != "Replace":
        return 1.0
    literal = normalizer["pattern"].get("String")
    return max(1.0, len(normalizer["content"]) / len(literal) if literal else len(normalizer["content"]) + 1.0)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved in a folder, beside a model or by itself."""
    return (folder / "tokenizer_config.json").is_file()


def resolve_tokenizer(name: str) -> tuple[str, str | None]:
    """Where a tokenizer lies: as :func:`resolve_base`, and a folder may hold nothing else.

    Raises:
        FileNotFoundError: naming what is there instead.
        ValueError: for a folder with neither a tokenizer nor a model.
    """
    folder = Path(name).expanduser()
    return (str(folder), None) if holds_tokenizer(folder) else resolve_base(name)


def resolve_base(base: str) -> tuple[str, str | None]:
    """Where ``base`` lies: a folder or Hub id, and the GGUF file in it if it is one.

    Raises:
        FileNotFoundError: naming what is there instead.
        ValueError: for a folder without a model that can be read safely, or with an adapter beside it.
    """
    from lit_lora.base.known_models import KNOWN_MODELS, model_folder

    if base in KNOWN_MODELS:
        folder = model_folder(base)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{base} is not here yet: run `lit-lora fetch {base}` (looked in {folder})")
        return str(folder), None
    for name, entry in KNOWN_MODELS.items():  # an adapter names its base as the Hub does
        if base == entry.hub_id and (model_folder(name) / "config.json").is_file():
            return str(model_folder(name)), None
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file {path}" + _neighbours(path))
        check_no_adapter(str(path.parent))
        return str(path.parent), path.name
    if path.is_dir():
        check_no_adapter(str(path))
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json: expected a model folder with config.json and *.safetensors")
        if not list(path.glob("*.safetensors")):
            pickles = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
            detail = f"; {', '.join(pickles)} may run code when loaded and is not read" if pickles else ""
            raise ValueError(f"{path} holds no *.safetensors{detail}: save the model as safetensors")
        return str(path), None
    if path.exists():
        raise ValueError(f"{path} is a file: expected a model folder, a .gguf file or a Hub id")
    if path.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        known = closest(base, KNOWN_MODELS)
        hint = f"; {did_you_mean(known)}" if known else _neighbours(path)
        raise FileNotFoundError(f"no model folder {base!r}{hint}")
    return base, None


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype for a name; "auto" by device."""
    resolved: Any = dtype
    if dtype == "auto":
        half = device.type == "cuda" or (device.type == "cpu" and multiplies_bfloat16())
        resolved = half_dtype(device) if half else torch.float32
    elif isinstance(dtype, str):
        resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    return resolved


def _commit_of(location: str) -> str | None:
    """The commit that a model on the Hub was just loaded from; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(location).exists():
        return None
    path = try_to_load_from_cache(location, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None


def random_model(wanted: Wanted, sharding: Sharding | None = None) -> PreTrainedModel:
    """An architecture with random weights; of a divided one, what lies outside of the layers is only cut."""
    location, device = wanted.base.removeprefix(RANDOM), wanted.device
    config = architecture(location, wanted.revision, wanted.trust_remote_code)
    model = wanted.valueless(config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(wanted.seed)
        fill_(model, random_values, device=device, quantization=wanted.quantization, sharding=sharding)
    model.tie_weights()
    model.config.name_or_path = wanted.base
    fields = {name: value for name, value in config.to_dict().items() if name not in _SAY_NOTHING}
    recipe = {"config": fields, "seed": wanted.seed, "dtype": str(wanted.dtype), "device": device.type}
    base_hash.note_base(model, base_hash.hash_recipe(**recipe))
    if wanted.quantization is not None:
        quantize.finish_quantization_(model, wanted.quantization, experts=sharding is None)
    _note_held(model, wanted, wanted.revision)
    return model


def is_quantized_already(base: str, revision: str | None = None) -> bool:
    """Whether a base is stored with quantized weights, and loaded as it is."""
    if base.startswith(RANDOM):
        return False
    location, gguf_file = resolve_base(base)
    return not gguf_file and bool(_saved_quantization(location, revision))


def _saved_quantization(location: str, revision: str | None) -> Any:
    fields, _ = PreTrainedConfig.get_config_dict(location, revision=revision)
    return fields.get("quantization_config")


def _check_not_quantized(location: str, revision: str | None) -> None:
    saved = _saved_quantization(location, revision)
    if saved:
        method = saved.get("quant_method", "unknown") if isinstance(saved, dict) else saved
        raise ValueError(f"{location} is quantized already ({method}) and is loaded as it is: leave out quantization")


def _neighbours(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (there is no folder {parent} either)"
    close = closest(path.name, os.listdir(parent))
    return f"; {did_you_mean([parent / close[0]])}" if close else ""
