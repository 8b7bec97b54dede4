"""Adapters that mean harm: nothing hangs, memory stays small, the error names the file, the model is as it was."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_lora.adapters import expressions
from lit_lora.adapters.layers import adapter_modules
from lit_lora.interchange.adapter_folder import base_of_adapter
from tests.tiny import language_model

pytestmark = pytest.mark.timeout(60)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CATASTROPHE = r"(.*.*)*x!"
IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False))
    return save_adapter(model, tmp_path / "adapter", base_model_name="owner/base")


def _config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))

    return change


def _header(entries: dict[str, Any], data_bytes: int) -> Callable[[Path], Any]:
    """A weights file with this header; its data take no room on the disk."""

    def change(folder: Path) -> None:
        header = json.dumps(entries).encode()
        with (folder / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + data_bytes)

    return change


def _of_size(size: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def _claimed_header(length: int) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        with (folder / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(8 + length)

    return change


def _tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Any]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, A: change(tensors[A])}, folder / WEIGHTS)

    return changed


TERABYTE = 1 << 40
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "targets": (_config(target_modules=CATASTROPHE), f"{CONFIG}: target_modules: matching '.*' .* takes more than"),
    "exclusions": (_config(exclude_modules=CATASTROPHE), f"{CONFIG}: exclude_modules: matching .* takes more than"),
    "ranks": (_config(rank_pattern={CATASTROPHE: 2}), f"{CONFIG}: rank_pattern: matching .* takes more than"),
    "alphas": (_config(alpha_pattern={CATASTROPHE: 2}), f"{CONFIG}: alpha_pattern: matching .* takes more than"),
    "layers": (
        _config(layers_pattern=CATASTROPHE, layers_to_transform=[0]),
        f"{CONFIG}: layers_pattern: matching .* takes more than",
    ),
    "many targets": (_config(target_modules=[f"x{i}" for i in range(100_000)]), "unexpected tensors"),
    "many saved": (_config(modules_to_save=[f"x{i}" for i in range(100_000)]), "the checksum differs"),
    "many excluded": (_config(exclude_modules=["q_proj", *map(str, range(100_000))]), "unexpected tensors"),
    "many ranks": (_config(rank_pattern={f"x{i}": 2 for i in range(100_000)}), "rank_pattern: matching 'x"),
    "a large rank": (_config(r=10**12), "shapes differ"),
    "an infinite scale": (_config(lora_alpha=10**400), f"{CONFIG}: lora_alpha must be a finite number"),
    "a large config": (lambda folder: (folder / CONFIG).write_bytes(b" " * (17 << 20)), f"{CONFIG} has 17,825,792"),
    "a deep config": (lambda folder: (folder / CONFIG).write_text('{"r":' * 50_000), CONFIG),
    "a tensor of a terabyte": (_header({A: _of_size(TERABYTE)}, TERABYTE), "shapes differ|missing"),
    "a base of a terabyte": (
        _header({"base_model.model.model.norm.weight": _of_size(TERABYTE)}, TERABYTE), "resized vocabulary"
    ),
    "many tensors": (
        _header({f"x{i}": EMPTY for i in range(50_000)}, 0), "50000 unexpected tensors"
    ),
    "a long header": (_claimed_header(1 << 26), f"{WEIGHTS} has a header of 67,108,864 bytes"),
    "a header of zeros": (_claimed_header(1 << 20), "not a whole safetensors file"),
    "a header that is a list": (_header([], 0), "not a whole safetensors file"),  # type: ignore[arg-type]
    "a shape of words": (_header({A: {"dtype": "F32", "shape": ["x"]}}, 0), "not a whole safetensors file"),
    "a shape that the data do not have": (
        _header({A: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 4]}}, 4), "missing|not a whole safetensors"
    ),
    "integers": (_tensor(lambda tensor: tensor.long()), "q_proj.lora_A.weight as I64, expected one of F64, F32"),
    "half bytes": (_tensor(lambda tensor: tensor.to(torch.float8_e4m3fn)), "lora_A.weight as F8_E4M3, expected one"),
    "not a number": (_tensor(lambda tensor: tensor * float("nan")), r"NaN or infinity in model.layers.0.self_attn"),
    "infinite": (_tensor(lambda tensor: tensor / 0), r"holds NaN or infinity in model.layers.0.self_attn.q_proj"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_adapter_is_refused_in_time_and_by_name(change, message, folder, monkeypatch):
    monkeypatch.setattr(expressions, "LIMIT_S", 0.5)
    change(folder)
    model = language_model()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB
    assert not list(adapter_modules(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["a large config", "a deep config"])
def test_the_command_lines_look_at_the_config_is_as_careful(name, folder):
    HOSTILE[name][0](folder)
    with pytest.raises(ValueError, match=CONFIG):
        base_of_adapter(str(folder))


def test_the_same_file_unchanged_is_read(folder):
    model = language_model()
    load_adapter(model, folder)
    assert len(list(adapter_modules(model))) == 3
