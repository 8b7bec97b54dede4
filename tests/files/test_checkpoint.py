"""Checkpoints that cannot be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from lit_lora.files.checkpoint import AtomicCheckpointIO, read_checkpoint


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
