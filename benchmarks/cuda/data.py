"""Models and data of the CUDA suite, without a network: architectures with random weights, examples of random tokens.

What the tokens are changes no time and no memory, only how many there are. Natural lengths: log-normal with a median of
190 tokens and sigma 0.55, cut to 32 to 1024, so about 220 tokens in the mean, as instruction data with short answers
has (GSM8K in a chat template: about 220). The first 41% of an example is its prompt, the rest is supervised. Everything
is drawn from a seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from benchmarks.cuda.worker import Row
from lit_lora.base.architectures import architecture
from lit_lora.base.load import RANDOM
from lit_lora.data.prepared.dataset import TokenizedExample

TINY = "tiny"
TINY_CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 384, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
"""For checks, and to try the suite out; weights large enough that attention and head matter."""
MEDIAN_TOKENS, SIGMA, SHORTEST, LONGEST, PROMPT_SHARE = 190, 0.55, 32, 1024, 0.41

Example = tuple[list[int], list[bool]]


def base_of(model: str, folder: Path) -> str:
    """``model`` as a base: "tiny" is written to ``folder``, others are architectures that lit_lora knows."""
    if model != TINY:
        return f"{RANDOM}{model}"
    path = folder / "tiny" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(TINY_CONFIG))
    return f"{RANDOM}{path}"


def config_of(base: str) -> PreTrainedConfig:
    """The config of a base with random weights."""
    return architecture(base.removeprefix(RANDOM), None, False)


def natural(num_examples: int, vocab_size: int, *, seed: int = 0, longest: int = LONGEST) -> list[Example]:
    """Examples of natural lengths: token ids, and which are supervised."""
    draw = random.Random(seed)
    made = []
    for _ in range(num_examples):
        length = round(draw.lognormvariate(np.log(MEDIAN_TOKENS), SIGMA))
        length = min(max(length, SHORTEST), longest)
        made.append(_example(draw, vocab_size, length, max(1, round(PROMPT_SHARE * length))))
    return made


def dense(lengths: list[int], vocab_size: int, *, seed: int = 0) -> list[Example]:
    """Examples of these lengths, every token but the first supervised."""
    draw = random.Random(seed)
    return [_example(draw, vocab_size, length, 1) for length in lengths]


def tokenized(made: list[Example]) -> list[TokenizedExample]:
    """As the collators take them."""
    return [TokenizedExample(i, np.array(ids, dtype=np.int32), np.array(mask)) for i, (ids, mask) in enumerate(made)]


def examples(settings: Row) -> list[TokenizedExample]:
    """The ragged batch of the correctness checks."""
    return tokenized(natural(4, config_of(settings["base"]).vocab_size, longest=160))


def _example(draw: random.Random, vocab_size: int, length: int, num_prompt: int) -> Example:
    return [draw.randrange(3, vocab_size) for _ in range(length)], [place >= num_prompt for place in range(length)]
