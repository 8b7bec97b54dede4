"""What an adapter was trained with: noted on the model, and kept in the adapter's weights file.

An adapter belongs to the weights that it was trained beside, to the tokens and the template that its data was written
in, and to what ended a turn there. The note goes from the loader of the base and from the data to the writer of the
adapter, and lies in the file's metadata, where PEFT, transformers and vLLM pass over it. Adapters of other writers, and
on models that were loaded otherwise, have none. A checkpoint holds it too.
"""

from __future__ import annotations

import json
import types
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open
from torch import nn

from lit_lora.base.base_hash import known_hash
from lit_lora.config import QuantizationConfig

KEY = "lit_lora_trained_on"
"""Key in the metadata of a weights file, and attribute of a model."""

VERSION = 1
"""Of the record; to be raised when an older reader would misunderstand it."""

_EARLIER_KEY = "lit_lora_quantization"
"""What there was before: the quantization alone, null for full precision."""


@dataclass(frozen=True)
class TrainedOn:
    """A record of training. A field that is None is not known. Plain types only: it is written as JSON."""

    quantization: QuantizationConfig | Literal["none"] | None = None
    """How the base was quantized; "none" for not at all."""

    base_hash: str | None = None
    """Of all the base's weights, see ``base_hash.py``."""

    dtype: str | None = None
    """dtype of the base's weights, such as "bfloat16"."""

    revision: str | None = None
    """Of the base on the Hub: as it was asked for, or else the commit that was loaded."""

    started_from: str | None = None
    """SHA-256 of the adapter that training started from, where it was no new one; see ``interchange/checksum.py``."""

    tokenizer: str | None = None
    """Where the tokenizer came from: a name or folder."""

    new_tokens: list[str] | None = None
    """Tokens that were added to it."""

    vocabulary_sha256: str | None = None
    """Of how the tokenizer maps text to ids."""

    chat_template_sha256: str | None = None
    """Of the template that conversations were written in."""

    format: str | None = None
    """Of the training data; "text" is plain text, all others are conversations."""

    columns: dict[str, str] | None = None
    """Field of the format -> column, where they differ."""

    max_length: int | None = None
    """Longest example, in tokens."""

    train_on_prompt: bool | None = None
    """Whether prompts were learned too."""

    train_on_turns: str | None = None
    """Which answers were learned, where not all: "last"."""

    reasoning: str | None = None
    """What was done with reasoning where it was not learned: "mask" or "drop"."""

    turn_end_ids: list[int] | None = None
    """Tokens that ended an answer."""

    turn_end_strings: list[str] | None = None
    """Texts that ended an answer, where the template has no token for it."""

    def tokenizer_difference(self, *, vocabulary_sha256: str, chat_template_sha256: str, **others: Any) -> str:
        """In what another tokenizer differs from the recorded one; empty if in nothing that is known."""
        differing = []
        if self.vocabulary_sha256 not in (None, vocabulary_sha256):
            differing.append("it makes other tokens of a text")
        if self.chat_template_sha256 not in (None, chat_template_sha256) and self.format != "text":
            differing.append("its chat template is another one")
        return " and ".join(differing)

    @property
    def quantized(self) -> QuantizationConfig | None:
        """How the base was quantized; None for not at all, or not known."""
        return self.quantization if isinstance(self.quantization, QuantizationConfig) else None

    def to_json(self) -> str:
        """All that is known."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps({"version": VERSION, **known}, sort_keys=True)


def note(model: nn.Module, **known: Any) -> None:
    """Note fields of :class:`TrainedOn` on a model, beside those that it has."""
    setattr(model, KEY, replace(vars(model).get(KEY, TrainedOn()), **known))


def noted(model: nn.Module) -> TrainedOn:
    """What is noted on a model. Waits for the hash of its base, which is computed in the background."""
    record: TrainedOn = vars(model).get(KEY, TrainedOn())
    base = known_hash(model) if record.base_hash is None else None
    return record if base is None else replace(record, base_hash=base.value)


def complete(model: nn.Module, record: TrainedOn) -> None:
    """Note of a record what is not noted on the model yet."""
    own = asdict(vars(model).get(KEY, TrainedOn()))
    note(model, **{field.name: getattr(record, field.name) for field in fields(record) if own[field.name] is None})


def forget(model: nn.Module) -> None:
    """Take the note away: nothing is known."""
    vars(model).pop(KEY, None)


def noted_metadata(model: nn.Module) -> dict[str, str]:
    """The note as metadata of a weights file; empty where there is none."""
    record = noted(model)
    return {KEY: record.to_json()} if KEY in vars(model) or record != TrainedOn() else {}


def read_record(weights: str | Path) -> TrainedOn:
    """The record in an adapter's weights file.

    Raises:
        ValueError: if the file is damaged, or was written by a later version.
    """
    try:
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}. Take an undamaged copy") from error
    try:
        if KEY in metadata:
            return from_json(metadata[KEY])
        if _EARLIER_KEY in metadata:
            return TrainedOn(quantization=quantization_from(json.loads(metadata[_EARLIER_KEY])) or "none")
    except (ValueError, RecursionError) as error:
        key = KEY if KEY in metadata else _EARLIER_KEY
        raise ValueError(f"{weights} is damaged, {key} in its metadata: {error}") from error
    return TrainedOn()


def from_json(text: str) -> TrainedOn:
    """The record that :meth:`TrainedOn.to_json` wrote.

    Raises:
        ValueError: if it is no such record, or of a later version.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or type(content.get("version")) is not int:
        raise ValueError(f"expected a JSON object with a version, got {str(content)[:80]}")
    version = content.pop("version")
    if version > VERSION:
        raise ValueError(f"version {version} of the record, this lit_lora reads up to {VERSION}: update lit_lora")
    hints = get_type_hints(TrainedOn)
    if unknown := sorted(content.keys() - hints.keys()):
        warnings.warn(
            f"the adapter's record says {', '.join(unknown):.200}, which this version of lit_lora does not know",
            UserWarning,
            stacklevel=2,
        )
    known = {name: content[name] for name in content.keys() & hints.keys()}
    if isinstance(known.get("quantization"), dict):
        known["quantization"] = quantization_from(known["quantization"])
    for name, value in known.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} is {value!r}, expected {hints[name]}")
    return TrainedOn(**known)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    return type(value) is hint  # True is no number here


def quantization_from(content: Any) -> QuantizationConfig | None:
    """The config with these fields, as JSON or YAML has them; None for null.

    Raises:
        ValueError: if it is neither, or a field is unknown or has a value that it cannot have.
    """
    if content is None:
        return None
    known = [field.name for field in fields(QuantizationConfig)]
    if not isinstance(content, dict):
        raise ValueError(f"quantization is {content!r}, expected null or a mapping of {', '.join(known)}")
    if unknown := [name for name in content if name not in known]:
        raise ValueError(f"quantization has the unknown field {unknown[0]!r}, expected some of {', '.join(known)}")
    try:
        return QuantizationConfig(**content)
    except TypeError as error:  # a comparison of what cannot be compared
        raise ValueError(f"quantization has a value of the wrong type: {error}") from error
