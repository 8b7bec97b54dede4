"""Attention in blocks, and by torch's kernel, against the branch that computes each example by itself."""

import pytest
import torch

from lit_lora.kernels import products
from lit_lora.kernels.blockwise_attention import blockwise_attention
from lit_lora.kernels.flash_attention import flash_attention
from lit_lora.language_model import attention
from lit_lora.language_model.attention import _per_example

LENGTHS = [[1], [7, 1, 20], [128], [129, 3], [300, 127, 1], [5, 700]]  # from 512 keys on, head by head


def _attention_and_gradients(function, lengths, shared_prefix, *, heads=6, key_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    rows = sum(lengths)
    # As a model gives them: heads transposed out of a projection's output, and not contiguous.
    query, key, value = (
        torch.randn(1, rows, count, 8, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads, key_heads)
    )
    out = function(query, key, value, lengths, shared_prefix)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    return [out, *torch.autograd.grad(out, (query, key, value), grad)]


def _blockwise(query, key, value, lengths, shared_prefix):
    return blockwise_attention(query, key, value, lengths, shared_prefix=shared_prefix, scaling=0.3)


def _flash(query, key, value, lengths, shared_prefix):
    return flash_attention(query, key, value, lengths, shared_prefix=shared_prefix, scaling=0.3)


each_kernel = pytest.mark.parametrize("kernel", [_blockwise, _flash])


def _reference(query, key, value, lengths, shared_prefix):
    return _per_example(query, key, value, lengths, shared_prefix, 0.3, 0.0, None, None)


@each_kernel
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("key_heads", [6, 2, 1])
def test_values_and_gradients_equal_the_reference(kernel, lengths, key_heads):
    got = _attention_and_gradients(kernel, lengths, 0, key_heads=key_heads)
    expected = _attention_and_gradients(_reference, lengths, 0, key_heads=key_heads)
    assert got[0].is_contiguous()
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("lengths", "shared"), [([7, 1, 20], 0), ([300, 127, 1], 0), ([150, 450, 2], 150)], ids=str)
def test_bfloat16_is_as_exact_as_its_inputs(lengths, shared):
    got = _attention_and_gradients(_blockwise, lengths, shared, dtype=torch.bfloat16)
    expected = _attention_and_gradients(_reference, lengths, shared)
    for value, other in zip(got, expected, strict=True):
        assert value.dtype is torch.bfloat16
        assert (value.double() - other).norm() < 0.01 * other.norm()


@each_kernel
@pytest.mark.parametrize("lengths", [[5, 3, 9], [130, 1, 200, 40], [150, 450, 2]], ids=str)
def test_a_shared_prefix_is_seen_by_every_example(kernel, lengths):
    got = _attention_and_gradients(kernel, lengths, lengths[0])
    expected = _attention_and_gradients(_reference, lengths, lengths[0])
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)

    # And that is what the examples give when each has the prefix for itself.
    torch.manual_seed(1)
    prefix, *rests = lengths
    query, key, value = (torch.randn(1, 2, sum(lengths), 8, dtype=torch.float64) for _ in range(3))
    shared = kernel(query, key, value, lengths, prefix)[0].split(lengths)
    parts = [x.split(lengths, dim=2) for x in (query, key, value)]
    for index, rest in enumerate(rests, start=1):
        whole = [torch.cat([part[0], part[index]], dim=2) for part in parts]
        alone = kernel(*whole, [prefix + rest], 0)[0]
        torch.testing.assert_close(alone[prefix:], shared[index], rtol=1e-10, atol=1e-12)


@each_kernel
def test_float32_is_as_exact_as_torchs_kernel(kernel):
    exact = _attention_and_gradients(_reference, [300, 100], 0)
    ours = _attention_and_gradients(kernel, [300, 100], 0, dtype=torch.float32)
    torchs = _attention_and_gradients(_reference, [300, 100], 0, dtype=torch.float32)
    for value, other, true in zip(ours, torchs, exact, strict=True):
        assert (value - true).abs().max() <= 2 * (other - true).abs().max() + 1e-7


def _called(monkeypatch, lengths, shared, dtype):
    calls = []
    for name in ("blockwise_attention", "flash_attention", "_per_example"):
        own = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, own=own, name=name, **k: calls.append(name) or own(*a, **k))
    q, k, v = (torch.randn(1, 2, sum(lengths), 8, dtype=dtype) for _ in range(3))
    seq_lens = attention.SeqLens(lengths, shared)
    attention.packed_attention_forward(
        torch.nn.Module(), q, k, v, attention.no_mask(q.device), cu_seq_lens_q=torch.zeros(1), seq_lens=seq_lens
    )
    return calls


@pytest.mark.parametrize(
    ("lengths", "shared", "onednn", "blockwise"),
    [([700], 0, False, True), ([800], 0, False, False), ([9, 800], 9, False, True), ([800], 0, True, True)],
)
def test_long_examples_take_torchs_kernel_where_products_are_slow(monkeypatch, lengths, shared, onednn, blockwise):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    called = _called(monkeypatch, lengths, shared, torch.bfloat16)
    assert called == ["blockwise_attention" if blockwise else "_per_example"]


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("lengths", [[5, 3], [5, 900]])
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_type_gets_the_kernel_that_is_fast_for_it(monkeypatch, dtype, onednn, lengths, shared):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    is_long = max(lengths) > 768
    expected = "blockwise_attention" if is_long and onednn else "flash_attention"
    if dtype is torch.bfloat16:
        expected = "_per_example" if is_long and not onednn and not shared else "blockwise_attention"
    if dtype is torch.float16:
        expected = "_per_example"
    assert _called(monkeypatch, lengths, shared, dtype) == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_need_not_lie_in_one_piece(dtype):
    """Neither those of the inputs, nor those of the gradient, as that of a sum."""
    torch.manual_seed(0)
    plain = [torch.randn(1, heads, 12, 8, dtype=dtype) for heads in (4, 2, 2)]
    torn = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in plain]
    results = []
    for inputs in (plain, torn):
        inputs = [x.requires_grad_() for x in inputs]
        out = _flash(*inputs, [7, 5], 0)
        results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    expected = _reference(*plain, [7, 5], 0)
    torch.testing.assert_close(results[0][0], expected)
    torch.testing.assert_close(results[0][1:], list(torch.autograd.grad(expected.sum(), plain)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_autocast_takes_the_other_branch_in_half_precision():
    q, k, v = (torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3))
    seq_lens = attention.SeqLens([4, 5, 3], 4)
    call = {"cu_seq_lens_q": torch.zeros(1), "seq_lens": seq_lens}
    mask = attention.no_mask(q.device)
    expected, _ = attention.packed_attention_forward(torch.nn.Module(), q, k, v, mask, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # As after rotary positions: queries and keys in float32, values in half precision.
        got, _ = attention.packed_attention_forward(torch.nn.Module(), q, k, v.bfloat16(), mask, **call)
    got.sum().backward()
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)


def _kept(kernel, inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        return kept, kernel(*inputs, [150, 50], 0)


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass():
    inputs = [torch.randn(1, 4, 200, 8, requires_grad=True) for _ in range(3)]
    kept, _ = _kept(_blockwise, inputs)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in inputs)


def test_torchs_kernel_keeps_the_output_too_and_a_number_for_each_row_and_head():
    inputs = [torch.randn(1, 4, 200, 8, requires_grad=True) for _ in range(3)]
    kept, out = _kept(_flash, inputs)
    assert {x.data_ptr() for x in (*inputs, out)} <= {x.data_ptr() for x in kept}
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in (*inputs, out)) + 4 * 200
