"""What a run says, in a pipe and on a terminal, quiet or not; and whose progress bar is shown."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoModelForCausalLM

import lit_lora
from lit_lora import LoRAConfig, LoRALightningModule, SFTDataModule
from lit_lora.__main__ import main
from lit_lora.callbacks import ConvergenceAssertion, StepProgress
from lit_lora.callbacks._support.displays import TerminalLine
from lit_lora.cli.lightning_cli import parse_fit
from tests.terminal import terminal
from tests.tiny import config

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

OPTIONS = [
    "--model.base=base", "--data.tokenizer=bytes", "--data.train=data.jsonl", "--data.validation=data.jsonl",
    "--data.batch_size=2", "--data.cache_dir=cache", "--trainer.accelerator=cpu", "--trainer.max_steps=4",
    "--convergence.min_decrease=-9",
]  # fmt: skip


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A base with weights in files, whose loading transformers shows by a bar, and data."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config("Llama", vocab_size=260)).save_pretrained("base")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(8)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def parts():
    module = LoRALightningModule("base", lora=LoRAConfig(r=2))
    return module, SFTDataModule("data.jsonl", tokenizer="bytes", batch_size=2, cache_dir="cache")


def fit(**settings):
    return lit_lora.fit(
        *parts(), callbacks=[ConvergenceAssertion(-9.0), *settings.pop("bars", [])], max_steps=4,
        accelerator="cpu", **settings,
    )  # fmt: skip


NOISE = ("Seed set", "GPU available", "TPU available", "Trainer.fit", "Tip", "Epoch", "Loading weights", "\r", "\x1b")


def test_a_pipe_gets_lines_about_the_run(capfd):
    main(["fit", *OPTIONS])
    out, err = capfd.readouterr()
    assert [word for word in NOISE if word in out + err] == []
    assert re.findall(r"^step (\d)/4, loss", out, re.MULTILINE) == ["1", "4"]
    for said in ("data.jsonl (prompt_completion): 8 examples", "trainable: ", "base:      ", "device:    cpu"):
        assert said in err
    assert out.index("step 4/4") < out.index("lit_lora: proved")


def test_a_terminal_shows_a_whole_run_in_rows_that_fit(monkeypatch):
    monkeypatch.setattr(TerminalLine, "interval_s", 0.0)
    with terminal(monkeypatch, 80) as seen:
        main(["fit", *OPTIONS])
    assert [word for word in NOISE[:-2] if word in "\n".join(seen.rows)] == []
    moving = [frame for frame in seen.frames if frame.startswith(("step ", "validating "))]
    assert moving
    assert max(map(len, moving)) < 80
    assert len([row for row in seen.rows if row.startswith("step ") and "/4" in row]) == 1
    assert not any(row.startswith("validating") for row in seen.rows)


def test_a_quiet_run_prints_its_verdict_only(capfd):
    main(["fit", *OPTIONS, "--quiet"])
    out, err = capfd.readouterr()
    assert err == ""
    assert re.match(r"\nlit_lora: proved\n(  [a-z].*\n)+\Z", out)
    assert "quiet" not in yaml.safe_load(Path("runs/run/config.yaml").read_text())


QUIET = {
    "behind": ([*OPTIONS, "--quiet"], True),
    "in front": (["--quiet", *OPTIONS], True),
    "in between": ([*OPTIONS[:3], "--quiet", *OPTIONS[3:]], True),
    "with a value": (["--quiet", "true", *OPTIONS], True),
    "from a file": ([*OPTIONS, "--config=quiet.yaml"], True),
    "taken back": (["--quiet=false", *OPTIONS, "--config=quiet.yaml"], False),
    "not at all": (OPTIONS, False),
}


@pytest.mark.parametrize("where", QUIET)
def test_quiet_is_said_anywhere(where):
    Path("quiet.yaml").write_text("quiet: true\n")
    arguments, quiet = QUIET[where]
    assert parse_fit(arguments).quiet is quiet


def test_a_quiet_run_from_a_script_prints_its_verdict_only(capfd):
    assert fit(quiet=True).result == "proved"
    out, err = capfd.readouterr()
    assert err == ""
    assert re.match(r"\nlit_lora: proved\n(  [a-z].*\n)+\Z", out)
    fit(folder="other")
    assert "step 4/4" in capfd.readouterr().out, "the next run is not quiet"


def test_a_quiet_run_shows_warnings_and_errors(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with lit_lora.runs.said.readable(quiet=True):
            logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("a warning of the log")
            with pytest.warns(UserWarning, match="a warning of ours"):
                rank_zero_warn("a warning of ours")
    assert "a warning of the log" in capfd.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["fit", *OPTIONS, "--quiet", "--data.train=nowhere.jsonl"])
    assert caught.value.code == 2
    assert "nowhere.jsonl" in capfd.readouterr().err


def test_a_resumed_run_may_be_quiet_or_not(capfd):
    main(["fit", *OPTIONS, "--quiet"])
    said = capfd.readouterr().out
    main(["fit", *OPTIONS, "--ckpt_path=last"])
    assert said in capfd.readouterr().out
    assert not Path("runs/run/config.1.yaml").exists()


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_other_verbs_can_be_quiet(capfd, verb):
    options = [option for option in OPTIONS if "max_steps" not in option]
    main([verb, *options, "--data.test=data.jsonl", "--quiet"])
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"(val|test)_loss", out)
    assert "validating" not in out
    assert "testing" not in out


def test_a_user_s_own_bar_takes_the_place_of_ours(capfd):
    main(["fit", *OPTIONS, "--trainer.callbacks+=RichProgressBar"])
    assert "step 4/4" not in capfd.readouterr().out
    fit(bars=[StepProgress(0.0)])
    assert re.findall(r"^step (\d)/4", capfd.readouterr().out, re.MULTILINE) == ["1", "2", "3", "4"]


def test_the_trainer_s_switch_and_the_callback_s_settings_hold(capfd):
    main(["fit", *OPTIONS, "--trainer.enable_progress_bar=false"])
    assert "step 4/4" not in capfd.readouterr().out
    assert parse_fit([*OPTIONS, "--progress.line_every_s=0"]).progress.line_every_s == 0


def test_a_quiet_run_with_a_bar_is_refused(capfd):
    with pytest.raises(ValueError, match="a quiet run shows no progress, and was given RichProgressBar"):
        fit(quiet=True, bars=[RichProgressBar()])
    with pytest.raises(SystemExit):
        main(["fit", *OPTIONS, "--quiet", "--trainer.callbacks+=RichProgressBar"])
    assert "leave one of them out" in capfd.readouterr().err
    assert not Path("runs/run").exists()


def test_the_loss_of_a_step_is_not_read_for_a_bar(monkeypatch):
    """Lightning reads what is logged with ``prog_bar`` whenever anyone asks for its metrics: in every step."""
    result = "lightning.pytorch.trainer.connectors.logger_connector.result.convert_tensors_to_scalars"
    read = []
    monkeypatch.setattr(result, lambda value: read.append(value) or value.item())
    fit()
    assert read == []
