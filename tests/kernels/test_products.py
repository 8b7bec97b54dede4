"""Products on a CPU: the same values by either library, and the choice between them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_lora.files.environment import ALLOCATION_VARIABLES
from lit_lora.kernels import products
from lit_lora.kernels.cuda_way import as_on_cuda
from tests.cuda_way import DEVICES, cuda_way

ROWS, INNER, COLUMNS = 160, 96, 128  # above the size from which oneDNN is asked


@pytest.fixture(params=["AMD", "another maker"])
def maker(request, monkeypatch):
    monkeypatch.setattr(products, "by_amd", lambda: request.param == "AMD")
    return request.param


@pytest.fixture
def onednn_calls(monkeypatch):
    """How often oneDNN's operator is called."""
    calls = []
    linear = torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        calls.append(args[0].shape)
        return linear(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


def _close(got, expected):
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_product_in_any_layout(maker, layout, bias):
    torch.manual_seed(0)
    weight = {
        "rows": torch.randn(COLUMNS, INNER),
        "columns": torch.randn(INNER, COLUMNS).t(),
        "gaps": torch.randn(COLUMNS, 3, INNER)[:, 1],
    }[layout]
    x, offset = torch.randn(ROWS, INNER), torch.randn(COLUMNS) if bias else None
    exact = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
    _close(products.linear(x, weight, offset), exact.float())


@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_matmul_is_the_product_also_of_transposed_operands(maker, batch):
    torch.manual_seed(0)
    left, right = torch.randn(*batch, INNER, ROWS).transpose(-1, -2), torch.randn(*batch, COLUMNS, INNER)
    exact = left.double() @ right.double().transpose(-1, -2)
    _close(products.matmul(left, right.transpose(-1, -2)), exact.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_with_torch(maker, onednn_calls, dtype):
    x, weight = torch.randn(ROWS, INNER, dtype=dtype), torch.randn(COLUMNS, INNER, dtype=dtype)
    assert torch.equal(products.linear(x, weight), x @ weight.t())
    assert not onednn_calls


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_large_products_on_amd_go_to_onednn_unless_it_is_switched_off(maker, onednn_calls, monkeypatch):
    x, weight = torch.randn(ROWS, INNER), torch.randn(COLUMNS, INNER)
    products.linear(x, weight)
    assert len(onednn_calls) == (maker == "AMD")
    products.matmul(torch.stack([x, x]), torch.stack([weight.t(), weight.t()]))
    assert len(onednn_calls) == 3 * (maker == "AMD")
    products.linear(x[:2], weight)  # too small to be worth a kernel of its own
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    products.linear(x, weight)
    assert not products.onednn_is_faster()
    assert len(onednn_calls) == 3 * (maker == "AMD")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_half_precision_come_in_float32_and_unrounded(device, scale, dtype):
    with cuda_way(device):
        torch.manual_seed(0)
        left, right = torch.randn(INNER, ROWS).to(device, dtype).t(), torch.randn(INNER, COLUMNS).to(device, dtype)
        got = products.matmul_float32(left, right, scale).cpu()
    exact = (scale or 1.0) * left.cpu().double() @ right.cpu().double()
    _close(got, exact.float())


def test_without_values_a_scaled_product_in_float32_has_its_shape():
    with FakeTensorMode():
        left, right = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
        with as_on_cuda():
            got = products.matmul_float32(left, right, 2.0)
    assert (got.shape, got.dtype) == ((5, 3), torch.float32)


NEW_SHAPES = """
import ctypes, torch
from lit_lora.kernels import products

class HeapInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e in_use free f".split()]

heap_info = ctypes.CDLL(None).mallinfo2
heap_info.restype = HeapInfo
products.by_amd = lambda: True
weight, rows = torch.randn(576, 576), torch.randn(1200, 576)
for num_rows in range(500, 1200):
    products.linear(rows[:num_rows], weight)
    if num_rows in (799, 1199):
        print((heap_info().in_use + heap_info().mapped) / 2**20)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not say what its heap holds"
)
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="kernels for AVX512 take half a MB each"
)
def test_kernels_for_ever_new_shapes_do_not_pile_up_under_the_command_line():
    """Seven hundred shapes, the last four hundred of which would take 200 MiB."""

    def growth_mib(**variables: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", NEW_SHAPES], capture_output=True, text=True, check=True, timeout=300,
            env={**os.environ, **ALLOCATION_VARIABLES, **variables},
        )  # fmt: skip
        middle, end = map(float, done.stdout.split())
        return end - middle

    assert growth_mib() < 30
    assert growth_mib(LRU_CACHE_CAPACITY="1024", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") > 100  # so it can fail
