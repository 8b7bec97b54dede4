import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from lit_lora import linear_cross_entropy
from lit_lora.kernels import products
from lit_lora.kernels.cuda_way import as_on_cuda
from lit_lora.kernels.linear_cross_entropy import linear_cross_entropy_reference, linear_cross_entropy_with_accuracy
from tests.cuda_way import DEVICES, cuda_way


def _inputs(num_tokens: int, *, dtype=torch.float32, weight_grad=False, vocab_size=50):
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, 16, dtype=dtype, requires_grad=weight_grad)
    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[0] = vocab_size - 1
    if num_tokens > 3:
        labels[1] = labels[3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("vocab_size", [50, 8193])  # the latter in three blocks, the last of one row
def test_value_and_gradient_equal_the_reference(vocab_size, chunk_size, weight_grad, dtype, tolerance):
    hidden, weight, labels = _inputs(13, dtype=dtype, weight_grad=weight_grad, vocab_size=vocab_size)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    (loss * 0.7).backward()
    got = [loss.detach(), hidden.grad] + ([weight.grad] if weight_grad else [])
    hidden.grad = weight.grad = None
    expected_loss = linear_cross_entropy_reference(hidden, weight, labels)
    (expected_loss * 0.7).backward()
    expected = [expected_loss.detach(), hidden.grad] + ([weight.grad] if weight_grad else [])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
@pytest.mark.parametrize("vocab_size", [1, 2, 50, 8193])
def test_on_cuda_value_and_gradient_are_those_of_float64(vocab_size, dtype, tolerance, chunk_size, weight_grad, device):
    with cuda_way(device):
        inputs = _inputs(13, dtype=dtype, weight_grad=weight_grad, vocab_size=vocab_size)
        hidden, weight, labels = (x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs)
        out = linear_cross_entropy_with_accuracy(hidden, weight, labels, chunk_size=chunk_size)
        (out.nll_sum * 0.7).backward()
    got = [out.nll_sum.detach(), hidden.grad] + ([weight.grad] if weight_grad else [])
    exact = [x.detach().cpu().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    expected_loss = F.cross_entropy(logits, labels.cpu(), reduction="sum")
    (expected_loss * 0.7).backward()
    expected = [expected_loss.detach(), *(x.grad for x in exact[: 1 + weight_grad])]
    for ours, theirs in zip(got, expected, strict=True):
        atol = tolerance * max(1e-3, float(theirs.abs().max()))
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=tolerance, atol=atol)
    others = logits.detach().scatter(1, labels.cpu()[:, None].clamp(min=0), float("-inf")).amax(1)
    if dtype == torch.float32:
        right = logits.detach().gather(1, labels.cpu()[:, None].clamp(min=0)).squeeze(1) > others
        assert out.num_correct == (right & (labels.cpu() != -100)).sum()


@pytest.mark.parametrize("way", [nullcontext, as_on_cuda])
def test_a_head_that_is_sure_of_its_tokens_still_gives_a_gradient(way):
    """Where a label's probability is one in float32, its gradient must not be a difference of ones."""
    hidden, weight = (10 * torch.eye(4)).requires_grad_(), 3 * torch.eye(4)
    with way():
        linear_cross_entropy(hidden, weight, torch.arange(4)).backward()
    others, own = 1 - torch.eye(4), 3 * torch.eye(4)  # mean row of the three others, and the label's
    probability = torch.tensor(math.log(3) - 30, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(hidden.grad.double(), probability * (others - own).double(), rtol=1e-4, atol=0)


def test_on_cuda_logits_come_in_chunks_of_a_size(monkeypatch):
    shapes = []
    own = products.matmul_float32
    monkeypatch.setattr(products, "matmul_float32", lambda a, b: shapes.append((len(a), b.shape[1])) or own(a, b))
    monkeypatch.setattr("lit_lora.kernels.linear_cross_entropy._CUDA_CHUNK_BYTES", 50 * 4 * 5)
    hidden, weight, labels = _inputs(13)
    with as_on_cuda():
        linear_cross_entropy(hidden.detach(), weight, labels)
    assert shapes == [(5, 50), (5, 50), (3, 50)]


def test_sum_is_torch_cross_entropy():
    hidden, weight, labels = _inputs(20)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, chunk_size=6), expected)


def test_accuracy_counts_the_supervised_tokens_that_are_right():
    hidden, weight, labels = _inputs(40)
    logits = hidden @ weight.T
    labels[10:20] = logits.argmax(-1)[10:20]
    out = linear_cross_entropy_with_accuracy(hidden, weight, labels, chunk_size=7)
    assert out.num_correct == ((logits.argmax(-1) == labels) & (labels != -100)).sum()
    assert out.num_correct >= 10


def test_no_supervised_token_gives_zero_loss_and_zero_gradient():
    hidden, weight, _ = _inputs(5)
    selected = hidden[torch.zeros(0, dtype=torch.long)]
    loss = linear_cross_entropy(selected, weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_tokens_that_the_model_is_sure_of_have_exact_losses_and_gradients():
    hidden, weight, labels = _inputs(6, vocab_size=5000)
    with torch.no_grad():
        hidden.copy_(weight[labels.clamp(min=0)] * 6)
    linear_cross_entropy(hidden, weight, labels).backward()
    exact = hidden.detach().double().requires_grad_()
    loss = F.cross_entropy(exact @ weight.double().T, labels, reduction="sum")
    loss.backward()
    assert 0 < loss < 1e-3
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels).double(), loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6 * exact.grad.abs().max().item())


def test_large_logits_do_not_overflow():
    hidden, weight, labels = _inputs(6)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    assert loss.isfinite()


def test_autocast_computes_in_its_dtype():
    hidden, weight, labels = _inputs(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    expected = linear_cross_entropy_reference(hidden.bfloat16(), weight.bfloat16(), labels)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.1)
    assert hidden.grad.dtype == torch.float32


def test_disagreeing_lengths_are_refused():
    hidden, weight, labels = _inputs(5)
    with pytest.raises(ValueError, match=r"\(5, 16\) and \(4,\)"):
        linear_cross_entropy(hidden, weight, labels[:4])
