"""The files of a tokenizer, to be written beside an adapter, where TRL's users and ``AutoTokenizer`` look for them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What ``tokenizer.save_pretrained`` writes, chat template included: relative path -> content."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
