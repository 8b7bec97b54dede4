"""A reader follows a page: each command of a block, in this process where one is enough."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.promises.blocks import (
    BEFORE,
    SMALLER,
    Block,
    Command,
    blocks,
    commands,
    lit_lora_commands,
    smaller,
    why_not_run,
)
from tests.promises.conftest import Stranger
from tests.promises.sentences import PROJECT


def run(reader: Stranger, command: Command, page: str) -> None:
    """One command of a page; it has to succeed."""
    words, output = command
    row = why_not_run(" ".join(words))
    if row is not None:
        check_unrun(reader, " ".join(words))
    elif words[0] == "lit-lora" and "--trainer.devices" not in words:
        printed = "--print_config" in words
        ran = reader.run(*(words[1:] if printed else smaller(words)))
        assert ran.code == 0, f"{page}: {' '.join(words)}\n{ran.text[-3000:]}"
        if output is not None:
            Path(output).write_text(ran.out)
    else:
        start(reader, words, page)


def start(reader: Stranger, words: list[str], page: str) -> None:
    """A command in processes of its own."""
    calls = {"lit-lora": ["-m", "lit_lora"], "torchrun": ["-m", "torch.distributed.run"]}
    assert words[0] in calls, f"{page}: no test knows how to run {words[0]}"
    verb = words[words.index("lit_lora") + 1] if "lit_lora" in words else words[1]
    given = [sys.executable, *calls[words[0]], *words[1:], *SMALLER[verb]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(given, env=environment(), start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=250)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks, too
            raise
    assert process.returncode == 0, err[-3000:] + out[-3000:]


def environment() -> dict[str, str]:
    """For other processes, which are to find the checkout that is tested."""
    ours = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    of_make = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "VENV")  # make test hands its variables on
    return {**{key: value for key, value in os.environ.items() if key not in of_make}, **ours}


def check_unrun(reader: Stranger, script: str) -> None:
    """What is not run is at least sound: shell, files, targets, and every option of lit-lora."""
    shell = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert shell.returncode == 0, shell.stderr
    for target in re.findall(r"^make (\w+)", script):
        made = subprocess.run(["make", "-n", target], cwd=PROJECT, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
    for name in re.findall(r"(?:-c |^)(\S+\.txt|\.ci/\w+)", script):
        assert (PROJECT / name).is_file(), name
    for arguments in lit_lora_commands(script):
        ran = reader.run(*arguments, "--print_config")
        assert ran.code == 0, ran.text[-3000:]


def follow(reader: Stranger, page: str) -> None:
    """Run the blocks of a page, one after the other."""
    for command in commands(BEFORE.get(page, "")):
        run(reader, command, page)
    for block in blocks(page, "bash"):
        run_block(reader, block)


def run_block(reader: Stranger, block: Block) -> None:
    """A block of commands, or a script."""
    if why_not_run(block.code) and block.code.startswith("#!"):
        check_unrun(reader, block.code)
        return
    for command in commands(block.code):
        run(reader, command, f"{block.page}:{block.line}")
