"""A call that does not fit is the model's answer; what is raised within is told by where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_lora.base.whose_error import NotTakenError, ask, raised_here


class _Gated(nn.Module):
    def forward(self, x: Any, gate: Any) -> Any:
        return x * gate


def _error(function: Any, *args: Any, **kwargs: Any) -> Exception:
    with pytest.raises(TypeError) as caught:
        ask(function, *args, **kwargs)
    return caught.value


@pytest.mark.parametrize(("args", "kwargs"), [((1,), {}), ((1, 2, 3), {}), ((1, 2), {"gates": 3}), ((), {"x": 1})])
def test_a_call_that_does_not_fit_is_no_error_of_ours(args, kwargs):
    error = _error(_Gated(), *args, **kwargs)
    assert isinstance(error, NotTakenError)
    assert not raised_here(error)


def test_an_error_within_stays_what_it_was():
    def takes_one(x: Any) -> Any:
        return _Gated()(x)

    assert not isinstance(_error(takes_one, 1), NotTakenError)


def test_what_fits_is_called():
    assert ask(_Gated(), 2, gate=3) == 6
    assert ask(torch.add, torch.tensor(1), torch.tensor(2)) == 3  # not written in Python
