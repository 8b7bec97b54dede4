"""The tokenizer that a data module was told by name, or that of the model which it feeds."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_lora.wording import setting


def loaded_tokenizer(name: str | None, module: Any) -> tuple[PreTrainedTokenizerBase, str]:
    """Load it; code that comes with it runs where the module says ``trust_remote_code``.

    Args:
        name: of the tokenizer; None for the module's.
        module: what is trained, if it is known.

    Returns:
        The tokenizer, and its name.

    Raises:
        ValueError: if there is no name, and the module does not say which base model it trains.
    """
    from lit_lora.base.load import load_tokenizer

    revision = None
    if name is None:
        name, revision = getattr(module, "base", None), getattr(module, "revision", None)
    if not isinstance(name, str):
        raise ValueError(
            "no tokenizer: the module has no attribute 'base' with the model's name; "
            f"set {setting('data.tokenizer')} to a name, a folder, or 'bytes'"
        )
    trusted = getattr(module, "trust_remote_code", False)
    return load_tokenizer(name, revision=revision, trust_remote_code=trusted), name
