"""``lit-lora verify``: whether a run is what its folder says, by taking some of its steps again."""

from __future__ import annotations

import sys
from pathlib import Path

from lit_lora.callbacks.verdict import NotProvedError


def verify(run: str, steps: int = 10, places: int = 2, seed: int | None = None) -> None:
    """Check the files of a run, and repeat steps from places chosen at random: its start or its checkpoints.

    On the machine and with the versions of the run, losses, norms and weights have to be the same bit for bit;
    elsewhere within a tolerance, which is said. The folder of the run is only read.

    Args:
        run: folder of the run.
        steps: most steps to repeat from one place; until the next checkpoint, where one is within reach.
        places: most places to repeat steps from.
        seed: of the choice of places; another choice each time if not given.
    """
    for name, value in {"steps": steps, "places": places}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    from lit_lora.cli.lightning_cli import replay
    from lit_lora.runs.verification import verify as look

    found = look(
        Path(run), replay, num_steps=steps, num_places=places, seed=seed,
        say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(found)
    if found.result == "not verified":
        raise NotProvedError(f"{run} is not what its folder says")
