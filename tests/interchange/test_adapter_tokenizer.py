"""Every kind of tokenizer comes back with the adapter that it was saved beside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file

from lit_lora import (
    LoRAConfig,
    LoRALightningModule,
    SFTDataModule,
    inject_lora,
    load_base_model,
    load_tokenizer,
    save_adapter,
)
from lit_lora.base.byte_tokenizer import CHAT_TEMPLATE
from lit_lora.base.trained_on import note
from lit_lora.cli.lightning_cli import parse_fit
from lit_lora.data.chats.tokenize import format_prompt, format_text
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.data.data_record import data_record
from lit_lora.data.prepared.prepare import SourceSettings
from lit_lora.evaluation.load import load
from lit_lora.language_model.generation import stop_tokens
from lit_lora.tools.estimate import largest_batches
from tests.chat_tokenizers import EOS, chat_tokenizer
from tests.started_runs import make_base
from tests.sweep.configs import tiny_config
from tests.tools.test_fetch import write_tiny_gguf

CODE = """
from transformers import PreTrainedTokenizer

class LetterTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}
    model_input_names = ["input_ids", "attention_mask"]
    vocab_size = 256

    def get_vocab(self):
        return {**{chr(code): code for code in range(256)}, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) if ord(token) < 256 else 63

    def _convert_id_to_token(self, index):
        return chr(index)

    def save_vocabulary(self, *args, **options):
        return ()
"""


def _gguf(folder: Path) -> Any:
    write_tiny_gguf(folder / "model.gguf")
    return load_tokenizer(str(folder / "model.gguf"))


def _edited(folder: Path) -> Any:
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = "Now: " + CHAT_TEMPLATE
    return tokenizer


def _several_templates(folder: Path) -> Any:
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = {"default": CHAT_TEMPLATE + "!", "tool_use": "none"}
    return tokenizer


def _with_code(folder: Path) -> Any:
    (folder / "letters.py").write_text(CODE)
    fields = {
        "tokenizer_class": "LetterTokenizer",
        "auto_map": {"AutoTokenizer": ["letters.LetterTokenizer", None]},
        "eos_token": "<e>",
        "chat_template": "{% for m in messages %}{{ m['content'] + '<e>' }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(str(folder))
    return load_tokenizer(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("named", ["data.tokenizer", "model.base"])
def test_one_setting_lets_the_code_of_a_tokenizer_run_for_data_and_estimate(named, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    _with_code(folder)
    (folder / "config.json").write_text(json.dumps(tiny_config("llama", vocab_size=260).to_dict()))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")  # which neither of them reads
    (tmp_path / "data.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n' * 4)
    base = str(folder) if named == "model.base" else "random:tinyllama-1.1b"
    given = {"model.base": base, "data.train": tmp_path / "data.jsonl", "data.cache_dir": tmp_path / "cache"}
    given |= {} if named == "model.base" else {"data.tokenizer": folder}
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for trust in (False, True):
        settings = {**given, "model.trust_remote_code": trust}
        config = parse_fit([part for name, value in settings.items() for part in (f"--{name}", str(value))])
        data = SFTDataModule(**config.data)
        trainer.strategy.connect(LoRALightningModule(base, trust_remote_code=trust))
        data.trainer = trainer
        origin = largest_batches(config).origin
        if trust:
            assert type(data.tokenizer).__name__ == "LetterTokenizer"
            assert "of 4 examples" in origin
        else:
            assert "trust_remote_code" in origin
            with pytest.raises(ValueError, match="trust_remote_code"):
                _ = data.tokenizer


KINDS = {
    "bytes": lambda folder: load_tokenizer("bytes"),
    "GGUF": _gguf,
    "an edited template": _edited,
    "several templates": _several_templates,
    "slow, with code of its own": _with_code,
    "no template": lambda folder: chat_tokenizer(None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_saved_with_the_adapter_and_taken_from_there(kind, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    tokenizer = KINDS[kind](tmp_path / "tokenizer")
    model = load_base_model(make_base(tmp_path / "base", "{{ 'another template' }}"))
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    note(model, **data_record(tokenizer, SourceSettings(), name=None, format="messages"))
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    trust = kind == "slow, with code of its own"
    if trust:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(str(tmp_path / "adapter"))
    _, got, _ = load(str(tmp_path / "adapter"), trust_remote_code=trust)
    messages = [{"role": "user", "content": "ab cd"}]
    assert format_prompt(got, messages) == format_prompt(tokenizer, messages)
    assert format_text(got, "ab") == format_text(tokenizer, "ab")
    assert turn_end(got) == turn_end(tokenizer)


def test_what_the_base_ends_with_counts_only_as_far_as_the_tokenizer_ends_with_it(tmp_path):
    model = load_base_model(make_base(tmp_path / "base"))
    tokenizer = chat_tokenizer()
    sep = tokenizer.convert_tokens_to_ids("<|sep|>")
    model.generation_config.eos_token_id = [ord("e"), sep]  # the first is another tokenizer's
    end = turn_end(tokenizer)
    assert stop_tokens(model, tokenizer, end) == [*end.ids, sep]
    assert tokenizer.convert_tokens_to_ids(EOS) in end.ids
    model.generation_config.eos_token_id = ord("e")
    assert stop_tokens(model, tokenizer, end) == end.ids


def test_a_base_without_a_tokenizer_asks_for_one(tmp_path):
    make_base(tmp_path / "base")
    with pytest.raises(ValueError, match=r"no tokenizer: .*has no tokenizer of its own: set tokenizer"):
        load(base=f"random:{tmp_path / 'base' / 'config.json'}")
    _, tokenizer, _ = load(base=f"random:{tmp_path / 'base' / 'config.json'}", tokenizer="bytes")
    assert tokenizer.chat_template == CHAT_TEMPLATE
