"""Held-out conversations with tools and reasoning are asked as they are learned, and compared with what is written."""

from __future__ import annotations

import json

import pytest

from lit_lora import LoRAConfig, generate, inject_lora
from lit_lora.base.trained_on import TrainedOn
from lit_lora.data.batches.loaders import prompts_of
from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from lit_lora.evaluation import generate as generate_module
from lit_lora.evaluation import score as score_module
from lit_lora.evaluation.held_out import read_held_out
from lit_lora.evaluation.load import Loaded
from lit_lora.evaluation.score import score
from lit_lora.language_model.generation import Completion
from tests.chat_tokenizers import VOCAB_SIZE, chat_tokenizer
from tests.tiny import language_model

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
USER = {"role": "user", "content": "Paris?"}
ROWS = [
    {"tools": TOOLS, "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
    {"messages": [USER, {"role": "assistant", "reasoning_content": "a city", "content": "Yes."}]},
]
WRITTEN = '{"name": "weather", "arguments": {"city": "Paris"}}'


@pytest.fixture
def loaded():
    model = language_model(vocab_size=VOCAB_SIZE, pad_token_id=None)
    inject_lora(model, LoRAConfig(r=2))
    return Loaded(model, chat_tokenizer(TEMPLATE), TrainedOn())


@pytest.fixture
def asked(monkeypatch):
    prompts: list[str] = []

    def complete(model, tokenizer, ids, **options):
        prompts[:] = [tokenizer.decode(each) for each in ids]
        return [Completion(text, False) for text in (WRITTEN, "<think>a city</think>\n\nYes.")][: len(ids)]

    monkeypatch.setattr(score_module, "complete", complete)
    monkeypatch.setattr(generate_module, "complete", complete)
    return prompts


def test_tool_calls_and_answers_after_reasoning_count_as_right(tmp_path, loaded, asked):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    scores = score(loaded, str(path))
    assert scores.expected == [WRITTEN, "Yes."]
    assert scores.after is not None
    assert scores.after.exact_match == 100
    assert '"name": "weather"' in asked[0]
    assert asked[0].endswith("user\nParis?<|im_end|>\n<|im_start|>assistant\n")
    assert "weather" not in asked[1]


def test_held_out_data_is_looked_at_as_training_was(tmp_path, loaded, asked):
    path = tmp_path / "held_out.jsonl"
    turns = [*ROWS[1]["messages"], USER, {"role": "assistant", "content": "Yes."}]
    path.write_text(json.dumps({"messages": turns}))
    assert score(loaded, read_held_out(str(path))).num_examples == 1
    assert "a city" in asked[0]
    held_out = read_held_out(str(path), TrainedOn(reasoning="drop", train_on_turns="last"))
    assert (held_out.reasoning, held_out.train_on_turns) == ("drop", "last")
    assert score(loaded, held_out).num_examples == 1
    assert "a city" not in asked[0]


def test_generation_shows_tools(loaded, asked):
    generate(loaded, [USER], tools=TOOLS)
    assert '"name": "weather"' in asked[0]
    with pytest.raises(ValueError, match="tools have no place in plain text"):
        generate(loaded, "Once", format="text", tools=TOOLS)


def test_the_reference_of_a_prompt_is_what_a_model_writes(tmp_path, loaded):
    path = tmp_path / "held_out.jsonl"
    goes_on = [*ROWS[0]["messages"], {"role": "tool", "content": "rain"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"tools": TOOLS, "messages": goes_on}]))
    examples = read_examples(str(path), SourceSettings()).items
    references = [prompt["reference"] for prompt in prompts_of(examples, loaded.tokenizer, "held_out.jsonl", None)]
    assert references == [WRITTEN, "Yes.", WRITTEN]
