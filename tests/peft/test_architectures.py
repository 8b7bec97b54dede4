"""All linear layers of many kinds of models: PEFT reads what is written, its files are read, a fresh head is kept.

PEFT expands "all-linear" in ways of its own (experts of a mixture, projections that are never called), and trains the
head of a classifier only if it is told the task.
"""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from lit_lora import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter
from tests.tiny import SIZES, language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:not adapted"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
]
ENCODER = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
BART = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], str | None, list[str]]] = {
    "LlamaForCausalLM": (SIZES, "CAUSAL_LM", []),
    "GPT2LMHeadModel": ({**SIZES, "n_positions": 64}, "CAUSAL_LM", []),
    "FalconForCausalLM": (SIZES, "CAUSAL_LM", []),
    "MixtralForCausalLM": ({**SIZES, "num_local_experts": 2}, "CAUSAL_LM", []),
    "Qwen3MoeForCausalLM": ({**SIZES, **EXPERTS, "head_dim": 8}, "CAUSAL_LM", []),
    "Qwen2MoeForCausalLM": ({**SIZES, **EXPERTS, "shared_expert_intermediate_size": 16}, "CAUSAL_LM", []),
    "T5ForConditionalGeneration": (
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}, "SEQ_2_SEQ_LM", []
    ),
    "BertModel": (ENCODER, None, []),
    "BertForMaskedLM": (ENCODER, None, []),
    "LlamaForSequenceClassification": (SIZES, "SEQ_CLS", ["score"]),
    "BertForSequenceClassification": (ENCODER, "SEQ_CLS", ["classifier"]),
    "RobertaForSequenceClassification": (ENCODER, "SEQ_CLS", ["classifier"]),
    "BartForSequenceClassification": (BART, "SEQ_CLS", ["classification_head"]),
    "DebertaV2ForSequenceClassification": (ENCODER, "SEQ_CLS", ["pooler", "classifier"]),
    "DistilBertForSequenceClassification": (
        {"vocab_size": 128, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 32}, "SEQ_CLS",
        ["pre_classifier", "classifier"],
    ),
    "BertForTokenClassification": (ENCODER, "TOKEN_CLS", ["classifier"]),
    "BertForQuestionAnswering": (ENCODER, "QUESTION_ANS", ["qa_outputs"]),
    # PEFT would look for another module inside of this head, so that it is not told the task.
    "BigBirdForQuestionAnswering": ({**ENCODER, "attention_type": "original_full"}, None, ["qa_classifier"]),
    "BertForMultipleChoice": (ENCODER, None, ["classifier"]),
}  # fmt: skip
"""Class -> its sizes, PEFT's name for its task, its head."""

each_model = pytest.mark.parametrize("name", MODELS)


def _model(name: str, seed: int = 0) -> Any:
    """A pretrained body, the same each time, and a head that is random each time."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**MODELS[name][0]))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(seed)
    for head in MODELS[name][2]:
        for parameter in model.get_submodule(head).parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _outputs(model: Any, name: str) -> torch.Tensor:
    ids = torch.arange(3, 17).view(2, 7)
    ids[:, -1] = 2  # BART wants an end
    more = {"decoder_input_ids": ids} if name.startswith("T5") else {}
    found = model(input_ids=ids[None] if name.endswith("Choice") else ids, **more)
    return torch.cat([value.flatten() for value in found.values() if isinstance(value, torch.Tensor)])


def _train(model: nn.Module, part: str) -> None:
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)


def _assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@each_model
def test_peft_and_we_read_what_we_write_onto_another_random_head(name, tmp_path):
    _, task, head = MODELS[name]
    model = _model(name)
    report = inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    assert report.saved == head
    assert report.config.modules_to_save == (head or None)
    _train(model, ".copy.")
    expected = _outputs(model, name)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["task_type"] == task
    assert isinstance(written["target_modules"], list)
    assert all("." not in target for target in written["target_modules"])  # the last parts say it all
    assert (_outputs(_model(name, seed=1), name) - expected).abs().max() > 1e-2
    theirs = peft.PeftModel.from_pretrained(_model(name, seed=1), tmp_path).eval()
    _assert_equal(_outputs(theirs, name), expected)
    ours = _model(name, seed=1)
    load_adapter(ours, tmp_path)
    _assert_equal(_outputs(ours, name), expected)
    merge_lora(ours)
    _assert_equal(_outputs(ours, name), expected)


PEFT_FAILS = ("BertForTokenClassification", "BertForQuestionAnswering", "DistilBertForSequenceClassification")
"""PEFT (0.21) first adapts the head of these under "all-linear", and then cannot train it in full."""


@each_model
def test_what_peft_writes_is_read_onto_another_random_head(name, tmp_path):
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type=MODELS[name][1])
    if name in PEFT_FAILS:
        with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
            peft.get_peft_model(_model(name), config)
        return
    theirs = peft.get_peft_model(_model(name), config, autocast_adapter_dtype=False).eval()
    _train(theirs, "modules_to_save")
    theirs.save_pretrained(tmp_path)
    # Where PEFT knows no task, or no head of that name, it leaves the head as it was and out of the file.
    seed = 1 if MODELS[name][1] and not name.startswith(("Bart", "Deberta")) else 0
    ours = _model(name, seed)
    load_adapter(ours, tmp_path)
    _assert_equal(_outputs(ours, name), _outputs(theirs, name))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "BertForTokenClassification"])
def test_the_gradients_of_a_classifier_equal_those_of_peft(name, tmp_path):
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, target_modules=["q_proj", "query"], task_type=MODELS[name][1]
    )
    theirs = peft.get_peft_model(_model(name), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path)
    ours = _model(name, seed=1)
    load_adapter(ours, tmp_path, trainable=True)
    for model in (ours, theirs):
        _outputs(model.eval(), name).square().sum().backward()
    got = {n.replace(".copy.", "."): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = {
        n.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    assert got.keys() == expected.keys()
    assert {n for n in got if "lora" not in n} == {f"{MODELS[name][2][0]}.{part}" for part in ("weight", "bias")} & set(
        got
    )
    for key, gradient in expected.items():
        _assert_equal(got[key], gradient)


def test_a_head_that_is_excluded_stays_as_it_is_and_peft_is_not_told_the_task(tmp_path):
    name = "BertForSequenceClassification"
    model = _model(name)
    report = inject_lora(model, LoRAConfig(r=2, init_lora_weights=False, exclude_modules=["classifier"]))
    assert report.saved == []
    assert not any("classifier" in adapted for adapted in report.adapted)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    theirs = peft.PeftModel.from_pretrained(_model(name), tmp_path).eval()
    _assert_equal(_outputs(theirs, name), _outputs(model, name))


def test_adapting_a_head_that_is_trained_in_full_is_refused():
    with pytest.raises(ValueError, match=r"'score' has no effect.*the head of a classifier is trained in full too"):
        inject_lora(_model("LlamaForSequenceClassification"), LoRAConfig(target_modules=["q_proj", "score"]))


REFUSED = {
    "Qwen3Moe": ({**EXPERTS, "head_dim": 8, "mlp_only_layers": [0]}, ["down_proj", "gate_proj", "up_proj"]),
    "DeepseekV3": (
        {
            "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
        },
        ["down_proj", "gate_proj", "up_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_whose_names_peft_takes_for_experts_are_refused(kind, tmp_path):
    """PEFT turns every target of such a name into one of the experts, even the full name of a shared expert."""
    sizes, ends = REFUSED[kind]
    with pytest.raises(
        ValueError, match=rf"names? for that of the fused experts.*exclude_modules: \{str(ends)[:-1]}\]"
    ):
        inject_lora(language_model(kind, **sizes), LoRAConfig(r=2))
    dense = next(
        name for name, module in language_model(kind, **sizes).named_modules()
        if isinstance(module, nn.Linear) and name.endswith("down_proj")
    )  # fmt: skip
    theirs = peft.get_peft_model(language_model(kind, **sizes), peft.LoraConfig(r=2, target_modules=["o_proj", dense]))
    assert not any(dense in name for name, _ in theirs.named_parameters() if "lora" in name)
    model = language_model(kind, **sizes)
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False, exclude_modules=ends))
    save_adapter(model, tmp_path)
    reader = peft.PeftModel.from_pretrained(language_model(kind, **sizes), tmp_path).eval()
    ids = torch.arange(3, 17).view(2, 7)
    _assert_equal(reader(ids).logits, model(ids).logits)
