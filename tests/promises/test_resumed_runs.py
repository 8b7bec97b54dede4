"""A resumed run goes on where it was, with what it was told; what differs is refused, or applied and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora.files.checkpoint import CHECKSUM, checksum, read_checkpoint
from tests.tiny import language_model

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def losses(stranger, run: str = "run") -> list[float]:
    return stranger.metrics(run).losses


def rates(stranger, run: str = "run") -> list[float]:
    return [step.learning_rate for step in stranger.metrics(run).steps]


ROWS = [{"prompt": f"ask {i}", "completion": f"tell {i}", "other": f"else {i}", "text": f"all {i}"} for i in range(40)]

CHANGED_DATA = {
    "prompt and completion swapped": {"data__columns": '{"prompt": "completion", "completion": "prompt"}'},
    "another column": {"data__columns": '{"completion": "other"}'},
    "another format": {"data__format": "text"},
    "another length": {"data__max_length": 32},
    "prompts learned too": {"data__train_on_prompt": "true"},
    "fewer rows": {"data__limit": 30},
    "another batch": {"data__batch_size": 3},
    "another limit of a batch": {"data__max_tokens_per_batch": 500},
    "another order": {"data__seed": 1},
    "no order": {"data__shuffle": "false"},
    "padding": {"data__packing": "false"},
    "a part for validation": {"data__validation_fraction": 0.2},
}


@pytest.mark.parametrize("changed", CHANGED_DATA.values(), ids=CHANGED_DATA)
def test_a_setting_that_changes_tokens_or_their_order_is_refused_and_named(stranger, changed):
    stranger.write("data.jsonl", ROWS)
    stranger.fit()
    before = stranger.contents()
    refused = stranger.fit(ckpt_path="last", trainer__max_steps=8, **changed)
    assert refused.code == 1
    (name,) = changed
    assert f"{name.replace('__', '.')} was " in refused.err
    assert stranger.contents() == before


def test_the_same_tokens_by_another_name_are_the_same(stranger):
    stranger.write("data.jsonl", ROWS)
    stranger.options |= {"model.optimization.lr_schedule": "constant"}
    stranger.fit(trainer__max_steps=8, trainer__default_root_dir="whole")
    stranger.fit()
    shutil.copy("data.jsonl", "renamed.jsonl")
    same = {"data__train": "renamed.jsonl", "data__format": "prompt_completion", "data__max_length": 1000}
    assert stranger.fit(ckpt_path="last", trainer__max_steps=8, **same).code == 0
    assert losses(stranger) == losses(stranger, "whole")


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_data_that_changes_under_the_run_is_the_data_it_was_trained_on(stranger, monkeypatch, harm):
    from lit_lora.callbacks import TrainingCheckpoint

    save = TrainingCheckpoint._save

    def save_later(self, trainer, score=None):
        path = stranger.folder / "data.jsonl"
        if harm == "gone":
            path.unlink(missing_ok=True)
        else:
            path.write_text(path.read_text().replace("it is", "it was"))
        save(self, trainer, score)

    stranger.options |= {"model.optimization.lr_schedule": "constant"}
    original = Path("data.jsonl").read_text()
    monkeypatch.setattr(TrainingCheckpoint, "_save", save_later)
    assert stranger.fit().code == 0
    monkeypatch.undo()
    monkeypatch.chdir(stranger.folder)
    refused = stranger.fit(ckpt_path="last", trainer__max_steps=8)
    assert refused.code in (1, 2)
    assert ("the content of data.train has changed" if harm == "changed" else "no data file at") in refused.err
    Path("data.jsonl").write_text(original)
    assert stranger.fit(ckpt_path="last", trainer__max_steps=8).code == 0
    stranger.fit(trainer__default_root_dir="whole", trainer__max_steps=8)
    assert losses(stranger) == losses(stranger, "whole")


APPLIED = {
    "model.optimization.learning_rate": 0.001,
    "model.optimization.lr_schedule": "constant",
    "model.optimization.warmup_ratio": 0.5,
    "model.optimization.weight_decay": 0.1,
    "model.lora.lora_dropout": 0.5,
    "trainer.accumulate_grad_batches": 2,
    "trainer.gradient_clip_val": 0.01,
    "trainer.max_steps": 12,
    "trainer.limit_train_batches": 11,
    "trainer.limit_val_batches": 0.5,
}


@pytest.mark.parametrize("name", APPLIED)
def test_a_setting_that_is_applied_is_named_and_recorded_as_it_was(stranger, name):
    option = name.replace(".", "__")
    if name == "trainer.limit_val_batches":
        stranger.options |= {"data.validation_fraction": 0.2}
    stranger.fit(**{"trainer__max_steps": 8, "trainer__default_root_dir": "other", option: APPLIED[name]})
    stranger.options |= {"convergence.min_decrease": -9}
    with_old = stranger.fit(trainer__max_steps=8, checkpoint__keep_last=9)
    assert with_old.code == 0
    shutil.copytree("run", "same")
    resume = {"trainer__max_steps": 8}
    stranger.fit(**resume, trainer__default_root_dir="same", ckpt_path="same/checkpoints/step=00000004.ckpt")
    changed = stranger.fit(**{**resume, option: APPLIED[name]}, ckpt_path="run/checkpoints/step=00000004.ckpt")
    assert changed.code == 0
    assert f"Changed from step 4 on: {name} was " in changed.err
    assert f"from step 4 on: {name} was " in changed.out
    (change,) = stranger.record("verdict.json")["changes"]
    assert change["step"] == 4
    assert list(change["settings"]) == [name]
    assert f"{name}, up to step 4" in Path("run/adapter/README.md").read_text()
    assert stranger.record("verdict.json", "same")["changes"] == []
    if name == "model.optimization.learning_rate":
        assert rates(stranger)[4:] == pytest.approx([rate / 10 for rate in rates(stranger, "same")[4:]])
        assert "learning_rate | 0.001" in Path("run/adapter/README.md").read_text()
    elif name in ("model.optimization.lr_schedule", "model.optimization.warmup_ratio"):
        assert rates(stranger)[4:] == rates(stranger, "other")[4:8]
    # Which change the rounding, later epochs, and what is best:
    if name not in ("trainer.limit_train_batches", "trainer.limit_val_batches"):
        assert losses(stranger)[5:] != losses(stranger, "same")[5:]


REFUSED = {
    "model.lora.r": 8,
    "model.lora.lora_alpha": 32,
    "model.lora.use_rslora": "true",
    "model.lora.target_modules": '["q_proj"]',
    "model.lora.adapter_dtype": "bfloat16",
    "model.quantization.bits": 8,
    "model.optimizer": '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}',
    "model.lr_scheduler": "torch.optim.lr_scheduler.ConstantLR",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_with_which_there_is_no_going_on_is_refused_and_named(stranger, name):
    stranger.fit()
    before = stranger.contents()
    refused = stranger.fit(ckpt_path="last", trainer__max_steps=8, **{name.replace(".", "__"): REFUSED[name]})
    assert refused.code == 1, refused.err
    assert name.removesuffix(".bits") in refused.err
    assert stranger.contents() == before


@pytest.mark.parametrize("name", ["model.max_new_tokens", "data.num_workers", "export.portable"])
def test_what_has_no_effect_on_training_is_not_named(stranger, name):
    stranger.fit()
    values = {"model.max_new_tokens": 5, "data.num_workers": 1, "export.portable": "true"}
    resumed = stranger.fit(ckpt_path="last", trainer__max_steps=4, **{name.replace(".", "__"): values[name]})
    assert resumed.code == 0
    assert "Changed from" not in resumed.err


def test_targets_in_other_words_are_the_same_adapters(stranger):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    written = json.dumps(targets)
    stranger.fit(model__lora__target_modules=written)
    for other in (json.dumps(targets[::-1]), "all-linear"):
        same = stranger.fit(ckpt_path="last", trainer__max_steps=5, model__lora__target_modules=other)
        assert same.code == 0, same.err


def test_a_copy_of_a_run_goes_on_from_its_newest_checkpoint(stranger):
    stranger.fit(trainer__max_steps=8, data__validation_fraction=0.2, trainer__val_check_interval=3)
    shutil.copytree("run", "copy", copy_function=shutil.copyfile)  # times of change are those of the copying
    names = sorted(path.name for path in Path("copy/checkpoints").iterdir())
    assert len(names) > 1
    for name in sorted(names, reverse=True):
        (Path("copy/checkpoints") / name).touch()
    settings = {"data__validation_fraction": 0.2, "trainer__val_check_interval": 3}
    resumed = stranger.fit(trainer__default_root_dir="copy", ckpt_path="last", trainer__max_steps=9, **settings)
    assert f"Going on from copy/checkpoints/{names[-1]}" in resumed.err


def test_last_is_what_was_saved_last_not_the_furthest(stranger):
    stranger.fit(trainer__max_steps=8, checkpoint__keep_last=9)
    stranger.fit(trainer__max_steps=6, ckpt_path="run/checkpoints/step=00000002.ckpt", checkpoint__keep_last=9)
    resumed = stranger.fit(ckpt_path="last", trainer__max_steps=7)
    assert "Going on from run/checkpoints/step=00000006.ckpt" in resumed.err


@pytest.fixture
def stored_base(stranger) -> Path:
    """The base as a folder with weights."""
    model = language_model("Llama", vocab_size=260)
    model.save_pretrained("stored")
    stranger.options |= {"model.base": "stored"}
    return stranger.folder / "stored" / "model.safetensors"


def flip_a_bit(path: Path, tensor: int, bit: int) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[tensor % len(tensors)]
    flat = tensors[name].reshape(-1).view(torch.int32)
    flat[(7919 * bit) % len(flat)] ^= 1 << (bit % 32)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("convergence.min_decrease", -5.0),
        ("gradient_norm.on_non_finite", "skip"),
        ("gradient_flow.check_base", "false"),
        ("memory.budget_mib", 90000),
    ],
)
def test_a_check_that_judges_otherwise_is_named_and_recorded(stranger, name, changed):
    stranger.fit()
    resumed = stranger.fit(ckpt_path="last", trainer__max_steps=6, **{name.replace(".", "__"): changed})
    assert f"{name} was " in resumed.err
    (change,) = stranger.record("verdict.json")["changes"]
    assert name in change["settings"]


def test_a_base_that_computes_otherwise_is_an_error_on_resume(stranger, stored_base):
    """The same weights, and another number in the config beside them."""
    stranger.fit()
    config = stored_base.parent / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    refused = stranger.fit(ckpt_path="last", trainer__max_steps=8)
    assert refused.code == 1
    assert "whose weights or config are not the same" in refused.err
    generated = stranger.run("generate", "say 3", "--adapter", "run/adapter", "--max_new_tokens", 3)
    assert generated.code == 1
    assert "its weights or its config are not the same" in generated.err


@pytest.mark.parametrize("number", range(4))
def test_one_bit_of_the_base_is_an_error_on_resume(stranger, stored_base, number):
    stranger.fit()
    whole = stored_base.read_bytes()
    flip_a_bit(stored_base, tensor=5 * number, bit=11 * number)
    refused = stranger.fit(ckpt_path="last", trainer__max_steps=8)
    assert refused.code == 1
    assert "belongs to another base" in refused.err
    stored_base.write_bytes(whole)
    assert stranger.fit(ckpt_path="last", trainer__max_steps=8).code == 0


def test_a_base_in_other_shards_is_the_same(stranger, stored_base):
    stranger.fit()
    model = language_model("Llama", vocab_size=260)
    model.save_pretrained("sharded", max_shard_size="50KB")
    assert len(list(Path("sharded").glob("*.safetensors"))) > 1
    assert stranger.fit(ckpt_path="last", trainer__max_steps=8, model__base="sharded").code == 0


def edited(path: Path, change) -> None:
    """Edit a checkpoint as its checksum allows."""
    content = read_checkpoint(path)
    change(content)
    torch.save({**content, CHECKSUM: checksum(content)}, path)


EDITS = {
    "a field more in its metrics": lambda c: c["lit_lora"]["record"].update(unsaved='{"step": 5, "mood": 1.0}\n'),
    "no end of its record": lambda c: c["lit_lora"]["record"].pop("num_bytes"),
    "another kind of record": lambda c: c["lit_lora"]["record"].update(sha256=None),
    "no record": lambda c: c["lit_lora"].pop("record"),
    "all of its metrics, as format 1 had them": lambda c: c["lit_lora"].update(format=1, metrics={"steps": []}),
    "another format": lambda c: c["lit_lora"].update(format=99, version="9.9"),
    "no format": lambda c: c["lit_lora"].pop("format"),
    "no random state": lambda c: c["lit_lora"].pop("ranks"),
    "no settings": lambda c: c["lit_lora"].pop("settings"),
    "no adapters": lambda c: c["lit_lora"].pop("adapters"),
    "no optimizer": lambda c: c["lit_lora"].pop("optimizer"),
    "of another project": lambda c: c.pop("lit_lora"),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_a_checkpoint_of_another_version_is_named_as_one(stranger, change):
    stranger.fit()
    edited(Path("run/checkpoints/step=00000004.ckpt"), change)
    before = stranger.contents()
    refused = stranger.fit(ckpt_path="last", trainer__max_steps=8)
    assert refused.code == 1
    assert "lit_lora" in refused.err or "LoRALightningModule" in refused.err
    assert stranger.contents() == before


def test_formats_are_named(stranger):
    stranger.fit()
    edited(Path("run/checkpoints/step=00000004.ckpt"), EDITS["another format"])
    refused = stranger.fit(ckpt_path="last", trainer__max_steps=8)
    assert "format 99" in refused.err
    assert "'9.9'" in refused.err


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_files_of_another_checkpoint_callback_are_neither_gone_on_from_nor_deleted(stranger):
    """Weights alone, saved last and into the same folder, by a callback of Lightning's own."""
    callback = json.dumps(
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {
                "dirpath": "run/checkpoints",
                "filename": "{step}",
                "auto_insert_metric_name": True,
                "save_weights_only": True,
                "every_n_train_steps": 1,
                "save_top_k": -1,
            },
        }
    )
    options = {"trainer__callbacks": f"[{callback}]", "checkpoint__keep_last": 1}
    assert stranger.fit(trainer__max_steps=4, **options).code == 0
    theirs = {"step=1.ckpt", "step=2.ckpt", "step=3.ckpt", "step=4.ckpt"}
    assert theirs < {path.name for path in Path("run/checkpoints").iterdir()}
    resumed = stranger.fit(ckpt_path="last", trainer__max_steps=6, **options)
    assert resumed.code == 0, resumed.err
    assert "Going on from run/checkpoints/step=00000004.ckpt" in resumed.err
    assert theirs < {path.name for path in Path("run/checkpoints").iterdir()}


def test_a_check_of_another_project_is_compared_by_the_name_of_its_class():
    from lit_lora.callbacks.verdict import Check, Verdict

    class Patience(Check):
        name = "patience"

        def __init__(self, limit: int = 3) -> None:
            self.limit = limit

        def judge(self, trainer, pl_module):
            return Verdict(self.name, True, "")

        def judge_early(self, trainer, exception):
            return Verdict(self.name, None, "")

    assert Patience(5).settings() == {"Patience.limit": 5}
