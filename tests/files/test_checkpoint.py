"""Checkpoints that cannot be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from lit_lora.files import checkpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO, newest_checkpoint, read_checkpoint


@pytest.mark.parametrize("num_bytes", [0, 64, 100, 1_000, 10_000, 40_000])
def test_a_disk_that_is_full_at_whatever_byte_is_an_error_of_the_disk(tmp_path: Path, num_bytes: int) -> None:
    """torch's archive complains of its own state then, and what is no error of the disk ends a run."""
    path, checkpoint = tmp_path / "last.ckpt", {"state_dict": {"a": torch.arange(10_000.0)}, "global_step": 1}
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    child = os.fork()  # a limit on the size of files cannot be taken back
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
            AtomicCheckpointIO().save_checkpoint({**checkpoint, "global_step": 2}, path)
        except OSError as error:
            code = 0 if error.errno == errno.EFBIG else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_checkpoint(path)["global_step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("reading", ["_loaded", "read_checkpoint"])
def test_what_a_run_that_goes_on_removes_meanwhile_is_no_damage(tmp_path, monkeypatch, reading):
    """Each checkpoint goes while it is read, and a newer one lies there, until the third."""
    writer, rest = AtomicCheckpointIO(), {"state_dict": {}, "optimizer_states": []}
    before = getattr(checkpoint, reading)

    def write(step: int) -> None:
        writer.save_checkpoint({**rest, "global_step": step}, tmp_path / f"step={step}.ckpt")

    def read(path: Path, **options: object) -> object:
        step = int(path.stem.removeprefix("step="))
        if step < 3:
            write(step + 1)
            path.unlink()
        return before(path, **options)

    write(1)
    monkeypatch.setattr(checkpoint, reading, read)
    newest, problems = newest_checkpoint(tmp_path)
    assert (newest, problems) == (tmp_path / "step=3.ckpt", [])


def test_a_link_to_nowhere_is_a_damaged_checkpoint(tmp_path):
    (tmp_path / "step=1.ckpt").symlink_to(tmp_path / "gone")
    newest, (problem,) = newest_checkpoint(tmp_path)
    assert newest is None
    assert "no checkpoint" in problem
