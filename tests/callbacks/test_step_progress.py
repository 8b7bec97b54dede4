"""Progress on a terminal of any width, in a pipe, over time, and for every way in which a run can end."""

from __future__ import annotations

import itertools
import logging
import re
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info
from plain_projects import AdapterModel, DictDataset, PlainModel, collate
from torch.utils.data import DataLoader, IterableDataset

from lit_lora.callbacks import StepProgress, step_progress
from lit_lora.callbacks._support.displays import TerminalLine
from lit_lora.callbacks._support.pace import Pace
from lit_lora.callbacks._support.progress_text import Progress, bar_format, line, rate
from lit_lora.callbacks._support.step_loss import StepLoss
from tests.terminal import terminal

USUAL = Progress("step", 120, 3000, 5.7421, 2e-4, "12,345 tokens/s", 723.0)
LARGE = Progress("step", 123_456_789, 1_000_000_000, 1.2345e-12, 1.2345e-11, rate(98_765_432.1, "samples"), 9.9e6)
ALL_PARTS = ("step 120/3000", "loss 5.742", "lr 2.00e-04", "12,345 tokens/s", "12:03 left")


@pytest.fixture
def fit(make_trainer):
    """Runs a fit that shows its progress."""

    def run(model: pl.LightningModule, *callbacks: pl.Callback, bar: StepProgress | None = None, **settings):
        trainer = make_trainer(bar or StepProgress(), *callbacks, **{"enable_progress_bar": True, **settings})
        trainer.fit(model)
        return trainer

    return run


class Scheduled(AdapterModel):
    """Logs its loss, validates, and has a learning rate that goes down after each step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Huge(AdapterModel):
    """Numbers that take room."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"] * 1.23456e11


# ---------------------------------------------------------------------- the words


@pytest.mark.parametrize("progress", [USUAL, LARGE, USUAL._replace(total=None), Progress("validating", 3, 20)])
def test_a_line_fits_any_number_of_columns(progress):
    for columns in range(1, 200):
        assert len(line(progress, columns)) <= columns
        layout = bar_format(progress, columns)
        assert len(layout.replace("{bar}", "." * 5)) <= columns


def test_a_narrow_line_does_without_what_matters_least():
    said = [[part for part in ALL_PARTS if part in line(USUAL, columns)] for columns in (80, 62, 50, 30, 20)]
    step, loss, learning_rate, speed, left = ALL_PARTS
    assert said == [[step, loss, learning_rate, speed, left], [step, loss, speed, left], [step, loss, left],
                    [step, loss], [step]]  # fmt: skip
    assert line(USUAL) == ", ".join(ALL_PARTS)


def test_what_is_not_known_is_not_shown():
    assert line(Progress("step", 7, None, 0.5)) == "step 7, loss 0.5"


# ---------------------------------------------------------------------- a terminal


def test_a_terminal_of_80_columns_shows_all_in_one_line(fit, monkeypatch):
    monkeypatch.setattr(TerminalLine, "interval_s", 0.0)
    with terminal(monkeypatch, 80) as seen:
        fit(Scheduled(), limit_val_batches=2, val_check_interval=4, num_sanity_val_steps=1)
    assert max(map(len, seen.frames)) <= 80
    steps = [frame for frame in seen.frames if frame.startswith("step ")]
    assert [n for n, _ in itertools.groupby(re.match(r"step (\d)", s)[1] for s in steps)] == list("12345678")
    whole = r"step \d/8 .*loss [\d.]+, lr \d\.\d\de-0\d, [\d,]+ tokens/s, 00:\d\d left"
    known = [frame for frame in steps if not frame.startswith(("step 1/", "step 4: ", "step 8: "))]
    assert [frame for frame in known if not re.match(whole, frame)] == []
    assert any(frame.startswith("validating 1/2") for frame in seen.frames)
    rows = [re.sub(r"[\d.]+(?= |$)", "N", row) for row in seen.rows if row]
    assert len(rows) == 3
    assert rows[0].startswith("step 4: val_loss")
    assert rows[1].startswith("step 8: val_loss")
    assert seen.rows[-2].startswith("step 8/8 ")


@pytest.mark.parametrize("columns", [15, 40, 80, 200])
@pytest.mark.parametrize("model", [Scheduled, Huge])
def test_no_frame_is_wider_than_the_terminal(fit, monkeypatch, columns, model):
    monkeypatch.setattr(TerminalLine, "interval_s", 0.0)
    last = StopAt(5)
    with terminal(monkeypatch, columns) as seen:
        fit(model(), last, max_steps=1_000_000_000, max_epochs=-1)
    assert max(map(len, seen.frames)) < columns
    assert len([row for row in seen.rows if row]) == 1
    if columns >= 40:
        assert re.match(r"step 5/1000000000,? .*loss", seen.rows[0])


def test_a_terminal_that_does_not_know_its_width_has_80_columns(fit, monkeypatch):
    monkeypatch.setattr(TerminalLine, "interval_s", 0.0)
    with terminal(monkeypatch, 0) as seen:
        fit(Scheduled())
    assert max(map(len, seen.frames)) == 79


class Talks(pl.Callback):
    """Says something in the middle of a run; warnings are printed to stderr, too."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            print("printed", "text")
            print("an error", file=sys.stderr)
            rank_zero_info("a note")
            print("a prompt> ", end="", flush=True)
            print("answered")


def test_what_others_write_stands_above_the_line(fit, monkeypatch):
    monkeypatch.setattr(TerminalLine, "interval_s", 0.0)
    log = logging.getLogger("lightning.pytorch")
    with terminal(monkeypatch, 80) as seen:
        handler = logging.StreamHandler(sys.stderr)
        log.addHandler(handler)
        try:
            fit(Scheduled(), Talks())
        finally:
            log.removeHandler(handler)
        assert handler.stream is sys.stderr
    rows = [row for row in seen.rows if row]
    for text in ("printed text", "an error", "a note", "a prompt> answered"):
        assert text in rows
    assert [row for row in rows if row.startswith("step ")] == [rows[-1]]
    assert rows[-1].startswith("step 8/8")


class Ends(pl.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            raise self.error


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("error", [ValueError("no good"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_begins_a_line_of_its_own(fit, monkeypatch, error):
    with terminal(monkeypatch, 80) as seen:  # which looks that the streams are given back
        with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
            fit(Scheduled(), Ends(error))
        print("said afterwards")
    assert "said afterwards" in seen.rows


# ---------------------------------------------------------------------- no terminal


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""

    class Clock:
        now_s = 1000.0

        def __call__(self) -> float:
            return self.now_s

    made = Clock()
    monkeypatch.setattr(step_progress, "_now_s", made)
    return made


class Slow(pl.Callback):
    """Every step, or every validation batch, takes this long."""

    def __init__(self, clock, seconds: float, validation_s: float = 0.0) -> None:
        self.clock, self.seconds, self.validation_s = clock, seconds, validation_s

    def on_train_batch_start(self, *_):
        self.clock.now_s += self.seconds

    def on_validation_batch_start(self, *_):
        self.clock.now_s += self.validation_s


def steps_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+)/", text, re.MULTILINE)]


def test_a_pipe_gets_the_first_and_the_last_step_as_lines(fit, capsys):
    fit(Scheduled(), limit_val_batches=2, val_check_interval=4)
    out = capsys.readouterr().out
    assert "\r" not in out
    assert "\x1b" not in out
    assert steps_of(out) == [1, 8]
    assert re.search(r"^step 8/8, loss [\d.]+, lr \d\.\d\de-0\d, [\d,]+ tokens/s, 00:00 left$", out, re.MULTILINE)
    assert re.search(r"^step 4: val_loss [\d.]+$", out, re.MULTILINE)


def test_a_dumb_terminal_gets_lines(fit, monkeypatch):
    with terminal(monkeypatch, 80, name="dumb") as seen:
        fit(Scheduled())
    assert "\r" not in seen.written.replace("\r\n", "\n")
    assert steps_of("\n".join(seen.rows)) == [1, 8]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1, [1, 31, 61, 64]), (29, [1, *range(3, 64, 2), 64]), (30, list(range(1, 65))), (500, list(range(1, 65)))],
)
def test_a_line_comes_at_the_first_step_after_half_a_minute(fit, capsys, clock, seconds, shown):
    fit(AdapterModel(), Slow(clock, seconds), max_steps=64)
    assert steps_of(capsys.readouterr().out) == shown


def test_speed_and_time_left_are_those_of_the_clock(fit, capsys, clock):
    """Two steps a minute, of 128 tokens each; a validation after 4 steps takes 60 s, which is no time of the steps."""
    fit(Scheduled(), Slow(clock, 30.0, 30.0), limit_val_batches=2, val_check_interval=4, max_steps=8)
    lines = capsys.readouterr().out.splitlines()
    told = {int(re.match(r"step (\d+)", text)[1]): text for text in lines if text.startswith("step ") and "/" in text}
    assert "tokens/s" not in told[1]
    assert told[2].endswith("4.3 tokens/s, 03:00 left")
    assert told[5].endswith("4.3 tokens/s, 02:15 left")  # 180 s for 4 steps
    assert "validating 2/2, 00:00 left" in lines


def test_the_learning_rate_and_the_loss_are_those_of_the_step(fit, capsys):
    fit(Scheduled(), max_steps=1)
    assert "lr 1.00e-02" in capsys.readouterr().out


# ---------------------------------------------------------------------- totals


class Endless(IterableDataset):
    def __iter__(self):
        rows = DictDataset(64)
        return (rows[index % 64] for index in itertools.count())


class Unknown(AdapterModel):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=4, collate_fn=collate)


class TwoSteps(AdapterModel):
    """Manual optimization: two steps a batch."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(self.step(batch))
            self.optimizers().step()


TOTALS = {  # 16 batches an epoch; with what is shown after the last step
    "steps": ({"max_steps": 5}, AdapterModel, "step 5/5"),
    "epochs": ({"max_steps": -1, "max_epochs": 2}, AdapterModel, "step 32/32"),
    "the lower of both": ({"max_steps": 20, "max_epochs": 1}, AdapterModel, "step 16/16"),
    "accumulation": ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3}, AdapterModel, "step 12/12"),
    "accumulation by epoch": (
        {"max_steps": -1, "max_epochs": 2, "callbacks": {0: 1, 1: 4}}, AdapterModel, "step 20/20",
    ),
    "limited batches": ({"max_steps": -1, "max_epochs": 3, "limit_train_batches": 5}, AdapterModel, "step 15/15"),
    "no length": ({"max_steps": -1, "max_epochs": 1, "stop": 7}, Unknown, "step 7,"),
    "no length, but steps": ({"max_steps": 6, "max_epochs": 1}, Unknown, "step 6/6"),
    "no end": ({"max_steps": -1, "max_epochs": -1, "stop": 18}, AdapterModel, "step 18,"),
    "a limit of time": ({"max_steps": -1, "max_time": "00:01:00:00", "stop": 3}, AdapterModel, "step 3,"),
    "manual optimization": ({"max_steps": -1, "max_epochs": 1}, TwoSteps, "step 32,"),
    "manual optimization, steps": ({"max_steps": 8}, TwoSteps, "step 8/8"),
    "a trial": ({"max_steps": -1, "max_epochs": 4, "fast_dev_run": 2}, AdapterModel, "step 2/2"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOTALS)
def test_a_total_is_the_run_s_or_none(fit, capsys, name):
    settings, model, shown = TOTALS[name]
    settings = dict(settings)
    callbacks = [StopAt(settings.pop("stop"))] if "stop" in settings else []
    if schedule := settings.pop("callbacks", None):
        callbacks.append(GradientAccumulationScheduler(schedule))
    fit(model(), *callbacks, **settings)
    lines = re.findall(r"^step \d+[/,].*", capsys.readouterr().out, re.MULTILINE)
    assert lines[-1].startswith(shown)
    assert all(("/" in text.split(",")[0]) == ("/" in shown) for text in lines)


def test_the_time_left_ends_with_max_time(fit, capsys, clock):
    fit(AdapterModel(), Slow(clock, 1000.0), max_steps=4, max_time="00:00:30:00")
    assert re.search(r"^step 2/4, .* (29:\d\d|30:00) left$", capsys.readouterr().out, re.MULTILINE)


# ---------------------------------------------------------------------- what it costs, and its neighbours


@pytest.mark.parametrize("columns", [None, 80])
def test_the_loss_is_read_for_what_is_shown_only(fit, monkeypatch, clock, columns):
    reads = []
    drain = StepLoss.drain
    monkeypatch.setattr(StepLoss, "drain", lambda self: (reads.append(self), drain(self))[1])
    if columns:
        with terminal(monkeypatch, columns):
            fit(Scheduled(), max_steps=40)
    else:
        fit(Scheduled(), max_steps=40)
    assert len(reads) == 2  # the clock stands still: the first and the last step
    assert len(reads[0]._pending) <= 1


def test_a_user_s_bar_is_taken_and_ours_can_be_switched_off(make_trainer, capsys):
    make_trainer(RichProgressBar(), enable_progress_bar=True).fit(AdapterModel())
    make_trainer(enable_progress_bar=False).fit(AdapterModel())
    assert "step " not in capsys.readouterr().out


def test_it_is_silent_while_it_is_disabled(make_trainer, capsys):
    bar = StepProgress()
    trainer = make_trainer(bar, enable_progress_bar=True)
    bar.disable()
    trainer.fit(AdapterModel())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("verb", "doing"), [("validate", "validating"), ("predict", "predicting")])
def test_other_verbs_show_their_batches(make_trainer, capsys, monkeypatch, verb, doing):
    class Model(AdapterModel):
        def predict_step(self, batch, batch_idx):
            return self(batch["x"])

        predict_dataloader = AdapterModel.val_dataloader

    trainer = make_trainer(StepProgress(), enable_progress_bar=True, limit_val_batches=2)
    trainer.validate(Model(), verbose=False) if verb == "validate" else trainer.predict(Model())
    assert [f"{doing} 1/2", f"{doing} 2/2, 00:00 left"] == capsys.readouterr().out.splitlines()


def test_samples_are_counted_where_there_are_no_tokens(fit, capsys):
    fit(PlainModel())
    assert re.search(r"step 8/8, .* samples/s", capsys.readouterr().out)


def test_a_time_between_lines_is_not_negative():
    with pytest.raises(ValueError, match="line_every_s must not be negative, got -1"):
        StepProgress(-1)


def test_pace_is_the_last_half_minute_s():
    pace = Pace()
    for second in range(101):
        pace.mark(float(second), second, 10 * second if second <= 60 else 600 + 20 * (second - 60))
    assert pace.per_s() == (1.0, 20.0)
    assert pace.seconds_left(150) == 50.0
    assert pace.seconds_left(None) is None
