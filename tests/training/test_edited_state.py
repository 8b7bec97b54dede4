"""What a checkpoint holds of a run, edited: refused by name, and not by what then goes wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from lit_lora.training import training_state

WHOLE: dict[str, Any] = {
    "format": training_state.FORMAT,
    "version": "1",
    **{"base": "", "base_hash": "", "adapters": {}, "settings": {}, "trainer": {}, "ranks": [], "record": {}},
    **{"optimizer": {}, "changes": [], "training_point": {}},
}


@pytest.mark.parametrize("name", sorted(WHOLE.keys() - {"format", "version"}))
@pytest.mark.parametrize("value", [None, 3])
def test_an_edited_part_is_named(name, value):
    training_state.read({training_state.KEY: WHOLE})
    with pytest.raises(ValueError, match=f"the checkpoint lacks {name}: it is not as lit_lora 1 writes it"):
        training_state.read({training_state.KEY: {**WHOLE, name: value}})


def test_a_training_point_holds_tensors():
    with pytest.raises(ValueError, match="lacks training_point"):
        training_state.read({training_state.KEY: {**WHOLE, "training_point": {"a": "text"}}})
