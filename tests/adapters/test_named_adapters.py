"""Several adapters on one base: switched, added up, mixed within a batch, exchanged, taken away; PEFT's values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lit_lora import (
    LoRAConfig,
    QuantizationConfig,
    active_adapters,
    adapter_names,
    delete_adapter,
    disable_lora,
    hotswap_adapter,
    inject_lora,
    load_adapter,
    merge_lora,
    mixed_adapters,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lit_lora.base.quantize import quantize_
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

IDS = torch.arange(36).view(3, 12) + 3
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "v_proj"]},
    "other layers and rank": {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "rows": {"target_modules": ["k_proj"], "trainable_token_indices": {"embed_tokens": [4, 9]}},
    "copy of the head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


def base(kind: str = "Llama") -> Any:
    return language_model(kind, **({"num_local_experts": 4} if kind == "Mixtral" else {}))


def write(folder: Path, settings: dict[str, Any], kind: str = "Llama", seed: int = 1) -> Path:
    """An adapter of PEFT, with random values wherever it may have some."""
    model = peft.get_peft_model(base(kind), peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **more).logits


def both(folder: Path, names: list[str], *, not_in_peft: Sequence[str] = ()) -> tuple[Any, Any]:
    """One base with these adapters, here and in PEFT, where some exclude others."""
    folders = {name: write(folder / name, KINDS[name], seed=seed) for seed, name in enumerate(names)}
    ours, theirs = base(), peft.PeftModel.from_pretrained(base(), str(folders[names[0]]), names[0])
    load_adapter(ours, folders[names[0]], name=names[0])
    for name in names[1:]:
        if name not in not_in_peft:
            theirs.load_adapter(str(folders[name]), name)
        load_adapter(ours, folders[name], name=name)
    return ours, theirs


def test_every_kind_of_adapter_is_switched_as_if_it_were_alone(tmp_path: Path) -> None:
    names = list(KINDS)
    ours, theirs = both(tmp_path, names, not_in_peft=["rows"])
    without = logits(base())
    assert adapter_names(ours) == names
    assert active_adapters(ours) == names[:1], "those that come later lie beside the first"
    for name in [*names, *reversed(names)]:
        set_adapter(ours, name)
        alone = base()
        load_adapter(alone, tmp_path / name)
        assert torch.equal(logits(ours), logits(alone)), name
        if name != "rows":
            theirs.set_adapter(name)
            torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
        with disable_lora(ours):
            assert torch.equal(logits(ours), without)
    set_adapter(ours, None)
    assert active_adapters(ours) == []
    assert torch.equal(logits(ours), without)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2"])
def test_experts_and_biases_are_switched(kind: str, tmp_path: Path) -> None:
    fused = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    special = fused if kind == "Mixtral" else {"target_modules": ["q_proj"], "bias": "all"}
    folders = {
        "special": write(tmp_path / "special", special, kind),
        "again": write(tmp_path / "again", {**special, "r": 3}, kind, seed=2),
        "linear": write(tmp_path / "linear", {"target_modules": ["v_proj"]}, kind),
    }
    model, before = base(kind), logits(base(kind))
    for name, folder in folders.items():
        with pytest.warns(UserWarning, match="not adapted") if kind == "Mixtral" and name == "linear" else _nothing():
            load_adapter(model, folder, name=name)
    for name in ("linear", "again", "special", "again", "linear"):
        set_adapter(model, name)
        alone = base(kind)
        with pytest.warns(UserWarning, match="not adapted") if kind == "Mixtral" and name == "linear" else _nothing():
            load_adapter(alone, folders[name])
        assert torch.equal(logits(model), logits(alone)), name
    set_adapter(model, ["special", "linear"])
    with pytest.raises(ValueError, match="cannot be active together"):
        set_adapter(model, ["again", "special"])
    assert active_adapters(model) == ["special", "linear"], "a refusal changes nothing"
    with pytest.raises(ValueError, match=r"experts see tokens|biases"):
        mixed_adapters(model, ["special", "linear", None]).__enter__()
    assert active_adapters(model) == ["special", "linear"]
    unload_lora(model)
    assert torch.equal(logits(model), before)
    assert adapter_names(model) == []
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in base(kind).named_parameters()}


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("order", [["linear", "other layers and rank", "embedding"], ["embedding", "DoRA"]])
def test_several_active_adapters_add_up_as_in_peft(order: list[str], tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, ["linear", "other layers and rank", "embedding", "DoRA"])
    set_adapter(ours, order)
    theirs.base_model.set_adapter(order)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
    assert active_adapters(ours) == order
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model(IDS).logits.square().mean().backward()
    here = sum(p.grad.square().sum() for n, p in ours.named_parameters() if p.grad is not None)
    there = sum(p.grad.square().sum() for n, p in theirs.named_parameters() if p.grad is not None)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="set_adapter one of them"):
        merge_lora(ours)
    for name in order:  # one after the other
        set_adapter(ours, name)
        merge_lora(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-3, rtol=1e-3)


def test_what_is_no_sum_is_not_active_together(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, ["linear", "DoRA"])
    with pytest.raises(ValueError, match="both change q_proj, one as DoRALinear"):
        set_adapter(ours, ["linear", "DoRA"])
    assert active_adapters(ours) == ["linear"]


@pytest.mark.parametrize(
    "rows", [["linear", None, "embedding"], ["embedding", "rows", "linear"], [None, "linear", "DoRA"]]
)
def test_each_row_of_a_batch_has_its_adapter(rows: list[str | None], tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, ["linear", "embedding", "DoRA", "rows"], not_in_peft=["DoRA", "rows"])
    generation: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with mixed_adapters(ours, rows):
        mixed = logits(ours)
        generated = ours.generate(IDS, **generation)
    for number, name in enumerate(rows):
        set_adapter(ours, name)
        torch.testing.assert_close(mixed[number], logits(ours)[number], atol=1e-5, rtol=1e-5)
    if not {"rows", "DoRA"} & {*rows}:  # which PEFT does not mix
        names = [name or "__base__" for name in rows]
        torch.testing.assert_close(mixed, logits(theirs, adapter_names=names), atol=1e-4, rtol=1e-4)
        assert torch.equal(generated, theirs.generate(input_ids=IDS, adapter_names=names, **generation))
    with mixed_adapters(ours, rows[:2]), pytest.raises(ValueError, match=r"2 adapters are named.*the batch has 3 rows"):
        logits(ours)
    with pytest.raises(ValueError, match=r"no adapter .french.; there are .*.linear."):
        mixed_adapters(ours, ["french"]).__enter__()


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, ["linear", "other layers and rank"])
    adapters = {}
    for name in ("linear", "other layers and rank"):
        set_adapter(ours, name)
        adapters[name] = [p.requires_grad_() for n, p in ours.named_parameters() if "lora_" in n]
    with mixed_adapters(ours, ["linear", "other layers and rank", "linear"]):
        ours(IDS).logits.square().sum().backward()
    mixed = {name: [p.grad.clone() for p in parameters] for name, parameters in adapters.items()}
    for name, rows in (("linear", [0, 2]), ("other layers and rank", [1])):
        set_adapter(ours, name)
        alone = torch.autograd.grad(ours(IDS[rows]).logits.square().sum(), adapters[name])
        for got, expected in zip(mixed[name], alone, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_an_adapter_is_added_beside_others_trained_saved_and_deleted(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, ["linear", "embedding"])
    inject_lora(ours, LoRAConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5), name="new")
    assert active_adapters(ours) == ["linear"]
    set_adapter(ours, "new")
    ours.train()
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    torch.optim.SGD(trained, lr=1.0).param_groups[0]
    ours(IDS).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.ones_like(parameter), alpha=0.1)
    save_adapter(ours, tmp_path / "new")
    alone = base()
    load_adapter(alone, tmp_path / "new")
    assert torch.equal(logits(alone), logits(ours))
    set_adapter(ours, ["new", "linear"])
    with pytest.raises(ValueError, match="set_adapter"):
        save_adapter(ours, tmp_path / "two")
    delete_adapter(ours, "new")
    assert (adapter_names(ours), active_adapters(ours)) == (["linear", "embedding"], ["linear"])
    with pytest.raises(ValueError, match="no adapter 'new'"):
        set_adapter(ours, "new")
    with pytest.raises(ValueError, match="already has an adapter 'linear'"):
        load_adapter(ours, tmp_path / "linear", name="linear")
    with pytest.raises(ValueError, match="already has adapters"):
        load_adapter(ours, tmp_path / "linear")
    merge_lora(ours, unload=False)
    with pytest.raises(ValueError, match="unmerge_lora first"):
        set_adapter(ours, "embedding")


def test_adapters_are_switched_on_a_quantized_base(tmp_path: Path) -> None:
    for name in ("linear", "DoRA"):
        write(tmp_path / name, KINDS[name])
    model, alone = base(), base()
    for each in (model, alone):
        quantize_(each, QuantizationConfig(block_size=32))
    for name in ("linear", "DoRA"):
        load_adapter(model, tmp_path / name, name=name)
    load_adapter(alone, tmp_path / "DoRA")
    set_adapter(model, "DoRA")
    assert torch.equal(logits(model), logits(alone))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", list(KINDS))
def test_an_exchanged_adapter_computes_what_it_does_alone_and_compiles_nothing(name: str, tmp_path: Path) -> None:
    first = write(tmp_path / "first", KINDS[name], seed=1)
    second = write(tmp_path / "second", {**KINDS[name], "lora_alpha": 24, "use_rslora": False}, seed=2)
    model, alone = base(), base()
    load_adapter(model, first)
    load_adapter(alone, second)
    num_compiled = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal num_compiled
        num_compiled += 1
        return graph

    torch._dynamo.reset()
    run = torch.compile(model, backend=counting)
    logits(run)
    assert (compiled := num_compiled) > 0
    hotswap_adapter(model, second)
    torch.testing.assert_close(logits(run), logits(alone), atol=1e-5, rtol=1e-5)
    assert num_compiled == compiled


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"target_modules": ["q_proj", "v_proj"], "r": 4}, "shapes differ"), ({"target_modules": ["q_proj"]}, "missing 4"),
     ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, "unexpected")],
)  # fmt: skip
def test_an_adapter_of_other_shapes_is_not_exchanged(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = base()
    load_adapter(model, write(tmp_path / "first", KINDS["linear"]))
    before = logits(model)
    with pytest.raises(ValueError, match=named):
        hotswap_adapter(model, write(tmp_path / "second", settings))
    assert torch.equal(logits(model), before)
