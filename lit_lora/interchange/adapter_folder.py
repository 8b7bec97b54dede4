"""What the folder of an adapter says: which base it belongs to, and what it was trained with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import QuantizationConfig
from lit_lora.interchange.adapter_path import check_adapter_path
from lit_lora.wording import setting

if TYPE_CHECKING:
    from torch import nn


class Base(NamedTuple):
    """Which base model."""

    name: str
    """As in ``--model.base``."""
    revision: str | None
    """Branch, tag or commit on the Hub."""


class Quantized(NamedTuple):
    """How a base was quantized in training."""

    quantization: QuantizationConfig | None
    """None for full precision, or unknown."""
    source: str
    """The file that says so; empty where none does."""


def local_folder(adapter: str) -> str:
    """The folder of an adapter: itself, or where an adapter on the Hub was downloaded to.

    Raises:
        ValueError: if there is none.
    """
    from lit_lora.interchange.peft_format import find_folder

    check_adapter_path(adapter)
    return adapter if Path(adapter).exists() else str(find_folder(adapter))


def base_of_adapter(adapter: str, base: str | None = None, revision: str | None = None) -> Base:
    """The base model that an adapter names, or the one that is given, with a warning if it is another one.

    Equal shapes load without complaint.

    Args:
        adapter: folder in PEFT's format.
        base: None for the one that the adapter names.
        revision: None for the one that the adapter names, of that base.

    Raises:
        ValueError: if neither names one, or ``adapter_config.json`` cannot be read.
        FileNotFoundError: if the folder has no ``adapter_config.json``.
    """
    named = named_base(adapter)
    if named is None:
        if base is None:
            raise ValueError(f"{_config_path(adapter)} names no base model: give --base")
        return Base(base, revision)
    if base is None or folder_record(adapter).base_hash is not None or same_place(base, named.name):
        if revision is not None and named.revision is not None and revision != named.revision:
            _warn(f"the adapter in {adapter} was trained on revision {named.revision}, and is put on {revision}")
        return Base(base or named.name, revision or named.revision)
    _warn(
        f"the adapter in {adapter} was trained on {named.name!r} and is put on {base!r}: unless their weights are the "
        "same, it will not compute what was trained"
    )
    return Base(base, revision)


def folder_record(adapter: str) -> TrainedOn:
    """What the weights file of an adapter says that it was trained with; nothing is known where it does not.

    Raises:
        ValueError: if it cannot be read, naming it.
    """
    from lit_lora.base.trained_on import read_record
    from lit_lora.interchange.peft_format import WEIGHTS_NAME

    weights = Path(adapter) / WEIGHTS_NAME
    return read_record(weights) if weights.is_file() else TrainedOn()


def check_base(adapter: str, record: TrainedOn, model: nn.Module, place: Base, *, other_base: bool | None) -> None:
    """Check that a base is the one that an adapter was trained on, by all of its weights.

    Args:
        adapter: for the message.
        record: what it was trained with.
        model: with the base.
        place: where the base came from.
        other_base: make a warning of it; None where that is no choice.

    Raises:
        ValueError: if it is another one.
    """
    from lit_lora.base.base_hash import base_hash, short

    if record.base_hash is None:
        return
    found = base_hash(model).value
    if found == record.base_hash:
        return
    named = named_base(adapter) if Path(adapter).is_dir() else None
    message = (
        f"the adapter in {adapter} was trained on {named.name if named else 'another base'}, "
        f"{short(record.base_hash)}, and {place.name} is {short(found)}: its weights or its config are not the same, "
        "so it will not compute what was trained"
    )
    if found.partition(":")[0] != record.base_hash.partition(":")[0]:
        _warn(f"{message}, unless only the kind of file differs")
    elif other_base:
        _warn(message)
    else:
        choice = "" if other_base is None else ", or --other_base if you mean it"
        raise ValueError(f"{message}. Give {setting('model.base')} as in training{choice}")


def trained_quantization(adapter: str) -> Quantized:
    """How the base was quantized in training: from the adapter's record, else from its run's ``config.yaml``.

    Raises:
        ValueError: if that file cannot be read, naming it.
    """
    record = folder_record(adapter)
    if record.quantization is not None:
        return Quantized(record.quantized, adapter)
    return _from_run(Path(adapter).resolve().parent / "config.yaml")


def default_quantization(adapter: str, base: Base) -> Quantized:
    """How to quantize a base for an adapter: as in training, and not at all if it is stored quantized.

    Raises:
        ValueError: if what says so cannot be read, naming the file.
    """
    from lit_lora.base.load import is_quantized_already

    trained = trained_quantization(adapter)
    stored = trained.quantization is not None and is_quantized_already(base.name, base.revision)
    return Quantized(None, "") if stored else trained


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)


def _from_run(path: Path) -> Quantized:
    from lit_lora.base.trained_on import quantization_from
    from lit_lora.files import strict_yaml

    if not path.is_file():
        return Quantized(None, "")
    try:
        config = strict_yaml.read(path)
        model = config.get("model") if isinstance(config, dict) else config
        if not isinstance(model, dict):
            raise ValueError(f"got {_shown(model)} for model, expected a mapping with quantization among its fields")
        return Quantized(quantization_from(model.get("quantization")), str(path))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} should be the config of the run that wrote the adapter, and is not: {reason}. Correct it, say how "
            "the base was quantized (--quantization.bits 4), or move the adapter away from it"
        ) from error


def _config_path(adapter: str) -> Path:
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        check_adapter_path(adapter)
        raise FileNotFoundError(f"no adapter folder {adapter}; for one on the Hub, give {setting('model.base')} too")
    return path


def named_base(adapter: str) -> Base | None:
    """The base model that the config of an adapter names.

    Raises:
        ValueError: if the config cannot be read.
        FileNotFoundError: if there is none.
    """
    from lit_lora.interchange.peft_folder import read_config

    path = _config_path(adapter)
    content = read_config(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {_shown(content)}, expected a JSON object as PEFT writes it: take an undamaged copy of the "
            "adapter"
        )
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: base_model_name_or_path is {_shown(base)}, expected a name or folder: correct it")
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"{path}: revision is {_shown(revision)}, expected a branch, tag or commit: correct it")
    return Base(base, revision or None) if base else None


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:80]


def same_place(one: str, other: str) -> bool:
    """Whether two names are of one base, as far as names tell."""
    return _place(one) == _place(other)


def _place(base: str) -> str:
    """Equal for two names of one base."""
    from lit_lora.base.load import RANDOM, resolve_base

    prefix = RANDOM if base.startswith(RANDOM) else ""
    place = base.removeprefix(RANDOM)
    if not prefix:
        try:
            place, _ = resolve_base(base)
        except (FileNotFoundError, ValueError):
            place = base
    path = Path(place).expanduser()
    return prefix + (str(path.resolve()) if path.exists() else place)
