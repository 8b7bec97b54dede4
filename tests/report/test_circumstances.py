"""Which machine a run ran on is told apart from those that round differently."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from lit_lora.report import circumstances

EPYC = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: {}\nmodel\t\t: {}\n"
    "model name\t: AMD EPYC\nflags\t\t: fpu {}\n"
)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (EPYC.format(25, 17, "avx2 avx512f"), "AMD EPYC, family 25, model 17 (AVX512)"),
        (EPYC.format(26, 2, "avx2 avx512f"), "AMD EPYC, family 26, model 2 (AVX512)"),
        (EPYC.format(25, 1, "avx2"), "AMD EPYC, family 25, model 1 (AVX2)"),
        ("model name\t: A: B\n\nmodel name\t: of another core\n", "A: B"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", None),
        ("", None),
    ],
)
def test_the_processor_is_named_with_its_generation(cpuinfo, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(circumstances, "Path", lambda _: tmp_path / "cpuinfo")
    assert circumstances.processor() == (expected or platform.processor() or platform.machine())


def test_without_that_file_it_is_what_the_system_calls_it(monkeypatch):
    monkeypatch.setattr(circumstances, "Path", lambda _: Path("/nowhere"))
    assert circumstances.processor() == (platform.processor() or platform.machine())
