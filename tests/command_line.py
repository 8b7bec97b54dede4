"""Run ``lit-lora`` as a user would: in a process of its own, with nothing of an earlier run in its environment."""

from __future__ import annotations

import os
import subprocess
import sys


def lit_lora(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The finished process; it has to succeed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LIT_LORA_RUN")}
    command = [sys.executable, "-m", "lit_lora", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr[-3000:] + process.stdout[-2000:]
    return process
