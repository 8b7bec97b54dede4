"""What a position in the data means: kept with a checkpoint, and compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.data.batches.mixture import Mixture
from lit_lora.data.batches.sampler import BatchSettings
from lit_lora.data.prepared.dataset import Examples


def fingerprint_of(
    train: Examples,
    validation: Examples | None,
    batches: BatchSettings,
    mixture: Mixture | None,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """See ``SFTDataModule.fingerprint``; plain types.

    Args:
        train: what is trained on.
        validation: what is validated on.
        batches: what decides which examples form a batch.
        mixture: which examples an epoch holds.
        source: all that made the tokens, to say why they differ.
    """
    order = asdict(batches)
    order |= {"max_tokens_per_batch": order.pop("max_tokens"), "packing": not order.pop("padded")}
    if mixture is not None:
        order |= {"mixture": [list(mixture.sizes), list(mixture.quotas)]}
    digest = None if validation is None else validation.digest()
    return {"tokens": train.digest(), "order": order, "source": dict(source), "validation": digest}


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a checkpoint's position means the same with the present data and settings.

    Args:
        saved: from ``SFTDataModule.fingerprint`` when the run was saved.
        current: the same now.

    Raises:
        ValueError: if the tokens or their order differ; names each setting that makes it so.
    """
    different = _names(saved["order"], current["order"])
    if saved["tokens"] != current["tokens"]:
        different += _names(saved["source"], current["source"]) or ["the content of data.train has changed"]
    if different:
        raise ValueError(
            f"cannot continue in the middle of the data, because it has changed since the checkpoint: "
            f"{'; '.join(different)}. Restore it, or start a new run"
        )
    if saved["validation"] != current["validation"]:
        rank_zero_warn(
            "the validation data has changed since the checkpoint: losses on it before and after do not compare"
        )


def _names(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    return [
        f"data.{name} was {saved.get(name)!r} and is {current.get(name)!r}"
        for name in {**saved, **current}
        if saved.get(name) != current.get(name)
    ]
