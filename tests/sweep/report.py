"""The table of a sweep, as a page of the docs: the same on every machine with the same transformers."""

from __future__ import annotations

from collections import Counter

import transformers

from tests.sweep.compare import GRADIENT_TOLERANCE, LENGTHS, LOSS_TOLERANCE, Result
from tests.sweep.sweep import Architecture

_HEAD = """# Architectures

Every causal and sequence-to-sequence architecture that transformers {version} knows, built small, with LoRA on all
linear layers but those that a run refuses to adapt: the loss and the adapters' gradients of lit_lora against those of
the model's own forward pass, in float32, on three examples of {lengths} tokens, in training mode. `make sweep` makes
this page.

{summary}.

How a batch is run is found by trial (`lit_lora/language_model/trial.py`); the reasons are those that a run prints.
Sliding windows and chunks are of 8 tokens here, shorter than every example. Where batches are packed, the reference
is each example alone; where they are padded, it is transformers' own forward pass of the same padded batch. The loss
must be equal within {loss:g} and the gradients within {gradients:g}, relative. The columns give the next power of ten
above the largest difference of a packed batch, a padded one, a single example, and a batch whose layers are
recomputed.

"""
_CAUSAL_COLUMNS = ("model type", "class", "batches", "loss from hidden states", "loss", "gradients", "why not")
_SEQ2SEQ_COLUMNS = ("model type", "class", "loss", "gradients")
_OTHER_COLUMNS = ("model type", "class", "what happens")


def page(results: dict[Architecture, Result]) -> str:
    """The page, Markdown."""
    statuses = Counter(result.status for result in results.values())
    summary = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    head = _HEAD.format(
        version=transformers.__version__,
        lengths=" ".join(f"{n}," for n in LENGTHS[:-1]) + f" and {LENGTHS[-1]}",
        summary=summary, loss=LOSS_TOLERANCE, gradients=GRADIENT_TOLERANCE,
    )  # fmt: skip
    rows: dict[str, list[tuple[str, ...]]] = {"causal": [], "seq2seq": [], "refused": [], "not built": []}
    for architecture, result in results.items():
        name = f"`{architecture.model_type}`"
        numbers = (_above(result.loss), _above(result.gradients))
        if result.status in ("refused", "not built"):
            rows[result.status].append((name, result.model_class or "", result.why))
        elif result.path is None:
            rows["seq2seq"].append((name, result.model_class, *numbers))
        else:
            layout = (
                "packed, beginnings shared"
                if result.path.shared_prefix
                else "packed"
                if result.path.packed
                else "padded"
            )
            why = "; ".join(text for text in (result.path.reason, result.path.other_loss) if text)
            direct = "yes" if result.path.direct_head else "no"
            rows["causal"].append((name, result.model_class, layout, direct, *numbers, why))
    return head + "\n".join(
        [
            *_section("Next-token prediction", _CAUSAL_COLUMNS, rows["causal"]),
            *_section("Encoder-decoders, through `load_base` and `compute_loss`", _SEQ2SEQ_COLUMNS, rows["seq2seq"]),
            *_section("Refused, before a run", _OTHER_COLUMNS, rows["refused"]),
            *_section("Not built small, or not run on text, by transformers itself", _OTHER_COLUMNS, rows["not built"]),
        ]
    )


def _section(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [columns, tuple("---" for _ in columns), *sorted(rows)]
    return [
        f"## {title}",
        "",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines),
        "",
    ]


def _above(difference: float) -> str:
    """The next power of ten above a difference, never less than what rounding makes of it on another machine."""
    power = -5
    while 10.0**power < difference:
        power += 1
    return f"1e{power}"
