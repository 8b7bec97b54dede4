"""Counts of every kind of batch, and rates that leave validation out."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from plain_projects import AdapterModel, PlainModel

from lit_lora.callbacks import ThroughputLogger
from lit_lora.callbacks._support.batch_counts import count

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
LABELS = torch.tensor([[5, -100, 7], [5, 6, -100]])


PACKED = {"num_tokens": 4, "target_positions": torch.arange(3), "example_ids": torch.arange(5)}


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": MASK, **PACKED}, (4, 3, 5)),
        ({"input_ids": MASK, "attention_mask": MASK, "labels": LABELS}, (4, 2, 2)),
        ({"input_ids": MASK}, (6, 0, 2)),
        ({"input_ids": MASK, "num_tokens": 0, "target_positions": torch.arange(0)}, (0, 0, 2)),
        (torch.zeros(7, 3), (0, 0, 7)),
        ([torch.zeros(3, 2), torch.zeros(3)], (0, 0, 3)),
        ("text", (0, 0, 0)),
    ],
)
def test_counts(batch, expected):
    assert tuple(int(number) for number in count(batch)) == expected


class Slow(AdapterModel):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(2)  # two thirds of a second for each of three steps, if it were counted


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rates_are_real_and_leave_validation_out(make_trainer, logger, accumulate):
    callback = ThroughputLogger()
    make_trainer(
        callback,
        logger=logger,
        accumulate_grad_batches=accumulate,
        max_steps=7,
        log_every_n_steps=3,
        limit_val_batches=1,
        val_check_interval=4,
    ).fit(Slow())
    times = logger.values("throughput/step_time_s")
    assert len(times) == 2  # steps 3 and 6; the first step is not timed
    assert all(0.02 * accumulate <= t < 0.02 * accumulate + 0.6 for t in times), times
    tokens = 128 * accumulate
    assert logger.values("throughput/tokens_per_s") == pytest.approx([tokens / t for t in times])
    assert logger.values("throughput/target_tokens_per_s") == pytest.approx([tokens / 4 / t for t in times])
    assert logger.values("throughput/samples_per_s") == pytest.approx([4 * accumulate / t for t in times])
    assert logger.values("throughput/num_tokens") == [3 * tokens, 6 * tokens]
    assert callback.num_tokens == 7 * tokens
    assert callback.timed_tokens == 6 * tokens
    assert callback.tokens_per_s == pytest.approx(tokens / times[0], rel=3)


def test_batches_without_tokens_log_samples_only(make_trainer, logger):
    make_trainer(ThroughputLogger(), logger=logger).fit(PlainModel())
    keys = {key for row in logger.rows for key in row if key.startswith("throughput")}
    assert keys == {"throughput/samples_per_s", "throughput/step_time_s"}


def test_totals_outlive_a_resume(make_trainer, tmp_path):
    first = ThroughputLogger()
    trainer = make_trainer(first, max_steps=4, limit_train_batches=4)
    trainer.fit(AdapterModel())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = ThroughputLogger()
    make_trainer(second, max_steps=8, limit_train_batches=4).fit(
        AdapterModel(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert (second.num_tokens, second.num_target_tokens, second.num_samples) == (8 * 128, 8 * 32, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_waits_on_logging_steps_only(make_trainer, logger):
    batch = {"attention_mask": torch.ones(2, 3, device="cuda")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype feature")  # torch's remark about its own mode
        torch.cuda.set_sync_debug_mode("error")  # any hidden wait in between raises; synchronize() itself does not
    try:
        counts = count(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(counts[0]) == 6
    trainer = make_trainer(ThroughputLogger(), accelerator="gpu", devices=1, logger=logger, log_every_n_steps=4)
    trainer.fit(AdapterModel())
    assert len(logger.values("throughput/tokens_per_s")) == 2
