"""Architectures by name, with random weights: for memory studies, benchmarks and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from lit_lora.files.meant import closest, did_you_mean

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **_LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "tinyllama-1.1b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""Architectures by name, from the models' published ``config.json``."""


def architecture(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of ``random:NAME``."""
    if name in ARCHITECTURES:
        fields = dict(ARCHITECTURES[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    path = check_architecture(name)
    if path.exists():
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def check_architecture(name: str) -> Path:
    """The path that ``random:NAME`` would have if it is one.

    Raises:
        FileNotFoundError: if it is neither that, nor a known architecture, nor the name of a model on the Hub.
    """
    path = Path(name).expanduser()
    if name in ARCHITECTURES or path.exists():
        return path
    if name.count("/") != 1 or path.is_absolute() or name.startswith("."):
        hint = did_you_mean(closest(name, ARCHITECTURES)) or f"known are {', '.join(ARCHITECTURES)}"
        raise FileNotFoundError(f"no architecture {name!r}: {hint}; or give a folder or a config.json")
    return path
