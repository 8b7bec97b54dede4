"""A log that grows: whole after whatever happened to it, and known by how far it had come."""

from __future__ import annotations

import hashlib
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lit_lora.files.append_log import AppendLog, Mark, read_to_mark, with_set_aside


@pytest.fixture
def log(tmp_path: Path) -> AppendLog:
    log = AppendLog(tmp_path / "log.jsonl")
    log.begin(b"one\n")
    log.append(b"two\n")
    return log


@pytest.fixture
def file_limit() -> Iterator[Callable[[int | None], None]]:
    """Call it with the bytes that a file may have, as on a full disk; None for as many as before."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_its_mark_is_that_of_its_content(log: AppendLog) -> None:
    assert log.path.read_bytes() == b"one\ntwo\n"
    assert log.mark == Mark(8, hashlib.sha256(b"one\ntwo\n").hexdigest())
    assert log.is_whole
    again = AppendLog(log.path)
    assert not again.is_whole
    again.begin(b"one\ntwo\n")
    assert again.mark == log.mark
    assert with_set_aside(log.path) == [log.path]


def test_a_disk_that_is_full_for_a_while_leaves_no_half_line(log: AppendLog, file_limit) -> None:
    before = log.mark
    file_limit(10)
    for _ in range(2):
        with pytest.raises(OSError, match="File too large"):
            log.append(b"three\n")
        assert log.path.read_bytes() == b"one\ntwo\n"
        assert log.mark == before
    file_limit(None)
    log.append(b"three\n")
    assert log.path.read_bytes() == b"one\ntwo\nthree\n"
    assert log.mark.sha256 == hashlib.sha256(b"one\ntwo\nthree\n").hexdigest()


def test_what_others_added_is_written_over(log: AppendLog) -> None:
    with log.path.open("ab") as file:
        file.write(b"half a li")
    log.append(b"three\n")
    assert log.path.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("harm", ["gone", "shorter"])
def test_a_log_that_lost_something_is_not_whole_and_nothing_is_appended_to_it(log: AppendLog, harm: str) -> None:
    if harm == "gone":
        log.path.unlink()
        with pytest.raises(FileNotFoundError):
            log.append(b"three\n")
    else:
        log.path.write_bytes(b"one\nt")
    assert not log.is_whole
    log.begin(b"one\ntwo\nthree\n")
    assert log.is_whole
    assert with_set_aside(log.path) == [log.path]


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (b"", False),
        (b"one\n", False),
        (b"one\ntwo\n", False),
        (b"one\ntwo\nthree", True),  # a crash, or a part of the run that is gone back before
        (b"another\n", True),
    ],
)
def test_a_beginning_keeps_whatever_it_would_lose(tmp_path: Path, found: bytes, kept: bool) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(found)
    AppendLog(path).begin(b"one\ntwo\n")
    assert path.read_bytes() == b"one\ntwo\n"
    aside = with_set_aside(path)[1:]
    assert [other.read_bytes() for other in aside] == [found] * kept
    path.write_bytes(b"third\n")
    AppendLog(path).begin(b"")
    assert {other.read_bytes() for other in with_set_aside(path)[1:]} == {b"third\n", *[found] * kept}


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ([b"one\ntwo\n"], b"one\ntwo\n"),
        ([b"one\ntwo\nthree\n"], b"one\ntwo\n"),
        ([None], None),
        ([b"one\n"], "has 4 bytes, expected at least 8"),
        ([b""], "has 0 bytes, expected at least 8"),
        ([b"one\ntwO\n"], "is not as it was: its first 8 bytes"),
        ([b"another run\n", b"one\ntwo\nthree\n"], b"one\ntwo\n"),
        ([None, b"one\ntwo\n"], b"one\ntwo\n"),
        ([None, b"one\n"], "1.jsonl has 4 bytes"),
        ([b"another run\n", b"one\n"], "0.jsonl is not as it was: its first 8 bytes have another SHA-256; "),
    ],
)
def test_what_it_held_at_a_mark_is_found_or_what_is_wrong_is_said(tmp_path: Path, contents, expected) -> None:
    mark = Mark(8, hashlib.sha256(b"one\ntwo\n").hexdigest())
    files = [tmp_path / f"{number}.jsonl" for number in range(len(contents))]
    for path, content in zip(files, contents, strict=True):
        if content is not None:
            path.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match="bytes") as caught:
            read_to_mark(files, mark)
        assert expected in str(caught.value)
    else:
        assert read_to_mark([*files, *files], mark) == expected
    assert read_to_mark([], Mark(0, "")) == b""
