"""The prefix oracle over published chat templates: what is learned is what a model that is asked would have to write.

A cell is one template and one kind of conversation. For every answer, the conversation before it (with the start of an
answer) and the conversation through it are rendered by transformers and tokenized as whole strings: the example has the
tokens of both, and learns those after the first up to the end of the answer, and no others.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.chat_template import common_length
from lit_lora.data.chats.conversation import read_conversation, read_tools
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.tokenize import Encoded, encode_examples, format_prompt
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.data.rows.sources import Problems
from tests.data.published_templates import CONVERSATIONS, conversation, published, tokenizer_of

TEMPLATES = published()
ALL = [(name, cell) for name in TEMPLATES for cell in CONVERSATIONS]

REFUSED = {
    ("tools", "the template leaves out the tool call 'get_weather' of turn 2"): """
        chatml deepseek_v2 internlm2 llama2 mistral_v1 mistral_v7 olmo2 phi4 phi4_mini qwen2 smollm2 smollm3
        vicuna yi zephyr cohere cohere2 cohere2_training cohere_training deepseek_r1_distill
        deepseek_r1_distill_training gemma gemma3 gemma3_training gemma_training lfm2 lfm2_training llama3
        llama3_training phi3 phi3_5 phi3_5_training phi3_training
    """,
    ("reasoning", "the template leaves out the reasoning of turn 2, although it is the answer to learn"): """
        chatml deepseek_v2 falcon3 granite3 internlm2 llama2 llama4 mistral_tekken mistral_v1 mistral_v3
        mistral_v7 olmo2 phi4 phi4_mini qwen2 smollm2 vicuna yi zephyr cohere cohere2 cohere2_training
        cohere_training gemma gemma3 gemma3_training gemma4 gemma4_v2 gemma4_v3 gemma4_v4 gemma_training lfm2
        lfm2_training lfm2_v2 lfm2_v2_training llama3 llama3_1 llama3_2 llama3_training phi3 phi3_5
        phi3_5_training phi3_training qwen2_5 qwen2_5_training qwen3_instruct_2507 qwen3_instruct_2507_training
    """,
}
"""Cell and error -> templates that cannot show it."""

FOLDED = ("gemma", "gemma_training", "mistral_v1", "mistral_v3", "mistral_tekken")
"""Templates that show no system message beside an answer."""
JSON_ARGUMENTS = ("deepseekv3",)
"""Templates that take a tool call's arguments as text, and no content beside it."""
TWO_ENDS = ("cohere2", "cohere2_training")
"""Templates that end every answer with two tokens."""
CUTS_REASONING = ("qwq", "deepseek_r1_distill", "deepseekv3", "deepseekv3_training")
"""Templates that begin an answer with <think>, and cut reasoning out of answers that they are given."""


def refused(name: str, cell: str) -> str:
    """Why a template cannot show a kind of conversation; empty where it can."""
    return next((error for (of, error), names in REFUSED.items() if of == cell and name in names.split()), "")


def as_taken(name: str, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns as the template wants them."""
    if name in FOLDED and turns[0]["role"] == "system":
        joined = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        turns = [{"role": "user", "content": joined}, *turns[2:]]
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            if name in JSON_ARGUMENTS:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    if name in ("deepseek_r1_distill_training", "smollm3"):
        for turn in turns:
            if "reasoning_content" in turn:
                turn["content"] = f"<think>\n{turn.pop('reasoning_content')}\n</think>\n\n{turn['content']}"
    return turns


@pytest.mark.parametrize(("name", "cell"), [cell for cell in ALL if not refused(*cell)])
def test_what_is_learned_is_what_a_model_would_write(name: str, cell: str) -> None:
    tokenizer = tokenizer_of(name, TEMPLATES[name])
    encoded, problems = encode(tokenizer, cell)
    assert not problems.count, str(problems)
    given, tools = conversation(cell)
    turns = as_taken(name, given)
    stops = set(turn_end(tokenizer).ids)

    def tokens(count: int, generation: bool) -> list[int]:
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": generation}
        text = tokenizer.apply_chat_template(turns[:count], **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    num_learned = 0
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked, through = tokens(index, True), tokens(index + 1, False)
        dropped = len(conversation(cell)[0]) - len(turns)
        before = conversation(cell)[0][: index + dropped]
        assert format_prompt(tokenizer, before, tools) == asked, "inference asks as transformers does"
        if name in CUTS_REASONING and cell == "reasoning":
            said = f"{turn['reasoning_content']}\n</think>\n\n{turn['content']}{tokenizer.eos_token}"
            through = asked + tokenizer(said, add_special_tokens=False)["input_ids"]
        first = common_length(asked, through)
        if first < len(asked):
            assert any("begins an answer with" in note for note in problems.notes), "said, where inference says more"
        end = next((k + 1 for k in range(first, len(through)) if through[k] in stops), None)
        if end is not None and name in TWO_ENDS:
            end += 1
        if end is None:  # what begins the next turn ends this one
            while tokenizer.decode(through[-1:]).isspace():
                through.pop()
            end = len(through) + 1
        holding = [e for e in encoded if e.ids[: min(end, len(through))] == through[:end] and e.ids[end - 1] in stops]
        assert holding, f"no example has turn {index + 1}: {tokenizer.decode(through)}"
        learning = [example for example in holding if all(example.mask[first:end])]
        assert len(learning) == 1, f"turn {index + 1} is learned once"
        assert not learning[0].mask[first - 1]
        num_learned += end - first
    assert sum(sum(example.mask) for example in encoded) == num_learned, "and nothing else is learned"
    assert all(example.mask[-1] for example in encoded), "an example ends with the last that it teaches"


@pytest.mark.parametrize(("name", "cell"), [cell for cell in ALL if refused(*cell)])
def test_what_a_template_cannot_show_is_a_bad_row(name: str, cell: str) -> None:
    encoded, problems = encode(tokenizer_of(name, TEMPLATES[name]), cell)
    assert (len(encoded), problems.count) == (0, 1)
    assert f"data:1: the chat template cannot render it: {refused(name, cell)}" in problems.shown[0]


def test_all_templates_are_tried() -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    assert len(TEMPLATES) >= 60
    assert len([cell for cell in ALL if not refused(*cell)]) > 3 * len(TEMPLATES)


def encode(tokenizer: PreTrainedTokenizerBase, cell: str) -> tuple[list[Encoded], Problems]:
    """The examples that a cell's conversation becomes."""
    turns, tools = conversation(cell)
    problems = Problems("data")
    example = Example(1, read_conversation(turns, "messages"), read_tools(tools))
    return encode_examples(tokenizer, [example], problems, max_length=10_000), problems
