"""Give the system back what was freed.

glibc keeps freed blocks of up to 32 MB for itself, and gives back only what lies at the end. Where weights that stay
come between larger ones that do not, as when a model is quantized while it is loaded, a process would hold several
times what its tensors need.
"""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Let the C library give the system what it keeps of freed memory; nothing where it keeps none, or cannot."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # not in musl
        trim(0)
