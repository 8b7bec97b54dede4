"""The modules that are adapted and trained in full are those that PEFT chooses, and each reads the other's files.

A table of structures (decoders, encoders, layers at the top, several numbered levels, names that end alike) times a
table of configurations.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.layers import TrainableCopy, adapter_modules
from lit_lora.adapters.matching import layer_indices, resolve_pattern
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:not adapted"),
]


class Block(nn.Module):
    def __init__(self, *, experts: int = 0) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.input_layernorm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.v_proj(torch.tanh(self.q_proj(self.input_layernorm(x)))))
        return x + sum((expert(x) for expert in self.experts), torch.zeros(()))


class Stack(nn.Module):
    """Layers under a name, and a head; whatever it is made of."""

    def __init__(self, name: str, blocks: list[nn.Module], head: str = "head") -> None:
        super().__init__()
        self.add_module(name, nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(8)
        self.add_module(head, nn.Linear(8, 5))
        self.names = (name, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.get_submodule(self.names[0]):  # type: ignore[attr-defined]
            x = block(x)
        return self.get_submodule(self.names[1])(self.norm(x))


class Pair(nn.Module):
    """Two stacks, of which one name ends like the other."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Stack("layers", [Block(), Block()])
        self.language_model = Stack("layers", [Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + self.language_model(x)


class Body(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner
        self.lm_head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(x))


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return build().eval()

    return made


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "Llama": language_model,
    "Mixtral": lambda: language_model("Mixtral", num_local_experts=2),
    "decoder": _seeded(lambda: Body(Stack("layers", [Block(), Block(), Block()]))),
    "at the top": _seeded(lambda: Stack("layers", [Block(), Block(), Block()])),
    "sequential": _seeded(lambda: nn.Sequential(Block(), Block(), nn.Linear(8, 4))),
    "experts": _seeded(lambda: Body(Stack("layers", [Block(experts=2), Block(experts=2)]))),
    "other name": _seeded(lambda: Body(Stack("h", [Block(), Block()]))),
    "nested": _seeded(lambda: Body(Stack("stages", [Stack("blocks", [Block(), Block()], "out"), nn.Linear(5, 8)]))),
    "nested at the top": _seeded(lambda: Stack("stages", [Stack("blocks", [Block()], "out"), nn.Linear(5, 8)])),
    "pair": _seeded(Pair),
}
ALL = list(STRUCTURES)
OURS = [name for name in ALL if name not in ("Llama", "Mixtral")]
CONFIGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "names": (ALL, {"target_modules": ["q_proj", "v_proj"]}),
    "one layer": (ALL, {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers in a list": (
        ["Llama", "decoder", "at the top", "pair", "other name"],
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "layers in one of three": (
        ALL, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "h", "layers"]}
    ),
    "outer list": (
        ["nested", "nested at the top"],
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "stages"},
    ),
    "a full name beside layers": (
        ["decoder", "experts", "pair"],
        {"target_modules": ["model.layers.0.q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "a full name of Llama beside layers": (
        ["Llama", "Mixtral"],
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": 1},
    ),
    "full names alone": (
        ["decoder", "pair"],
        {"target_modules": ["model.layers.0.q_proj", "model.layers.1.q_proj"], "layers_to_transform": [1]},
    ),
    "a full name at the top": (
        ["at the top"],
        {
            "target_modules": ["layers.0.q_proj", "v_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["layers"],
        },
    ),
    "experts of a layer": (["experts"], {"target_modules": ["0", "1"], "layers_to_transform": [1]}),
    "excluded": (OURS, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.q_proj"]}),
    "excluded from one of two": (
        ["pair"], {"target_modules": ["q_proj"], "exclude_modules": r"language_model\..*"}
    ),
    "expression": (ALL, {"target_modules": r".*\.1\..*q_proj|1\.q_proj"}),
    "patterns": (
        ["Llama", "decoder", "at the top"],
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 3, r"layers\.0\..*": 4, "q_proj": 5},
            "alpha_pattern": {r".*\.1\..*": 3, "v_proj": 2},
        },
    ),
    "saved": (["Llama", "decoder", "pair"], {"target_modules": ["q_proj"], "modules_to_save": ["head", "lm_head"]}),
    "saved by part of a name": (ALL, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "saved by path": (
        ["Llama", "decoder", "pair"], {"target_modules": ["v_proj"], "modules_to_save": ["model.norm"]}
    ),
    "saved and targeted": (["Llama"], {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp"]}),
}  # fmt: skip
STRICT = "matches no|match no targeted|cannot be told from|has no effect"
"""PEFT passes over names that match nothing, and takes a module for another one; here these are errors in training."""

each_cell = pytest.mark.parametrize(
    ("build", "fields"),
    [
        pytest.param(STRUCTURES[name], fields, id=f"{name}-{config}")
        for config, (names, fields) in CONFIGS.items()
        for name in names
    ],
)


def _of_peft(build: Callable[[], nn.Module], fields: dict[str, Any]) -> Any:
    """PEFT's model, or None where it finds nothing to adapt."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **copy.deepcopy(fields))
    try:
        model = peft.get_peft_model(build(), config, autocast_adapter_dtype=False)
    except ValueError:
        return None
    _move({name: p for name, p in model.named_parameters() if "modules_to_save" in name})
    return model.eval()


def _of_ours(build: Callable[[], nn.Module], fields: dict[str, Any]) -> tuple[nn.Module | None, str]:
    """Our model, or None and why it is refused."""
    model = build()
    try:
        inject_lora(model, LoRAConfig(r=2, init_lora_weights=False, **fields))
    except ValueError as error:
        return None, str(error)
    return model, ""


def _move(parameters: dict[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)


def _chosen_by_peft(model: Any) -> tuple[set[str], set[str]]:
    modules = dict(model.base_model.model.named_modules())
    adapted = {n for n, m in modules.items() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return adapted, {n for n, m in modules.items() if isinstance(m, peft.utils.ModulesToSaveWrapper)}


def _chosen(model: nn.Module) -> tuple[set[str], set[str]]:
    modules = dict(adapter_modules(model))
    saved = {name for name, module in modules.items() if isinstance(module, TrainableCopy)}
    return modules.keys() - saved, saved


def _output(model: nn.Module) -> torch.Tensor:
    if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
        return model(torch.arange(3, 17).view(2, 7)).logits
    return model(torch.linspace(-1, 1, 32).view(4, 8))


def _assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@each_cell
def test_what_peft_trained_is_read_as_it_was(build, fields, tmp_path):
    # PEFT sorts patterns when it writes them. In another order it would not read its own file: ranks would differ.
    fields = {name: dict(sorted(value.items())) if isinstance(value, dict) else value for name, value in fields.items()}
    theirs = _of_peft(build, fields)
    if theirs is None:
        with pytest.raises(ValueError, match=STRICT):
            inject_lora(build(), LoRAConfig(**fields))
        return
    theirs.save_pretrained(tmp_path)
    ours = build()
    load_adapter(ours, tmp_path)
    assert _chosen(ours) == _chosen_by_peft(theirs)
    _assert_close(_output(ours), _output(theirs))


@each_cell
def test_what_is_trained_is_what_peft_reads(build, fields, tmp_path):
    ours, refusal = _of_ours(build, fields)
    if ours is None:
        assert re.search(STRICT, refusal), refusal
        return
    theirs = _of_peft(build, fields)
    adapted, saved = _chosen_by_peft(theirs)
    # A regular expression on a mixture of experts: PEFT takes the ends of the names that it matches.
    from_expression = isinstance(fields["target_modules"], str) and "experts" in str(theirs)
    assert _chosen(ours)[0] == adapted or (from_expression and _chosen(ours)[0] < adapted)
    assert _chosen(ours)[1] <= saved
    _move({name: p for name, p in ours.named_parameters() if ".copy." in name})
    expected = _output(ours)
    save_adapter(ours, tmp_path)
    assert (_output(build()) - expected).abs().max() > 1e-3
    for reader in (_by_peft(build(), tmp_path), _by_us(build(), tmp_path)):
        _assert_close(_output(reader), expected)
    assert _chosen_by_peft(_by_peft(build(), tmp_path)) == _chosen(ours)


def _by_peft(model: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder).eval()


def _by_us(model: nn.Module, folder: Path) -> nn.Module:
    load_adapter(model, folder)
    return model


class Twice(nn.Module):
    """The whole name of one layer is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(8, 8), nn.Sequential()
        self.inner.add_module("fc", nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.tanh(self.fc(x)))


@pytest.mark.parametrize("portable", [True, False])
def test_a_layer_whose_name_ends_another_is_written_as_an_expression(portable, tmp_path):
    build = _seeded(Twice)
    ours = build()
    report = inject_lora(ours, LoRAConfig(r=2, exclude_modules=["inner.fc"], init_lora_weights=False))
    assert list(report.adapted) == ["fc"]
    save_adapter(ours, tmp_path, portable=portable)
    for reader in (_by_peft(build(), tmp_path), _by_us(build(), tmp_path)):
        _assert_close(_output(reader), _output(ours))
    assert _chosen_by_peft(_by_peft(build(), tmp_path))[0] == {"fc"}


def test_many_whole_names_are_read_as_they_are_written(tmp_path):
    """From 20 on PEFT looks for a shorter list by itself."""
    build = lambda: language_model(num_hidden_layers=6)  # noqa: E731
    ours = build()
    inject_lora(ours, LoRAConfig(r=2, layers_to_transform=[0, 2, 3, 5], init_lora_weights=False))
    save_adapter(ours, tmp_path)
    theirs = _by_peft(build(), tmp_path)
    assert _chosen_by_peft(theirs)[0] == _chosen(ours)[0]
    assert len(_chosen(ours)[0]) == 28
    _assert_close(_output(theirs), _output(ours))


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.attention(x, x, x, need_weights=False)[0])


def test_all_linear_beside_attention_of_torch_is_written_as_what_it_came_to(tmp_path):
    """PEFT would also take the output projection, which torch's attention never calls."""
    build = _seeded(WithAttention)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert _chosen_by_peft(theirs)[0] == {"up", "attention.out_proj"}
    ours = build()
    inject_lora(ours, LoRAConfig(r=2, init_lora_weights=False))
    save_adapter(ours, tmp_path)
    read = _by_peft(build(), tmp_path)
    assert _chosen_by_peft(read) == _chosen(ours) == ({"up"}, set())
    x = torch.randn(2, 3, 8)
    _assert_close(read(x), ours(x))


names = st.lists(st.text("ab_1", min_size=1, max_size=3), min_size=2, max_size=5).map(".".join)
modules = st.lists(names, min_size=1, max_size=6, unique=True)
parts = st.text("ab_1.", min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(modules, st.dictionaries(parts, st.integers()))
def test_the_pattern_that_counts_is_that_of_peft(modules, patterns):
    keys = {name: peft.utils.other.get_pattern_key(patterns, name) for name in modules}
    expected = {name: patterns[key] for name, key in keys.items() if key in patterns}
    assert resolve_pattern("rank_pattern", patterns, modules) == expected


@settings(max_examples=100, deadline=None)
@given(modules, st.one_of(st.none(), parts, st.lists(parts, max_size=3)))
def test_the_index_that_counts_is_that_of_peft(modules, pattern):
    found = layer_indices(modules, pattern)
    for name in modules:
        for index in (1, 11):
            config = peft.LoraConfig(
                target_modules=[name.rpartition(".")[2]], layers_to_transform=[index], layers_pattern=pattern
            )
            chosen = peft.tuners.tuners_utils.check_target_module_exists(config, name)
            assert bool(chosen) == (found.get(name) == index)
