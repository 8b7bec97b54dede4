"""What a processor can do, by its features, never by timing: the same machine always takes the same way."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

_LIMIT = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""oneDNN's own variables, new and old, for the newest instructions that it may use."""
_HAVE_BFLOAT16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_", "DEFAULT", "ALL")


@cache
def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 have instructions of their own: AVX512-BF16 (Zen 4 and later) or AMX (newer Xeons).

    Where oneDNN is told to leave them out (``ONEDNN_MAX_CPU_ISA``) they count as not there.
    """
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    limit = next((os.environ[name].upper() for name in _LIMIT if os.environ.get(name)), "DEFAULT")
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16")) and limit.startswith(_HAVE_BFLOAT16)
