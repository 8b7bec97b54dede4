"""One cell of the conformance table: an adapter written by one side and read by the other, compared in every way."""

from __future__ import annotations

import copy
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_lora import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from lit_lora.interchange.peft_format import adapter_state_dict
from tests.conformance.conformance_models import ARCHITECTURES, base_of, outputs
from tests.table_cell import Cell, Differs, same, same_keys

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "saved": {"modules_to_save": []},
}
"""Name -> fields; the module to save is the architecture's."""
TARGETS = ("attention", "all-linear", "ends")
DIRECTIONS = ("PEFT writes", "we write")
_same = partial(same, tolerance=1e-4)


class _PeftFails(Exception):
    """With its error."""


def run_cell(architecture: str, targets: str, variant: str, direction: str) -> Cell:
    """Compare."""
    fields = _fields(architecture, targets, variant)
    compare = _peft_writes if direction == "PEFT writes" else _we_write
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # PEFT's remarks about what is done on purpose
        try:
            return Cell("equal", compare(architecture, fields, Path(folder)))
        except _PeftFails as error:
            return Cell("PEFT", str(error))
        except Differs as error:
            return Cell("different", str(error))
        except ValueError as error:  # what we refuse, we refuse so
            try:
                _by_peft(lambda: _made_by_peft(architecture, fields))
            except _PeftFails as of_peft:
                return Cell("PEFT", str(of_peft))
            return Cell("refused", _first_line(error).replace(folder, "FOLDER"))


def _fields(architecture: str, targets: str, variant: str) -> dict[str, Any]:
    known = ARCHITECTURES[architecture]
    names = {"attention": list(known.attention), "all-linear": "all-linear", "ends": list(known.ends)}[targets]
    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": names, **VARIANTS[variant]}
    if variant == "saved":
        fields["modules_to_save"] = [known.saved]
    return fields


def _peft_writes(architecture: str, fields: dict[str, Any], folder: Path) -> str:
    theirs = _by_peft(lambda: _made_by_peft(architecture, fields))
    expected = _by_peft(lambda: _run(theirs, architecture))
    _by_peft(lambda: theirs.save_pretrained(folder))
    ours = copy.deepcopy(base_of(architecture))
    load_adapter(ours, folder, trainable=True)
    got = _run(ours, architecture)
    _same("output", got[0], expected[0])
    same_keys("gradients", got[1], expected[1])
    for name, gradient in expected[1].items():
        _same(f"gradient of {name}", got[1][name], gradient)
    save_adapter(ours, folder / "again")
    same_keys("file", _file(folder / "again"), _file(folder))
    return _check_merge(ours, architecture, got[0], lambda: theirs.merge_and_unload())


def _we_write(architecture: str, fields: dict[str, Any], folder: Path) -> str:
    torch.manual_seed(3)
    ours = copy.deepcopy(base_of(architecture))
    inject_lora(ours, LoRAConfig(**fields))
    _move(ours)
    expected = outputs(ours, architecture).detach()
    save_adapter(ours, folder)
    theirs = _by_peft(lambda: peft.PeftModel.from_pretrained(copy.deepcopy(base_of(architecture)), folder).eval())
    _same("output", _by_peft(lambda: outputs(theirs, architecture)), expected)
    read = _by_peft(lambda: peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
    same_keys(
        "tensors", {key.removeprefix("base_model.model."): t for key, t in read.items()}, adapter_state_dict(ours)
    )
    return _check_merge(ours, architecture, expected, lambda: theirs.merge_and_unload())


def _made_by_peft(architecture: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(2)
    config = peft.LoraConfig(task_type=ARCHITECTURES[architecture].task, **fields)
    model = peft.get_peft_model(copy.deepcopy(base_of(architecture)), config, autocast_adapter_dtype=False).eval()
    _move(model)
    return model


def _check_merge(ours: Any, architecture: str, before: Tensor, theirs: Any) -> str:
    """Merged it computes the same, as PEFT's does; taken out again it is what it was, bit for bit.

    Returns:
        What PEFT does otherwise.
    """
    with torch.no_grad():
        unmerged = outputs(ours, architecture)
        try:
            merge_lora(ours, unload=False)
        except ValueError:
            try:
                _by_peft(theirs)
            except _PeftFails as error:
                return f"merged by neither; {error}"
            raise
        _same("merged", outputs(ours, architecture), before)
        unmerge_lora(ours)
        if not torch.equal(outputs(ours, architecture), unmerged):
            raise Differs("unmerged")
        merge_lora(ours)
        merged = outputs(ours, architecture)
        _same("merged and unloaded", merged, before)
        try:
            _same("", _by_peft(lambda: outputs(theirs(), architecture)), before)
        except Differs:
            return "PEFT merges into another function"  # https://github.com/huggingface/peft/issues/2777
        except _PeftFails as error:
            return f"merged by us alone; {error}"
    return ""


def _run(model: Any, architecture: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and gradients by the names that parameters have in a file."""
    out = outputs(model, architecture)
    out.square().sum().backward()
    gradients = {_plain(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients


def _plain(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace("magnitude_vector.default.weight", "magnitude_vector")
    return name.replace(".default", "").replace(".modules_to_save", "").replace(".copy.", ".")


def _file(folder: Path) -> dict[str, Tensor]:
    """What it holds; PEFT also writes whole embeddings and heads of the base that are adapted."""
    return {
        name: tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        if not name.endswith(".base_layer.weight")
    }


def _move(model: nn.Module) -> None:
    """What starts as the base's is to matter, too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_A" not in name and "lora_B.weight" not in name):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _by_peft(call: Any) -> Any:
    """What PEFT gives; its failures are its own."""
    try:
        return call()
    except Differs:
        raise
    except Exception as error:
        raise _PeftFails(f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
