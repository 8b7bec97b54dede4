"""Tokens that a tokenizer did not have: added, with the tokens that their text was made of before.

What those pieces mean is the best guess at what a new token means, so their embeddings' mean is what it starts from.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AddedToken, PreTrainedTokenizerBase

from lit_lora.wording import setting


class NewTokens:
    """Tokens to add.

    Args:
        tokens: as they stand in the data.

    Raises:
        ValueError: if one is empty or named twice.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        if isinstance(tokens, str) or not all(isinstance(token, str) and token.strip() for token in tokens):
            raise ValueError(f"new_tokens must be a list of texts, got {tokens!r}")
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"new_tokens names a token twice: {', '.join(tokens)}")
        self.tokens = list(tokens)
        self.pieces: dict[int, list[int]] = {}
        """Id of each added token -> ids of the tokens that its text was made of."""

    def added_to(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer, with the tokens; it is changed the first time.

        Raises:
            ValueError: if it has one of them already.
        """
        if self.pieces or not self.tokens:
            return tokenizer
        known = tokenizer.get_vocab()
        there = [token for token in self.tokens if token in known]
        if there:
            raise ValueError(
                f"new_tokens: {', '.join(map(repr, there))} {'are' if len(there) > 1 else 'is'} in the vocabulary "
                f"already: leave it out of {setting('data.new_tokens')}; model.lora.trainable_token_indices "
                f"[{', '.join(str(known[token]) for token in there)}] trains its embedding"
            )
        pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in self.tokens]
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.tokens])
        known = tokenizer.get_vocab()
        self.pieces = {known[token]: list(ids) for token, ids in zip(self.tokens, pieces, strict=True)}
        return tokenizer
