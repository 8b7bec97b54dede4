"""What ends an answer is found by rendering the template, and is what training supervises."""

from __future__ import annotations

import pytest

from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.tokenize import encode_examples
from lit_lora.data.chats.turn_end import text_end, turn_end
from lit_lora.data.rows.sources import Problems
from tests.chat_tokenizers import EOS, KINDS, chat_tokenizer

CONVERSATION = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second"},
]
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@each_kind
def test_the_end_of_an_answer_is_found_whatever_it_is(kind):
    tokenizer = chat_tokenizer(kind.template, **kind.options)
    end = turn_end(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end.ids) == kind.ids
    assert end.strings == kind.strings


@each_kind
def test_the_end_of_an_answer_is_supervised(kind):
    tokenizer = chat_tokenizer(kind.template, **kind.options)
    end = turn_end(tokenizer)
    problems = Problems("data")
    (encoded,) = encode_examples(tokenizer, [Example(1, CONVERSATION)], problems, max_length=500)
    (single,) = encode_examples(tokenizer, [Example(1, CONVERSATION[:2])], problems, max_length=500)
    assert not problems.count
    for example, answer in ((encoded, "second"), (single, "first")):
        learned = tokenizer.decode([i for i, m in zip(example.ids, example.mask, strict=True) if m])
        following = learned.rpartition(answer)[2]
        ends = [*tokenizer.convert_ids_to_tokens(end.ids), *(string for string in end.strings if string.strip())]
        assert following, "nothing after the answer is learned"
        assert following.strip().startswith(tuple(ends)), following


def test_the_built_in_tokenizer_and_plain_text_end_with_the_end_of_sequence_token():
    tokenizer = byte_tokenizer()
    assert turn_end(tokenizer) == text_end(tokenizer) == ([tokenizer.eos_token_id], [])
    assert text_end(chat_tokenizer()).ids == [chat_tokenizer().convert_tokens_to_ids(EOS)]


REFUSING = "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (REFUSING + KINDS["ChatML"].template, KINDS["ChatML"].ids),
        ("{{ raise_exception('nothing at all') }}", [EOS]),
        ("{{ 'a template without content' }}", [EOS]),
    ],
)
def test_a_template_that_refuses_leaves_the_end_of_sequence_token(template, expected):
    tokenizer = chat_tokenizer(template)
    end = turn_end(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end.ids) == expected
    assert end.strings == []
