"""Every verb that takes an adapter says which one was meant: a run folder, a checkpoint or a file is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.__main__ import main


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs with adapters, and one that was stopped before it wrote any."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a/adapter", "runs/a/adapter-best", "runs/b/adapter"):
        Path(folder).mkdir(parents=True)
        Path(folder, "adapter_config.json").write_text("{}")
        Path(folder, "adapter_model.safetensors").touch()
    for checkpoint in ("runs/a/checkpoints/step=3.ckpt", "runs/stopped/checkpoints/step=1.ckpt"):
        Path(checkpoint).parent.mkdir(parents=True)
        Path(checkpoint).touch()
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    Path("data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')


MEANT = [
    ("runs/a", "did you mean runs/a/adapter"),
    ("runs/a", "runs/a/adapter-best"),
    ("runs", "runs/b/adapter"),
    ("runs/a/checkpoints/step=3.ckpt", "it is a checkpoint; `lit-lora export runs/a/checkpoints/step=3.ckpt FOLDER`"),
    ("runs/a/checkpoints/step=3.ckpt", "those of its run are runs/a/adapter"),
    ("runs/stopped", "it holds checkpoints; `lit-lora export runs/stopped/checkpoints/step=1.ckpt FOLDER`"),
    ("runs/a/adapter/adapter_model.safetensors", "it is a file; give its folder, runs/a/adapter"),
    ("adapter-best", "did you mean runs/a/adapter-best?"),
    ("runs/a/adaptr", "did you mean runs/a/adapter?"),
    ("runs/c/adapter", "did you mean runs/b/adapter or runs/a/adapter?"),
    ("somewhere/else/mine", "there is no folder somewhere/else"),
    ("base", "a base is given as --base"),
    ("data.jsonl", "expected a folder with adapter_config.json"),
]


@pytest.mark.parametrize(("adapter", "hint"), MEANT)
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "hello", "--adapter"],
        ["generate", "hello", "--base", "random:base", "--adapter"],
        ["evaluate", "data.jsonl", "--adapter"],
        ["merge", "--output", "merged", "--adapter"],
        ["export", "--output", "exported", "--source"],
    ],
    ids=lambda command: " ".join(command[:1] + command[2:3]),
)
def test_what_is_no_adapter_is_told_with_the_one_that_was_meant(runs, capsys, command, adapter, hint):
    if command[0] == "export" and adapter.endswith(".ckpt"):
        pytest.skip("export takes checkpoints")
    with pytest.raises(SystemExit) as caught:
        main([*command, adapter])
    assert caught.value.code != 0
    error = capsys.readouterr().err
    assert f"no adapter in {adapter}: " in error
    assert hint in error
    assert "Traceback" not in error
