"""What a processor can do, by its features, never by timing: the same machine always takes the same way."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""oneDNN's own variables, new and old, for the newest instructions that it may use."""
_WITH_BFLOAT16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_", "DEFAULT", "ALL")


@cache
def by_amd() -> bool:
    """Whether the processor is one by AMD."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        described = platform.processor()
    return "AuthenticAMD" in described


@cache
def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 take less time than those of float32.

    So it is with AMX, and with AVX512-BF16 on AMD's processors (Zen 4 and later); on one of Intel's that has
    AVX512-BF16 alone float32 was faster (``benchmarks/NOTES.md``). Instructions that oneDNN is told to leave out
    (``ONEDNN_MAX_CPU_ISA``) count as not there.
    """
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    limit = next((os.environ[name].upper() for name in _LIMITS if os.environ.get(name)), "DEFAULT")
    allowed = torch.backends.mkldnn.is_available() and limit.startswith(_WITH_BFLOAT16)
    return bool(allowed and (has.get("amx_bf16") or (has.get("avx512_bf16") and by_amd())))
