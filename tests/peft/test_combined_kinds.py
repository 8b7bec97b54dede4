"""Combined and cut down: convolutions, attentions of torch and fused experts, for each way of combining.

Where PEFT's ``add_weighted_adapter`` works, its values; where it does not, what the matrices say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lit_lora import LoRAConfig, combine_adapters, compress_adapter, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.layers import lora_layers
from lit_lora.interchange.stored_factors import read_factors
from tests.peft.test_convolutions import Convolved
from tests.peft.test_packed_attention import Attending, Encoder
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:The density 1.0"),
    pytest.mark.filterwarnings("ignore:not adapted"),
]

CONV = {"target_modules": ["first", "second"]}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "1d": (lambda: Convolved(1), CONV),
    "2d": (lambda: Convolved(2), {**CONV, "use_rslora": True}),
    "3d": (lambda: Convolved(3), CONV),
    "groups": (lambda: Convolved(2, groups=2), CONV),
    "beside a linear layer": (lambda: Convolved(2, stride=2), {"target_modules": ["first", "head"]}),
    "attention": (Attending, {"target_modules": ["attention", "up"]}),
    "encoder": (Encoder, {"target_modules": ["self_attn", "linear1"]}),
    "experts": (lambda: language_model("Mixtral", num_local_experts=3), EXPERTS),
    "transposed experts": (lambda: language_model("GptOss", num_local_experts=3, head_dim=8), EXPERTS),
    "experts and router beside layers": (
        lambda: language_model("Mixtral", num_local_experts=3),
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", "experts.down_proj"]},
    ),
}
WAYS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {"r": 3},
    "ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "ties_svd": {"density": 0.5, "r": 3},
    "magnitude_prune_svd": {"density": 0.5, "r": 3},
    "dare_linear_svd": {"density": 1.0, "r": 3},
    "dare_ties_svd": {"density": 1.0, "r": 3},
}
WEIGHTS = [0.7, -0.3]


def _written(build: Callable[[], nn.Module], fields: dict[str, Any], folder: Path, seed: int) -> str:
    model = build()
    torch.manual_seed(seed)
    start: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **fields}
    inject_lora(model, LoRAConfig(**start))
    save_adapter(model, folder)
    return str(folder)


def _ours(build: Callable[[], nn.Module], folder: Path | str) -> dict[str, torch.Tensor]:
    """Layer -> what is added to its weight."""
    model = build()
    load_adapter(model, folder)
    deltas = {name: None if layer.unmergeable else layer.delta_weight() for name, layer in lora_layers(model)}
    return {name: delta for name, delta in deltas.items() if delta is not None}


def _theirs(build: Callable[[], nn.Module], folders: list[str], how: str, more: dict[str, Any]) -> Any:
    model = peft.PeftModel.from_pretrained(build(), folders[0], "0")
    model.load_adapter(folders[1], "1")
    more = {"svd_rank" if name == "r" else name: value for name, value in more.items()}
    model.add_weighted_adapter(["0", "1"], WEIGHTS, "made", combination_type=how, **more)
    return model


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


PEFT_HAS = [
    (kind, how)
    for kind in ("1d", "2d", "3d", "groups", "beside a linear layer", "attention", "encoder")
    for how in WAYS
    # 0.21 decomposes kernels of two dimensions alone, and puts groups of several adapters among each other.
    if (kind not in ("1d", "3d") or not how.endswith("svd"))
    and (kind != "groups" or not (how.endswith("svd") or how == "cat"))
]


@pytest.mark.parametrize(("kind", "how"), PEFT_HAS)
def test_kinds_are_combined_as_peft_does(kind: str, how: Any, tmp_path: Path) -> None:
    build, fields = KINDS[kind]
    folders = [_written(build, fields, tmp_path / str(seed), seed) for seed in range(2)]
    theirs = _theirs(build, folders, how, WAYS[how])
    made = combine_adapters(folders, tmp_path / "made", weights=WEIGHTS, how=how, **WAYS[how])
    stored = read_factors(made).layers
    assert len(stored) >= 2
    for name, factors in stored.items():
        layer = theirs.base_model.model.get_submodule(name)
        A, B = (half["made"].weight for half in (layer.lora_A, layer.lora_B))
        got = factors.named(name)
        if how.endswith("svd"):  # whose signs are free
            _close(factors.product(), B.flatten(1) @ A.flatten(1))
        else:
            _close(got[f"{name}.lora_A.weight"], A)
            _close(got[f"{name}.lora_B.weight"], B)
    _ours(build, made)
    peft.PeftModel.from_pretrained(build(), str(made))


OURS_ALONE = [(kind, how) for kind in KINDS for how in WAYS if (kind, how) not in PEFT_HAS or how == "cat"]


@pytest.mark.parametrize(("kind", "how"), OURS_ALONE)
def test_what_peft_does_not_combine_is_what_the_matrices_say_and_read_by_it(
    kind: str, how: Any, tmp_path: Path
) -> None:
    build, fields = KINDS[kind]
    folders = [_written(build, fields, tmp_path / str(seed), seed) for seed in range(2)]
    made = combine_adapters(folders, tmp_path / "made", weights=WEIGHTS, how=how, **WAYS[how])
    got, both = _ours(build, made), [_ours(build, folder) for folder in folders]
    assert got.keys() == both[0].keys()
    for name, delta in got.items() if how in ("cat", "svd") else ():
        whole = WEIGHTS[0] * both[0][name] + WEIGHTS[1] * both[1][name]
        _close(delta, whole if how == "cat" else _truncated(whole, 3, experts="experts" in name))
    if how == "linear":
        stored = [load_file(Path(folder) / "adapter_model.safetensors") for folder in (*folders, made)]
        for key, tensor in stored[2].items():
            roots = [(abs(w) * 1.5) ** 0.5 for w in WEIGHTS]  # alpha over rank
            signed = -roots[1] if ".lora_A." in key else roots[1]
            _close(tensor, roots[0] * stored[0][key] + signed * stored[1][key])
    peft.PeftModel.from_pretrained(build(), str(made))


def _truncated(whole: torch.Tensor, r: int, *, experts: bool) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(whole if experts else whole.flatten(1), full_matrices=False)
    return (U[..., :r] * S[..., None, :r] @ Vh[..., :r, :]).view(whole.shape)


def test_groups_of_a_convolution_are_added_up_group_by_group(tmp_path: Path) -> None:
    build, fields = KINDS["groups"]
    folders = [_written(build, fields, tmp_path / str(seed), seed) for seed in range(2)]
    made = combine_adapters(folders, tmp_path / "made", weights=WEIGHTS, how="cat")
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(5))
    added = []
    for folder in (*folders, made):
        model: Any = build()
        load_adapter(model, folder)
        added.append(model.first.added(x).detach())
    _close(added[2], WEIGHTS[0] * added[0] + WEIGHTS[1] * added[1])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_cut_down_to_the_best_of_its_rank(kind: str, tmp_path: Path) -> None:
    build, fields = KINDS[kind]
    before = read_factors(_written(build, fields, tmp_path / "before", 0))
    found = compress_adapter(tmp_path / "before", tmp_path / "after", r=2)
    after = read_factors(found.folder)
    assert after.layers.keys() == before.layers.keys()
    for name, factors in before.layers.items():
        r = 1 if kind == "groups" and name == "first" else 2
        U, S, Vh = torch.linalg.svd(factors.product(), full_matrices=False)
        _close(after.layers[name].product(), U[..., :r] * S[..., None, :r] @ Vh[..., :r, :])
        assert found.ranks[name] == 2
        lost = (factors.product() - after.layers[name].product()).norm() / factors.product().norm()
        assert found.errors[name] == pytest.approx(float(lost), abs=1e-5)
    peft.PeftModel.from_pretrained(build(), str(found.folder))
    _ours(build, found.folder)
    bounded = compress_adapter(tmp_path / "before", tmp_path / "bounded", max_error=0.6)
    assert max(bounded.errors.values()) <= 0.6
    _ours(build, bounded.folder)
    again = compress_adapter(bounded.folder, tmp_path / "again", max_error=0.0)
    assert again.error == pytest.approx(0, abs=1e-3)
