"""Adapters on disk, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT writes is read here, and what is written here PEFT reads. PEFT loads loosely (a missing tensor only warns, an
unexpected one is not reported); here a tensor that is missing, unexpected or misshapen raises, before the model is
touched. Files are written whole or not at all, and read back before they replace anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_lora.adapters.inject import InjectionPlan, InjectionReport, apply_plan, plan_injection
from lit_lora.adapters.layers import TrainableCopy, adapter_modules, lora_layers
from lit_lora.adapters.matching import some
from lit_lora.adapters.module_names import named_modules, plain_name
from lit_lora.adapters.task_heads import as_pretrained, task_type
from lit_lora.adapters.trainable_tokens import DELTA, TrainableTokens
from lit_lora.adapters.trained_biases import trained_biases
from lit_lora.base import base_weight
from lit_lora.base.trained_on import noted, noted_metadata
from lit_lora.files.atomic import FileToWrite, atomic_write_all
from lit_lora.interchange.added_rows import grown_vocabulary, rows_in_whole_layers, with_added_rows
from lit_lora.interchange.checksum import check_adapter, serialize
from lit_lora.interchange.peft_config import from_peft_config, to_peft_config
from lit_lora.interchange.peft_folder import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    StoredTensor,
    adapted_in,
    find_folder,
    find_weights,
    read_config,
    read_header,
    read_tensors,
)
from lit_lora.interchange.tokenizer_files import tokenizer_files
from lit_lora.interchange.written_adapter import config_to_write, portable_state
from lit_lora.wording import in_words_of

__all__ = [
    "adapter_state_dict",
    "from_peft_config",
    "load_adapter",
    "load_adapter_state_dict",
    "save_adapter",
    "to_peft_config",
]

CARD_NAME = "README.md"


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter, detached but not copied, by their names in the model.

    A trainable copy appears under the name of the module that it stands for: ``lm_head.weight``.
    """
    state: dict[str, Tensor] = {}
    for name, module in adapter_modules(model):
        if isinstance(module, TrainableCopy):
            state |= {f"{name}.{plain_name(key)}": tensor for key, tensor in module.copy.state_dict().items()}
        elif isinstance(module, TrainableTokens):
            if module.tied_to is None:
                state[f"{name}.{DELTA}"] = module.rows_KD.detach()
        else:
            inner = module.state_dict()
            state |= {f"{name}.{key}": inner[key] for key in inner if key.startswith("lora_")}
    return state | {name: bias.detach() for name, bias in trained_biases(model).items()}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the adapter of a model, in its own dtypes.

    Args:
        model: a model with adapters.
        state: exactly the tensors of :func:`adapter_state_dict`.

    Raises:
        ValueError: naming tensors that are missing, unexpected, misshapen, or hold NaN or infinity. The model is then
            unchanged.
    """
    own = adapter_state_dict(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_state({name: tuple(tensor.shape) for name, tensor in own.items()}, shapes, "the adapter state")
    _check_finite(state, "the adapter state")
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
    tokenizer: Any = None,
) -> Path:
    """Write the adapter of a model as a folder that PEFT, transformers and vLLM load.

    Args:
        model: a model with adapters.
        folder: where to; made if missing. Other files in it are left alone.
        base_model_name: Hub id or folder of the base; taken from a transformers model if None.
        model_card: text of ``README.md``; none is written if None.
        portable: fold every layer's scale into B and pad to one rank, for tools without rsLoRA and rank or alpha
            patterns (vLLM, llama.cpp).
        tokenizer: what it was trained with, saved beside it with its chat template; None leaves it out.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no adapter, or it holds nothing but zeros, NaN or infinity.
        OSError: if the folder cannot be written to. An earlier adapter in it is then as it was.
    """
    modules = dict(adapter_modules(model))
    if not modules:
        raise ValueError("the model has no adapters: call inject_lora first")
    config = config_to_write(model, next(iter(modules.values())).config, portable)
    state = portable_state(model, adapter_state_dict(model), config.r) if portable else adapter_state_dict(model)
    tensors = {f"{PREFIX}{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    _check_worth_saving(model, tensors)
    content = to_peft_config(
        config,
        base_model_name or _name_of_base(model),
        revision=noted(model).revision,
        task_type=task_type(model, config.modules_to_save or (), named_modules(model)),
        fan_in_fan_out=any(base_weight.is_conv1d(layer.base_layer) for _, layer in lora_layers(model)),
    )
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    data = serialize(tensors, from_peft_config(content), noted_metadata(model))

    def check_weights(path: Path) -> None:
        written = read_tensors(path)
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
    if tokenizer is not None:
        files = [*_tokenizer_files(tokenizer, folder), *files]  # first: what is complete has its tokenizer
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
    read = read_adapter(model, folder_or_hub_id)
    report = apply_plan(model, read.plan)
    load_adapter_state_dict(model, read.state)
    if not trainable:
        for _, module in adapter_modules(model):
            module.requires_grad_(False)
        for bias in trained_biases(model).values():
            bias.requires_grad_(False)
    return report


class ReadAdapter(NamedTuple):
    """An adapter that was read and fits a model, which it is not on yet."""

    plan: InjectionPlan
    state: dict[str, Tensor]
    """Its tensors, by their names in the model."""


def read_adapter(
    model: nn.Module,
    folder_or_hub_id: str | Path,
    *,
    values: Callable[[str, nn.Parameter], Tensor] = lambda name, parameter: parameter,
) -> ReadAdapter:
    """Read an adapter for a model, whose vocabulary gets the rows that it needs.

    Args:
        model: as for :func:`load_adapter`; weights need no values.
        folder_or_hub_id: as there.
        values: of a weight of the base that the adapter brings along, by its name.

    Raises:
        ValueError: as there.
    """
    folder = find_folder(folder_or_hub_id)
    content = read_config(folder / CONFIG_NAME)
    weights = find_weights(folder)
    header = read_header(weights)
    try:
        if isinstance(content, dict) and content.get("target_modules") is None:
            # PEFT then has a choice of its own for some architectures; the tensors say which it was.
            content = {**content, "target_modules": adapted_in(header.values())}
        config = from_peft_config(content)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    with grown_vocabulary(model, config, header.values()) as added:
        try:
            config = with_added_rows(model, config, header.values(), added)
            plan = plan_injection(model, config, from_file=True)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
        expected = plan.shapes()
        of_base = _weights_of_base(model, header.values(), expected, folder)
        stored = {tensor.name: tensor.shape for tensor in header.values()}
        whole = rows_in_whole_layers(plan, stored)
        stored = {name: shape for name, shape in stored.items() if name not in of_base}
        stored |= {name: expected[name] for name in whole}
        _check_state(expected, stored, str(folder), hint="; ".join(plan.ignored))
        raw = read_tensors(weights)
        state = _by_name(raw, header, folder)
        check_adapter(weights, raw, from_peft_config(content))
        _check_finite(state, str(folder))
        held = {f"{layer}.weight": added for layer in (*plan.tokens, *plan.tied_tokens)}
        _check_equal_base(of_base, values, state, header, weights, held)
        state |= {name: state[weight][ids] for name, (weight, ids) in whole.items()}
    return ReadAdapter(plan, {name: state[name] for name in expected})


def is_whole_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter just as it was written, by its checksum."""
    try:
        weights = find_weights(folder)
        check_adapter(weights, read_tensors(weights), from_peft_config(read_config(folder / CONFIG_NAME)))
    except (OSError, ValueError):
        return False
    return True


def _tokenizer_files(tokenizer: Any, folder: Path) -> list[FileToWrite]:
    files = []
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.append(FileToWrite(folder / name, lambda f, content=content: f.write(content)))  # type: ignore[misc]
    return files


def _check_state(
    expected: Mapping[str, tuple[int, ...]], state: Mapping[str, tuple[int, ...]], source: str, hint: str = ""
) -> None:
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = [
        f"{name}: got {state[name]}, the model needs {shape}"
        for name, shape in expected.items()
        if name in state and state[name] != shape
    ]
    problems = [f"missing {len(missing)} tensors ({some(missing)})"] if missing else []
    problems += [f"{len(unexpected)} unexpected tensors ({some(unexpected)})"] if unexpected else []
    if misshapen:
        problems.append(f"made for another base model, {len(misshapen)} shapes differ ({some(misshapen)})")
    if problems:
        problems += [hint] if hint else []
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}")


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{source} holds NaN or infinity in {some(broken)}")


def _by_name(raw: Mapping[str, Tensor], header: Mapping[str, StoredTensor], folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        name = header[key].name
        if name in state and not _same_tensor(state[name], tensor):
            raise ValueError(f"{folder} holds several tensors for {name}: is there more than one adapter in the file?")
        state[name] = tensor
    return state


def _weights_of_base(
    model: nn.Module, stored: Iterable[StoredTensor], expected: Mapping[str, object], folder: Path
) -> dict[str, nn.Parameter]:
    """Weights of the base that come along, as PEFT writes those of embeddings and heads -> those of the model.

    Raises:
        ValueError: if one has another shape.
    """
    own = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, nn.Parameter] = {}
    for tensor in stored:
        parameter = own.get(tensor.name.replace(".base_layer.", "."))
        if parameter is None or tensor.name in expected:
            continue
        if tensor.shape != tuple(parameter.shape):
            raise ValueError(
                f"{folder} was trained with a resized vocabulary: {tensor.name} is {tensor.shape}, the model has "
                f"{tuple(parameter.shape)}. "
                + in_words_of(
                    python=f"Call model.resize_token_embeddings({tensor.shape[0]}) and load again",
                    command_line="Resize the base in Python, save it, and give its folder as the base",
                )
            )
        found[tensor.name] = parameter
    return found


def _check_equal_base(
    of_base: Mapping[str, nn.Parameter],
    values: Callable[[str, nn.Parameter], Tensor],
    state: Mapping[str, Tensor],
    header: Mapping[str, StoredTensor],
    weights: Path,
    held: Mapping[str, range],
) -> None:
    """Refuse another base; ``held`` says which rows of which weight the adapter holds itself."""
    to_copy, rows = [], 0
    for name, of_model in of_base.items():
        parameter = values(name.replace(".base_layer.", "."), of_model)
        stored = state[name].to(device=parameter.device, dtype=parameter.dtype)
        if torch.equal(stored, parameter):
            continue
        differ = (stored != parameter).reshape(len(parameter), -1).any(dim=1).nonzero().flatten().tolist()
        if set(differ) <= set(held.get(name, ())):
            continue
        if differ[0] == 0 or differ != list(range(differ[0], len(parameter))):
            raise ValueError(
                f"{weights.parent} holds its own {name}, which differs from the model's: it was trained on another "
                "base model"
            )
        key = next(key for key, tensor in header.items() if tensor.name == name)
        rows = len(parameter)
        to_copy.append(f"model.get_parameter({name.replace('.base_layer.', '.')!r}).data.copy_(stored[{key!r}])")
    if to_copy:
        raise ValueError(
            f"{weights.parent} was trained with a resized vocabulary, and the tokens that were added are in this file "
            "alone. "
            + in_words_of(
                python="Copy them into the model and load again: "
                f"model.resize_token_embeddings({rows}, mean_resizing=False); "
                f"stored = safetensors.torch.load_file({str(weights)!r}); {'; '.join(to_copy)}. "
                "For the command line, save that model and give its folder as the base",
                command_line="In Python, resize the base's embeddings and copy them into it, save that model, and give "
                "its folder as the base",
            )
        )


def _check_worth_saving(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the adapter holds NaN or infinity in {some(broken)}: it is not saved")
    layers = list(lora_layers(model))
    # All zero means not gathered, or never initialised.
    if layers and not any(layer.starts_nonzero.any() for _, layer in layers):
        raise ValueError("every A of the adapter is zero: it was not gathered or never initialised, nothing is saved")


def _same_tensor(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)


def _name_of_base(model: nn.Module) -> str | None:
    pretrained = as_pretrained(model)
    return (pretrained.config.name_or_path or None) if pretrained is not None else None
