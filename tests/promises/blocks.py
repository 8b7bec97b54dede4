"""The fenced blocks of the documentation, and what it takes to run them in seconds.

Every block of commands or Python runs as it stands, but for what these tables name: a row that nothing uses fails, and
so does a block that needs a row and has none. The model of the quickstart is a tiny one of the same name here.
"""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from tests.promises.sentences import PROJECT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "docs").rglob("*.md")),
)
TUTORIALS = tuple(page for page in PAGES if page.startswith("docs/tutorials/"))
"""Their blocks run in one order, whatever their language."""

SMALLER = {
    "fit": ["--trainer.max_steps=3", "--trainer.accelerator=cpu", "--data.limit=24", "--convergence.min_decrease=-1"],
    "fit --ckpt_path": ["--trainer.max_steps=5"],
    "validate": ["--trainer.accelerator=cpu", "--data.limit=24"],
    "estimate": ["--model.base=smollm2-135m-instruct", "--trainer.max_steps=3"],
    "generate": ["--max_new_tokens=3"],
    "chat": ["--max_new_tokens=3"],
    "evaluate": ["--max_new_tokens=3", "--limit=3"],
    "tiers": ["--only=[1]"],
}
"""Options added to a command, by its verb, or by verb and option: the last of two equal ones counts."""

OTHER_WORDS = {
    "README.md": {'"HuggingFaceTB/SmolLM2-135M-Instruct"': '"tiny"'},
    "docs/memory.md": {'"random:llama-2-7b"': '"random:tiny"'},
    "docs/python.md": {"max_steps=100": 'max_steps=3, accelerator="cpu"'},
    "docs/tutorials/your_own_data.md": {'"HuggingFaceTB/SmolLM2-135M-Instruct"': '"tiny"'},
    "docs/tutorials/from_peft_or_trl.md": {'"HuggingFaceTB/SmolLM2-135M-Instruct"': '"tiny"'},
    "docs/tutorials/tool_calls.md": {"Qwen/Qwen3-0.6B": "qwen3"},
    "docs/callbacks.md": {"max_steps=100": "max_steps=60"},
    "docs/multi_process.md": {
        "--nproc_per_node 4 -m lit_lora fit --config my.yaml --trainer.devices 4": (
            "--nproc_per_node 2 -m lit_lora fit --config my.yaml --trainer.devices 2"
        ),
    },
}
"""What stands in a page's blocks -> what is run in its place."""

BEFORE = {
    "docs/adapters.md": "lit-lora fit --config lora_standard.yaml --data.train my.jsonl\n"
    "lit-lora fit --config lora_mlp.yaml --data.train my.jsonl",
    "docs/serving.md": "lit-lora fit --config lora_standard.yaml --data.train my.jsonl",
    "docs/inference.md": "lit-lora fit --config lora_standard.yaml --data.train my.jsonl\n"
    "lit-lora fit --config lora_mlp.yaml --data.train my.jsonl",
    "docs/multi_process.md": "lit-lora fit --config lora_standard.yaml --data.train my.jsonl --print_config > my.yaml",
    "docs/runs.md": "lit-lora fit --config lora_standard.yaml --data.train my.jsonl\n"
    "lit-lora fit --config lora_mlp.yaml --data.train my.jsonl",
}
"""Commands that a page takes as done."""

NOT_RUN = {
    "make quickstart": "by a test of its own, in a process of its own",
    "make": "what these do is tested one by one; that make knows them is tested here",
    ".ci/run": "it runs these tests",
    "source .venv/bin/activate": "the tests run in an environment already",
    "pip install": "fetches gigabytes; .ci/run does it",
    "lit-lora fit --config lora_standard.yaml --trainer.accelerator gpu": "needs GPUs; multi_process.md's run on CPUs",
    "lit-lora fit --trainer.strategy lora_sharded_cpu_offload": "needs a GPU; cuda/test_cuda_sharded.py does it",
    "torchrun --nnodes": "training/test_several_machines.py runs it on two machines",
    "#!/bin/bash": "needs SLURM",
    "lit-lora sweep model.optimization.learning_rate=1e-5..1e-3": "thirty runs; tools/test_sweep_verb.py has two",
    "ollama": "not installed here, as the page says",
    "llama-cli": "not installed here; make consumers runs llama.cpp as a library",
    "lit-lora harness": "an extra, and tasks of the Hub; consumers/test_harness.py has one of its own",
    "lit-lora push": "needs an account on the Hub; tools/test_push.py has a Hub of its own",
    "vllm": "not installed here, as the page says",
    "mlx_lm.generate": "not installed here, as the page says",
}
"""First words of a command, or of a script -> why it is not run. The lit-lora commands in it are parsed whole."""


class Block(NamedTuple):
    """A fenced block."""

    page: str
    """Path below the project."""
    line: int
    """Where it starts."""
    language: str
    text: str
    """As it stands there."""

    @property
    def code(self) -> str:
        """With the page's other words."""
        text = self.text
        for old, new in OTHER_WORDS.get(self.page, {}).items():
            text = text.replace(old, new)
        return text


class Command(NamedTuple):
    """One command of a block."""

    words: list[str]
    output: str | None = None
    """The file that it is redirected to."""


def blocks(page: str, *languages: str) -> list[Block]:
    """All fenced blocks of a page, in their order; of these languages, if any are given."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    assert len(found) * 2 == len(re.findall(r"^\s*```", text, re.MULTILINE)), (
        f"{page}: a fence is not closed or indented"
    )
    return [block for block in found if not languages or block.language in languages]


def commands(script: str) -> list[Command]:
    """The commands of a block that is no script: one a line, or several with ``&&``; output may go to a file.

    Raises:
        ValueError: for anything else of a shell, which these tests would not understand.
    """
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                output = words[-1] if len(words) > 2 and words[-2] == ">" else None
                plain = words[:-2] if output else words
                if any(re.fullmatch(r"[();<>|&]+", part) for part in plain):
                    raise ValueError(f"no test understands {line!r}: write one command a line")
                found.append(Command(plain, output))
                words = []
    return found


def why_not_run(text: str) -> str | None:
    """The row of NOT_RUN for a command or script, by its first words; the longest one."""
    rows = [row for row in NOT_RUN if text == row or text.startswith((f"{row} ", f"{row}\n"))]
    return max(rows, key=len, default=None)


def smaller(words: list[str]) -> list[str]:
    """The arguments of a lit-lora command, with the options that make it quick."""
    verb, *rest = words[1:]
    rows = [row for row in SMALLER if row.split()[0] == verb and all(part in rest for part in row.split()[1:])]
    return [verb, *rest, *(option for row in rows for option in SMALLER[row])]


def lit_lora_commands(script: str) -> list[list[str]]:
    """What a script gives to lit-lora, with verb, wherever the call stands in it."""
    joined = script.replace("\\\n", " ")
    return [shlex.split(match[1], comments=True) for match in re.finditer(r"(?:lit-lora|-m lit_lora) +(.*)", joined)]
