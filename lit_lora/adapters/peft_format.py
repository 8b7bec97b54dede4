"""Adapters on disk, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT writes is read here, and what is written here PEFT reads. PEFT loads loosely (a missing tensor only warns, an
unexpected one is not reported); here a tensor that is missing, unexpected or misshapen raises, before the model is
touched. Files are written whole or not at all, and read back before they replace anything.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_lora.adapters import base_weight
from lit_lora.adapters.checksum import check_adapter, serialize
from lit_lora.adapters.inject import InjectionReport, apply_plan, plan_injection
from lit_lora.adapters.layers import LoRALayer, LoRALinear, TrainableCopy, adapter_modules, lora_layers
from lit_lora.adapters.matching import some
from lit_lora.adapters.peft_config import from_peft_config, to_peft_config
from lit_lora.adapters.trained_on import noted_metadata
from lit_lora.atomic import FileToWrite, atomic_write_all
from lit_lora.config import LoRAConfig
from lit_lora.wording import in_words_of

__all__ = [
    "adapter_state_dict",
    "from_peft_config",
    "load_adapter",
    "load_adapter_state_dict",
    "save_adapter",
    "to_peft_config",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
PREFIX = "base_model.model."


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter, detached but not copied, by their names in the model.

    A trainable copy appears under the name of the module that it stands for: ``lm_head.weight``.
    """
    state: dict[str, Tensor] = {}
    for name, module in adapter_modules(model):
        if isinstance(module, TrainableCopy):
            state |= {f"{name}.{key}": tensor for key, tensor in module.copy.state_dict().items()}
        else:
            inner = module.state_dict()
            state |= {f"{name}.{key}": inner[key] for key in inner if key.startswith("lora_")}
    return state


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the adapter of a model, in its own dtypes.

    Args:
        model: a model with adapters.
        state: exactly the tensors of :func:`adapter_state_dict`.

    Raises:
        ValueError: naming tensors that are missing, unexpected or misshapen. The model is then unchanged.
    """
    own = adapter_state_dict(model)
    _check_state({name: tuple(tensor.shape) for name, tensor in own.items()}, state, "the adapter state")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model_name: str | None = None,
    model_card: str | None = None,
    portable: bool = False,
) -> Path:
    """Write the adapter of a model as a folder that PEFT, transformers and vLLM load.

    Args:
        model: a model with adapters.
        folder: where to; made if missing. Other files in it are left alone.
        base_model_name: Hub id or folder of the base; taken from a transformers model if None.
        model_card: text of ``README.md``; none is written if None.
        portable: fold every layer's scale into B and pad to one rank, for readers that know no rsLoRA and no rank or
            alpha patterns (vLLM, llama.cpp).

    Returns:
        The folder.

    Raises:
        ValueError: if there is no adapter, or it holds nothing but zeros, NaN or infinity.
        OSError: if the folder cannot be written to. An earlier adapter in it is then as it was.
    """
    modules = dict(adapter_modules(model))
    if not modules:
        raise ValueError("the model has no adapters: call inject_lora first")
    config = _config_to_write(model, next(iter(modules.values())).config, portable)
    state = _portable_state(model, config.r) if portable else adapter_state_dict(model)
    tensors = {f"{PREFIX}{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    _check_worth_saving(model, tensors)
    content = to_peft_config(
        config,
        base_model_name or _name_of_base(model),
        task_type="CAUSAL_LM" if _is_causal_lm(model) else None,
        fan_in_fan_out=any(base_weight.is_conv1d(layer.base_layer) for _, layer in lora_layers(model)),
    )
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    data = serialize(tensors, from_peft_config(content), noted_metadata(model))

    def check_weights(path: Path) -> None:
        written = _read_tensors(path)
        differing = [n for n in tensors.keys() | written.keys() if not _same_tensor(tensors.get(n), written.get(n))]
        if differing:
            raise ValueError(f"{path} does not hold what was written: {some(sorted(differing))} differ")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        FileToWrite(folder / WEIGHTS_NAME, lambda f: f.write(data), check_weights),
        FileToWrite(folder / CONFIG_NAME, lambda f: f.write(text.encode())),
    ]
    if model_card is not None:
        files.append(FileToWrite(folder / CARD_NAME, lambda f: f.write(model_card.encode())))
    atomic_write_all(files)
    return folder


def load_adapter(model: nn.Module, folder_or_hub_id: str | Path, *, trainable: bool = False) -> InjectionReport:
    """Inject and load an adapter that lit_lora or PEFT wrote.

    Args:
        model: the base model that the adapter was trained on, without adapters.
        folder_or_hub_id: a folder, or the id of a repository on the Hub.
        trainable: whether the adapter can be trained further; otherwise it is frozen.

    Returns:
        What was adapted.

    Raises:
        ValueError: if the files are not a LoRA adapter that lit_lora implements, or do not fit the model, naming the
            tensors. The model is then unchanged.
    """
    folder = _find_folder(folder_or_hub_id)
    config = _read_config(folder / CONFIG_NAME)
    raw = _read_tensors(_find_weights(folder))
    state = _names_in_model(raw, folder)
    try:
        plan = plan_injection(model, config, unmatched="ignore")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    expected = plan.shapes()
    extra = state.keys() - expected.keys()
    for name in sorted(extra & _frozen_names(model, plan.adapted.keys() | plan.saved.keys())):
        _check_equals_base(model, name, state.pop(name), folder)
    _check_state(expected, state, str(folder), hint="; ".join(plan.ignored))
    check_adapter(_find_weights(folder), raw, config)
    report = apply_plan(model, plan)
    load_adapter_state_dict(model, state)
    if not trainable:
        for _, module in adapter_modules(model):
            module.requires_grad_(False)
    return report


def _check_state(
    expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], source: str, hint: str = ""
) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{name}: got {tuple(state[name].shape)}, the model needs {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [f"missing {len(missing)} tensors ({some(missing)})"] if missing else []
    problems += [f"{len(unexpected)} unexpected tensors ({some(unexpected)})"] if unexpected else []
    if misshapen:
        problems.append(f"made for another base model, {len(misshapen)} shapes differ ({some(misshapen)})")
    if problems:
        problems += [hint] if hint else []
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}")


def _find_folder(folder_or_hub_id: str | Path) -> Path:
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    if folder.exists():
        raise ValueError(f"{folder} is a file: expected the folder that holds {CONFIG_NAME}")
    if isinstance(folder_or_hub_id, Path) or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise ValueError(f"no adapter folder {name!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"no adapter folder {name!r}, and none of that name on the Hub: {error}") from error


def _find_weights(folder: Path) -> Path:
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds adapter_model.bin, a pickle, which may run code when loaded and is not read: save it "
            "again with a current version of PEFT, as safetensors"
        )
    raise ValueError(f"{folder} holds no {WEIGHTS_NAME}")


def _read_config(path: Path) -> LoRAConfig:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {CONFIG_NAME}")
    try:
        return from_peft_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OverflowError, KeyError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _names_in_model(raw: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Names on disk -> names in the model; other trainers leave the adapter's name in (``lora_A.default.weight``)."""
    state: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        name = key.removeprefix(PREFIX)
        name = re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", name)
        name = re.sub(r"\.(lora_embedding_[AB])\.[^.]+$", r".\1", name)
        # With a resized vocabulary PEFT also writes both halves of its wrapper around a saved embedding.
        name = re.sub(r"\.modules_to_save\.([^.]+\.)?(weight|bias)$", r".\2", name)
        name = name.replace(".original_module.", ".base_layer.")
        if name in state and not _same_tensor(state[name], tensor):
            raise ValueError(f"{folder} holds several tensors for {name}: is there more than one adapter in the file?")
        state[name] = tensor
    return state


def _frozen_names(model: nn.Module, wrapped: set[str]) -> set[str]:
    """Weights of the base as PEFT names them when it writes them along: those of embeddings and heads."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    inside = {f"{name}.base_layer.{key}" for name in wrapped for key, _ in model.get_submodule(name).named_parameters()}
    return names | inside


def _check_equals_base(model: nn.Module, name: str, tensor: Tensor, folder: Path) -> None:
    base = model.get_parameter(name.replace(".base_layer.", "."))
    if tensor.shape != base.shape:
        raise ValueError(
            f"{folder} was trained with a resized vocabulary: {name} is {tuple(tensor.shape)}, the model has "
            f"{tuple(base.shape)}. "
            + in_words_of(
                python=f"Call model.resize_token_embeddings({tensor.shape[0]}) and add its weights first",
                command_line="Give the base that was resized for it, with its weights, as the base",
            )
        )
    if not torch.equal(tensor.to(device=base.device, dtype=base.dtype), base):
        raise ValueError(
            f"{folder} holds its own {name}, which differs from the model's: it was trained on another base model, or "
            "its vocabulary was resized"
        )


def _config_to_write(model: nn.Module, config: LoRAConfig, portable: bool) -> LoRAConfig:
    layers = dict(lora_layers(model))
    if portable and layers:
        r = max(layer.r for layer in layers.values())
        config = replace(
            config,
            r=r,
            lora_alpha=r,
            use_rslora=False,
            rank_pattern={},
            alpha_pattern={},
            target_modules=_shortest_names(model, layers),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    elif isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        # PEFT takes layers_to_transform only beside a list.
        config = replace(config, target_modules=sorted(layers), layers_to_transform=None, layers_pattern=None)
    return config


def _shortest_names(model: nn.Module, layers: dict[str, LoRALayer]) -> list[str]:
    """The last parts of the paths if they say it all, which every reader understands; else the whole paths."""
    ends = {name.rpartition(".")[2] for name in layers}
    inside = tuple(f"{name}." for name, _ in adapter_modules(model))
    outside = {
        name.rpartition(".")[2]
        for name, _ in model.named_modules()
        if name not in layers and not name.startswith(inside)
    }
    return sorted(layers) if ends & outside else sorted(ends)


def _portable_state(model: nn.Module, r: int) -> dict[str, Tensor]:
    state = adapter_state_dict(model)
    for name, layer in lora_layers(model):
        linear = isinstance(layer, LoRALinear)
        names = ("lora_A.weight", "lora_B.weight") if linear else ("lora_embedding_A", "lora_embedding_B")
        lora_A, lora_B = state[f"{name}.{names[0]}"], state[f"{name}.{names[1]}"]
        state[f"{name}.{names[0]}"] = torch.cat([lora_A, lora_A.new_zeros(r - layer.r, lora_A.shape[1])])
        scaled = (lora_B.float() * layer.scaling).to(lora_B.dtype)
        state[f"{name}.{names[1]}"] = torch.cat([scaled, lora_B.new_zeros(lora_B.shape[0], r - layer.r)], dim=1)
    return state


def _check_worth_saving(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the adapter holds NaN or infinity in {some(broken)}: it is not saved")
    layers = list(lora_layers(model))
    # The half that starts non-zero: A, and B of an embedding. All zero means not gathered, or never initialised.
    if layers and not any(layer.factors()[not isinstance(layer, LoRALinear)].any() for _, layer in layers):
        raise ValueError("every A of the adapter is zero: it was not gathered or never initialised, nothing is saved")


def _same_tensor(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)


def _pretrained_config(model: nn.Module) -> Any:
    transformers = sys.modules.get("transformers")
    return model.config if transformers and isinstance(model, transformers.PreTrainedModel) else None


def _name_of_base(model: nn.Module) -> str | None:
    config = _pretrained_config(model)
    return (config.name_or_path or None) if config is not None else None


def _is_causal_lm(model: Any) -> bool:
    config = _pretrained_config(model)
    return config is not None and bool(model.can_generate()) and not getattr(config, "is_encoder_decoder", False)
