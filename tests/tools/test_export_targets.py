"""``lit-lora export --to``: read back by PEFT, transformers and gguf's reader, or refused with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_lora import LoRAConfig, inject_lora, load_adapter, load_base_model
from lit_lora.adapters.layers import adapter_modules, lora_layers
from lit_lora.interchange.gguf_vocabulary import vocabulary
from lit_lora.interchange.ollama import wrapping
from lit_lora.interchange.plain_adapter import vllm_rank
from lit_lora.tools.export import export
from tests.chat_tokenizers import CHATML, VOCAB_SIZE, chat_tokenizer, each_turn
from tests.small_adapters import LLAMA3, MERGES, MODELS, RANKS, SIZE, small_adapter
from tests.tiny import language_model

IDS = torch.arange(3, 24).view(3, 7)


def _expected(adapter: str) -> torch.Tensor:
    model = load_base_model(str(Path(adapter).parent / "base"))
    load_adapter(model, adapter)
    return _logits(model)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def _close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


UNREAD = ("Mixtral", "Qwen3-MoE", "Gemma 2", "Gemma 3", "OLMo 2", "GPT-2", "GPT-NeoX")
"""transformers has no reader for these, or one that leaves fields of the config out."""
READ = {name: model for name, model in MODELS.items() if name not in UNREAD}


@pytest.mark.filterwarnings("ignore:not adapted:UserWarning")
@pytest.mark.parametrize(("kind", "sizes"), READ.values(), ids=READ)
def test_transformers_reads_a_gguf_file_as_what_was_merged(kind, sizes, tmp_path):
    adapter = small_adapter(tmp_path, kind, **sizes)
    export(adapter, str(tmp_path / "out" / "model.gguf"), to="gguf", gguf_type="f32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    _close(_logits(model), _expected(adapter), 1e-5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 5e-3), ("bf16", 2e-2), ("q8_0", 0.1)])
def test_a_gguf_file_of_fewer_bits_rounds_and_no_more(kind, tolerance, tmp_path):
    adapter = small_adapter(tmp_path)
    export(adapter, str(tmp_path / "model.gguf"), to="gguf", gguf_type=kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    _close(_logits(model), _expected(adapter), tolerance)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind.upper()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_a_gguf_file_says_what_the_tokenizer_does(tmp_path):
    adapter = small_adapter(tmp_path, vocab_size=SIZE + 3)
    export(adapter, str(tmp_path / "model.gguf"), to="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    field = {name.removeprefix("tokenizer."): value.contents() for name, value in reader.fields.items()}
    tokenizer = chat_tokenizer(merges=MERGES)
    assert field["chat_template"] == CHATML
    assert (field["ggml.model"], field["ggml.pre"]) == ("gpt2", "gpt-2")
    assert field["ggml.tokens"][:SIZE] == tokenizer.convert_ids_to_tokens(range(SIZE))
    assert field["ggml.token_type"] == [1] * 259 + [3] * (SIZE - 259) + [5] * 3
    assert field["ggml.merges"] == ["t h", "th e", "e r"]
    ends = field["ggml.eos_token_id"], field["ggml.eot_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]
    assert not field["ggml.add_bos_token"]
    assert field["ggml.padding_token_id"] == tokenizer.pad_token_id


def test_scaled_positions_are_written_as_factors(tmp_path):
    adapter = small_adapter(tmp_path, rope_parameters=LLAMA3, max_position_embeddings=512)
    export(adapter, str(tmp_path / "model.gguf"), to="gguf", gguf_type="f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    got = tensors["rope_freqs.weight"]
    for index, factor in enumerate(got):
        wavelength = 2 * math.pi * 10000.0 ** (2 * index / 16)
        smooth = min(max((64 / wavelength - 1) / 3, 0.0), 1.0)  # 1 for short waves, 0 for long ones
        assert factor == pytest.approx(1 / (smooth + (1 - smooth) / 8), rel=1e-5)
    assert len({round(float(factor), 3) for factor in got}) > 2


def test_a_gguf_adapter_holds_the_same_change_in_the_order_of_llama(tmp_path):
    adapter = small_adapter(tmp_path)
    export(adapter, str(tmp_path / "adapter.gguf"), to="gguf", gguf_type="f32", adapter_only=True)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    model = load_base_model(str(tmp_path / "base"))
    load_adapter(model, adapter)
    ours = dict(lora_layers(model))
    assert len(tensors) == 2 * len(ours)
    # Of a head of 16, llama.cpp has rows 0, 8, 1, 9, ... of transformers.
    order = [head * 16 + half * 8 + i for head in range(4) for i in range(8) for half in range(2)]
    for name, ending, rows in (
        ("q_proj", "attn_q", order),
        ("k_proj", "attn_k", order[:32]),
        ("v_proj", "attn_v", None),
    ):
        lora_A, lora_B = (tensors[f"blk.1.{ending}.weight.lora_{half}"] for half in "ab")
        delta = alpha / lora_B.shape[1] * lora_B @ lora_A
        expected = ours[f"model.layers.1.self_attn.{name}"].delta_weight()
        assert torch.allclose(delta, expected if rows is None else expected[rows], atol=1e-6)


def test_hf_is_the_merged_model(tmp_path, capsys):
    adapter = small_adapter(tmp_path, "Qwen2")
    export(adapter, str(tmp_path / "out"), to="hf")
    _close(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), _expected(adapter), 1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
    assert "one layer in memory at a time" in capsys.readouterr().out


def test_vllm_gets_a_portable_adapter_and_the_command(tmp_path, capsys):
    adapter = small_adapter(tmp_path, lora={**RANKS, "r": 12})
    export(adapter, str(tmp_path / "out"), to="vllm")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["rank_pattern"], written["use_rslora"]) == (12, {}, False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    _close(_logits(peft.PeftModel.from_pretrained(plain, tmp_path / "out")), _expected(adapter), 1e-5)
    assert f"--enable-lora --max-lora-rank 16 --lora-modules tuned={tmp_path / 'out'}" in capsys.readouterr().out


@pytest.mark.parametrize(("r", "needed"), [(1, 8), (8, 8), (65, 128), (257, 320), (512, 512)])
def test_vllm_has_a_few_ranks(r, needed):
    assert vllm_rank(r) == needed
    with pytest.raises(ValueError, match="ranks up to 512, and this adapter's is 513"):
        vllm_rank(513)


def test_mlx_gets_factors_the_other_way_round(tmp_path):
    adapter = small_adapter(tmp_path)
    export(adapter, str(tmp_path / "out"), to="mlx")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert (settings["fine_tune_type"], settings["num_layers"]) == ("lora", 2)
    assert "self_attn.q_proj" in settings["lora_parameters"]["keys"]
    model = load_base_model(str(tmp_path / "base"))
    load_adapter(model, adapter)
    for name, layer in lora_layers(model):
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape == (layer.base_layer.in_features, settings["lora_parameters"]["rank"])
        delta = (settings["lora_parameters"]["scale"] * b.T) @ a.T
        assert torch.allclose(delta, layer.delta_weight(), atol=1e-6)
        assert name.split(".", 3)[3] in settings["lora_parameters"]["keys"]


def test_ollama_gets_a_modelfile_with_template_and_stops(tmp_path):
    adapter = small_adapter(tmp_path)
    export(adapter, str(tmp_path / "out"), to="ollama", gguf_type="f32")
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    _close(_logits(model), _expected(adapter), 1e-5)


DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML


def test_what_a_template_says_without_a_system_message_is_kept():
    tokenizer = chat_tokenizer(DEFAULT_SYSTEM)
    found = wrapping(tokenizer)
    assert found.start == "<|im_start|>system\nBe kind.<|im_end|>\n"
    turns = [{"role": "user", "content": "x"}]
    assert found.render(turns) == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


SECOND_ANSWER_DIFFERS = CHATML.replace("m['content']", "(m['content'] if loop.index < 4 else m['content'] | upper)")
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": (
        {"kind": "OPT", "lora": {"target_modules": "all-linear"}},
        {"to": "gguf"},
        "architecture OPTForCausalLM is not one of",
    ),
    "field": ({"hidden_act": "gelu"}, {"to": "gguf"}, "hidden_act is gelu, expected silu"),
    "vLLM": ({"kind": "Bloom"}, {"to": "vllm"}, "vLLM serves no adapters on BloomForCausalLM"),
    "name": ({}, {"to": "gguf", "output": "folder"}, "let it end in .gguf"),
    "DoRA": (
        {"lora": {"target_modules": ["q_proj"], "use_dora": True}},
        {"to": "gguf", "adapter_only": True},
        r"a GGUF adapter cannot take this adapter: it has DoRA",
    ),
    "DoRA, vLLM": ({"lora": {"target_modules": ["q_proj"], "use_dora": True}}, {"to": "vllm"}, "vLLM .* has DoRA"),
    "saved": (
        {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
        {"to": "vllm"},
        r"modules trained in full \(lm_head\)",
    ),
    "biases": (
        {"kind": "Qwen2", "lora": {"target_modules": ["q_proj"], "bias": "all"}}, {"to": "mlx"}, "trained biases"
    ),
    "embedding": ({"lora": {"target_modules": ["embed_tokens"]}}, {"to": "mlx"}, "the tensor .*lora_embedding_A"),
    "head": (
        {"lora": {"target_modules": ["lm_head"]}},
        {"to": "gguf", "adapter_only": True},
        "an adapter of lm_head.* cannot be written as GGUF",
    ),
    "head, mlx": ({"lora": {"target_modules": ["lm_head"]}}, {"to": "mlx"}, "mlx-lm cannot take an adapter of lm_head"),
    "template": ({"template": SECOND_ANSWER_DIFFERS}, {"to": "ollama"}, "it does more than to put something around"),
    "no template": ({"template": None}, {"to": "ollama"}, "the tokenizer has none"),
    "no gguf": ({}, {"to": "hf", "adapter_only": True}, "adapter_only=True is for to='gguf'"),
    "portable": ({}, {"to": "hf", "portable": True}, "portable=True and to='hf' exclude each other"),
}  # fmt: skip


@pytest.mark.parametrize(("made", "asked", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_target_cannot_express_is_an_error_that_names_it(made, asked, message, tmp_path, monkeypatch):
    adapter = small_adapter(tmp_path, **made)
    asked = dict(asked)
    output = tmp_path / "out" / asked.pop("output", "model.gguf" if asked["to"] == "gguf" else "folder")

    def merged(*_: Any, **__: Any) -> None:
        raise AssertionError("it is refused before anything is merged")

    monkeypatch.setattr("lit_lora.evaluation.export_targets.merge", merged)
    with pytest.raises(ValueError, match=message):
        export(adapter, str(output), **asked)
    assert not output.exists()
    assert not list(tmp_path.glob("out/.*"))


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS: dict[str, Any] = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": _split(LETTERS + r"\p{N}{1,3}" + REST),
    "qwen2": _split(LETTERS + r"\p{N}" + REST),
    "": _split(LETTERS + r"\p{N}{1,2}" + REST),
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_way_to_split_words_has_its_name_in_llama_cpp(name):
    from tokenizers import models

    tokenizer = chat_tokenizer()
    backend = tokenizer.backend_tokenizer
    vocab = backend.get_vocab(with_added_tokens=False) | {"ab": VOCAB_SIZE}
    backend.model = models.BPE(vocab=vocab, merges=[("a", "b")], ignore_merges=name == "llama-bpe")
    backend.pre_tokenizer = SPLITS[name]
    if name:
        found = vocabulary(tokenizer, VOCAB_SIZE + 1)
        assert (found.words, found.merges) == (name, ["a b"])
        return
    with pytest.raises(ValueError, match="it splits words in another way than gpt-2, smollm, llama-bpe, qwen2"):
        vocabulary(tokenizer, VOCAB_SIZE + 1)


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "words": ({"model": {"type": "WordLevel"}}, "it is WordLevel"),
    "bytes beside it": ({"model": {"byte_fallback": True}}, "tokens for single bytes beside it"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, r"it normalizes text \(Lowercase\)"),
}


@pytest.mark.parametrize(("changes", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_llama_cpp_has_no_words_for_are_refused(changes, message):
    from lit_lora.interchange import gguf_vocabulary

    content = json.loads(chat_tokenizer(merges=MERGES).backend_tokenizer.to_str())
    for part, change in changes.items():
        content[part] = {**(content[part] or {}), **change}
    with pytest.raises(ValueError, match=message):
        gguf_vocabulary._words(content)


def test_a_tokenizer_without_merges_is_refused():
    with pytest.raises(ValueError, match="it has no merges"):
        vocabulary(chat_tokenizer(), VOCAB_SIZE)


def test_an_embedding_smaller_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="it has token 265, and the model's embedding has 260 rows"):
        vocabulary(chat_tokenizer(merges=MERGES), 260)


def test_the_template_of_a_first_token_is_written_once():
    from lit_lora.interchange.ollama import modelfile

    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML)
    tokenizer.bos_token = "<|sep|>"
    assert modelfile("m.gguf", tokenizer, ["a"], adds_bos=False).count("<|sep|>") == 2
    assert "<|sep|>" not in modelfile("m.gguf", tokenizer, ['a"'], adds_bos=True)


def test_a_template_that_ends_turns_in_text_has_it_as_a_stop(tmp_path):
    adapter = small_adapter(tmp_path, template=each_turn("USER: ", "ASSISTANT: ", "###END###\\n"))
    export(adapter, str(tmp_path / "out"), to="ollama")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.endswith('PARAMETER stop "<|endoftext|>"\nPARAMETER stop "###END###"\n')
    assert '{{ else if eq .Role "assistant" }}ASSISTANT: {{ .Content }}###END###\n{{ end }}' in text


def test_the_adapters_of_a_model_are_there():
    """The fixture's adapter has ranks of its own, so that scales and padding matter."""
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, **RANKS))
    assert len({module.scaling for _, module in adapter_modules(model)}) == 2
