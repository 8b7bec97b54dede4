"""What the folder of an adapter says about its base: which one it is, and how it was quantized in training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from lit_lora.config import QuantizationConfig


class TrainedOn(NamedTuple):
    """How the base was quantized that an adapter was trained on."""

    quantization: QuantizationConfig | None
    """None for full precision, or unknown."""
    source: str
    """The file that says so; empty where none does."""


def base_of_adapter(adapter: str) -> str:
    """The base model that an adapter names.

    Raises:
        ValueError: if it names none, or its ``adapter_config.json`` cannot be read.
        FileNotFoundError: if the folder has no ``adapter_config.json``.
    """
    base = _named_base(adapter)
    if base is None:
        raise ValueError(f"{_config_path(adapter)} names no base model: give --base")
    return base


def warn_of_another_base(adapter: str, base: str) -> None:
    """Warn if an adapter names another base than the one that is used: equal shapes load without complaint.

    Raises:
        ValueError: if its ``adapter_config.json`` cannot be read.
        FileNotFoundError: if the folder has no ``adapter_config.json``.
    """
    if not Path(adapter).is_dir():  # on the Hub, or nowhere: loading it says which
        return
    named = _named_base(adapter)
    if named is not None and _place(named) != _place(base):
        warnings.warn(
            f"the adapter in {adapter} was trained on {named!r} and is put on {base!r}: unless their weights are the "
            "same, it will not compute what was trained",
            UserWarning,
            stacklevel=3,
        )


def trained_on(adapter: str) -> TrainedOn:
    """How the base was quantized in training: from the adapter's weights file, else its run's ``config.yaml``.

    Raises:
        ValueError: if that file cannot be read, naming it.
    """
    from lit_lora.adapters.peft_folder import WEIGHTS_NAME
    from lit_lora.adapters.trained_on import recorded_quantization

    weights = Path(adapter) / WEIGHTS_NAME
    if weights.is_file():
        known, quantization = recorded_quantization(weights)
        if known:
            return TrainedOn(quantization, str(weights))
    return _from_run(Path(adapter).resolve().parent / "config.yaml")


def default_quantization(adapter: str, base: str) -> TrainedOn:
    """How to quantize a base for an adapter: as in training, and not at all if it is stored quantized.

    Raises:
        ValueError: if what says so cannot be read, naming the file.
    """
    from lit_lora.models import is_quantized_already

    trained = trained_on(adapter)
    return TrainedOn(None, "") if trained.quantization and is_quantized_already(base) else trained


def _from_run(path: Path) -> TrainedOn:
    import yaml

    from lit_lora.adapters.trained_on import quantization_from

    if not path.is_file():
        return TrainedOn(None, "")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = config.get("model") if isinstance(config, dict) else config
        if not isinstance(model, dict):
            raise ValueError(f"got {_shown(model)} for model, expected a mapping with quantization among its fields")
        return TrainedOn(quantization_from(model.get("quantization")), str(path))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} should be the config of the run that wrote the adapter, and is not: {reason}. Correct it, say how "
            "the base was quantized (--quantization.bits 4), or move the adapter away from it"
        ) from error


def _config_path(adapter: str) -> Path:
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {adapter}: expected {path}")
    return path


def _named_base(adapter: str) -> str | None:
    from lit_lora.adapters.peft_folder import read_config

    path = _config_path(adapter)
    content = read_config(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {_shown(content)}, expected a JSON object as PEFT writes it: take an undamaged copy of the "
            "adapter"
        )
    base = content.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: base_model_name_or_path is {_shown(base)}, expected a name or folder: correct it")
    return base or None


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]


def _place(base: str) -> str:
    """Equal for two names of one base."""
    from lit_lora.models import RANDOM, resolve_base

    prefix = RANDOM if base.startswith(RANDOM) else ""
    place = base.removeprefix(RANDOM)
    if not prefix:
        try:
            place, _ = resolve_base(base)
        except (FileNotFoundError, ValueError):
            place = base
    path = Path(place).expanduser()
    return prefix + (str(path.resolve()) if path.exists() else place)
