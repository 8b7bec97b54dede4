"""Every fenced command and every fenced line of Python of the documentation runs, in the order of its page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml

from lit_lora.data.chats.tokenize import encode_examples
from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from tests.data.published_templates import OWN, tokenizer_of
from tests.promises.blocks import (
    BEFORE,
    NOT_RUN,
    OTHER_WORDS,
    PAGES,
    SMALLER,
    TUTORIALS,
    blocks,
    commands,
    why_not_run,
)
from tests.promises.following import environment, follow, run
from tests.promises.sentences import PROJECT

pytestmark = [
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning, about loggers, workers and short runs
]

BASH = [page for page in PAGES if blocks(page, "bash")]
PYTHON = [page for page in PAGES if blocks(page, "python") and page not in TUTORIALS]


@pytest.mark.parametrize("page", [page for page in BASH if page not in ("docs/multi_process.md", *TUTORIALS)])
def test_the_commands_of_a_page_run(page, reader):
    follow(reader, page)


@pytest.mark.ddp
def test_the_commands_of_several_processes_run(reader):
    follow(reader, "docs/multi_process.md")


def test_make_quickstart_ends_as_the_readme_shows(reader):
    """The targets as they stand, with a ``lit-lora`` that adds what makes its verbs quick."""
    checkout = reader.folder / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "configs"):
        (checkout / name).symlink_to(PROJECT / name)
    script = checkout / ".venv" / "bin" / "lit-lora"
    script.parent.mkdir(parents=True)
    cases = "".join(
        f'  {verb}) exec {sys.executable} -m lit_lora "$@" {shlex.join(more)};;\n'
        for verb, more in SMALLER.items()
        if " " not in verb
    )
    script.write_text(f'#!/bin/sh\ncase $1 in\n{cases}  *) exec {sys.executable} -m lit_lora "$@";;\nesac\n')
    script.chmod(0o755)
    (checkout / ".venv" / ".installed").touch()
    made = subprocess.run(["make", "quickstart"], cwd=checkout, env=environment(), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:] + made.stdout[-2000:]
    (shown,) = blocks("README.md", "")
    labels = re.findall(r"^(?:  )?([a-z ]+?)  ", shown.text, re.MULTILINE)
    assert {"loss", "gradient flow", "adapter export", "request", "after"} < set(labels)
    assert [label for label in labels if not re.search(rf"^ *{label}  ", made.stdout, re.MULTILINE)] == []
    ends = [
        "exact match on {} held-out examples: {} % before, {} % after",
        "mean loss per target token: {} before, {} after",
    ]
    for end in ends:
        pattern = re.escape(end).replace(r"\{\}", r"[\d.]+")
        assert re.search(pattern, shown.text), end
        assert re.search(pattern, made.stdout), end


class Regression(lightning.LightningModule):
    """A project of a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def small_model() -> torch.nn.Module:
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "v_proj": torch.nn.Linear(4, 4)})


def trained(model: torch.nn.Module) -> None:
    """As after a step: B is not zero any more."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)


def proved_nothing_wrong(given: dict[str, Any]) -> None:
    """Three steps need not lower the loss; all else has to hold."""
    assert set(given["outcome"].reasons) <= {"convergence"}
    for folder in ("runs/mine/adapter", "merged", "portable", "mine"):
        assert any(Path(folder).glob("*.safetensors")), folder


def watched(given: dict[str, Any]) -> None:
    """The trainer that the page makes trains, and its checks judge."""
    given["trainer"].fit(Regression(), torch.utils.data.DataLoader(torch.randn(240, 4), batch_size=4))
    assert given["trainer"].global_step == 60
    assert given["flow"].verdict.passed


def adapted(given: dict[str, Any]) -> None:
    from lit_lora import load_adapter, load_base_model

    ids = torch.arange(20).reshape(1, 20)
    ours = load_base_model("tiny")
    load_adapter(ours, "runs/lora_standard/adapter")
    with torch.no_grad():
        torch.testing.assert_close(given["model"](ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)


def estimated(given: dict[str, Any]) -> None:
    assert given["estimate"].fits("8GB")


def two_adapters(given: dict[str, Any]) -> None:
    lit_lora = given["lit_lora"]
    assert lit_lora.adapter_names(given["base"]) == ["requests", "mlp"]
    assert lit_lora.active_adapters(given["base"]) == ["requests"]


def kinds_of_modules(given: dict[str, Any]) -> None:
    """``test_other_models.py`` trains each."""
    kinds = [
        kind for kind in given.values() if isinstance(kind, type) and issubclass(kind, given["LoRALightningModule"])
    ]
    assert len(kinds) == 6


AFTER: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": adapted,
    "docs/adapters.md": two_adapters,
    "docs/callbacks.md": watched,
    "docs/memory.md": estimated,
    "docs/other_models.md": kinds_of_modules,
    "docs/python.md": proved_nothing_wrong,
}
"""A block that runs without doing its work would pass: what each page's Python has to leave behind."""


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(page, reader):
    """In one namespace; what a page leaves to its reader (a model, the training of it) comes from here."""
    given: dict[str, Any] = {"model": small_model()}
    first = {"README.md": "lit-lora fit --config lora_standard.yaml --data.train my.jsonl", **BEFORE}
    if page in ("README.md", "docs/adapters.md"):
        for command in commands(first[page]):
            run(reader, command, page)
    for block in blocks(page, "python"):
        exec(compile(block.code, f"{page}:{block.line}", "exec"), given)
        if "inject_lora(model" in block.code:
            trained(given["model"])
    AFTER[page](given)


@pytest.mark.parametrize(
    "block", [b for page in PAGES for b in blocks(page, "yaml")], ids=lambda b: f"{b.page}:{b.line}"
)
def test_the_yaml_of_a_page_is_taken(block, reader):
    Path("block.yaml").write_text(block.text)
    ran = reader.run("fit", "--config=lora_standard.yaml", "--config=block.yaml", "--print_config")
    assert ran.code == 0, ran.text
    printed = yaml.safe_load(ran.out)

    def compare(asked: Any, got: Any) -> None:
        if isinstance(asked, dict):
            for key, value in asked.items():
                compare(value, got[key])
        elif isinstance(asked, list) and all(isinstance(value, dict) for value in asked):
            assert len(asked) == len(got)
            for pair in zip(asked, got, strict=True):
                compare(*pair)
        else:
            assert asked == got

    compare(yaml.safe_load(block.text), printed)


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_lines_of_data_with_tools_and_reasoning_are_learned_as_they_are(page, tmp_path):
    text = blocks(page, "json")[-1].text
    (tmp_path / "lines.jsonl").write_text(text)
    examples = read_examples(str(tmp_path / "lines.jsonl"), SourceSettings())
    tokenizer = tokenizer_of("magistral", OWN / "magistral.jinja")
    called, reasoned = encode_examples(tokenizer, examples.items, examples.problems, max_length=1000)
    assert not examples.problems.count
    learned = [tokenizer.decode([i for i, m in zip(e.ids, e.mask, strict=True) if m]) for e in (called, reasoned)]
    assert learned[0].startswith('[TOOL_CALLS]weather[ARGS]{"city": "Paris"}</s>')
    assert learned[1] == "[THINK]First 3 * 4 = 12.[/THINK]14</s>"


def test_every_block_is_of_a_kind_that_a_test_runs():
    others = {
        (b.page, b.language): b for page in PAGES for b in blocks(page) if b.language not in ("bash", "python", "yaml")
    }
    expected = {("README.md", ""), ("README.md", "json"), ("docs/data.md", "json"), ("docs/runs.md", "text")}
    expected |= {("docs/inference.md", "json")}
    expected |= {(f"docs/tutorials/{name}.md", "json") for name in ("your_own_data", "tool_calls")}
    expected |= {("docs/tutorials/from_peft_or_trl.md", "text")}
    assert set(others) == expected
    assert sum(len(blocks(page, "bash", "python")) for page in PAGES) >= 25


def test_every_row_of_the_tables_is_used():
    texts = {page: "\n".join(block.text for block in blocks(page)) for page in PAGES}
    assert not {(page, old) for page, words in OTHER_WORDS.items() for old in words if old not in texts[page]}
    scripts = [block.code for page in BASH for block in blocks(page, "bash")]
    every = [script for script in scripts if script.startswith("#!")]
    plain = [c for script in scripts if not script.startswith("#!") for c in commands(script)]
    every += [" ".join(command.words) for command in plain]
    assert {row for text in every if (row := why_not_run(text))} == set(NOT_RUN)
    verbs = {words[1] for words, _ in plain if words[0] == "lit-lora"}
    assert {row.split()[0] for row in SMALLER} <= verbs
    assert set(BEFORE) <= set(BASH)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lit-lora fit --config lora_standard.yaml --data.trian my.jsonl", "data.trian"),
        ("lit-lora fit --config lora_standard.yaml --data.train yours.jsonl", "yours.jsonl"),
        ("lit-lora mrege adapter merged", "did you mean 'merge'"),
        ("lit-lore fit", "no test knows how to run lit-lore"),
        ("torchrun --nnodes 2 -m lit_lora fit --config lora_standard.yaml --trainer.devcies 4", "devcies"),
        ("make quikstart", "quikstart"),
        ("pip install -c constraint.txt torch", "constraint.txt"),
    ],
)
def test_a_broken_command_fails(line, said, reader):
    (command,) = commands(line)
    with pytest.raises(AssertionError, match=re.escape(said)):
        run(reader, command, "a page")


@pytest.mark.parametrize("text", ["lit-lora fit; rm x", "lit-lora fit | tee log", "lit-lora fit $(cat x)"])
def test_a_shell_that_no_test_understands_is_said(text):
    with pytest.raises(ValueError, match="no test understands"):
        commands(text)
