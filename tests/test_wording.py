"""Messages name settings as their reader writes them: arguments in Python, options on a command line."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from lit_lora import SFTDataModule
from lit_lora.__main__ import main
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.wording import advice, for_command_line, in_words_of, setting
from tests.tiny import config

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

COLUMNS = {"prompt": "question", "completion": "it's"}


@pytest.mark.parametrize(
    ("options", "name", "assignment", "told"),
    [
        ("python", "columns", f"columns={COLUMNS!r}", "name them: columns"),
        (
            None,
            "data.columns",
            """--data.columns '{"prompt": "question", "completion": "it'"'"'s"}'""",
            "name them: data.columns",
        ),
        (
            {"data", "columns"},
            "--columns",
            """--columns '{"prompt": "question", "completion": "it'"'"'s"}'""",
            "name them: --columns",
        ),
        ({"data"}, "--columns", None, "rename them"),
    ],
)
def test_a_setting_is_worded_for_its_reader(options, name, assignment, told):
    def words() -> tuple[str, str, str]:
        return (
            setting("data.columns"),
            setting("data.columns", COLUMNS),
            advice("name them: {}", "data.columns", otherwise="rename them"),
        )

    if options == "python":
        got = words()
    else:
        with for_command_line(options):
            got = words()
            assert in_words_of(python="p", command_line="c") == "c"
    assert got[0] == name
    assert assignment is None or got[1] == assignment
    assert got[2] == told
    assert in_words_of(python="p", command_line="c") == "p"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    rows = [{"ask": f"say {number}", "say": "x" * 40} for number in range(4)]
    Path("odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"say {number}", "completion": "x" * 40} for number in range(4)]
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("bad.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"prompt": "", "completion": "b"}) + "\n")
    LlamaForCausalLM(config("Llama", vocab_size=260)).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")


def said(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    assert caught.value.code != 0
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


FIT = [
    "fit",
    "--model.base=random:tinyllama-1.1b",
    "--data.tokenizer=bytes",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=1",
    "--data.train",
]
BASE = ["--base", "random:base/config.json"]


@pytest.mark.parametrize(
    ("arguments", "told", "untold"),
    [
        ([*FIT, "odd.jsonl"], "--data.columns '{\"prompt\": \"question\"", "columns="),
        (["evaluate", "odd.jsonl", "adapter"], "--columns '{\"prompt\": \"question\"", "data.columns"),
        (["merge", "adapter", "new", "--base=base", "--sample=odd.jsonl"], "rename the columns of the file", "s="),
        ([*FIT, "bad.jsonl"], "or --data.on_bad_rows drop to skip them", "on_bad_rows="),
        (["evaluate", "bad.jsonl", "adapter"], "or --on_bad_rows drop to skip them", "data.on_bad_rows"),
        ([*FIT, "good.jsonl", "--data.max_length=3"], "within --data.max_length 3: the prompts alone", "max_length="),
        ([*FIT, "good.jsonl", "--data.max_tokens_per_batch=9"], "or set --data.max_length 9", "max_length="),
        ([*FIT, "good.jsonl", "--data.validation_fraction=0.01"], "--data.validation_fraction 0.01 of 4", "fraction="),
        (["generate", "hi", *BASE], "has no tokenizer of its own: set --tokenizer, for example", "data.tokenizer"),
        (["generate", "hi", "--adapter", "adapter"], "names no base model: give --base", "base="),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_command_line_speaks_of_its_options(folder, capsys, arguments, told, untold):
    error = said(capsys, *arguments)
    assert told in error
    assert untold not in error


def test_python_is_told_of_arguments(folder):
    with pytest.raises(ValueError, match=r"name them, for example columns=\{'prompt': 'question'"):
        SFTDataModule("odd.jsonl", tokenizer=byte_tokenizer()).setup("fit")
    with pytest.raises(ValueError, match=r"within max_length=3: the prompts alone are longer; raise max_length"):
        SFTDataModule("good.jsonl", tokenizer=byte_tokenizer(), max_length=3).setup("fit")


ONLY_IN_PYTHON = {"unload=True", "model_attr={self.model_attr!r}"}
"""What no command line reaches."""

OF_A_FILE = {"init_lora_weights={start!r}", "path_initial_model_for_weight_conversion=...", "target_modules={content"}
"""Fields of adapter_config.json, in PEFT's notation."""


def test_no_message_writes_a_setting_as_python_does():
    """Whatever is raised goes through :func:`setting` where it assigns, for a message is read on all surfaces."""
    found, num_messages = [], 0
    for path in [*(ROOT / "lit_lora").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            num_messages += 1
            for text in _texts(node.exc):
                assigned = re.findall(r"\b[a-z_]+=(?:\{.*?\}|['\"\[\w.]+)", text)
                calls = re.findall(r"\b(?:Call|call|set) [a-z_.]+\.[a-z_]+\(", text)
                allowed = tuple({*ONLY_IN_PYTHON, *OF_A_FILE})
                found += [
                    f"{path.name}:{node.lineno}: {part}" for part in (*assigned, *calls) if not part.startswith(allowed)
                ]
    assert num_messages > 150
    assert found == []


def _texts(node: ast.AST) -> list[str]:
    """Constant text of a message, with ``{expression}`` for the rest; not what is inside of calls such as advice()."""
    if isinstance(node, ast.JoinedStr):
        parts = [
            v.value if isinstance(v, ast.Constant) else "{" + ast.unparse(v).strip("f'\"{}") + "}" for v in node.values
        ]
        return ["".join(map(str, parts))]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("advice", "in_words_of", "setting")
    ):
        return []
    return [text for child in ast.iter_child_nodes(node) for text in _texts(child)]
