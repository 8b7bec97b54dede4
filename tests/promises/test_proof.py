"""What a run says of itself is true, and stays: sent again, stopped, on one step, with nothing to judge."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_lora.report.outcome import EXIT_NOT_PROVED

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:convergence. loss"),
]

FAILING = {
    "warns": {"convergence__min_decrease": 0.99},
    "raises": {"convergence__min_decrease": 0.99, "convergence__on_failure": "raise"},
    "over the memory budget": {"memory__budget_mib": 1},
    "stops at the memory budget": {"memory__budget_mib": 1, "memory__on_exceeded": "stop"},
}


@pytest.mark.filterwarnings("ignore:phase ")
@pytest.mark.parametrize("settings", FAILING.values(), ids=FAILING)
def test_a_failed_run_sent_again_stays_failed(stranger, settings):
    first = stranger.fit(**settings)
    assert first.code == EXIT_NOT_PROVED
    assert "proved" not in first.headline
    for _ in range(2):
        again = stranger.fit(**settings, ckpt_path="last")
        assert again.code == EXIT_NOT_PROVED
        assert again.headline == first.headline


@pytest.mark.filterwarnings("ignore:phase ")
@pytest.mark.parametrize("settings", [FAILING["warns"], FAILING["raises"], {}], ids=["warns", "raises", "proved"])
def test_a_finished_run_sent_again_says_the_same_and_changes_nothing(stranger, settings):
    first = stranger.fit(**settings)
    before = stranger.contents()
    again = stranger.fit(**settings, ckpt_path="last")
    assert (again.code, again.headline) == (first.code, first.headline)
    assert next(line for line in first.out.splitlines() if line.startswith("  loss")) in again.out
    assert stranger.contents() == before


def test_the_verdict_of_a_finished_run_is_not_judged_anew_by_other_settings(stranger):
    first = stranger.fit()
    assert first.headline == "proved"
    again = stranger.fit(ckpt_path="last", convergence__min_decrease=0.99, convergence__on_failure="raise")
    assert (again.code, again.headline) == (0, "proved")


def test_a_failed_run_that_is_trained_on_is_judged_as_a_whole(stranger):
    assert stranger.fit(convergence__min_decrease=0.2).code == EXIT_NOT_PROVED
    longer = stranger.fit(convergence__min_decrease=0.2, trainer__max_steps=40, ckpt_path="last")
    assert longer.headline == "proved"
    assert "over 40 steps" in longer.out
    assert stranger.record("verdict.json")["step"] == 40


def test_a_run_that_early_stopping_ended_is_over(stranger):
    Path("stop.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: train_loss, patience: 0, "
        "min_delta: 100, check_on_train_epoch_end: true}\n"
    )
    settings = {"config": "stop.yaml", "trainer__max_steps": 200}
    first = stranger.fit(**settings)
    steps = stranger.record("verdict.json")["step"]
    assert 0 < steps < 200
    before = stranger.contents()
    again = stranger.fit(**settings, ckpt_path="last")
    assert again.headline == first.headline
    assert stranger.contents() == before
    stranger.fit(**settings, ckpt_path="last", model__max_new_tokens=5)  # another run than the one that ended
    assert stranger.record("verdict.json")["step"] > steps


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_checkpoint_past_the_end_is_judged_by_nothing(stranger, killed_at, monkeypatch, is_finished):
    if is_finished:
        stranger.fit(trainer__max_steps=44)
    else:
        with killed_at("lit_lora.callbacks.adapter_export.HFAdapterExport.judge"):
            stranger.fit(trainer__max_steps=44)
        monkeypatch.undo()
        monkeypatch.chdir(stranger.folder)
    before = stranger.contents()
    past = stranger.fit(trainer__max_steps=2, ckpt_path="last")
    assert past.headline == "NOT JUDGED: the checkpoint is at step 44, max_steps is 2"
    assert past.code == 0
    epochs = stranger.fit(trainer__max_steps=-1, trainer__max_epochs=1, ckpt_path="last")
    assert (epochs.code, epochs.headline) == (1, "")
    assert "max_epochs=1" in epochs.err
    assert stranger.contents() == before


@pytest.mark.parametrize(("unit", "length"), [("steps", 2), ("epochs", 1)])
def test_an_older_checkpoint_with_nothing_left_to_do_harms_nothing_newer(stranger, unit, length):
    stranger.options |= {"data.batch_size": 20, "trainer.max_steps": -1, "trainer.max_epochs": -1}  # 2 steps an epoch
    stranger.fit(**{f"trainer__max_{unit}": 2 * length, "checkpoint__keep_last": 9})
    before = stranger.contents()
    refused = stranger.fit(**{f"trainer__max_{unit}": length}, ckpt_path="run/checkpoints/step=00000002.ckpt")
    assert refused.code == 1
    assert "finished at step 4" in refused.err
    assert stranger.contents() == before


@pytest.mark.parametrize("settings", [{"trainer__max_steps": 1}, {"trainer__fast_dev_run": "true"}], ids=str)
def test_one_step_is_not_judged(stranger, settings):
    ran = stranger.fit(**settings)
    assert ran.code == 0, ran.err
    assert ran.headline.startswith("NOT JUDGED: ")
    assert "gradient flow" in ran.headline


def test_a_bound_that_could_not_be_judged_keeps_the_run_from_being_proved(stranger):
    ran = stranger.fit(memory__budget_mib=10**6, memory__max_growth_mib_per_1000_steps=1)
    assert ran.headline == "NOT JUDGED: memory"


def test_killed_between_the_last_checkpoint_and_the_export_the_run_ends_as_if_it_had_not_been(
    stranger, killed_at, monkeypatch
):
    stranger.fit(trainer__default_root_dir="whole")
    with monkeypatch.context(), killed_at("lit_lora.callbacks.adapter_export.HFAdapterExport.judge"):
        stranger.fit()
    monkeypatch.undo()
    monkeypatch.chdir(stranger.folder)
    assert not Path("run/adapter").exists()
    resumed = stranger.fit(ckpt_path="last")
    assert resumed.headline == "proved"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("run/adapter", name).read_bytes() == Path("whole/adapter", name).read_bytes()
    assert stranger.metrics("run").losses == stranger.metrics("whole").losses
    assert stranger.record("convergence.json")["passed"]


@pytest.mark.parametrize("harm", ["gone", "stale", "damaged"])
def test_an_adapter_that_is_not_of_the_last_state_is_written_again(stranger, harm):
    stranger.fit()
    adapter = Path("run/adapter")
    expected = {path.name: path.read_bytes() for path in adapter.iterdir()}
    if harm == "gone":
        shutil.rmtree(adapter)
    elif harm == "stale":
        stranger.fit(trainer__default_root_dir="short", trainer__max_steps=2)
        shutil.copy("short/adapter/adapter_model.safetensors", adapter)
    else:
        (adapter / "adapter_model.safetensors").write_bytes(expected["adapter_model.safetensors"][:-7])
    assert stranger.fit(ckpt_path="last").headline == "proved"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (adapter / name).read_bytes() == expected[name]


def test_the_best_adapter_comes_back_from_its_checkpoint_or_the_run_is_not_proved(stranger):
    first_is_best = {"checkpoint__mode": "max", "export__mode": "max"}  # of a loss that falls
    settings = {"data__validation_fraction": 0.2, "trainer__val_check_interval": 2, **first_is_best}
    stranger.fit(**settings)
    best = Path("run/adapter-best/adapter_model.safetensors")
    expected = best.read_bytes()
    shutil.rmtree(best.parent)
    assert stranger.fit(**settings, ckpt_path="last").headline == "proved"
    assert best.read_bytes() == expected
    best.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    stranger.fit(ckpt_path="last", **settings)
    assert best.read_bytes() == expected
    best.unlink()
    assert stranger.fit(**settings, ckpt_path="last").headline == "proved"
    assert best.read_bytes() == expected
    shutil.move(best.parent, "kept")
    Path("run/checkpoints/step=00000002.ckpt").unlink()
    lost = stranger.fit(**settings, ckpt_path="last")
    assert (lost.code, lost.headline) == (EXIT_NOT_PROVED, "NOT PROVED: adapter export")
    assert "neither is its checkpoint" in lost.out
    shutil.move("kept", best.parent)
    back = stranger.fit(**settings, ckpt_path="last")
    assert (back.code, back.headline) == (0, "proved")


def test_an_adapter_that_could_be_written_only_later_is_there_then(stranger):
    Path("full").touch()
    failed = stranger.fit(export__folder="full/adapter")
    assert (failed.code, failed.headline) == (1, "NOT PROVED: adapter export")
    Path("full").unlink()
    again = stranger.fit(export__folder="full/adapter", ckpt_path="last")
    assert (again.code, again.headline) == (0, "proved")
    assert stranger.record("verdict.json")["result"] == "proved"
    assert Path("full/adapter/adapter_model.safetensors").is_file()


def test_a_trial_leaves_the_folder_of_a_run_alone(stranger):
    stranger.fit()
    before = stranger.contents()
    assert stranger.fit(trainer__fast_dev_run="true", model__optimization__learning_rate=0.02).code == 0
    assert stranger.contents() == before


def start(stranger, *arguments: object, count: int = 1, **changed) -> list[subprocess.Popen[str]]:
    """Processes that are all started before the first is waited for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_lora", "fit", *stranger.arguments(**changed), *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return [subprocess.Popen(command, **options) for _ in range(count)]


def test_runs_started_at_once_take_a_folder_each(stranger):
    processes = start(stranger, count=3)
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, results
    folders = sorted(path.name for path in Path().glob("run*"))
    assert folders == ["run", "run-2", "run-3"]
    claimed = sorted(out.splitlines()[-1].split()[-1] for out, _ in results)
    assert claimed == folders
    for folder in folders:
        assert stranger.record("verdict.json", folder)["result"] == "proved"
        assert Path(folder, "adapter", "adapter_model.safetensors").is_file()
        assert not Path(folder, ".lock").exists()


def test_a_run_that_lives_is_not_resumed_a_second_time_and_one_that_was_killed_is(stranger):
    (process,) = start(stranger, trainer__max_steps=10**6, checkpoint__every_n_steps=1)
    try:
        while not list(Path("run/checkpoints").glob("*.ckpt")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        refused = stranger.fit(ckpt_path="last", trainer__max_steps=10**6)
        assert refused.code == 1
        assert f"the run in run is going on (process {process.pid} on " in refused.err
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    step = max(int(path.stem.removeprefix("step=")) for path in Path("run/checkpoints").glob("*.ckpt"))
    resumed = stranger.fit(ckpt_path="last", trainer__max_steps=step + 3, convergence__min_decrease=-99)
    assert resumed.code == 0
    assert stranger.record("verdict.json")["step"] == step + 3


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("found", ["nothing", "an empty folder"])
def test_no_checkpoint_is_an_error_where_nothing_is_trained(stranger, verb, found):
    Path("empty").mkdir()
    trained_only = {name: None for name in stranger.options if name.startswith(("convergence", "trainer.max_steps"))}
    stranger.options |= trained_only
    ran = stranger.fit(verb, ckpt_path="last" if found == "nothing" else "empty", data__validation_fraction=0.2)
    assert ran.code == 1
    assert "no checkpoint in " in ran.err
    assert "val_loss" not in ran.out


def test_exit_codes_are_the_documented_ones(stranger):
    assert stranger.fit().code == 0
    assert stranger.fit(model__base="random:nowhere.json").code in (1, 2)
    assert stranger.run("fit", "--trainer.no_such_option", "1").code == 2
    assert stranger.fit(convergence__min_decrease=0.99).code == 3
