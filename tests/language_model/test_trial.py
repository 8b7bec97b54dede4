"""The trial of shortcuts: what it must see, what it must not hide, and what it must not leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lit_lora import LoRAConfig, inject_lora
from lit_lora.data.batches.packing import collate_packed
from lit_lora.kernels import flash_attention
from lit_lora.language_model import attention, forward
from lit_lora.language_model.attention_calls import packable_up_to, record_calls
from lit_lora.language_model.forward import laid_out, language_model_loss, linear_cross_entropy_with_accuracy
from lit_lora.language_model.trial import choose_path
from tests.language_model.test_forward import _collated, _gradients, _reference_loss
from tests.sweep.compare import build
from tests.sweep.configs import tiny_config
from tests.tiny import examples, language_model

GEMMA2: dict[str, Any] = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}
CHUNKED: dict[str, Any] = {
    **TWO_LAYERS, "attn_temperature_tuning": False, "layer_types": ["chunked_attention", "full_attention"]
}  # fmt: skip


def adapted(kind: str = "Llama", **fields: Any) -> Any:
    model = language_model(kind, **fields)
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    return model


# ---------------------------------------------------------------------- what rows of thousands of tokens would show


@pytest.mark.parametrize(
    ("model_type", "fields", "up_to"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 4096}, None),  # told by an argument too
        ("gemma3_text", {"sliding_window": 512}, None),
        ("llama4_text", {**CHUNKED, "attention_chunk_size": 8192}, 8192),
        ("llama4_text", {**CHUNKED, "attention_chunk_size": 300}, 300),
        ("llama4_text", {**CHUNKED, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_windows_and_chunks_of_any_length_are_found(model_type, fields, up_to):
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **fields)).eval()
    calls = record_calls(model, torch.arange(3, 12)[None])
    assert len(calls) == model.config.num_hidden_layers
    assert packable_up_to(calls, torch.device("cpu")) == up_to
    assert choose_path(model).packed_up_to == up_to


@pytest.mark.parametrize("length", [18, 20, 21, 40])
def test_an_example_that_is_longer_than_a_chunk_is_padded(length):
    model = build("llama4_text", **CHUNKED, attention_chunk_size=20)
    model.eval()
    path = choose_path(model)
    assert path.packed
    assert path.packed_up_to == 20
    assert "up to 20 tokens" in str(path)
    batch = examples((length, 11))
    packed = _collated(collate_packed, batch)
    assert ("cu_seq_lens" in laid_out(packed, path)) == (length <= 20)
    with torch.no_grad():
        loss = language_model_loss(model, packed, path).nll_sum
        torch.testing.assert_close(loss, _reference_loss(model, batch), rtol=1e-5, atol=1e-5)


def test_a_chunk_that_packing_would_cross_is_seen():
    """Row of 40 tokens, chunk of 16: the loss was 182.7 in place of 186.9."""
    model = build("llama4_text", attention_chunk_size=16)
    path = choose_path(model)
    assert not path.packed
    assert "of 16 tokens, is told by the mask alone" in path.reason
    batch = examples((40, 12))
    loss = language_model_loss(model, _collated(collate_packed, batch), path).nll_sum
    torch.testing.assert_close(loss, _reference_loss(model, batch), rtol=1e-5, atol=1e-5)


def test_positions_that_are_counted_along_the_row_are_seen():
    """Llama 4 scales queries by position from token 8192 on, which a few tokens do not show."""
    path = choose_path(build("llama4_text", **TWO_LAYERS, layer_types=["full_attention"] * 2))
    assert not path.packed
    assert "counts positions along the row" in path.reason


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("Gemma2", GEMMA2), ("Cohere", {"logit_scale": 0.0625}), ("Granite", {"logits_scaling": 8.0})],
)
def test_what_the_model_does_to_its_logits_is_seen_however_small_they_are(kind, fields):
    model = language_model(kind, std=1e-4, **fields)
    assert not choose_path(model).direct_head


# ---------------------------------------------------------------------- a shortcut that is wrong


@pytest.fixture
def broken(monkeypatch):
    """Break a part of a shortcut, by name."""

    def window(query: Any, key: Any, value: Any, *, window: int | None, **options: Any) -> Any:
        return masked(query, key, value, window=window and window + 1, **options)

    def borders(query: Any, key: Any, value: Any, seq_lens: list[int], **options: Any) -> Any:
        return flash(query, key, value, [sum(seq_lens)], **options)

    def prefix(query: Any, key: Any, value: Any, seq_lens: list[int], *, shared_prefix: int = 0, **options: Any) -> Any:
        return flash(query, key, value, seq_lens, shared_prefix=shared_prefix and shared_prefix - 1, **options)

    def gradient(*args: Any, **options: Any) -> Any:
        out = flash(*args, **options)
        return out.detach() + 1.02 * (out - out.detach())

    def head(*args: Any, **options: Any) -> Any:
        out = chunked(*args, **options)
        return out._replace(nll_sum=out.nll_sum.detach() + 1.02 * (out.nll_sum - out.nll_sum.detach()))

    masked, flash = attention._masked_attention, attention.flash_attention
    chunked = linear_cross_entropy_with_accuracy
    parts = {
        "window": (attention, "_masked_attention", window), "borders": (attention, "flash_attention", borders),
        "prefix": (attention, "flash_attention", prefix), "gradient": (attention, "flash_attention", gradient),
        "head": (forward, "linear_cross_entropy_with_accuracy", head),
    }  # fmt: skip
    return lambda name: monkeypatch.setattr(*parts[name])


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("window", (False, False, True)),
        ("borders", (False, False, True)),
        ("prefix", (True, False, True)),
        ("gradient", (False, False, True)),
        ("head", (True, True, False)),
    ],
)
def test_a_shortcut_that_is_wrong_is_not_taken(broken, part, expected):
    """Packed, beginnings shared, loss from hidden states."""
    model = adapted("Mistral", sliding_window=8 if part == "window" else None)
    path = choose_path(model)
    assert (path.packed, path.shared_prefix, path.direct_head) == (True, True, True), str(path)
    broken(part)
    path = choose_path(model)
    assert (path.packed, path.shared_prefix, path.direct_head) == expected, str(path)
    assert path.reason


# ---------------------------------------------------------------------- what a model raises, and what we do


class _OddError(Exception):
    pass


@pytest.mark.parametrize("error", [_OddError, KeyError, AssertionError, ZeroDivisionError, NotImplementedError])
def test_whatever_a_model_raises_is_a_reason_to_pad(error):
    model = adapted()
    attend = model.model.layers[1].self_attn
    own = attend.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "seq_lens" in kwargs:
            raise error("not here")
        return own(*args, **kwargs)

    attend.forward = forward
    path = choose_path(model)
    assert not path.packed
    assert path.direct_head
    assert path.reason.startswith(f"not packed: {error.__name__}: ")
    assert "not here" in path.reason


def test_an_error_of_our_own_is_not_taken_for_an_answer(monkeypatch):
    monkeypatch.setattr(flash_attention, "_put_", None)  # as a slip of the pen would
    with pytest.raises(TypeError, match="NoneType"):
        choose_path(adapted())


def test_a_model_that_does_not_run_is_refused_in_words():
    model = adapted()

    def forward(*_: Any, **__: Any) -> None:
        raise _OddError("pixel_values are missing")

    model.forward = forward
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not run .* pixel_values are missing.*compute_loss"):
        choose_path(model)


def test_a_model_that_sees_what_follows_is_refused():
    model = AutoModelForCausalLM.from_config(tiny_config("bert", is_decoder=False))
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        choose_path(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_one_that_sees_what_follows_by_less_than_rounding_may_is_refused(share, dtype):
    """As a trained one does, which mostly gives back the token that it sees."""
    model = AutoModelForCausalLM.from_config(tiny_config("bert", is_decoder=False))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.mul_(share)
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        choose_path(model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rounding_that_depends_on_the_row_is_not_taken_for_it(dtype):
    model = adapted().to(dtype)
    forward = model.forward

    def rough(*args: Any, **given: Any) -> Any:
        output = forward(*args, **given)
        noise = torch.ones(len(output.logits), 1, 1, dtype=dtype)
        noise[1:] = 1.03
        output.logits = output.logits * noise
        return output

    model.forward = rough
    if dtype is torch.float32:
        with pytest.raises(ValueError, match="not causal"):
            choose_path(model)
    else:
        choose_path(model)


def test_weights_that_are_no_numbers_are_refused():
    model = adapted()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not numbers"):
        choose_path(model)


# ---------------------------------------------------------------------- attention calls that packing cannot serve


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"s_aux": torch.zeros(4)}, "its attention takes s_aux"),
        ({"is_causal": False}, "its attention is not causal"),
        ({"seq_lens": None}, "where examples begin"),
        ({"attention_mask": torch.zeros(1, 1, 12, 12)}, "a mask of its own"),
        ({"attention_mask": None}, "a mask of its own"),
        ({"query": torch.zeros(2, 4, 12, 8)}, "queries of shape"),
        ({"key": torch.zeros(1, 2, 13, 8)}, "keys of shape"),
        ({"key": torch.zeros(1, 3, 12, 8), "value": torch.zeros(1, 3, 12, 8)}, "keys of shape"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_call_that_asks_for_more_is_refused(change, reason):
    call: dict[str, Any] = {
        "query": torch.zeros(1, 4, 12, 8), "key": torch.zeros(1, 2, 12, 8), "value": torch.zeros(1, 2, 12, 8),
        "attention_mask": attention.no_mask(torch.device("cpu")), "seq_lens": attention.SeqLens([7, 5]),
        "cu_seq_lens_q": torch.tensor([0, 7, 12], dtype=torch.int32),
    }  # fmt: skip
    attention.packed_attention_forward(nn.Identity(), **call)
    with pytest.raises(attention.CannotPack, match=reason.replace("a mask", "(a|an attention) mask")):
        attention.packed_attention_forward(nn.Identity(), **{**call, **change})


def test_values_may_be_of_another_width_than_keys():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, 12, 8, generator=generator) for _ in range(2))
    value = torch.randn(1, 4, 12, 6, generator=generator)
    got, _ = attention.packed_attention_forward(
        nn.Identity(), query, key, value, attention.no_mask(query.device),
        cu_seq_lens_q=torch.tensor([0, 7, 12], dtype=torch.int32), seq_lens=attention.SeqLens([7, 5]),
    )  # fmt: skip
    parts = [F.scaled_dot_product_attention(query[:, :, s], key[:, :, s], value[:, :, s], is_causal=True)
             for s in (slice(0, 7), slice(7, 12))]  # fmt: skip
    torch.testing.assert_close(got, torch.cat(parts, dim=2).transpose(1, 2))


# ---------------------------------------------------------------------- what is left behind


@pytest.mark.parametrize(
    ("kind", "fields", "implementation"),
    [
        ("Llama", {}, "eager"),
        ("Llama", {}, "sdpa"),
        ("Mistral", {"sliding_window": 4}, "sdpa"),
        ("Gemma2", GEMMA2, "eager"),  # the only one it has: transformers' SDPA attention knows no soft cap
    ],
)
def test_padded_batches_and_generation_are_what_they_would_be_without_packing(kind, fields, implementation, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 9, 10, 11, 12]])
    options: dict[str, Any] = {"attention_mask": (ids != 0).long(), "max_new_tokens": 6, "do_sample": False}
    models = [adapted(kind, attn_implementation=implementation, **fields) for _ in range(2)]
    trained, fresh = models
    path = choose_path(trained)
    assert path.packed, str(path)
    language_model_loss(trained, _collated(collate_packed, examples()), path).nll_sum.backward()
    assert trained.config._attn_implementation == implementation
    for ours, own in ((m(ids, attention_mask=options["attention_mask"]).logits for m in models),):
        assert torch.equal(ours, own)
    assert torch.equal(trained.generate(ids, **options), fresh.generate(ids, **options))
    trained.config.save_pretrained(tmp_path)
    assert attention.IMPLEMENTATION not in (tmp_path / "config.json").read_text()


def test_a_trial_leaves_no_trace():
    model = adapted(attention_dropout=0.1).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    assert choose_path(model).packed
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_short_row_makes_a_model_do_is_undone():
    """BigBird gives up its sparse attention, for good, when a row is short."""
    model = AutoModelForCausalLM.from_config(tiny_config("big_bird", attention_type="block_sparse", block_size=2))
    choose_path(model)
    assert model.bert.attention_type == "block_sparse"
    assert model.bert.encoder.layer[0].attention.attention_type == "block_sparse"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_recomputing_with_the_models_own_means_is_exact_or_not_packed():
    """``gradient_checkpointing_enable`` repeats a layer outside of packed attention: never with another result."""
    model = adapted()
    expected = _gradients(model, _reference_loss(model, examples()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    path = choose_path(model)
    assert not path.packed
    model.train()
    loss = language_model_loss(model, _collated(collate_packed, examples()), path).nll_sum
    for name, gradient in _gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-4, msg=name)


# ---------------------------------------------------------------------- noise, other losses, other models


@pytest.mark.filterwarnings("ignore:not adapted")
def test_noise_of_the_models_own_does_not_stand_in_the_way():
    model = adapted("Mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1)
    path = choose_path(model)
    assert path.packed
    assert path.direct_head


@pytest.mark.filterwarnings("ignore:not adapted")
def test_a_router_loss_is_not_trained_on_and_that_is_said():
    fields: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    plain, routed = (
        adapted("Mixtral", output_router_logits=r, router_aux_loss_coef=0.5, **fields) for r in (False, True)
    )
    path = choose_path(routed)
    assert not choose_path(plain).other_loss
    assert "the model's own loss is another" in str(path)
    batch = _collated(collate_packed, examples())
    losses = [language_model_loss(model, batch, choose_path(model)).nll_sum for model in (plain, routed)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("built", "what"),
    [
        (
            lambda: AutoModelForSeq2SeqLM.from_config(tiny_config("t5")),
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        (lambda: nn.Linear(2, 2), "Linear is no language model"),
    ],
)
def test_other_models_are_sent_to_the_hook(built, what):
    with pytest.raises(ValueError, match=f"{what}.*override compute_loss"):
        choose_path(built())
