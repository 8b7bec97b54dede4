"""A file is the old one or the whole new one."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest

from lit_lora.files.atomic import FileToWrite, atomic_write, atomic_write_all, make_folder, remove_partial_files


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "weights"
    for content in (b"old", b"new"):
        atomic_write(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["weights"]


def test_new_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    atomic_write(tmp_path / "ours", lambda file: file.write(b""))
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error), match=str(tmp_path) if isinstance(error, OSError) else None):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights"]


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path):
    """``/dev/full`` refuses every byte, as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")

    def write_to_a_full_disk(file):
        with open("/dev/full", "wb") as full:
            full.write(b"x" * 10_000)

    with pytest.raises(OSError, match=r"into the folder .*: No space left") as caught:
        atomic_write(tmp_path / "never", write_to_a_full_disk)
    assert caught.value.errno == errno.ENOSPC


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match=r"cannot write x into the folder .*missing: No such file"):
        atomic_write(tmp_path / "missing" / "x", lambda file: file.write(b""))


def test_files_of_a_set_are_replaced_together_or_not_at_all(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(b"old")

    def refuse(path):
        assert path.read_bytes() == b"new"
        raise ValueError("not what was meant")

    with pytest.raises(ValueError, match="not what was meant"):
        atomic_write_all([FileToWrite(path, lambda file: file.write(b"new"), refuse) for path in paths])
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    atomic_write_all([FileToWrite(path, lambda file: file.write(b"new")) for path in paths])
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    kept = tmp_path / "weights.partial.txt"
    file, folder = tmp_path / ".weights.abc123.partial", tmp_path / ".xyz.partial"
    for path in (kept, file):
        path.touch()
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    assert remove_partial_files(tmp_path) == [file, folder]
    assert os.listdir(tmp_path) == [kept.name]
    assert remove_partial_files(tmp_path / "missing") == []


def test_in_a_shared_folder_only_old_leftovers_are_removed(tmp_path):
    old, new = tmp_path / ".old.partial", tmp_path / ".new.partial"
    for path in (old, new):
        path.touch()
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    assert remove_partial_files(tmp_path, older_than_s=3600) == [old]
    assert os.listdir(tmp_path) == [new.name]


def test_a_folder_that_cannot_be_written_to_is_an_error_that_names_the_option(tmp_path):
    make_folder(tmp_path / "a" / "b", option="x")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"folder .*file/run: Not a directory; set trainer.default_root_dir to"):
        make_folder(tmp_path / "file" / "run", option="trainer.default_root_dir")
