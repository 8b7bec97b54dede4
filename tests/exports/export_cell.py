"""A row of the export table: a tiny model with an adapter, written for every target and read back."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lit_lora import load_adapter, load_base_model
from lit_lora.adapters.layers import lora_layers
from lit_lora.evaluation.export_targets import Source, export_to
from tests.exports.export_layouts import architecture_of, as_in_gguf, read_gguf, stored
from tests.small_adapters import MODELS, RANKS, small_adapter
from tests.table_cell import Cell, Differs, same, same_keys

IDS = torch.arange(3, 24).view(3, 7)
_same = partial(same, tolerance=1e-5)


class _Made(NamedTuple):
    """What a row exports."""

    adapter: str
    base: Path
    folder: Path
    model: Any
    """With the adapter on it."""
    logits: Tensor
    config: Any


_EXPERTS = {**RANKS, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank_pattern": {}}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: model for name, model in MODELS.items() if "," not in name},
    "Qwen3-MoE, experts adapted": (MODELS["Qwen3-MoE"][0], {**MODELS["Qwen3-MoE"][1], "lora": _EXPERTS}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "OPT": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 64, "max_position_embeddings": 256}),
    "Falcon": ("Falcon", {}),
}
"""Name in the table -> kind of model, and fields of its config."""


def run_row(name: str, folder: Path) -> dict[str, Cell]:
    """Export for every target, and compare."""
    kind, fields = ROWS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about what is done on purpose
        adapter = small_adapter(folder, kind, **{"num_hidden_layers": 1, **fields, **_one_layer(fields)})
        model = load_base_model(str(folder / "base"))
        load_adapter(model, adapter)
        config = AutoConfig.from_pretrained(folder / "base")
        made = _Made(adapter, folder / "base", folder, model, _logits(model), config)
        return {target: _run(made, target) for target in TARGETS}


def _one_layer(fields: dict[str, Any]) -> dict[str, Any]:
    return {"layer_types": fields["layer_types"][:1]} if "layer_types" in fields else {}


def _run(made: _Made, target: str) -> Cell:
    try:
        TARGETS[target](made)
    except Differs as error:
        return Cell("different", str(error))
    except ValueError as error:
        return Cell("refused", str(error).replace(str(made.folder), "FOLDER"))
    return Cell("equal")


def _written(made: _Made, to: Any, name: str, **options: Any) -> Path:
    shipped = export_to(Source(made.adapter), made.folder / name, to, gguf_type="f32", **options)
    return shipped.path


def _read_by_peft(made: _Made, to: str) -> None:
    """PEFT, and thus vLLM's reader, finds the adapter that was trained."""
    folder = _written(made, to, to)
    base = AutoModelForCausalLM.from_pretrained(made.base)
    _same("logits", _logits(peft.PeftModel.from_pretrained(base, folder)), made.logits)


def _merged(made: _Made) -> None:
    folder = _written(made, "hf", "hf")
    _same("logits", _logits(AutoModelForCausalLM.from_pretrained(folder)), made.logits)


def _gguf(made: _Made) -> None:
    """Each tensor of the merged model, in llama.cpp's layout, and none besides."""
    _compare_gguf(made, _written(made, "gguf", "model.gguf"))


def _ollama(made: _Made) -> None:
    folder = _written(made, "ollama", "ollama")
    _compare_gguf(made, folder / "model.gguf")
    text = (folder / "Modelfile").read_text()
    if not re.match(r'FROM ./model.gguf\nTEMPLATE """.+"""\nPARAMETER stop', text, re.DOTALL):
        raise Differs("Modelfile")


def _compare_gguf(made: _Made, path: Path) -> None:
    got = read_gguf(path)
    expected = as_in_gguf(stored(made.folder / "hf"), architecture_of(path), made.config)
    same_keys("names", got, expected)
    for name, tensor in expected.items():
        _same(name, got[name], tensor)


def _gguf_adapter(made: _Made) -> None:
    """The base in llama.cpp's layout and what the file adds to it are the merged model in that layout."""
    path = _written(made, "gguf", "adapter.gguf", adapter_only=True)
    tensors, architecture = read_gguf(path), architecture_of(path)
    alpha = _alpha(path)
    base, merged = (as_in_gguf(stored(made.folder / f), architecture, made.config) for f in ("base", "hf"))
    for name, weight in base.items():
        a, b = (tensors.pop(f"{name}.lora_{half}", None) for half in "ab")
        delta = 0.0 if a is None or b is None else alpha / len(a) * b @ a
        _same(name, weight + delta, merged[name])
    if tensors:
        raise Differs(f"{next(iter(tensors))} is of no layer")


def _alpha(path: Path) -> float:
    import gguf

    return gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents()


def _mlx(made: _Made) -> None:
    folder = _written(made, "mlx", "mlx")
    tensors = load_file(folder / "adapters.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    for name, layer in lora_layers(made.model):
        a, b = (tensors.pop(f"{name}.lora_{half}") for half in "ab")
        _same(name, settings["scale"] * b.T @ a.T, layer.delta_weight().detach())
        if name.split(".", 3)[3] not in settings["keys"]:
            raise Differs(f"{name} is not in the keys")
    if tensors:
        raise Differs(f"{next(iter(tensors))} is of no layer")


TARGETS: dict[str, Callable[[_Made], None]] = {
    "peft": lambda made: _read_by_peft(made, "peft"),
    "portable": lambda made: _read_by_peft(made, "portable"),
    "hf": _merged,
    "gguf": _gguf,
    "gguf, adapter": _gguf_adapter,
    "ollama": _ollama,
    "vllm": lambda made: _read_by_peft(made, "vllm"),
    "mlx": _mlx,
}
"""Column of the table -> what compares; ``hf`` comes before those that take it as what is expected."""


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits
