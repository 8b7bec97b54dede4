"""Every precision that is let through, with every way to clip: a run trains, and resumes as if nothing had stopped it.

``16-true``, ``bf16-true`` and ``64-true`` are refused (``test_trainer_settings.py``).
"""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from tests.training.resume_project import run
from tests.training.test_exact_resume import assert_same_end, project  # noqa: F401 (a fixture)

CLIPS: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def _options(precision: str) -> dict[str, Any]:
    """Lightning by itself takes bf16-mixed on a CPU where 16-mixed is asked for."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_built_in_optimizer_clips_and_resumes(project, tmp_path, precision, clip, accumulate):  # noqa: F811
    settings: dict[str, Any] = {**project, "accumulate": accumulate, "max_steps": 4, "module_options": {}}
    stop_after = 2 * accumulate + accumulate // 2

    def once(**others: Any) -> dict[str, Any]:
        return run(**settings, trainer_options={**CLIPS[clip], **_options(precision)}, **others)

    whole = once(folder=str(tmp_path / "whole"))
    stopped = once(folder=str(tmp_path / "run"), stop_after=stop_after, signum=signal.SIGTERM)
    resumed = once(folder=str(tmp_path / "run"), ckpt_path=stopped["ckpt_path"], seed=99)
    assert stopped["stopped"]
    assert_same_end(whole, resumed)
    assert whole["losses"][-1] < whole["losses"][0]
