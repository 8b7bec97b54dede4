"""The tokenizer and chat template that an adapter was trained with: found, and checked against its record."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lit_lora.base.trained_on import TrainedOn
from lit_lora.interchange.adapter_folder import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_for(
    base: Base,
    adapter: str | None,
    record: TrainedOn,
    *,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter; where there is none, the base's or what the record names, if it is the same.

    Args:
        base: the base model.
        adapter: folder in PEFT's format; None for the base alone.
        record: what the adapter was trained with.
        tokenizer: take this one, with a warning if the adapter was trained with another.
        trust_remote_code: run code that comes with it.

    Raises:
        ValueError: if what is found is not what the adapter was trained with, saying in what it differs.
    """
    from lit_lora.base.load import holds_tokenizer, load_tokenizer
    from lit_lora.data.new_tokens import NewTokens

    def load(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
        return load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)

    if tokenizer is not None:
        chosen = load(tokenizer)
        if difference := _difference(chosen, record):
            warnings.warn(
                f"--tokenizer {tokenizer} is not what the adapter was trained with: {difference}",
                UserWarning,
                stacklevel=3,
            )
        return chosen
    if adapter is not None and holds_tokenizer(Path(adapter)):
        chosen = load(adapter)
        if difference := _difference(chosen, record):
            raise ValueError(
                f"the tokenizer in {adapter} is not what the adapter was trained with: {difference}. Take an undamaged "
                f"copy; if you changed it on purpose, give --tokenizer {adapter}"
            )
        return chosen
    places = [base, *([Base(record.tokenizer, None)] if record.tokenizer not in (None, base.name) else [])]
    found = []
    for place in places:
        try:
            chosen = load(*place)
        except (ValueError, OSError) as error:
            found.append(str(error))
            continue
        chosen = NewTokens([t for t in record.new_tokens or [] if t not in chosen.get_vocab()]).added_to(chosen)
        if not (difference := _difference(chosen, record)):
            return chosen
        found.append(f"{place.name}: {difference}")
    if adapter is None:
        raise ValueError(f"no tokenizer: {found[0]}")
    raise ValueError(
        f"no tokenizer beside the adapter in {adapter}, and none that it was trained with elsewhere: "
        f"{'; '.join(found)}. Give --tokenizer"
    )


def _difference(tokenizer: PreTrainedTokenizerBase, record: TrainedOn) -> str:
    """In what a tokenizer differs from a record; empty if in nothing that the record knows."""
    from lit_lora.data.data_record import chat_template_sha256, vocabulary_sha256

    return record.tokenizer_difference(
        vocabulary_sha256=vocabulary_sha256(tokenizer), chat_template_sha256=chat_template_sha256(tokenizer)
    )
