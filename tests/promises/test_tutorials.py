"""Each tutorial can be followed from top to bottom: its data is written, its commands and Python run in their order."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_lora.data.chats.tokenize import encode_examples
from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from tests.chat_tokenizers import TOKENS, chat_tokenizer
from tests.promises.blocks import SMALLER, TUTORIALS, blocks
from tests.promises.conftest import Stranger
from tests.promises.following import run_block
from tests.small_adapters import MERGES, SIZE
from tests.started_runs import make_base

pytestmark = [
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning, about loggers, workers and short runs
]

DATA = {"docs/tutorials/your_own_data.md": "my.jsonl", "docs/tutorials/tool_calls.md": "tools.jsonl"}
"""The file that a page's lines of data go into."""


REPEATED = {"docs/tutorials/your_own_data.md": 8}
"""How often these lines stand in the file, so that the part set aside for validation is trained on, too."""

LEARNED = {
    "docs/tutorials/your_own_data.md": [
        "--trainer.max_steps=150",
        "--trainer.accelerator=cpu",
        "--model.lora.target_modules=all-linear",
        "--model.optimization.learning_rate=0.02",
    ],
}
"""Options of a ``fit`` that learns its data by heart, in the place of the three steps of others."""


def nothing_more(given: dict[str, Any]) -> None:
    assert given == {}


def compared(given: dict[str, Any]) -> None:
    assert "rank_16" in Path("both.html").read_text()


def served(given: dict[str, Any]) -> None:
    """Transformers and PEFT answer as was trained, and the model that is served stops there by itself."""
    row = json.loads(Path("my.jsonl").read_text().splitlines()[0])
    assert given["turns"][0]["content"] == row["prompt"]
    assert given["from_adapter"].startswith(row["completion"])
    assert given["from_served"] == row["completion"]
    assert {"served", "served.gguf", "ollama"} <= {path.name for path in Path().iterdir()}
    alone = AutoModelForCausalLM.from_pretrained("tiny").generate(**given["asked"], max_new_tokens=60, do_sample=False)
    assert row["completion"] not in given["tokenizer"].decode(alone[0])


def in_four_bits(given: dict[str, Any]) -> None:
    assert json.loads(Path("runs/small_gpu/verdict.json").read_text())["step"] == 3
    assert "bits: 4" in Path("runs/small_gpu/config.yaml").read_text()


def called(given: dict[str, Any]) -> None:
    """Both turns of the assistant are learned, with what is shown before them left out."""
    tokenizer = AutoTokenizer.from_pretrained("qwen3")
    examples = read_examples("tools.jsonl", SourceSettings())
    encoded = encode_examples(tokenizer, examples.items, examples.problems, max_length=2000)
    assert not examples.problems.count
    learned = "".join(tokenizer.decode([i for i, m in zip(e.ids, e.mask, strict=True) if m]) for e in encoded)
    for answer in ('{"name": "stock", "arguments": {"item": "blue chair"}}', "Three are left.", "You are welcome."):
        assert learned.count(answer) == 1
    assert "How many are there." not in learned
    assert all("How many are there." in tokenizer.decode(e.ids) for e in encoded)
    assert isinstance(given["answer"].text, str)


def watched(given: dict[str, Any]) -> None:
    assert [check.verdict.passed for check in given["checks"]] == [True, True, True]
    assert given["counts"].steps == given["outcome"].step == 3


def went_both_ways(given: dict[str, Any]) -> None:
    """What PEFT holds at the end is what was trained on from where PEFT had begun."""
    first, last = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("theirs", "runs/further/adapter"))
    assert first.keys() == last.keys()
    there = {name.replace(".default", ""): value for name, value in given["model"].state_dict().items()}
    assert all(there[name].equal(value) for name, value in last.items())
    assert any(not first[name].equal(value) for name, value in last.items())


AFTER: dict[str, Callable[[dict[str, Any]], None]] = {
    "first_fine_tune": compared,
    "your_own_data": served,
    "qlora_small_gpu": in_four_bits,
    "tool_calls": called,
    "callbacks_in_your_project": watched,
    "from_peft_or_trl": went_both_ways,
    "several_gpus": nothing_more,
}
"""What a tutorial has to leave behind: in the namespace of its Python, and in the folder."""


@pytest.fixture
def follower(reader: Stranger, capfd: pytest.CaptureFixture[str]) -> Stranger:
    """Who also has a small model with the template of Qwen 3, which shows tools."""
    folder = importlib.util.find_spec("trl").submodule_search_locations[0]
    template = Path(folder, "chat_templates", "qwen3.jinja").read_text()
    make_base(reader.folder / "qwen3", template, num_hidden_layers=2, vocab_size=SIZE, eos_token_id=SIZE - len(TOKENS))
    chat_tokenizer(template, merges=MERGES).save_pretrained(reader.folder / "qwen3")
    return reader


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_can_be_followed(page: str, follower: Stranger, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setitem(SMALLER, "fit", LEARNED.get(page, SMALLER["fit"]))
    for block in blocks(page):
        if block.language == "json":
            Path(DATA[page]).write_text(block.text * REPEATED.get(page, 1))
        elif block.language == "bash":
            run_block(follower, block)
        elif block.language == "python":
            exec(compile(block.code, f"{page}:{block.line}", "exec"), given)
    AFTER[Path(page).stem](given)


def test_every_tutorial_leaves_something_to_look_at() -> None:
    assert list(AFTER) != []
    assert set(AFTER) == {Path(page).stem for page in TUTORIALS}
    assert set(DATA) == {page for page in TUTORIALS if blocks(page, "json")}
