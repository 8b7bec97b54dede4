"""What is supervised: every assistant turn up to its end token, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_lora.base.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from lit_lora.data.chats.chat_template import ALPACA_TEMPLATE
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.tokenize import Encoded, encode_examples, format_prompt
from lit_lora.data.rows.sources import Problems

SMOLLM_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is 1 + 2? é"},
    {"role": "assistant", "content": "It is 3. 🎉"},
    {"role": "user", "content": "assistant\nIt is 3."},
    {"role": "assistant", "content": "Yes.\n\nIt is."},
]


def smollm_like() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with SmolLM2's special tokens: bos <|im_start|>, eos and pad <|im_end|>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator([turn["content"] for turn in CHAT] * 3 + ["system user assistant"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = SMOLLM_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def smollm() -> PreTrainedTokenizerBase:
    folder = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
    return AutoTokenizer.from_pretrained(folder) if folder.is_dir() else smollm_like()


def encode(tokenizer, content, *, max_length: int = 1000, **options) -> Encoded:
    problems = Problems("data")
    encoded = encode_examples(tokenizer, [Example(1, content)], problems, max_length=max_length, **options)
    assert not problems.count, str(problems)
    return encoded[0]


def supervised_runs(tokenizer, example: Encoded) -> list[str]:
    """The supervised stretches as text."""
    runs: list[list[int]] = []
    previous = False
    for token, supervised in zip(example.ids, example.mask, strict=True):
        if supervised:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = supervised
    return [tokenizer.decode(run) for run in runs]


def test_every_assistant_turn_and_its_end_token_are_supervised(smollm) -> None:
    example = encode(smollm, CHAT)
    assert supervised_runs(smollm, example) == ["It is 3. 🎉<|im_end|>", "Yes.\n\nIt is.<|im_end|>"]
    whole = smollm.apply_chat_template(CHAT, tokenize=False)
    assert smollm.decode(example.ids) == whole.removesuffix("\n"), "the newline after the last end token is cut off"
    assert example.ids.count(smollm.eos_token_id) == 5, "system, and two turns of each"


def test_the_mask_goes_by_position_although_pad_is_eos(smollm) -> None:
    assert smollm.pad_token_id == smollm.eos_token_id
    example = encode(smollm, CHAT)
    assert example.mask[-1]
    assert example.ids[-1] == smollm.eos_token_id
    prompts = [token for token, supervised in zip(example.ids, example.mask, strict=True) if not supervised]
    assert smollm.eos_token_id in prompts, "end tokens of the system and user turns are not supervised"


def test_prompt_and_answer_have_the_tokens_of_the_whole(smollm) -> None:
    """The prompt at generation time is exactly what precedes the first supervised token."""
    example = encode(smollm, CHAT)
    for last in (1, 3):
        prompt = format_prompt(smollm, CHAT[:last])
        assert example.ids[: len(prompt)] == prompt
        assert not example.mask[len(prompt) - 1]
        assert example.mask[len(prompt)]


def test_a_token_across_the_border_is_parted_as_it_is_when_a_model_is_asked() -> None:
    tokenizer = byte_tokenizer()
    alphabet = tokenizer.get_vocab()
    characters = {character: index for character, index in alphabet.items() if index < 256}
    vocabulary = characters | {"ĊI": 259}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("Ċ", "I")])
    example = encode(tokenizer, CHAT[:2])
    assert 259 in tokenizer(tokenizer.apply_chat_template(CHAT[:2], tokenize=False))["input_ids"]
    assert supervised_runs(tokenizer, example) == ["It is 3. 🎉<eos>"]
    prompt = format_prompt(tokenizer, CHAT[:1])
    assert (example.ids[: len(prompt)], example.mask[: len(prompt)]) == (prompt, [False] * len(prompt))


def test_no_second_bos() -> None:
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, CHAT).ids.count(tokenizer.bos_token_id) == 1
    assert format_prompt(tokenizer, CHAT[:1]).count(tokenizer.bos_token_id) == 1


def adding_bos() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    return tokenizer


@pytest.mark.parametrize("text", ["plain text", "<bos>plain text", "plain text<eos>"])
def test_text_is_supervised_whole_and_ends_with_eos(text) -> None:
    for tokenizer, expected in ((byte_tokenizer(), text), (adding_bos(), "<bos>plain text")):
        example = encode(tokenizer, text)
        assert tokenizer.decode(example.ids) == expected.removesuffix("<eos>") + "<eos>"
        assert example.mask == [False] + [True] * (len(example.ids) - 1)


def test_without_a_chat_template_the_alpaca_layout_is_used() -> None:
    for tokenizer, bos in ((byte_tokenizer(), ""), (adding_bos(), "<bos>")):
        tokenizer.chat_template = None
        example = encode(tokenizer, CHAT[:2])
        assert tokenizer.decode(example.ids).startswith(f"{bos}Below is an instruction that describes a task.")
        assert supervised_runs(tokenizer, example) == ["It is 3. 🎉<eos>"]
        prompt = tokenizer.decode(format_prompt(tokenizer, [{"role": "system", "content": "Be brief."}, CHAT[0]]))
        assert prompt == f"{bos}Be brief.\n\n### Instruction:\nWhat is 1 + 2? é\n\n### Response:\n"


START = "{{ message.role + ': ' + message.content }}"
TEMPLATES = {
    "no end token": (START + "{{ '\n' }}", ["It is 3. 🎉\n", "Yes.\n\nIt is.<eos>"]),
    "eos, newline": (START + "{{ eos_token + '\n' }}", ["It is 3. 🎉<eos>", "Yes.\n\nIt is.<eos>"]),
    "only the last ends with eos": (
        START + "{{ eos_token if loop.last and message.role == 'assistant' else '\n' }}",
        ["It is 3. 🎉<eos>", "Yes.\n\nIt is.<eos>"],  # two examples: each answer ends as if it were the last
    ),
    "something after the last turn": (
        START + "{{ eos_token }}{% if loop.last and not add_generation_prompt %}{{ '<eos> ' }}{% endif %}",
        ["It is 3. 🎉<eos>", "Yes.\n\nIt is.<eos>"],
    ),
    "trims the content": (
        "{{ message.role + ': ' + message.content | trim + eos_token }}",
        ["It is 3. 🎉<eos>", "Yes.\n\nIt is.<eos>"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_kind_of_template_ends_in_eos(name) -> None:
    body, expected = TEMPLATES[name]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}"
        + body
        + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    examples = encode_examples(tokenizer, [Example(1, CHAT)], Problems("data"), max_length=1000)
    assert [run for example in examples for run in supervised_runs(tokenizer, example)] == expected


def test_generation_prompt_that_opens_with_more_than_training_has() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant:\n'", "'assistant:\n<think>\n'")
    assert "<think>" in tokenizer.decode(format_prompt(tokenizer, CHAT[:1]))
    assert supervised_runs(tokenizer, encode(tokenizer, CHAT)) == ["It is 3. 🎉<eos>", "Yes.\n\nIt is.<eos>"]


def test_templates_that_rewrite_earlier_turns_or_refuse_are_reported_by_line() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    problems = Problems("data")
    assert encode_examples(tokenizer, [Example(7, CHAT)], problems, max_length=100) == []
    assert "data:7: the chat template cannot render it: turns 1 to 1 are rendered differently" in problems.shown[0]
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    encode_examples(tokenizer, [Example(8, CHAT)], problems, max_length=100)
    assert "data:8: the chat template cannot render it: System role not supported" in problems.shown[1]


def test_slow_tokenizers_go_by_token_prefixes() -> None:
    slow = ByT5Tokenizer(extra_ids=0, bos_token="<s>")
    slow.chat_template = byte_tokenizer().chat_template.replace("{{ bos_token }}", "")
    assert not slow.is_fast
    example = encode(slow, CHAT)
    assert supervised_runs(slow, example) == ["It is 3. 🎉</s>", "Yes.\n\nIt is.</s>"]


def test_train_on_prompt_supervises_all_but_the_first(smollm) -> None:
    example = encode(smollm, CHAT, train_on_prompt=True)
    assert example.mask == [False] + [True] * (len(example.ids) - 1)
    assert example.ids == encode(smollm, CHAT).ids


def test_an_unanswered_last_turn_is_cut_off(smollm) -> None:
    question = {"role": "user", "content": "And?"}
    assert encode(smollm, [*CHAT, question]).ids == encode(smollm, CHAT).ids
    trained = encode(smollm, [*CHAT, question], train_on_prompt=True)
    assert "And?" in smollm.decode(trained.ids)


def test_truncation_on_the_right(smollm) -> None:
    whole = encode(smollm, CHAT)
    cut = encode(smollm, CHAT, max_length=len(whole.ids) - 2)
    assert cut.truncated
    assert not whole.truncated
    assert (cut.ids, cut.mask) == (whole.ids[:-2], whole.mask[:-2])
    prompt = len(format_prompt(smollm, CHAT[:1]))
    assert not any(encode(smollm, CHAT, max_length=prompt).mask)
    # Cut inside the second question, nothing after the first answer can be learned.
    second = len(format_prompt(smollm, CHAT[:3]))
    assert encode(smollm, CHAT, max_length=second).mask[-1]
    assert len(encode(smollm, CHAT, max_length=second).ids) < second


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode(tokenizer, "text")


def test_byte_tokenizer_is_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "é🎉 a\n\x00\x7f  <eos"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == VOCAB_SIZE == 259
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [256, 257, 258]


def test_alpaca_template_keeps_system_and_turns_apart() -> None:
    tokenizer = byte_tokenizer()
    text = tokenizer.apply_chat_template(CHAT, chat_template=ALPACA_TEMPLATE, tokenize=False)
    assert text.count("### Instruction:") == text.count("### Response:") == 2
