"""The tensors of the adapter of a model, by their names there: read out, and copied in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_lora.adapters.layers import TrainableCopy, adapter_modules
from lit_lora.adapters.matching import some
from lit_lora.adapters.module_names import plain_name
from lit_lora.adapters.trainable_tokens import DELTA, TrainableTokens
from lit_lora.adapters.trained_biases import trained_biases


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
    check_state({name: tuple(tensor.shape) for name, tensor in own.items()}, shapes, "the adapter state")
    check_finite(state, "the adapter state")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def check_state(
    expected: Mapping[str, tuple[int, ...]], state: Mapping[str, tuple[int, ...]], source: str, hint: str = ""
) -> None:
    """Refuse tensors that are not exactly those that a model needs.

    Args:
        expected: name -> shape that the model needs.
        state: name -> shape that there is.
        source: where it comes from.
        hint: what else to say of it.

    Raises:
        ValueError: naming the tensors.
    """
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


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: naming the tensors.
    """
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{source} holds NaN or infinity in {some(broken)}")


def same_tensor(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether both are there, with the same values in the same dtype."""
    return left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)
