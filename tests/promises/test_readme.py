"""What a stranger would try first on the sentences of the README."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.promises.sentences import PROJECT

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

NO_SETTINGS = {"help", "config", "print_config", "ckpt_path", "weights_only"}
"""Options of ``fit`` that are about the call."""


def test_a_run_says_what_the_first_paragraph_lists(stranger):
    ended = stranger.fit(trainer__max_steps=30, memory__budget_mib=100_000)
    assert ended.headline == "proved", ended.text
    verdicts = {verdict["name"]: verdict for verdict in stranger.record("verdict.json")["verdicts"]}
    assert set(verdicts) == {"gradients", "memory", "convergence", "gradient flow", "adapter export"}
    assert all(verdict["passed"] for verdict in verdicts.values())
    flow = verdicts["gradient flow"]["detail"]
    moved, frozen = re.fullmatch(
        r"all (\d+) trainable parameters moved; (\d+) frozen tensors bit-identical", flow
    ).groups()
    assert int(moved) == len(load_file("run/adapter/adapter_model.safetensors")) > 0
    assert int(frozen) > 0
    assert verdicts["adapter export"]["detail"].startswith("run/adapter")


@pytest.mark.report
def test_the_run_folder_holds_what_is_listed(stranger):
    stranger.fit(data__validation_fraction=0.2, trainer__val_check_interval=2, forgetting__data="data.jsonl")
    table = (PROJECT / "docs/runs.md").read_text().split("## What it shows")[0]
    listed = {name.rstrip("/") for name in re.findall(r"`([\w./-]+)`", table)} - {
        "config.1.yaml",
        "metrics.1.jsonl",
        "hparams.yaml",
        "metrics.csv",  # in logs/
    }
    listed = {name for name in listed if "/" not in name and not name.startswith(("-", "trainer", "lit"))}
    there = {path.name for path in (stranger.folder / "run").iterdir() if not path.name.startswith(".")}
    assert there == listed
    lines = (stranger.folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [entry for entry in map(json.loads, lines) if "val_loss" not in entry]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert {"loss", "loss_scale", "grad_norm", "param_norm", "learning_rate", "step_time_s", "num_tokens"} <= set(
            step
        )
    assert [entry["step"] for entry in map(json.loads, lines)] == [0, 1, 2, 2, 3, 4, 4]


def test_a_run_goes_on_bit_for_bit_from_another_folder(stranger, monkeypatch):
    """Where it was started does not matter, nor where the run lies now."""
    here = stranger.folder
    stranger.options |= {"data.train": here / "data.jsonl", "model.base": f"random:{here / 'base'}"}
    stranger.options |= {"model.optimization.lr_schedule": "constant"}
    stranger.fit(trainer__max_steps=8, trainer__default_root_dir="whole")
    stranger.fit()
    elsewhere = here / "else" / "where"
    elsewhere.mkdir(parents=True)
    shutil.move(here / "run", elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    stranger.options |= {"trainer.default_root_dir": "moved", "data.cache_dir": here / "another-cache"}
    assert stranger.fit(ckpt_path="last", trainer__max_steps=8).code == 0
    whole, moved = (
        load_file(run / "adapter/adapter_model.safetensors") for run in (here / "whole", elsewhere / "moved")
    )
    assert all(whole[name].equal(moved[name]) for name in whole)


def test_a_runs_own_config_is_the_run_again(stranger):
    """From its written config alone, in the folder of the run."""
    stranger.fit()
    again = stranger.run("fit", "--config", "run/config.yaml", "--trainer.default_root_dir", "again")
    assert again.code == 0, again.err
    assert stranger.metrics("again").losses == stranger.metrics().losses
    first, second = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("run", "again"))
    assert all(first[name].equal(second[name]) for name in first)


def test_every_option_is_a_key_of_yaml_and_the_other_way_round(stranger):
    printed = yaml.safe_load(stranger.run("fit", *stranger.arguments(), "--print_config").out)
    keys: set[str] = set()

    def walk(content: object, path: str) -> None:
        if path:
            keys.add(path)
        for name, value in content.items() if isinstance(content, dict) else ():
            walk(value, f"{path}.{name}" if path else name)

    walk(printed, "")
    options = stranger.options_of("fit")
    assert len(options) > 100
    # A group's own option and the help of a class are not settings, and what a class takes is shown with the class.
    helps = {name for name in options if name.endswith((".help", "+"))}
    missing = {name for name in options - helps - NO_SETTINGS if not {name, name.split(".")[0]} & keys}
    assert not missing
    groups = {option.rsplit(".", depth)[0] for option in options for depth in (1, 2)}
    nested_in_values = {key for key in keys if not any(key == o or key.startswith(f"{o}.") for o in options)}
    assert not nested_in_values - groups


def test_every_setting_of_the_trainer_is_an_option(stranger):
    from lightning import Trainer

    options = stranger.options_of("fit")
    settings = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert len(settings) > 30
    assert not {f"trainer.{name}" for name in settings} - options


def test_the_adapter_is_read_as_the_readme_says(stranger):
    """By PEFT, from the folder, onto the base that was trained on: the logits are those of ``lit-lora``."""
    import torch
    from peft import PeftModel

    from lit_lora.base.load import load_base_model
    from lit_lora.interchange.peft_format import load_adapter

    stranger.fit()
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load_base_model("random:base"), "run/adapter")(ids).logits
        model = load_base_model("random:base")
        before = model(ids).logits
        load_adapter(model, "run/adapter")
        after = model(ids).logits
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("harm", ["missing", "unexpected", "misshapen"])
def test_an_adapter_that_does_not_fit_is_an_error(stranger, harm):
    from safetensors.torch import save_file

    stranger.fit()
    path = stranger.folder / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if harm == "missing":
        del tensors[name]
    elif harm == "unexpected":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)
    (said,) = {stranger.run("merge", "run/adapter", "merged").code}
    ran = stranger.run("merge", "run/adapter", "merged")
    assert said == ran.code == 1
    assert not Path("merged").exists()
    assert len(ran.err.strip().splitlines()[-1]) < 1000


def test_a_format_is_detected_or_the_row_is_named(stranger):
    """A stranger's rows: columns of other names are asked for, not guessed."""
    rows = [{"asked": f"say {i}", "said": str(i)} for i in range(8)]
    stranger.write("other.jsonl", rows)
    refused = stranger.fit(data__train="other.jsonl")
    assert refused.code == 1
    assert "asked" in refused.err
    assert "columns" in refused.err
    columns = json.dumps({"prompt": "asked", "completion": "said"})
    assert stranger.fit(data__train="other.jsonl", data__columns=columns).code == 0
