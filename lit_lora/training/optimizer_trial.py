"""Optimizer and schedule of the user's choice, tried on two small parameters before the model is loaded.

There are too many optimizers for a list, and what one cannot do (dense gradients, this device, a step in one
evaluation) it says only when asked. A step here takes milliseconds; in the run it would come after minutes of loading.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lora.training.training_point import TrainingPoint

_SIZE = 320  # squared, above what bitsandbytes leaves in 32 bits (4096) and what it leaves unpaged (100,000)

EVALUATED_AGAIN = (
    "model.optimizer {} evaluates the batch {} in a step: loss, tokens and gradients of a step are those of one "
    "evaluation here. Use one that evaluates it once, such as torch.optim.AdamW"
)

Built = TypeVar("Built")


@contextlib.contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within, the run draws as if it had not been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def parameters(device: torch.device) -> list[nn.Parameter]:
    """Two matrices, as in an adapter."""
    values = torch.linspace(-1, 1, _SIZE**2, device=device).reshape(_SIZE, _SIZE)
    return [nn.Parameter(values.clone()), nn.Parameter(values.T.contiguous())]


def build(setting: str, make: Callable[[Any], Built], argument: Any) -> Built:
    """Call what the user gave.

    Args:
        setting: its name in ``model``.
        make: optimizer of parameters, or schedule of an optimizer.
        argument: those.

    Raises:
        ValueError: with the reason of whatever was raised.
    """
    try:
        return make(argument)
    except Exception as error:  # other people's code
        raise ValueError(f"model.{setting} cannot be built: {type(error).__name__}: {error}") from error


def check(optimizer: Optimizer, *, accumulates: bool, gives_closure: bool) -> None:
    """Take a few steps, and refuse an optimizer that a run could not be right with.

    Args:
        optimizer: of :func:`parameters`.
        accumulates: whether a step is made of several micro-batches.
        gives_closure: whether it is given the evaluation as a closure; under a loss scaler it is not.

    Raises:
        ValueError: naming the optimizer, and what to do.
    """
    kind = type(optimizer).__name__
    name = f"model.optimizer {kind}"
    groups = optimizer.param_groups
    if any(group.get("lr") is None for group in groups):
        raise ValueError(
            f"{name} has no learning rate of its own (lr is not set), which schedule and record need: set its lr, and "
            "switch off what would set it otherwise (for transformers' Adafactor: relative_step, scale_parameter and "
            "warmup_init false)"
        )
    held = [p for group in groups for p in group["params"]]
    evaluated_at: list[list[Tensor]] = []

    @torch.enable_grad()
    def closure() -> Tensor:
        evaluated_at.append([p.detach().clone() for p in held])
        optimizer.zero_grad()
        loss = torch.stack([((p + 0.1) ** 2).mean() for p in held]).sum()
        loss.backward()
        return loss

    point = TrainingPoint([optimizer], {str(number): p for number, p in enumerate(held)})
    for _ in range(3):  # what moves parameters before it evaluates them has nowhere to move to in the first two
        point.enter()
        before = [p.detach().clone() for p in held]
        evaluated_at.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it will say so again
                if gives_closure:
                    optimizer.step(closure)  # type: ignore[arg-type]
                else:
                    closure()
                    optimizer.step()
        except Exception as error:  # other people's code
            raise ValueError(f"{name} cannot train adapters here: {type(error).__name__}: {error}") from error
        point.leave()
        if len(evaluated_at) != 1:
            raise ValueError(EVALUATED_AGAIN.format(kind, f"{len(evaluated_at)} times"))
        if accumulates and not all(map(torch.equal, before, evaluated_at[0])):
            raise ValueError(
                f"{name} moves the parameters before it evaluates the batch, so that the micro-batches of a step would "
                "be evaluated in different places: set trainer.accumulate_grad_batches 1, or another optimizer"
            )
