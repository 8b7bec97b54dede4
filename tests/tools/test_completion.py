"""``lit-lora completion`` in real shells: what a TAB shows, with no Python and no other program within reach."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lit_lora.__main__ import main
from lit_lora.cli.verbs import TOOLS, TRAINER_VERBS

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

BASH, ZSH = shutil.which("bash"), shutil.which("zsh")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("bash", tmp_path_factory.mktemp("completion"))


def written(shell: str, folder: Path) -> Path:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["completion", shell])
    path = folder / f"lit-lora.{shell}"
    path.write_text(said.getvalue())
    return path


def completed(script: Path, *words: str) -> list[str]:
    """Of the last word, by the function that ``complete`` has been given."""
    code = (
        'source "$1"; shift; registered=$(complete -p lit-lora); [[ $registered =~ -F\\ ([a-z_]+) ]] || exit 9;'
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); "${BASH_REMATCH[1]}";'
        '(( ${#COMPREPLY[@]} == 0 )) || printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert BASH is not None
    command = [BASH, "--norc", "-u", "-c", code, "bash", str(script), "lit-lora", *words]
    ran = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/nowhere"}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["f"], ["fit", "fetch"]),
        ([""], [*TRAINER_VERBS, *TOOLS]),
        (["fit", "--model.dt"], ["--model.dtype"]),
        (["fit", "--model.dtype", ""], ["auto", "float32", "bfloat16", "float16"]),
        (["fit", "--data.train", "x.jsonl", "--model.dtype", "bf"], ["bfloat16"]),
        (["fit", "--model.dtype", "=", "fl"], ["float32", "float16"]),
        (["fit", "--model.dtype", "="], ["auto", "float32", "bfloat16", "float16"]),
        (["fit", "--model.dtype=bf"], ["--model.dtype=bfloat16"]),
        (["fit", "--quiet", "t"], ["true"]),
        (["fit", "--model.lora.use_r"], ["--model.lora.use_rslora"]),
        (["fit", "--model.quantization.b"], ["--model.quantization.bits", "--model.quantization.block_size"]),
        (["fit", "--print"], ["--print_config"]),
        (["fit", "--conf"], ["--config"]),
        (["validate", "--data.val"], ["--data.validation", "--data.validation_fraction"]),
        (["estimate", "--dev"], ["--devices", "--device"]),
        (["estimate", "--device", ""], ["cpu", "cuda"]),
        (["estimate", "--model.lora.lora_dr"], ["--model.lora.lora_dropout"]),
        (["sweep", "--tri"], ["--trials"]),
        (["init", "--memory"], None),
        (["data", "--html"], ["--html"]),
        (["data", "--mod"], None),
        (["init", "--on_bad_rows", "d"], ["drop"]),
        (["evaluate", "--dtype", "b"], ["bfloat16"]),
        (["evaluate", "--quantization.bi"], ["--quantization.bits"]),
        (["export", "--to", ""], None),
        (["fetch", ""], ["smollm2-135m-instruct"]),
        (["fit", "--model.base", "smo"], ["smollm2-135m-instruct"]),
        (["completion", ""], ["bash", "zsh"]),
        (["fit", "--config", ""], []),  # names of files: the shell's own
        (["report", ""], []),
        (["nonsense", "--"], []),
    ],
)
def test_a_word_is_completed(words, expected, script):
    found = completed(script, *words)
    assert found == expected if expected is not None else found


@pytest.mark.parametrize("verb", [*TRAINER_VERBS, *TOOLS])
def test_every_option_of_the_help_is_there(verb, script, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help.all" if verb in TRAINER_VERBS else "--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("-")]
    named = {word.rstrip(",=") for line in lines for word in line[:2] if re.fullmatch(r"--[\w.]+[,=]?", word)}
    shown = {word for word in named if not word.endswith(".help") and not word.startswith("--help.")}
    offered = set(completed(script, verb, "--"))
    groups = {word for word in shown if any(option.startswith(f"{word}.") for option in offered)}
    assert shown - groups - offered == set()
    assert "--help" in offered


def typed(shell: list[str], setup: str, keys: str, folder: Path) -> list[str]:
    """The words of the command that an interactive shell makes of these keys."""
    controller, device = pty.openpty()
    environment = {"PATH": "/nowhere", "TERM": "dumb", "PS1": "> ", "INPUTRC": "/dev/null", "HOME": str(folder)}
    with subprocess.Popen(
        shell, stdin=device, stdout=device, stderr=device, cwd=folder, env=environment, start_new_session=True
    ) as process:
        os.close(device)
        seen = ""

        def until(end: str) -> None:
            nonlocal seen
            deadline = time.monotonic() + 60
            while end not in seen and time.monotonic() < deadline and select.select([controller], [], [], 10)[0]:
                seen += os.read(controller, 4096).decode()

        os.write(controller, f"{setup}; lit-lora() {{ echo \"<$*>\"; }}; echo re''ady\n".encode())
        until("ready\r\n")
        os.write(controller, f"{keys}\n".encode())
        until(">\r\n")
        os.write(controller, b"exit\n")
        process.wait(timeout=60)
    os.close(controller)
    return seen[seen.rindex("<") + 1 : seen.rindex(">\r\n")].split()


KEYS = "lit-lora val\t--data.train\t min\t--model.dtype=bf\t --trainer.default_ro\tru\t"
WRITTEN = ["validate", "--data.train", "mine.jsonl", "--model.dtype=bfloat16", "--trainer.default_root_dir", "runs/"]


@pytest.fixture
def names_of_files(tmp_path: Path) -> Path:
    (tmp_path / "mine.jsonl").write_text("")
    (tmp_path / "runs").mkdir()
    return tmp_path


def test_tabs_in_bash_write_a_command_with_names_of_files(script, names_of_files):
    assert BASH is not None
    assert typed([BASH, "--norc", "--noprofile", "-i"], f"source {script}", KEYS, names_of_files) == WRITTEN


@pytest.mark.skipif(ZSH is None, reason="no zsh here")
def test_tabs_in_zsh_write_the_same_command(names_of_files):
    assert ZSH is not None
    path = written("zsh", names_of_files)
    shown = typed([ZSH, "-f", "-i"], f"source {path}", KEYS, names_of_files)
    assert shown == [word.rstrip("/") for word in WRITTEN]  # zsh takes a slash at the end back
