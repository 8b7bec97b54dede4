"""The table as a page: docs/conformance.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import peft
import transformers

from tests.conformance.conformance_cell import DIRECTIONS, TARGETS, VARIANTS
from tests.conformance.conformance_models import ARCHITECTURES
from tests.table_cell import Cell

Key = tuple[str, str, str, str]
"""Architecture, targets, variant, direction."""

_TEXT = """
A cell is a tiny model with an adapter that one side writes and the other reads. Equal means: the outputs, the gradients
of all that is trained (where PEFT writes), the names in the file and the merged model; and taken out again the model is
what it was, bit for bit. A field has both ways: PEFT writes / we write. `=` is equal, `P` is what PEFT cannot do, `R`
is what is refused here; the number beside it is that of a note below.

Targets: attention are its projections; all-linear is every linear layer but the head; ends are embedding and head, of
ViT the convolution. Variants: `bias` is `lora_only`; `saved` trains a norm or a pooler in full.
"""


def page(cells: Mapping[Key, Cell]) -> str:
    """The whole page."""
    notes: dict[str, int] = {}
    counts = Counter(cell.status for cell in cells.values())
    lines = [
        "# Adapters beside PEFT",
        "",
        f"{len(cells)} cells, with PEFT {peft.__version__} and transformers {transformers.__version__}: "
        f"{counts['equal']} equal, {counts['refused']} refused here,",
        f"{counts['PEFT']} that PEFT itself cannot do, {counts['different']} different. `make conformance` writes this "
        "page, and the tests compute it again.",
        "",
        *_TEXT.strip().splitlines(),
        "",
        "| architecture | targets | " + " | ".join(VARIANTS) + " |",
        "|---" * (2 + len(VARIANTS)) + "|",
    ]
    for architecture in ARCHITECTURES:
        for targets in TARGETS:
            fields = []
            for variant in VARIANTS:
                both = [cells[architecture, targets, variant, direction] for direction in DIRECTIONS]
                fields.append(" / ".join(_shown(cell, notes) for cell in both))
            lines.append(f"| {architecture} | {targets} | " + " | ".join(fields) + " |")
    lines += ["", "## Notes", ""]
    lines += [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell, notes: dict[str, int]) -> str:
    mark = {"equal": "=", "PEFT": "P", "refused": "R"}.get(cell.status, cell.status)
    if not cell.why:
        return mark
    note = _general(cell)
    return f"{mark}<sup>{notes.setdefault(note, len(notes) + 1)}</sup>"


def _general(cell: Cell) -> str:
    """The same words for the same reason, whatever the layer is called."""
    who = {"PEFT": "PEFT: ", "refused": "Refused: "}.get(cell.status, "Equal, but ")
    why = re.sub(r"\{[^}]*\}", "{...}", cell.why)  # a set, in whatever order
    words = [_layer_as_name(word) for word in why.replace("|", "\\|").split()]
    return who + " ".join(words)


def _layer_as_name(word: str) -> str:
    plain = word.strip("`'\":,.;")
    return word.replace(plain, "LAYER") if plain.count(".") > 1 and not plain.endswith("json") else word
