"""Published chat templates, a tokenizer for each, and the conversations that they are tried on."""

from __future__ import annotations

import copy
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

OWN = Path(__file__).parent / "chat_templates"
"""Written anew from the published formats, as short as they can be said."""

EOS = {
    "<|im_end|>": "chatml yi qwen smollm phi4 internlm2 qwq lfm nemotron",
    "<|end|>": "phi4_mini phi3_5",
    "<|endoftext|>": "phi3 falcon3 olmo2 glm4moe",
    "<|eot|>": "llama4",
    "<|eot_id|>": "llama3",
    "<|end_of_text|>": "granite3",
    "<end_of_turn>": "gemma gemma3",
    "<turn|>": "gemma4 diffusion_gemma",
    "<｜end▁of▁sentence｜>": "deepseek",
    "<|return|>": "gptoss",
    "<|END_OF_TURN_TOKEN|>": "cohere",
    "</s>": "",
}
"""End-of-sequence token: names, or beginnings of names, of the templates that go with it; the last for all others."""

_LEFT_OUT = re.compile(
    r"(idefics3|llava_next|smolvlm|qwen2_5_vl|qwen3_vl|lfm2_2_5_vl|diffusion_gemma"  # models of images, or other kinds
    r"|gemma4_v\d|nemotron_3_(5_lightning|super|ultra))(_training)?"  # like others that are there
)
"""Templates of TRL's that are not tried."""

_SPECIAL = re.compile(
    r"<\|[\w/ ]+\|>|<｜[^｜<>]+｜>|\[/?(?:INST|[A-Z]+_[A-Z_]+|ARGS|THINK)\]|</?s>|<(?:start|end)_of_turn>"
    r"|<\|[\w\"]+>|<[\w\"]+\|>"
)
_TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
"""Tokens in the vocabularies of models that use them, but not special."""
_CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather now.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
]


def _turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


_USER, _ANSWER = _turn("user", "What is 1 + 2?"), _turn("assistant", "It is 3.")
_USER_2, _ANSWER_2 = _turn("user", "And the weather in Paris?"), _turn("assistant", "Sunny, 20 degrees.")
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single turn": [_USER, _ANSWER],
    "multi-turn": [_USER, _ANSWER, _USER_2, _ANSWER_2],
    "system": [_turn("system", "Answer in short."), _USER, _ANSWER, _USER_2, _ANSWER_2],
    "tools": [
        _USER_2,
        _turn("assistant", "", tool_calls=[_CALL]),
        _turn("tool", "sunny", name="get_weather", tool_call_id="a1b2c3d4e"),
        _ANSWER_2,
    ],
    "reasoning": [
        _USER,
        _turn("assistant", "It is 3.", reasoning_content="One and two make three."),
        _USER_2,
        _turn("assistant", "Sunny, 20 degrees.", reasoning_content="They want to know the weather."),
    ],
}


def published() -> dict[str, Path]:
    """Name -> file: those that TRL ships, where it is installed, and those written anew."""
    spec = importlib.util.find_spec("trl")
    shipped = [] if spec is None else sorted((Path(str(spec.origin)).parent / "chat_templates").glob("*.jinja"))
    return {path.stem: path for path in [*sorted(OWN.glob("*.jinja")), *shipped] if not _LEFT_OUT.fullmatch(path.stem)}


@cache
def _backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    texts = [str(turns) for turns in CONVERSATIONS.values()]
    backend.train_from_iterator([*texts, *(path.read_text() for path in sorted(OWN.glob("*.jinja")))], trainer)
    return str(backend.to_str())


@cache
def tokenizer_of(name: str, path: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, and with the special tokens that a template names."""
    template = path.read_text(encoding="utf-8").removesuffix("\n")
    eos = next(token for token, names in EOS.items() if not names or name.startswith(tuple(names.split())))
    special = [*dict.fromkeys([eos, "<s>", "<|pad|>", *_SPECIAL.findall(template)])]
    backend = Tokenizer.from_str(_backend())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in _TAGS if token in template])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def conversation(cell: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Turns and tools of a cell of the table."""
    return copy.deepcopy(CONVERSATIONS[cell]), copy.deepcopy(TOOLS) if cell == "tools" else None
