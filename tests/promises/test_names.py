"""Every option, key and verb that the documentation names is there."""

from __future__ import annotations

import re

import pytest

from lit_lora.__main__ import TOOLS, TRAINER_VERBS
from lit_lora.cli.synonyms import SYNONYMS
from tests.promises.blocks import PAGES
from tests.promises.sentences import PROJECT

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

VERBS = [*TRAINER_VERBS, *TOOLS]
FOREIGN = {
    "torchrun": {
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
        "rdzv_backend",
        "rdzv_endpoint",
    },
    "SLURM": {"nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue", "open-mode", "kill-on-bad-exit"},
    "vLLM": {"lora-modules", "enable-lora", "max-lora-rank"},
    "llama-cli": {"lora"},
    "mlx-lm": {"model", "adapter-path", "prompt"},
    "nvidia-smi": {"query-gpu", "format"},
}
"""Options of others, by whose they are."""

GROUPS = "model|data|trainer|checkpoint|memory|convergence|gradient_norm|gradient_flow|export"


def code_of(page: str) -> list[str]:
    """The commands of a page, and its spans of code."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*fenced, *re.findall(r"`([^`\n]+)`", prose)]


def named_options(code: str) -> list[str]:
    found = re.findall(r"(?<![\w-])--([A-Za-z][\w.+-]*)", code)
    return [name.rstrip(".+") for name in found]


def named_keys(code: str) -> list[str]:
    """A span that is a key, perhaps with a value."""
    return (
        []
        if code.endswith((".json", ".yaml"))
        else re.findall(rf"^((?:{GROUPS})\.[a-z_.]*[a-z_])\.?\*?(?: \S+)?$", code)
    )


@pytest.fixture
def known(stranger):
    options = {option for verb in VERBS for option in stranger.options_of(verb)}
    assert len(options) > 150
    options |= {option.removeprefix("model.") for option in options if option.startswith("model.quantization.")}
    groups = {option.rsplit(".", depth)[0] for option in options for depth in (1, 2)}
    return options | groups


def test_every_option_and_key_is_there(known):
    foreign = set().union(*FOREIGN.values())
    options = {(page, name) for page in PAGES for code in code_of(page) for name in named_options(code)}
    keys = {(page, name) for page in PAGES for code in code_of(page) for name in named_keys(code)}
    assert len(options) > 50
    assert len(keys) > 100
    in_values = re.compile(r"trainer\.callbacks\.\w+|help\.\w+")  # of a class that the command names
    unknown = {
        (page, name)
        for page, name in options | keys
        if name not in known | foreign
        and not in_values.fullmatch(name)
        and not (page == "docs/command_line.md" and name in SYNONYMS)
    }
    assert unknown == set()
    assert {name for _, name in options} >= foreign


def test_every_verb_is_there_and_the_readme_has_them_all():
    named = {
        (page, verb) for page in PAGES for code in code_of(page) for verb in re.findall(r"\blit-lora ([a-z]+)", code)
    }
    assert {(page, verb) for page, verb in named if verb not in VERBS} == set()
    listed = re.search(r"^\| (`lit-lora fit`.*?) \|", (PROJECT / "README.md").read_text(), re.MULTILINE)[1]
    assert re.findall(r"[a-z]+", listed.replace("lit-lora ", "")) == sorted(VERBS, key=listed.index)
    assert len(re.findall(r"[a-z]+", listed.replace("lit-lora ", ""))) == len(VERBS)
