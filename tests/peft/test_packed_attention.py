"""``nn.MultiheadAttention`` beside PEFT: values, gradients, files, merged and taken out again."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lit_lora import (
    LoRAConfig,
    disable_lora,
    hotswap_adapter,
    inject_lora,
    load_adapter,
    merge_lora,
    mixed_adapters,
    save_adapter,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from lit_lora.adapters.layers import adapter_modules
from lit_lora.interchange.peft_format import adapter_state_dict


class Attending(nn.Module):
    """An attention of one's own between two linear layers."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **fields})
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.attention(x, x, x, need_weights=False)[0])


class Encoder(nn.Module):
    """Torch's own encoder, which has a fast path around its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "alone": (Attending, {"target_modules": ["attention"]}),
    "without biases": (lambda: Attending(bias=False), {"target_modules": ["attention"]}),
    "more keys and values": (
        lambda: Attending(add_bias_kv=True, add_zero_attn=True, batch_first=False),
        {"target_modules": ["attention"]},
    ),
    "rsLoRA, patterns": (
        Attending,
        {
            "target_modules": ["attention", "up"], "use_rslora": True, "rank_pattern": {"attention": 2},
            "alpha_pattern": {"attention": 3},
        },
    ),
    "saved module": (Attending, {"target_modules": ["attention"], "modules_to_save": ["up"]}),
    "encoder": (Encoder, {"target_modules": ["self_attn", "linear1"]}),
}  # fmt: skip
each_case = pytest.mark.parametrize(("build", "fields"), CASES.values(), ids=CASES)


def _equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _theirs(build: Any, fields: dict[str, Any]) -> Any:
    torch.manual_seed(2)
    start = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **fields}
    return peft.get_peft_model(build(), peft.LoraConfig(**start))


@each_case
def test_what_peft_writes_is_read_with_the_same_values_gradients_and_tensors(build, fields, tmp_path):
    theirs = _theirs(build, fields)
    theirs.save_pretrained(tmp_path)
    ours = build()
    load_adapter(ours, tmp_path, trainable=True)
    for model in (ours, theirs):
        model(X).square().sum().backward()
    _equal(ours(X), theirs(X))
    expected = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    got = {n.replace(".copy.", "."): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() == adapter_state_dict(ours).keys()
    for name, gradient in expected.items():
        # PEFT adds the output's product twice, one of them where autograd does not see it.
        seen = 2 if "out_proj" in name else 1
        torch.testing.assert_close(got[name], seen * gradient, rtol=1e-4, atol=1e-4)


@each_case
def test_peft_reads_what_we_write_and_both_merge_it_into_the_same(build, fields, tmp_path):
    ours = build()
    torch.manual_seed(3)
    inject_lora(ours, LoRAConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **fields}))
    save_adapter(ours, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(build(), tmp_path)
    for model in (ours, theirs):  # torch's encoder layers would read weights past PEFT's adapters in evaluation
        model.train()
    before = ours(X)
    _equal(theirs(X), before)
    merge_lora(ours, unload=False)
    _equal(ours(X), before)
    unmerge_lora(ours)
    assert torch.equal(ours(X), before)
    merge_lora(ours)
    assert not list(adapter_modules(ours))
    assert type(ours) is type(build())
    merged = theirs.merge_and_unload()
    _equal(ours(X), merged(X))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in build().named_parameters()}


def test_in_evaluation_and_without_gradients_it_computes_the_same():
    for build in (Attending, Encoder):
        model = build()
        base = model.eval()(X)
        names = ["attention"] if build is Attending else ["self_attn"]
        inject_lora(model, LoRAConfig(r=4, target_modules=names))
        _equal(model.train()(X), base)  # it starts as the base
        with torch.no_grad():
            for _, layer in adapter_modules(model):
                layer.start_at_random()
        expected = model.train()(X)
        assert not torch.allclose(expected, base, atol=1e-3)
        with torch.no_grad():
            _equal(model.eval()(X), expected)
            with disable_lora(model):
                _equal(model(X), base)


def test_switched_exchanged_and_taken_out(tmp_path):
    models = []
    for number, alpha in enumerate((6, 3)):
        model = Attending()
        torch.manual_seed(number)
        inject_lora(
            model, LoRAConfig(r=4, lora_alpha=alpha, target_modules=["attention", "up"], init_lora_weights=False)
        )
        save_adapter(model, tmp_path / str(number))
        models.append(model)
    base = Attending()
    for name in ("0", "1"):
        load_adapter(base, tmp_path / name, name=name)
    for name in ("1", "0"):
        set_adapter(base, name)
        _equal(base(X), models[int(name)](X))
    with pytest.raises(ValueError, match="cannot be active together"):
        set_adapter(base, ["0", "1"])
    with pytest.raises(ValueError, match="takes several inputs"), mixed_adapters(base, ["0", "1", None]):
        pass
    unload_lora(base)
    plain = Attending().state_dict()
    assert base.state_dict().keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in base.state_dict().items())
    hotswap_adapter(models[0], tmp_path / "1")
    _equal(models[0](X), models[1](X))
    with pytest.raises(ValueError, match="no portable form: attention is a MultiheadAttention"):
        save_adapter(models[0], tmp_path / "portable", portable=True)


REFUSED = {
    "keys of another width": (lambda: Attending(kdim=4, vdim=4), {}, "have a width of their own"),
    "DoRA": (Attending, {"use_dora": True}, "use_dora is not for nn.MultiheadAttention, in PEFT either"),
    "lora_bias": (Attending, {"lora_bias": True}, "lora_bias does not work with nn.MultiheadAttention"),
    "biases": (Attending, {"bias": "all"}, "bias 'all' does not work with nn.MultiheadAttention"),
    "dropout": (Attending, {"lora_dropout": 0.1}, "lora_dropout does not work with nn.MultiheadAttention"),
    "a start": (Attending, {"init_lora_weights": "pissa"}, "is for linear layers, and attention is none"),
}


@pytest.mark.parametrize(("build", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_there_is_refused_by_name_before_anything_is_touched(build, fields, message):
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**{"r": 4, "target_modules": ["attention"], **fields}))
    assert {name: type(module) for name, module in model.named_modules()} == before
