"""``docs/settings.md``: every setting of ours with its text, made from the dataclasses and signatures themselves.

python -m lit_lora.cli.settings_page > docs/settings.md
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from lit_lora.cli.help import explanation, settings_of, value_words
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.data.rows.data_source import DataSource
from lit_lora.module import LoRALightningModule
from lit_lora.runs.fit import CALLBACKS

_HEAD = """# Settings

Keys of YAML, and options of `lit-lora fit` (`--model.lora.r 16`). In Python the last part of a key is the argument's
name: of `LoRALightningModule`, `SFTDataModule`, a callback, or of the dataclass that the part before it names
(`LoRAConfig`, `QuantizationConfig`, `OptimizationConfig`, `StepConfig`). Settings of Lightning's Trainer are not listed
here: [trainer_settings.md](trainer_settings.md) says which work. This page is made from the code.
"""

_SECTIONS = {
    "model": "The model",
    "model.lora": "Adapters: `LoRAConfig`",
    "model.quantization": "Quantization: `QuantizationConfig`",
    "model.optimization": "What is learned: `OptimizationConfig`",
    "model.step": "At what cost: `StepConfig`",
    "data": "Data: `SFTDataModule`",
    "source": "One of several sources in `data.train`: `DataSource`",
}


def page() -> str:
    """The page, Markdown."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser()
    kinds = {"model": LoRALightningModule, "data": SFTDataModule, "source": DataSource, **CALLBACKS}
    for key, kind in kinds.items():
        parser.add_class_arguments(kind, key)
    actions = settings_of(parser)
    titles = _SECTIONS | {key: f"`{kind.__name__}`" for key, kind in CALLBACKS.items()}
    lines = [_HEAD]
    for group, title in titles.items():
        chosen = [(key, action) for key, action in actions.items() if key.rpartition(".")[0] == group]
        lines += _table(title, chosen) if chosen else []
    return "\n".join(lines)


def _table(title: str, chosen: Iterable[tuple[str, Any]]) -> list[str]:
    rows = [
        f"| `{key.removeprefix('source.')}` | {_cell(value_words(action))} | {_cell(explanation(action))} |"
        for key, action in sorted(chosen)
    ]
    return [f"## {title}", "", "| key | value (default) | |", "| --- | --- | --- |", *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
