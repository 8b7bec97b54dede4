"""What of a conversation is learned: which turns, how much of each, and what a template makes of it."""

from __future__ import annotations

import pytest
from tokenizers import models

from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.chats.conversation import read_conversation
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.tokenize import Encoded, encode_examples, format_prompt, last_answer
from lit_lora.data.rows.sources import Problems
from tests.chat_tokenizers import CHATML, chat_tokenizer
from tests.data.test_tokenize import smollm_like, supervised_runs

USER, USER_2 = {"role": "user", "content": "one?"}, {"role": "user", "content": "two?"}
FIRST, SECOND = {"role": "assistant", "content": "first"}, {"role": "assistant", "content": "second"}
CHAT = [USER, FIRST, USER_2, SECOND]
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encode(tokenizer, turns, *, tools=None, options=None, **settings) -> tuple[list[Encoded], Problems]:
    problems = Problems("data")
    example = Example(1, read_conversation(turns, "messages"), tools, options)
    return encode_examples(tokenizer, [example], problems, max_length=1000, **settings), problems


def learned(tokenizer, turns, **settings) -> list[list[str]]:
    """Of each example the stretches that it teaches."""
    encoded, problems = encode(tokenizer, turns, **settings)
    assert not problems.count, str(problems)
    return [supervised_runs(tokenizer, example) for example in encoded]


@pytest.mark.parametrize(
    ("turns", "settings", "expected"),
    [
        (CHAT, {}, ["first<|im_end|>", "second<|im_end|>"]),
        (CHAT, {"train_on_turns": "last"}, ["second<|im_end|>"]),
        ([*CHAT, USER], {"train_on_turns": "last"}, ["second<|im_end|>"]),
        ([USER, FIRST | {"train": False}, USER_2, SECOND], {}, ["second<|im_end|>"]),
        ([USER, FIRST, USER_2, SECOND | {"weight": 0}], {}, ["first<|im_end|>"]),
        ([FIRST, USER_2, SECOND], {}, ["second<|im_end|>"]),
        ([USER, FIRST, SECOND], {}, ["first<|im_end|>", "second<|im_end|>"]),
    ],
)
def test_which_turns_are_learned(turns, settings, expected) -> None:
    assert learned(chat_tokenizer(), turns, **settings) == [expected]


def test_a_conversation_with_nothing_to_learn_is_counted() -> None:
    encoded, problems = encode(chat_tokenizer(), [FIRST, USER])
    assert (encoded, problems.count) == ([], 0)
    assert problems.notes["a conversation without a turn to learn (train: false, weight: 0, or only the first)"] == 1


def test_weights_are_those_of_the_turns() -> None:
    tokenizer = chat_tokenizer()
    (example,), _ = encode(tokenizer, [USER, FIRST | {"weight": 0.25}, USER_2, SECOND])
    assert example.weights is not None
    for weight, text in ((0.25, "first<|im_end|>"), (1, "second<|im_end|>")):
        assert tokenizer.decode([i for i, w in zip(example.ids, example.weights, strict=True) if w == weight]) == text
    assert [weight > 0 for weight in example.weights] == example.mask
    (plain,), _ = encode(tokenizer, CHAT)
    assert plain.weights is None


def test_prompts_are_learned_but_for_turns_that_are_not() -> None:
    tokenizer = chat_tokenizer()
    runs = learned(tokenizer, [USER, FIRST | {"weight": 0}, USER_2, SECOND], train_on_prompt=True)
    assert len(runs[0]) == 2
    assert runs[0][0].endswith("<|im_start|>assistant\n")
    assert "first" not in "".join(runs[0])


def test_reasoning_is_kept_masked_or_dropped() -> None:
    tokenizer = chat_tokenizer(THINKING)
    turns = [USER, FIRST | {"reasoning_content": "so it  is"}]
    assert learned(tokenizer, turns) == [["<think>\nso it  is\n</think>\n\nfirst<|im_end|>"]]
    assert learned(tokenizer, turns, reasoning="mask") == [["<think>\n", "\n</think>\n\nfirst<|im_end|>"]]
    assert learned(tokenizer, turns, reasoning="drop") == [["first<|im_end|>"]]
    inline = [USER, {"role": "assistant", "content": "<think>so</think>first"}]
    assert learned(tokenizer, inline, reasoning="mask") == [["<think>", "</think>first<|im_end|>"]]
    assert learned(tokenizer, inline, reasoning="drop") == [["first<|im_end|>"]]
    prompt = format_prompt(tokenizer, [*turns, USER_2], reasoning="drop")
    assert "so it" not in tokenizer.decode(prompt)


def test_reasoning_that_a_template_does_not_show_is_a_bad_row_until_it_is_dropped() -> None:
    turns = [USER, FIRST | {"reasoning_content": "so"}]
    _, problems = encode(chat_tokenizer(), turns)
    assert "leaves out the reasoning of turn 2, although it is the answer to learn" in problems.shown[0]
    assert learned(chat_tokenizer(), turns, reasoning="drop") == [["first<|im_end|>"]]


REWRITING = CHATML.replace("m['content'] +", "(m['content'] if loop.last else m['content'].split('|')[-1]) +")


def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each() -> None:
    tokenizer = chat_tokenizer(REWRITING)
    turns = [USER, {"role": "assistant", "content": "because|first"}, USER_2, SECOND]
    (first, second), problems = encode(tokenizer, turns)
    assert [supervised_runs(tokenizer, e) for e in (first, second)] == [
        ["because|first<|im_end|>"],
        ["second<|im_end|>"],
    ]
    assert (first.part, second.part) == (0, 1)
    assert "because" not in tokenizer.decode(second.ids)
    assert sum("rewrites earlier turns" in note for note in problems.notes) == 1
    assert len(learned(tokenizer, turns, train_on_turns="last")) == 1
    assert len(learned(tokenizer, CHAT)) == 1, "where nothing is rewritten, one example has all"


LEAVING_OUT = {
    "the answer": (
        CHATML.replace("m['content'] +", "(m['content'] if m['role'] == 'user' else '') +"),
        "the answer of turn 2",
    ),
    "the system message in the middle": (
        CHATML.replace("m['content'] +", "(m['content'] if m['role'] != 'system' or loop.first else '') +"),
        "turn 3 (system), or rewrites it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEAVING_OUT)
def test_a_template_that_leaves_something_out_is_a_bad_row(kind) -> None:
    template, message = LEAVING_OUT[kind]
    turns = [USER, FIRST, {"role": "system", "content": "attention"}, USER_2, SECOND]
    encoded, problems = encode(chat_tokenizer(template), turns)
    assert (encoded, problems.count) == ([], 1)
    assert f"the template leaves out {message}" in problems.shown[0]


def test_keys_and_tools_that_a_template_has_no_use_for_are_counted() -> None:
    turns = [USER | {"name": "Ann", "mood": "good"}, FIRST]
    tools, options = [{"type": "function", "function": {"name": "f"}}], {"enable_thinking": False}
    _, problems = encode(chat_tokenizer(), turns, tools=tools, options=options, ignore=["mood"])
    assert problems.notes == {
        "the chat template does not show the tools": 1,
        "chat_template_kwargs 'enable_thinking' is not used by the chat template": 1,
        "key 'name' of a turn is not used by the chat template": 1,
    }
    (example,), problems = encode(chat_tokenizer("{% for m in messages %}{{ m | tojson }}{% endfor %}"), turns)
    assert not problems.notes
    named = chat_tokenizer(CHATML.replace("m['role'] +", "m['role'] + (' ' + m['name'] if 'name' in m else '') +"))
    (example,), problems = encode(named, [USER | {"name": "Ann"}, FIRST])
    assert "user Ann" in named.decode(example.ids)
    assert not problems.notes


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def test_without_a_system_role_the_message_is_put_before_the_next_user_message() -> None:
    tokenizer = chat_tokenizer(NO_SYSTEM + CHATML)
    turns = [{"role": "system", "content": "be brief"}, *CHAT]
    (example,), problems = encode(tokenizer, turns)
    assert "user\nbe brief\n\none?<|im_end|>" in tokenizer.decode(example.ids)
    assert sum("shows no system message" in note for note in problems.notes) == 1
    assert example.ids[: len(prompt := format_prompt(tokenizer, turns[:2]))] == prompt
    _, problems = encode(tokenizer, [turns[0], FIRST, USER_2, SECOND])
    assert "no user message follows" in problems.shown[0]


def test_a_developer_is_a_system_message_where_the_template_knows_none() -> None:
    turns = [{"role": "developer", "content": "be brief"}, *CHAT]
    tokenizer = chat_tokenizer(CHATML)
    assert tokenizer.decode(encode(tokenizer, turns)[0][0].ids).startswith("<|im_start|>system\nbe brief")
    knowing = chat_tokenizer("{% set known = ['developer'] %}" + CHATML)
    assert knowing.decode(encode(knowing, turns)[0][0].ids).startswith("<|im_start|>developer\nbe brief")


def test_content_comes_in_parts_where_a_template_wants_it_so() -> None:
    parts = CHATML.replace("m['content'] +", "(m['content'] | map(attribute='text') | join) +")
    assert learned(chat_tokenizer(parts), CHAT) == [["first<|im_end|>", "second<|im_end|>"]]


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '(draft) ' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_where_a_template_marks_what_is_generated_only_that_and_its_end_is_learned() -> None:
    assert learned(chat_tokenizer(MARKED), CHAT) == [["first<|im_end|>", "second<|im_end|>"]]
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert learned(chat_tokenizer(unmarked), CHAT) == [["(draft) first<|im_end|>", "(draft) second<|im_end|>"]]


def test_what_inference_begins_an_answer_with_and_training_does_not_is_said() -> None:
    tokenizer = chat_tokenizer(CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"))
    encoded, problems = encode(tokenizer, CHAT)
    assert supervised_runs(tokenizer, encoded[0]) == ["first<|im_end|>", "second<|im_end|>"]
    assert [count for note, count in problems.notes.items() if "begins an answer with '<think>" in note] == [2]


CUTTING = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +").replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"
)


@pytest.mark.parametrize("answer", [
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nfirst"},
    {"role": "assistant", "content": "first", "reasoning_content": "so"},
])  # fmt: skip
def test_reasoning_that_is_cut_out_is_learned_after_the_prompt_that_begins_it(answer) -> None:
    tokenizer = chat_tokenizer(CUTTING)
    (example,), _ = encode(tokenizer, [USER, answer])
    prompt = format_prompt(tokenizer, [USER])
    assert tokenizer.decode(prompt).endswith("<think>\n")
    assert example.ids[: len(prompt)] == prompt
    assert supervised_runs(tokenizer, example) == ["so\n</think>\n\nfirst<|im_end|>"]


def over_the_border():
    """A tokenizer with tokens of a line break and the white space after it."""
    tokenizer = byte_tokenizer()
    vocabulary = {character: index for character, index in tokenizer.get_vocab().items() if index < 256}
    merges = [("Ċ", "Ġ"), ("Ċ", "Ċ"), ("Ċ", "ĉ")]
    vocabulary |= {first + second: 259 + number for number, (first, second) in enumerate(merges)}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    return tokenizer


@pytest.mark.parametrize("answer", ["    return a + b", "\n\nfirst", "\tfirst", " first"])
@pytest.mark.parametrize("kind", [over_the_border, byte_tokenizer, smollm_like])
def test_white_space_that_an_answer_begins_with_is_learned(answer, kind) -> None:
    tokenizer, turns = kind(), [USER, {"role": "assistant", "content": answer}]
    prompt = format_prompt(tokenizer, [USER])
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert (whole[: len(prompt)] == prompt) == (kind is not over_the_border)
    (example,), problems = encode(tokenizer, turns)
    assert not problems.count
    assert example.ids[: len(prompt)] == prompt, "the prompt has the tokens that a model is asked with"
    assert supervised_runs(tokenizer, example) == [answer + tokenizer.eos_token]


def test_the_last_answer_is_without_reasoning_and_with_its_tool_calls() -> None:
    template = CHATML.replace(
        "m['content'] +", "m['content'] + (m.tool_calls[0].function | tojson if m.tool_calls else '') +"
    )
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = read_conversation([USER, {"role": "assistant", "tool_calls": [call]}], "messages")
    assert last_answer(chat_tokenizer(template), Example(1, turns)) == '{"name": "f", "arguments": {"x": 1}}'
    inline = [USER, {"role": "assistant", "content": "<think>so</think> first "}]
    assert last_answer(chat_tokenizer(), Example(1, inline)) == "first"
