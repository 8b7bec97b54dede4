"""The table as a page: docs/export_table.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import peft
import transformers

from tests.exports.export_cell import ROWS, TARGETS
from tests.table_cell import Cell

_TEXT = """
A row is a tiny model with random weights and an adapter of two ranks and scales on all of its linear layers; a column
is what `--to` names. `=` is equal in float32, read back by:

- peft, portable, vllm: PEFT, on the base: the logits of the adapted model.
- hf: transformers: the same logits.
- gguf and ollama: gguf's reader: each tensor of the merged model in the layout of llama.cpp, and none besides.
- gguf, adapter (`--adapter_only`): gguf's reader: the base in that layout plus what the file adds is the merged model.
- mlx: safetensors: the change of each layer, and the layer is among the keys.

What is equal in gguf and in gguf, adapter is read by llama.cpp, too, whose logits are those of the adapted model
([serving.md](serving.md#what-was-checked-and-by-whom)). `R` is refused with the message whose number stands beside it.
Nothing is written then.
"""


def page(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """The whole page, of rows by their names."""
    notes: dict[str, int] = {}
    counts = Counter(cell.status for row in cells.values() for cell in row.values())
    lines = [
        "# Exports, architecture by architecture",
        "",
        f"{counts.total()} cells, with PEFT {peft.__version__} and transformers {transformers.__version__}: "
        f"{counts['equal']} equal, {counts['refused']} refused,",
        f"{counts['different']} different. `make conformance` writes this page, and the tests compute it again.",
        "",
        *_TEXT.strip().splitlines(),
        "",
        "| architecture | " + " | ".join(TARGETS) + " |",
        "|---" * (1 + len(TARGETS)) + "|",
    ]
    for name in ROWS:
        lines.append(f"| {name} | " + " | ".join(_shown(cells[name][target], notes) for target in TARGETS) + " |")
    lines += ["", "## Messages", ""]
    lines += [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell, notes: dict[str, int]) -> str:
    mark = {"equal": "=", "refused": "R"}.get(cell.status, cell.status)
    if not cell.why:
        return mark
    # The same words for the same reason, whatever the layer or the model is called.
    note = re.sub(r"adapter of \S+: it names", "adapter of LAYER: it names", cell.why)
    note = re.sub(r"\b\w+(ForCausalLM|LMHeadModel)(?= is not one of|: serve)", "MODEL", note)
    return f"{mark}<sup>{notes.setdefault(note, len(notes) + 1)}</sup>"
