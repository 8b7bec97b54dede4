"""A run from a script, with all that one from the command line has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lit_lora
from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, SFTDataModule
from lit_lora.__main__ import main
from lit_lora.callbacks import ConvergenceAssertion

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def parts(rank: int = 4):
    module = LoRALightningModule(
        "random:base", lora=LoRAConfig(r=rank), optimization=OptimizationConfig(learning_rate=0.02)
    )
    return module, SFTDataModule("data.jsonl", tokenizer="bytes", batch_size=2, cache_dir="cache")


OPTIONS = [
    "--model.base=random:base", "--model.lora.r=4", "--model.optimization.learning_rate=0.02",
    "--data.train=data.jsonl", "--data.tokenizer=bytes", "--data.batch_size=2", "--data.cache_dir=cache",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--convergence.min_decrease=0.1",
]  # fmt: skip


def test_it_does_what_the_command_line_does(project):
    outcome = lit_lora.fit(*parts(), "script", max_steps=30, callbacks=[ConvergenceAssertion(0.1)], **QUIET)
    assert outcome.result == "proved"
    main(["fit", *OPTIONS, "--trainer.max_steps=30", "--trainer.default_root_dir=cli"])
    files = [{str(p.relative_to(run)) for p in Path(run).rglob("*") if p.is_file()} for run in ("script", "cli")]
    assert files[0] == files[1]
    said = [json.loads(Path(run, "verdict.json").read_text()) for run in ("script", "cli")]
    assert said[0]["result"] == said[1]["result"] == "proved"
    assert {v["name"] for v in said[0]["verdicts"]} == {v["name"] for v in said[1]["verdicts"]}
    losses = [lit_lora.TrainingMetrics.load(f"{run}/metrics.jsonl").losses for run in ("script", "cli")]
    assert losses[0] == losses[1]
    script, cli = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("script", "cli"))
    assert all(script[name].equal(cli[name]) for name in script)


def test_it_goes_on_where_it_was_and_takes_a_folder_of_its_own(project):
    whole = lit_lora.fit(*parts(), "run", max_steps=4, callbacks=[ConvergenceAssertion(-9.0)], **QUIET)
    lit_lora.fit(*parts(), "run", max_steps=4, callbacks=[ConvergenceAssertion(-9.0)], **QUIET)
    assert Path("run-2/verdict.json").is_file()
    again = lit_lora.fit(*parts(), "run-2", resume="last", max_steps=4, callbacks=[ConvergenceAssertion(-9.0)], **QUIET)
    assert (again.result, again.step) == (whole.result, whole.step) == ("proved", 4)
    longer = lit_lora.fit(*parts(), "run", resume="last", max_steps=6, callbacks=[ConvergenceAssertion(-9.0)], **QUIET)
    assert longer.step == 6


def test_a_refused_run_takes_no_folder_and_another_can_follow(project):
    any_loss = {"callbacks": [ConvergenceAssertion(-9.0)], **QUIET}
    lit_lora.fit(*parts(), "run", max_steps=4, **any_loss)
    with pytest.raises(ValueError, match=r"lora\.r"):
        lit_lora.fit(*parts(rank=8), "run", resume="last", max_steps=8, **any_loss)
    with pytest.raises(FileNotFoundError):
        lit_lora.fit(parts()[0], SFTDataModule("nowhere.jsonl", tokenizer="bytes"), "other", max_steps=4, **any_loss)
    assert not Path("other").exists()
    assert lit_lora.fit(*parts(), "other", max_steps=4, **any_loss) is not None


@pytest.mark.ddp
def test_two_processes_run_it_from_a_script(project):
    Path("train.py").write_text(
        "import os\nfrom tests.runs.test_fit import QUIET, parts\nimport lit_lora\n"
        "outcome = lit_lora.fit(*parts(), 'run', max_steps=4, devices=2, strategy='ddp', **QUIET)\n"
        "open(f'outcome-{os.getpid()}', 'w').write(str(outcome and outcome.step))\n"  # their lines on one pipe can mix
    )
    root = Path(lit_lora.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "train.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)},
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.read_text() for path in Path().glob("outcome-*")) == ["4", "None"]
    assert not Path("run-2").exists()
