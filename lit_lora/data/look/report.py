"""The report of an inspection: for a terminal, for a machine, as a page, and as settings to paste."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from lit_lora.data.look.pieces import LEGEND, as_text, visible
from lit_lora.data.look.report_page import page_of
from lit_lora.data.look.report_parts import Cut, Lengths, LookedAt, PairCounts, ShownExample, Suggested

_BAR = 40
"""Columns of the longest bar of the histogram."""
_BOLD, _RED, _PLAIN = "\033[1m", "\033[31m", "\033[0m"


@dataclass(frozen=True)
class DataReport:
    """What a model will see of some data. ``str(report)`` is for reading; see :func:`lit_lora.inspect_data`."""

    model: dict[str, Any]
    """Settings of the model: which it is."""
    tokenizer: str
    template: str
    """Which chat template writes the conversations."""
    sources: tuple[LookedAt, ...]
    validation: tuple[LookedAt, ...]
    """Sources of ``data.validation``: of these only the rows are counted, what follows is of the training data."""
    num_set_aside: int
    """Examples of the training data that ``data.validation_fraction`` takes, of those that were looked at."""
    lengths: Lengths | None
    """None where no row can be used."""
    cuts: tuple[Cut, ...]
    ends: dict[str, int]
    """The tokens that end an answer and are supervised, by how often."""
    num_open: int
    """Stretches of supervised tokens that end without such a token."""
    examples: tuple[ShownExample, ...]
    settings: dict[str, Any]
    """Of the data, those that were given."""
    suggested: tuple[Suggested, ...]
    warnings: tuple[str, ...]

    @property
    def num_problems(self) -> int:
        """Rows that cannot be used."""
        return sum(kind.count for source in (*self.sources, *self.validation) for kind in source.problems)

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it: plain types."""
        return {**asdict(self), "num_problems": self.num_problems, "yaml": self.yaml()}

    def yaml(self) -> str:
        """The suggested settings, as a config file of ``fit``."""
        suggested = {entry.key: entry for entry in self.suggested}
        settings = self.settings | {key: entry.value for key, entry in suggested.items()}
        lines = ["model:", *(line for key, value in self.model.items() for line in _yaml_lines(key, value)), "data:"]
        for key, value in settings.items():
            lines += _yaml_lines(key, value, suggested[key].reason if key in suggested else "")
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """One page, which needs nothing beside it."""
        return page_of(self.to_dict())

    def __str__(self) -> str:
        return self.text()

    def text(self, *, colour: bool = False) -> str:
        """For reading.

        Args:
            colour: with a terminal's codes for colours.
        """
        bold, red, plain = (_BOLD, _RED, _PLAIN) if colour else ("", "", "")
        lines: list[str] = []
        for source in self.sources:
            lines += _source_lines(source)
        if self.num_set_aside:
            whole = sum(source.num_examples for source in self.sources)
            lines.append(f"set aside for validation: {self.num_set_aside:,} of these {whole:,} examples")
        for source in self.validation:
            first, *more = _source_lines(source)
            lines += [f"for validation: {first}", *more]
        if len(self.sources) > 1:
            lines += ["", f"{bold}tokens by source{plain}", *_by_source(self.sources)]
        lines += [f"tokenizer: {self.tokenizer}, {self.template}", *self._end_lines()]
        lines += [f"{red}warning{plain}: {visible(warning)}" for warning in self.warnings]
        if self.num_problems:
            lines += ["", f"{red}problems{plain}: {_counted(self.num_problems, 'row')} cannot be used"]
            lines += [line for source in (*self.sources, *self.validation) for line in _problem_lines(source)]
        if self.lengths is not None:
            lines += ["", *_length_lines(self.lengths, bold, plain), "", *_cut_lines(self.cuts, bold, plain)]
        if self.examples:
            weighted = any(
                piece.weight not in (0, 1) for e in self.examples for part in e.parts.values() for piece in part
            )
            legend = f"{LEGEND}, 〔×weight text〕" if weighted else LEGEND
            lines += ["", f"{bold}as the model sees it{plain}: {legend}"]
        for example in self.examples:
            lines += ["", *_example_lines(example, colour)]
        if self.suggested:
            lines += ["", f"{bold}suggested settings{plain}, for a file given with --config:", "", self.yaml().rstrip()]
        return "\n".join(lines)

    def _end_lines(self) -> list[str]:
        if not self.ends and not self.num_open:
            return []
        ends = ", ".join(f"{token} ({count:,})" for token, count in self.ends.items())
        lines = [f"answers end with {ends}, which is supervised" if ends else "no answer ends with a token for it"]
        if self.num_open and ends:
            lines.append(f"{self.num_open:,} supervised stretches end without such a token")
        return lines


def _source_lines(source: LookedAt) -> Iterator[str]:
    rows = (
        f"all {source.num_rows:,} rows"
        if source.is_whole
        else f"the first {source.num_rows:,} rows, and there are more"
    )
    yield f"{visible(source.name)} ({source.format}): looked at {rows}"
    share = source.num_supervised / source.num_tokens if source.num_tokens else 0
    if source.pairs is not None:
        yield from _pair_lines(source.pairs)
    else:
        yield (f"  {_counted(source.num_examples, 'example')}, {source.num_tokens:,} tokens, {share:.0%} supervised")
    yield from (f"  {count:,} times: {visible(note)}" for note, count in source.notes.items())


def _pair_lines(pairs: PairCounts) -> Iterator[str]:
    n = max(1, pairs.num_pairs)
    yield (
        f"  {_counted(pairs.num_pairs, 'pair')}: on average {pairs.num_prompt_tokens / n:,.0f} tokens of prompt, "
        f"{pairs.num_chosen_tokens / n:,.0f} chosen, {pairs.num_rejected_tokens / n:,.0f} rejected; the chosen answer "
        f"is the longer one in {pairs.num_chosen_longer / n:.0%}"
    )


def _by_source(sources: Sequence[LookedAt]) -> Iterator[str]:
    total = sum(source.num_tokens for source in sources) or 1
    width = max(len(visible(source.name)) for source in sources)
    for source in sources:
        epoch = "" if source.epoch_share is None else f"{source.epoch_share:.1%} of an epoch's"
        own = "; ".join(filter(None, (epoch, source.share)))
        share = f"{source.num_tokens:>12,}  {source.num_tokens / total:>6.1%}"
        yield f"  {visible(source.name):<{width}}  {share}  {own}".rstrip()


def _problem_lines(source: LookedAt) -> Iterator[str]:
    for kind in source.problems:
        yield f"  {_counted(kind.count, 'row')}: {visible(kind.message)}"
        places = [f"{visible(file)}:{', '.join(map(str, lines))}" for file, lines in kind.lines.items()]
        more = " ..." if kind.count > sum(map(len, kind.lines.values())) else ""
        yield f"      {'; '.join(places)}{more}"


def _length_lines(lengths: Lengths, bold: str, plain: str) -> Iterator[str]:
    yield (
        f"{bold}tokens of an example{plain}: {lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, "
        f"mean {lengths.mean:,.0f}; 90 % have at most {lengths.most:,}, 99 % at most {lengths.nearly_all:,}"
    )
    names = [f"{entry.shortest:,}-{entry.longest:,}" for entry in lengths.bins]
    width, most = max(map(len, names)), max(entry.count for entry in lengths.bins)
    for name, entry in zip(names, lengths.bins, strict=True):
        bar = "█" * -(-entry.count * _BAR // most)
        yield f"  {name:>{width}}  {bar:<{_BAR}}  {entry.count:,}".rstrip()


def _cut_lines(cuts: Sequence[Cut], bold: str, plain: str) -> Iterator[str]:
    yield f"{bold}what max_length would cut{plain}"
    yield f"  {'max_length':>10}  {'examples cut':>12}  {'tokens lost':>12}  {'supervised':>12}  {'dropped':>8}"
    for cut in cuts:
        yield (
            f"  {cut.max_length:>10,}  {cut.num_cut:>12,}  {cut.num_tokens_lost:>12,}  {cut.num_supervised_lost:>12,}  "
            f"{cut.num_dropped:>8,}{'  <- as it is set' if cut.is_set else ''}"
        )


def _example_lines(example: ShownExample, colour: bool) -> Iterator[str]:
    where = f"{visible(example.source)}:{example.line}" + (f", part {example.part + 1}" if example.part else "")
    yield f"{where}, {example.num_tokens:,} tokens, {example.num_supervised:,} supervised"
    for name, pieces in example.parts.items():
        if name:
            yield f"  {name}:"
        yield from (f"  | {line}" for line in as_text(pieces, colour=colour).split("\n"))


def _yaml_lines(key: str, value: Any, reason: str = "") -> list[str]:
    """Of a setting, indented as one of a group; the reason as a comment."""
    text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10_000)
    if visible(text) != text:
        text = yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=False, width=10_000)
    first, *rest = text.rstrip("\n").split("\n")
    return [f"  {first}  # {reason}" if reason else f"  {first}", *(f"  {line}" for line in rest)]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
