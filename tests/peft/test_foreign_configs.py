"""Configurations as PEFT writes them that change nothing about the tensors, or contradict them in its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora import load_adapter, merge_lora, save_adapter, unmerge_lora
from lit_lora.adapters.layers import lora_layers
from tests.tiny import language_model

pytestmark = pytest.mark.filterwarnings("ignore:.corda_config. specified but will be ignored")
IDS = torch.arange(3, 24).view(3, 7)
QV = ["q_proj", "v_proj"]


def _written(folder: Path, kind: str = "Llama", **fields: Any) -> torch.Tensor:
    """The logits of a model of PEFT whose adapter is in the folder then."""
    start = {"r": 4, "lora_alpha": 6, "target_modules": QV, "init_lora_weights": False, **fields}
    torch.manual_seed(0)
    config = peft.LoraConfig(**start)  # type: ignore[arg-type]
    theirs = peft.get_peft_model(language_model(kind), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(str(folder))
    return theirs(IDS).logits


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "a rank for some of a pattern": (
        "Llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 5}}
    ),
    "three that overlap": (
        "Llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 5, "self_attn.q_proj": 3, "q_proj": 2}}
    ),
    "of an embedding": (
        "Llama", {"target_modules": [*QV, "embed_tokens"], "rank_pattern": {"embed_tokens": 3, ".*e.*_.*": 2}}
    ),
    "null targets, Llama": ("Llama", {"target_modules": None}),
    "null targets, GPT-2": ("GPT2", {"target_modules": None}),
    "null targets, Gemma 2": ("Gemma2", {"target_modules": None}),
    "a corda_config that is left": ("Llama", {"corda_config": peft.tuners.lora.config.CordaConfig()}),
    "no scale": ("Llama", {"lora_alpha": 0}),
    "a negative scale": ("Llama", {"lora_alpha": -3}),
    "mica": ("Llama", {"init_lora_weights": "mica"}),
    "mica, embedding": ("Llama", {"init_lora_weights": "mica", "target_modules": ["embed_tokens", "q_proj"]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(("kind", "fields"), CASES.values(), ids=CASES)
def test_the_adapter_is_what_was_in_memory(kind, fields, tmp_path):
    expected = _written(tmp_path, kind, **fields)
    ours = language_model(kind)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-4)
    before = ours(IDS).logits
    merge_lora(ours, unload=False)
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-4)
    unmerge_lora(ours)
    assert torch.equal(ours(IDS).logits, before)
    if not all(layer.starts_nonzero.any() for _, layer in lora_layers(ours)):
        return
    save_adapter(ours, tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(language_model(kind), tmp_path / "again").eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-5, atol=1e-4)


def test_patterns_that_overlap_are_what_peft_cannot_read_itself(tmp_path):
    _written(tmp_path, **CASES["a rank for some of a pattern"][1])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(language_model(), tmp_path)


def test_a_rank_of_no_pattern_is_refused(tmp_path):
    _written(tmp_path, **CASES["a rank for some of a pattern"][1])
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: t[:1] if "q_proj.lora_A" in k else t[:, :1] if "q_proj.lora_B" in k else t
               for k, t in load_file(path).items()}  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="4 shapes differ"):
        load_adapter(language_model(), tmp_path)


CHANGING = {
    "megatron_config": {"x": 1}, "velora_config": {"rank": 1}, "alora_invocation_tokens": [1], "use_qalora": True,
    "monteclora_config": {"num_samples": 8}, "layer_replication": [[0, 2]], "use_bdlora": {"x": 1},
    "arrow_config": {"top_k": 1}, "kasa_config": {"beta": 1e-4}, "of_tomorrow": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), CHANGING.items(), ids=CHANGING)
def test_a_field_that_changes_the_function_or_of_no_known_effect_is_refused_by_name(field, value, tmp_path):
    _written(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"does not implement, or does not know: {field}="):
        load_adapter(language_model(), tmp_path)
