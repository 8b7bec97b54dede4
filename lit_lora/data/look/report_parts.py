"""What looking at data found, part by part: plain numbers, and a few examples in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_lora.data.look.pieces import Piece


@dataclass(frozen=True)
class ProblemKind:
    """Rows that cannot be used, for one reason."""

    message: str
    """Of the first of them."""
    count: int
    lines: dict[str, tuple[int, ...]]
    """Of the first of them, some dozen, by file."""


@dataclass(frozen=True)
class PairCounts:
    """Preference pairs of a source."""

    num_pairs: int
    num_prompt_tokens: int
    """That both answers of a pair share, over all pairs."""
    num_chosen_tokens: int
    num_rejected_tokens: int
    num_chosen_longer: int
    """Pairs whose chosen answer has more tokens: where nearly all have, length is what is learned."""


@dataclass(frozen=True)
class LookedAt:
    """One source."""

    name: str
    format: str
    """As ``data.format`` has it, or "preference pairs"."""
    num_rows: int
    """Looked at, bad ones included."""
    is_whole: bool
    """Whether these are all."""
    num_examples: int
    num_tokens: int
    num_supervised: int
    problems: tuple[ProblemKind, ...]
    notes: dict[str, int]
    """What is done with rows that are not taken as they are, and with how many: columns that are not used, ..."""
    pairs: PairCounts | None = None
    share: str = ""
    """What is set of it: its weight or its epochs."""
    epoch_share: float | None = None
    """Its share of the tokens of an epoch, of several sources that were looked at as a whole."""


@dataclass(frozen=True)
class Bin:
    """Examples of these lengths."""

    shortest: int
    longest: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of the examples, before anything is cut."""

    shortest: int
    mean: float
    median: int
    most: int
    """Within which 90 % are."""
    nearly_all: int
    """Within which 99 % are."""
    longest: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Cut:
    """What one ``max_length`` would cut."""

    max_length: int
    num_cut: int
    """Examples that are longer."""
    num_tokens_lost: int
    num_supervised_lost: int
    num_dropped: int
    """Examples that would have nothing left to learn from."""
    is_set: bool
    """Whether it is the one that is set."""


@dataclass(frozen=True)
class Suggested:
    """A setting, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class ShownExample:
    """An example as the model sees it."""

    source: str
    line: int
    part: int
    """Which example of its row it is, from 0: a row may become several."""
    num_tokens: int
    num_supervised: int
    parts: dict[str, tuple[Piece, ...]]
    """One, under an empty name; of a pair three: the prompt, the chosen and the rejected answer."""
