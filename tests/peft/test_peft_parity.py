"""PEFT as the oracle: what it writes is read, what is written it reads, logits and gradients agree."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_adapter, merge_lora, save_adapter
from lit_lora.adapters.layers import adapter_modules
from lit_lora.base.quantize import quantize_
from lit_lora.interchange.peft_format import adapter_state_dict
from tests.tiny import language_model

pytestmark = [
    # PEFT's own remarks about what the tables below do on purpose.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor:UserWarning"),  # its own lora_B.bias
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
]

TOLERANCE = 1e-5
"""Of the largest value, where that is above 1: what float32 rounds differs from processor to processor."""


@dataclass
class Case:
    fields: dict[str, Any]
    kind: str = "Llama"
    model: dict[str, Any] = field(default_factory=dict)
    quantization: QuantizationConfig | None = None
    num_adapted: int = 0

    def base(self) -> Any:
        model = language_model(self.kind, **self.model)
        if self.quantization is not None:
            quantize_(model, self.quantization)
        return model


GPT2 = {"n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
TIED = {"tie_word_embeddings": True}
CASES = {
    "list": Case({"target_modules": ["q_proj", "v_proj"]}, num_adapted=4),
    "full name": Case({"target_modules": ["model.layers.1.mlp.up_proj"]}, num_adapted=1),
    "all-linear": Case({"target_modules": "all-linear"}, num_adapted=14),
    "regex": Case({"target_modules": r".*layers\.1\..*_proj"}, num_adapted=7),
    "rsLoRA": Case({"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, num_adapted=4),
    "patterns": Case(
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.k_proj": 5},
            "alpha_pattern": {"v_proj": 3, r"model\.layers\.0\.self_attn\.k_proj": 10.5},
            "use_rslora": True,
        },
        num_adapted=6,
    ),
    "one layer": Case({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, num_adapted=2),
    "layers": Case(
        {"target_modules": ["o_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}, num_adapted=2
    ),
    "excluded": Case(
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": [r"layers.0.self_attn.q_proj"]}, num_adapted=3
    ),
    "excluded by regex": Case({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, num_adapted=8),
    "saved head": Case({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, num_adapted=2),
    "saved tied head": Case({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, model=TIED, num_adapted=2),
    "saved tied embedding": Case(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, model=TIED, num_adapted=2
    ),
    "saved norm and block": Case(
        {"target_modules": ["self_attn.q_proj", "up_proj"], "modules_to_save": ["model.norm", "layers.1.mlp"]},
        num_adapted=3,
    ),
    "head": Case({"target_modules": ["q_proj", "lm_head"]}, num_adapted=3),
    "tied head": Case({"target_modules": ["q_proj", "lm_head"]}, model=TIED, num_adapted=3),
    "embedding": Case({"target_modules": ["embed_tokens", "q_proj"]}, num_adapted=3),
    "tied embedding": Case({"target_modules": ["embed_tokens", "q_proj"]}, model=TIED, num_adapted=3),
    "biases": Case({"target_modules": ["q_proj", "o_proj"]}, kind="Qwen2", num_adapted=4),
    "Conv1D": Case({"target_modules": ["c_attn", "c_fc"]}, kind="GPT2", model=GPT2, num_adapted=4),
    "Conv1D all-linear": Case({"target_modules": "all-linear"}, kind="GPT2", model=GPT2, num_adapted=8),
    "scaled embedding": Case(
        {"target_modules": ["embed_tokens", "q_proj"]}, kind="Gemma3Text", model={"head_dim": 8}, num_adapted=3
    ),
    "DoRA": Case({"target_modules": "all-linear", "use_dora": True}, num_adapted=14),
    "DoRA, biases": Case(
        {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        kind="Qwen2",
        num_adapted=4,
    ),
    "DoRA, Conv1D": Case(
        {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
        kind="GPT2",
        model=GPT2,
        num_adapted=4,
    ),
    "DoRA, embedding": Case({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, num_adapted=3),
    "DoRA, scaled embedding": Case(
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        kind="Gemma3Text",
        model={"head_dim": 8},
        num_adapted=3,
    ),
    "DoRA, NF4": Case(
        {"target_modules": "all-linear", "use_dora": True},
        model={"hidden_size": 64},
        quantization=QuantizationConfig(),
        num_adapted=14,
    ),
    "all biases": Case({"target_modules": ["q_proj"], "bias": "all"}, kind="Qwen2", num_adapted=2),
    "biases of LoRA": Case({"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, kind="Qwen2", num_adapted=4),
    "all biases, Conv1D": Case(
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"], "fan_in_fan_out": True},
        kind="GPT2",
        model=GPT2,
        num_adapted=2,
    ),
    "biases of LoRA's own": Case(
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True, "use_rslora": True, "bias": "lora_only"},
        kind="Qwen2",
        num_adapted=6,
    ),
    "biases of LoRA's own, Conv1D": Case(
        {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "fan_in_fan_out": True},
        kind="GPT2",
        model=GPT2,
        num_adapted=4,
    ),
    "biases of LoRA's own, NF4": Case(
        {"target_modules": ["q_proj"], "lora_bias": True},
        kind="Qwen2",
        model={"hidden_size": 64},
        quantization=QuantizationConfig(),
        num_adapted=2,
    ),
    "biases, DoRA and 4 bits": Case(
        {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True},
        kind="Qwen2",
        model={"hidden_size": 64},
        quantization=QuantizationConfig(),
        num_adapted=2,
    ),
    "NF4": Case(
        {"target_modules": "all-linear"}, model={"hidden_size": 64}, quantization=QuantizationConfig(), num_adapted=14
    ),
    "FP4": Case(
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
        model={"hidden_size": 64},
        quantization=QuantizationConfig(quant_type="fp4", double_quant=False),
        num_adapted=4,
    ),
}
"""Adapted layers of each: so that no case passes because nothing was adapted."""

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
IDS = torch.arange(3, 24).view(3, 7)


def _assert_equal(got: torch.Tensor, expected: torch.Tensor, what: str = "logits") -> None:
    assert (got - expected).abs().max() < TOLERANCE * max(1, expected.abs().max()), what


def _peft_model(case: Case, *, random: bool = True) -> Any:
    torch.manual_seed(4)
    names = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": not random, **case.fields}
    model = peft.get_peft_model(case.base(), peft.LoraConfig(**names), autocast_adapter_dtype=False)
    if random:
        _perturb(
            {n: p for n, p in model.named_parameters() if "modules_to_save" in n or "magnitude" in n or _is_bias(n, p)}
        )
    return model


def _our_model(case: Case, **fields: Any) -> Any:
    torch.manual_seed(5)
    model = case.base()
    given = {name: value for name, value in case.fields.items() if name != "fan_in_fan_out"}  # which is seen here
    config = LoRAConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **given, **fields})
    report = inject_lora(model, config)
    assert len(report.adapted) == case.num_adapted
    _perturb({n: p for n, p in model.named_parameters() if ".copy." in n or "magnitude" in n or _is_bias(n, p)})
    return model


def _is_bias(name: str, parameter: torch.nn.Parameter) -> bool:
    return name.endswith("bias") and parameter.requires_grad


def _perturb(parameters: dict[str, torch.Tensor]) -> None:
    """Trained in full, so that a reader that takes the base's values instead is found out."""
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@each_case
def test_peft_reads_what_we_write(case, tmp_path):
    ours = _our_model(case)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    expected = ours(IDS).logits
    _assert_equal(theirs(IDS).logits, expected)
    assert (case.base()(IDS).logits - expected).abs().max() > 1e-2


@each_case
def test_we_read_what_peft_writes_and_write_the_same_tensors(case, tmp_path):
    theirs = _peft_model(case)
    theirs.save_pretrained(tmp_path)
    ours = case.base()
    report = load_adapter(ours, tmp_path)
    assert len(report.adapted) == case.num_adapted
    expected = theirs(IDS).logits
    _assert_equal(ours(IDS).logits, expected)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    save_adapter(ours, tmp_path / "ours")
    written, read = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "ours", tmp_path))
    # PEFT also writes the base's own weights of adapted embeddings, and biases of what is trained in full three times.
    of_base = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")
    assert written.keys() == {name for name in read if not name.endswith(of_base)}
    assert all(torch.equal(tensor, read[name]) for name, tensor in written.items())
    assert (case.base()(IDS).logits - expected).abs().max() > 1e-2


@each_case
def test_gradients_equal_those_of_peft(case, tmp_path):
    theirs = _peft_model(case).train()
    theirs.save_pretrained(tmp_path)
    ours = case.base()
    load_adapter(ours, tmp_path, trainable=True)
    ours.train()
    ours(input_ids=IDS, labels=IDS).loss.backward()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    got = {
        name: tensor
        for name, tensor in ((n.replace(".copy.", "."), p.grad) for n, p in ours.named_parameters())
        if tensor is not None
    }
    expected = {
        name.removeprefix("base_model.model.")
        .replace("magnitude_vector.default.weight", "magnitude_vector")
        .replace(".default", "")
        .replace(".modules_to_save", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    assert got.keys() == expected.keys()
    assert got.keys() == adapter_state_dict(ours).keys()
    for name, gradient in expected.items():
        _assert_equal(got[name], gradient, name)


@pytest.mark.parametrize(
    "name", ["all-linear", "regex", "rsLoRA", "patterns", "one layer", "excluded", "saved head", "embedding", "Conv1D"]
)
def test_portable_export_needs_no_patterns(name, tmp_path):
    case = CASES[name]
    ours = _our_model(case)
    save_adapter(ours, tmp_path, portable=True)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"]
    assert isinstance(written["target_modules"], list)
    assert not any(written[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    ranks = {t.shape[0] for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in n}
    assert ranks == {written["r"]}
    expected = ours(IDS).logits
    theirs = peft.PeftModel.from_pretrained(case.base(), tmp_path)
    again = case.base()
    load_adapter(again, tmp_path)
    _assert_equal(theirs(IDS).logits, expected)
    _assert_equal(again(IDS).logits, expected)


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if not c.quantization], ids=[n for n, c in CASES.items() if not c.quantization]
)
def test_merging_equals_merging_with_peft(case, tmp_path):
    theirs = _peft_model(case)
    theirs.save_pretrained(tmp_path)
    ours = case.base()
    load_adapter(ours, tmp_path)
    before = ours(IDS).logits
    merge_lora(ours)
    assert not list(adapter_modules(ours))
    _assert_equal(ours(IDS).logits, before)
    if case.base().config.tie_word_embeddings:
        return  # where PEFT changes the tied twin along (peft issue 2777)
    merged = theirs.merge_and_unload()
    _assert_equal(ours(IDS).logits, merged(IDS).logits)
    assert type(ours.get_output_embeddings()) is torch.nn.Linear


def test_the_same_seed_starts_with_the_same_spread_as_peft():
    case = Case({"target_modules": ["q_proj"]}, model={"hidden_size": 256, "num_attention_heads": 4})
    for start in (True, "gaussian"):
        theirs = peft.get_peft_model(
            case.base(), peft.LoraConfig(r=16, target_modules=["q_proj"], init_lora_weights=start)
        )
        ours = case.base()
        inject_lora(ours, LoRAConfig(r=16, target_modules=["q_proj"], init_lora_weights=start))
        name = "model.layers.0.self_attn.q_proj.lora_A"
        expected = theirs.get_parameter(f"base_model.model.{name}.default.weight")
        got = ours.get_parameter(f"{name}.weight")
        assert got.std().item() == pytest.approx(expected.std().item(), rel=0.1)
        assert got.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.5)


def test_layers_to_transform_beside_a_string_is_written_as_names(tmp_path):
    """PEFT takes it only beside a list."""
    ours = language_model()
    config = LoRAConfig(r=4, target_modules="all-linear", layers_to_transform=[1], init_lora_weights=False)
    assert len(inject_lora(ours, config).adapted) == 7
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(language_model(), tmp_path)
    _assert_equal(theirs(IDS).logits, ours(IDS).logits)


def test_keys_with_an_adapter_name_are_read(tmp_path):
    case = CASES["saved head"]
    theirs = _peft_model(case)
    theirs.save_pretrained(tmp_path)
    named = {n: p.contiguous() for n, p in theirs.state_dict().items() if "lora_" in n or "modules_to_save" in n}
    assert any(name.endswith("lora_A.default.weight") for name in named)
    save_file(named, tmp_path / "adapter_model.safetensors")
    ours = case.base()
    load_adapter(ours, tmp_path)
    _assert_equal(ours(IDS).logits, theirs(IDS).logits)


def test_entries_that_peft_ignored_do_not_stop_loading(tmp_path):
    model = peft.get_peft_model(
        language_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "query_key_value"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    ours = language_model()
    load_adapter(ours, tmp_path)
    _assert_equal(ours(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base"),
    ],
)
def test_what_is_not_implemented_raises(options, named, tmp_path):
    model = peft.get_peft_model(language_model("Qwen2"), peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
    model.save_pretrained(tmp_path)
    target = language_model("Qwen2")
    with pytest.raises(ValueError, match=named):
        load_adapter(target, tmp_path)
    assert not list(adapter_modules(target))


@pytest.mark.parametrize("start", ["orthogonal", "gaussian", False])
def test_starts_that_leave_the_base_alone_are_read(start, tmp_path):
    model = peft.get_peft_model(
        language_model(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    )
    model.save_pretrained(tmp_path)
    ours = language_model()
    load_adapter(ours, tmp_path)
    _assert_equal(ours(IDS).logits, model(IDS).logits)


def test_transformers_loads_the_folder_without_peft_code_of_its_own(tmp_path):
    ours = _our_model(CASES["list"])
    save_adapter(ours, tmp_path)
    model = language_model()
    model.load_adapter(str(tmp_path))
    _assert_equal(model(IDS).logits, ours(IDS).logits)


def test_generation_equals_that_of_peft(tmp_path):
    theirs = _peft_model(CASES["embedding"])
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(CASES["embedding"].base())
    load_adapter(ours, tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(IDS, **options), theirs.generate(input_ids=IDS, **options))
