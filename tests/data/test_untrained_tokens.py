"""A template whose tokens the base was never trained on is named before training."""

from __future__ import annotations

import json
import warnings

import lightning as L
import pytest

from lit_lora import LoRAConfig, LoRALightningModule, SFTDataModule, inject_lora
from lit_lora.data.untrained_tokens import untrained_tokens
from tests.chat_tokenizers import TOKENS, VOCAB_SIZE, chat_tokenizer
from tests.tiny import language_model


def base(kind: str):
    model = language_model(vocab_size=VOCAB_SIZE, pad_token_id=None)
    rows = model.get_input_embeddings().weight.data
    start, end, reserve = (256 + TOKENS.index(token) for token in ("<|im_start|>", "<|im_end|>", "<|sep|>"))
    if kind == "zero":
        rows[end] = 0
    if kind == "equal":
        rows[end] = rows[reserve]
        rows[start] = rows[reserve]
    if kind == "others":
        rows[reserve] = rows[256 + TOKENS.index("<|user|>")] = 0
    return model


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("trained", []), ("zero", ["<|im_end|>"]), ("equal", ["<|im_start|>", "<|im_end|>"]), ("others", [])],
)
def test_untrained_tokens_of_the_template_are_found(kind, expected):
    assert untrained_tokens(base(kind).requires_grad_(False), chat_tokenizer()) == expected


@pytest.mark.parametrize("how", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_an_embedding_that_trains_is_not_looked_at(how):
    model = base("zero")
    inject_lora(model, LoRAConfig(**how))
    assert untrained_tokens(model, chat_tokenizer()) == []


@pytest.mark.parametrize("kind", ["trained", "zero"])
def test_a_run_says_so_once(tmp_path, kind):
    base(kind).save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "a.jsonl")
    data = SFTDataModule(path, validation=path, batch_size=2, cache_dir=tmp_path)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    trainer = L.Trainer(accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(LoRALightningModule(str(tmp_path / "base"), lora=LoRAConfig(r=2)), data)
    said = [str(warning.message) for warning in caught if "never trained on" in str(warning.message)]
    assert len(said) == (kind == "zero")
    if said:
        assert "the base was never trained on <|im_end|>, which the chat template writes" in said[0]
