"""``lit-lora merge`` and ``lit-lora export`` on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_lora import (
    LoRAConfig,
    LoRALightningModule,
    QuantizationConfig,
    inject_lora,
    load_adapter,
    load_base_model,
    save_adapter,
)
from lit_lora.adapters.layers import lora_layers
from lit_lora.adapters.merge import merge_lora
from lit_lora.base import base_weight
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.base.quantize import dequantize_
from lit_lora.base.trained_on import forget
from lit_lora.tools.export import export
from lit_lora.tools.merge import merge
from tests.tiny import config

IDS = torch.arange(3, 24).view(3, 7)


@pytest.fixture
def base(tmp_path: Path) -> str:
    torch.manual_seed(0)
    fields = {"vocab_size": 260, "hidden_size": 64, "initializer_range": 0.2, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(config("Llama", **fields))
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> str:
    """Without a note on its base, in a run folder whose config says that this was quantized."""
    folder = tmp_path / "run" / "adapter"
    model = load_base_model(base)
    inject_lora(model, LoRAConfig(r=4, rank_pattern={"q_proj": 2}, use_rslora=True, init_lora_weights=False))
    for _, layer in lora_layers(model):
        layer.factors()[1].data.mul_(0.3)
    forget(model)
    save_adapter(model, folder)
    (tmp_path / "run" / "config.yaml").write_text("model: {quantization: {bits: 4}}\n")
    return str(folder)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_by_default_what_is_nearer_to_the_trained_model_is_merged_into(adapter, tmp_path, capsys):
    merge(adapter, str(tmp_path / "auto"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "nearest" in line]
    found = re.fullmatch(
        r"  dequantized is nearest to what was trained: KL base (\S+), dequantized (\S+) nats/token", line
    )
    assert found
    for into, kl in zip(("base", "dequantized"), found.groups(), strict=True):
        drifts = merge(adapter, str(tmp_path / f"into_{into}"), into=into)  # type: ignore[arg-type]
        assert drifts["the unmerged model as trained, on its quantized base"].kl == pytest.approx(float(kl), 0.05, 1e-9)
    auto, dequantized = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "into_dequantized"))
    assert auto == dequantized
    assert float(found[1]) > 1e-4 > 100 * float(found[2])
    export(adapter, str(tmp_path / "hf"), to="hf")
    assert line in capsys.readouterr().out.splitlines()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == dequantized


def test_where_quantizing_changed_nothing_the_base_itself_is_taken(base, adapter, tmp_path, capsys):
    quantization = QuantizationConfig(double_quant=False)
    model = load_base_model(base, quantization=quantization)
    dequantize_(model)
    model.save_pretrained(base)
    (tmp_path / "run" / "config.yaml").write_text("model: {quantization: {bits: 4, double_quant: false}}\n")
    with pytest.warns(UserWarning, match="its weights or its config are not the same"):
        merge(adapter, str(tmp_path / "merged"), other_base=True)
    assert "  base is nearest to what was trained: KL base" in capsys.readouterr().out


@pytest.mark.parametrize("quantized", [False, True])
def test_into_the_unquantized_base_is_the_default_where_there_is_no_other(quantized, base, adapter, tmp_path):
    if not quantized:
        (tmp_path / "run" / "config.yaml").unlink()
    drifts = merge(adapter, str(tmp_path / "merged"), into="base" if quantized else "auto")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    unmerged = load_base_model(base)
    load_adapter(unmerged, adapter)
    expected = _logits(unmerged)
    assert (_logits(plain) - expected).abs().max() < 1e-5 * expected.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    assert tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    assert len(drifts) == 1 + quantized
    same = drifts["the unmerged model on the same base"]
    assert same.max_abs < 1e-4
    assert same.kl < 1e-8
    assert same.top1 == 1.0
    if quantized:
        trained = drifts["the unmerged model as trained, on its quantized base"]
        assert trained.max_abs > 10 * same.max_abs
        assert trained.kl > 1e-4


@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_merging_into_the_dequantized_base_keeps_what_was_trained(embedding_bits, base, adapter, tmp_path):
    quantization = QuantizationConfig(embedding_bits=embedding_bits)
    (drift,) = merge(adapter, str(tmp_path / "merged"), into="dequantized", quantization=quantization).values()
    trained = load_base_model(base, quantization=quantization)
    load_adapter(trained, adapter)
    expected = _logits(trained)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.dtype == torch.float32
    assert (_logits(plain) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert drift.max_abs < 1e-3
    assert drift.top1 == 1.0


def test_merging_into_4_bits_warns_and_loses_more(adapter, tmp_path):
    with pytest.warns(UserWarning, match="rounds the sum of base and adapter again"):
        (drift,) = merge(adapter, str(tmp_path / "4bit"), into="4bit").values()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "4bit")
    assert base_weight.is_quantized(model.model.layers[0].self_attn.q_proj)
    (dequantized,) = merge(adapter, str(tmp_path / "merged"), into="dequantized").values()
    assert drift.kl > 100 * abs(dequantized.kl)
    assert drift.kl > 1e-4


def test_a_prequantized_base_can_be_merged_into_dequantized(base, adapter, tmp_path):
    (tmp_path / "run" / "config.yaml").unlink()
    base4 = str(tmp_path / "base4")
    load_base_model(base, quantization=QuantizationConfig()).save_pretrained(base4)
    byte_tokenizer().save_pretrained(base4)
    with (
        pytest.raises(ValueError, match=r"quantized weights.*`lit-lora merge`"),
        pytest.warns(UserWarning, match="was trained on"),
    ):
        merge(adapter, str(tmp_path / "merged"), base=base4, other_base=True, into="base")
    with pytest.warns(UserWarning, match="was trained on"):
        (drift,) = merge(adapter, str(tmp_path / "merged"), base=base4, other_base=True).values()
    assert drift.max_abs < 1e-3


def test_merging_what_is_not_quantized_into_its_dequantized_form_asks_how_it_was(base, adapter, tmp_path):
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"how the base was quantized: give bits=4"):
        merge(adapter, str(tmp_path / "merged"), into="dequantized")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_fails_leaves_nothing_and_an_earlier_one_is_not_touched(adapter, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    with pytest.raises(ValueError, match="taken is there already"):
        merge(adapter, str(tmp_path / "taken"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        merge(adapter, str(tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("portable", [True, False])
def test_export_from_a_folder_computes_the_same(portable, base, adapter, tmp_path):
    export(adapter, str(tmp_path / "out"), portable=portable)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == base
    assert bool(written["rank_pattern"] or written["use_rslora"]) is not portable
    models = []
    for folder in (adapter, tmp_path / "out"):
        model = load_base_model(base)
        load_adapter(model, folder)
        models.append(_logits(model))
    assert (models[0] - models[1]).abs().max() < 1e-5 * models[0].abs().max()
    with pytest.raises(ValueError, match="give another folder"):
        export(adapter, adapter)


def test_export_from_a_checkpoint(base, tmp_path):
    import lightning as L
    from lightning.pytorch.demos.boring_classes import RandomDataset
    from torch.utils.data import DataLoader

    module = LoRALightningModule(base, lora=LoRAConfig(r=4, use_rslora=True), quantization=QuantizationConfig())
    module.configure_model()
    for _, layer in lora_layers(module):
        torch.nn.init.normal_(layer.factors()[1], std=0.1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, max_epochs=0, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, DataLoader(RandomDataset(4, 4)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "out"))
    export(str(tmp_path / "a.ckpt"), str(tmp_path / "vllm"), to="vllm")
    there, here = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("vllm", "out"))
    assert all(torch.allclose(there[name], tensor) for name, tensor in here.items())
    assert there.keys() == here.keys()
    assert module.model is not None
    expected = _logits(module.model)
    fresh = load_base_model(base, quantization=QuantizationConfig())
    load_adapter(fresh, tmp_path / "out")
    assert (_logits(fresh) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_merge_lora_on_a_quantized_base_says_what_to_do(base):
    model = load_base_model(base, quantization=QuantizationConfig())
    inject_lora(model, LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"rounding them again would lose most of the adapter.*`lit-lora merge`"):
        merge_lora(model)


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("model.norm.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.embed_tokens.weight", True),
        ("model.embed_tokens.weight", False),  # the row of a token that no text of the sample has
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("into", ["base", "dequantized"])
def test_a_base_that_is_no_number_is_not_merged(name, tied, value, into, base, adapter, tmp_path):
    if not tied:
        model = load_base_model(base)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(base)
    path = Path(base) / "model.safetensors"
    tensors = load_file(path)
    tensors[name][-1] = value
    save_file(tensors, path, {"format": "pt"})
    with (
        pytest.raises(ValueError, match=f"^(the base|{re.escape(base)}) holds NaN or infinity"),
        pytest.warns(UserWarning, match="its weights or its config are not the same"),
    ):
        merge(adapter, str(tmp_path / "merged"), into=into, other_base=True)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*"))
