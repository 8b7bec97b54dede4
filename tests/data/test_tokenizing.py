"""Tokenizing in several processes: the same as in one, where an earlier start stopped, whatever ends it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.prepared import tokenizing
from lit_lora.data.prepared.dataset import TokenizedDataset
from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source
from lit_lora.data.rows import readers, waiting

NUM_ROWS = 95
BAD = (3, 17, 18, 60, 94)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_ROWS", 10)
    monkeypatch.setattr(tokenizing, "LARGE_BYTES", 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [json.dumps({"prompt": f"q {i % 40}", "completion": "a " * (1 + i % 5)}) for i in range(1, NUM_ROWS + 1)]
    for line in BAD:
        rows[line - 1] = "nonsense" if line % 2 else json.dumps({"prompt": "p"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def tokenize(file: Path, name: str = "cache", workers: int = 1, **settings) -> TokenizedDataset:
    settings = {"on_bad_rows": "drop", **settings}
    return tokenize_source(
        str(file), byte_tokenizer(), SourceSettings(**settings), cache_dir=file.parent / name, num_workers=workers
    )


def same(first: TokenizedDataset, second: TokenizedDataset) -> bool:
    return (
        first.digest() == second.digest()
        and first.lines.tolist() == second.lines.tolist()
        and first.ids.tolist() == second.ids.tolist()
        and first.statistics == second.statistics
    )


def test_several_processes_give_what_one_gives(file) -> None:
    """Examples, their order and lines, counts, and the report of bad rows."""
    alone, together = tokenize(file), tokenize(file, "other", workers=2)
    assert same(alone, together)
    assert [int(problem.split(":")[1]) for problem in together.statistics.bad_rows] == list(BAD)
    assert together.statistics.num_duplicates == alone.statistics.num_duplicates > 0
    assert not [*(file.parent / "other").glob("*.parts")], "what was kept for a kill is gone"
    with pytest.raises(ValueError, match="5 bad rows \\(90 are good\\)") as one:
        tokenize(file, "third", on_bad_rows="error")
    assert together.statistics.bad_rows == [line.strip() for line in str(one.value).splitlines()[1:-1]]


@pytest.mark.parametrize("limit", [1, 9, 10, 47, 1000])
def test_a_limit_ends_where_it_would_in_one_piece(file, monkeypatch, limit) -> None:
    cut = tokenize(file, limit=limit)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 1000)
    assert same(cut, tokenize(file, "other", limit=limit))


def test_an_interrupted_start_is_gone_on_with(file, monkeypatch) -> None:
    whole = tokenize(file, "whole")
    encode, done = tokenizing.encode_block, []
    monkeypatch.setattr(
        "lit_lora.data.prepared.workers.encode_block", lambda *a: done.append(a) or _stop_at(4, done, encode, a)
    )
    with pytest.raises(KeyboardInterrupt):
        tokenize(file)
    done.clear()
    monkeypatch.setattr("lit_lora.data.prepared.workers.encode_block", lambda *a: done.append(a) or encode(*a))
    again = tokenize(file)
    assert whole.statistics == again.statistics
    assert same(whole, again)
    assert len(done) == 10 - 3, "three blocks of ten were there"


def _stop_at(count, done, encode, arguments):
    if len(done) == count:
        raise KeyboardInterrupt
    return encode(*arguments)


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_block_is_tokenized_again(file, monkeypatch, damage) -> None:
    whole = tokenize(file, "whole")
    monkeypatch.setattr(
        "lit_lora.data.prepared.prepare.atomic_write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        tokenize(file)
    monkeypatch.undo()
    monkeypatch.setattr(readers, "BLOCK_ROWS", 10)
    monkeypatch.setattr(tokenizing, "LARGE_BYTES", 1)
    blocks = sorted((file.parent / "cache").glob("*.parts/*.safetensors"))
    assert len(blocks) == 10
    blocks[4].write_bytes(damage(blocks[4].read_bytes()))
    again = tokenize(file)
    assert whole.statistics == again.statistics
    assert same(whole, again)


def test_a_changed_row_is_tokenized_again_and_the_rest_is_not_mistaken(file, monkeypatch) -> None:
    """The file is another one while blocks of the first are still there."""
    monkeypatch.setattr(
        "lit_lora.data.prepared.prepare.atomic_write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        tokenize(file)
    monkeypatch.undo()
    file.write_text(file.read_text().replace('"q 7"', '"another"'))
    assert same(tokenize(file), tokenize(file, "other"))


START = """
import sys
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.prepared import tokenizing
from lit_lora.data.rows import readers
from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source
from pathlib import Path
readers.BLOCK_ROWS, tokenizing.LARGE_BYTES = 10, 1
settings = SourceSettings(on_bad_rows="drop")
print("ready", flush=True)
tokenize_source(sys.argv[1], byte_tokenizer(), settings, cache_dir=Path(sys.argv[2]), num_workers=2)
"""


def start(file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", START, str(file), str(file.parent / "cache")]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_killed_in_the_middle_it_leaves_no_process_and_loses_nothing(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q {i}", "completion": "a " * 20}) + "\n" for i in range(1500)))
    process = start(file)
    blocks: list[Path] = []
    while len(blocks) < 5 and process.poll() is None:
        blocks = [*(tmp_path / "cache").glob("*.parts/*.safetensors")]
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == [], "workers end when nobody asks them any more"
    assert tokenize(file, workers=2).digest() == tokenize(file, "other").digest()


def test_a_worker_that_is_killed_is_told(file, monkeypatch) -> None:
    from lit_lora.data.prepared import workers

    begun: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1])

    def kill() -> None:
        while len(begun) < 2:
            time.sleep(0.01)
        for process in begun:
            os.kill(process.pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(ChildProcessError, match=r"ended with code -9, killed perhaps for lack of memory\. What was"):
        tokenize(file, workers=2)


def test_another_process_is_waited_for_with_a_message(file, caplog, request) -> None:
    log = logging.getLogger("lightning.pytorch.lit_lora")
    log.addHandler(caplog.handler)
    request.addfinalizer(lambda: log.removeHandler(caplog.handler))
    caplog.set_level(logging.INFO, logger=log.name)
    tokenized = tokenize(file)
    (path,) = (file.parent / "cache").glob("*.safetensors")
    content = path.read_bytes()
    path.unlink()
    release = threading.Event()

    def hold() -> None:  # as another process would
        with waiting.one_at_a_time(path.with_suffix(".lock"), ""):
            held.set()
            release.wait(30)
            path.write_bytes(content)

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    threading.Timer(0.3, release.set).start()
    assert same(tokenized, tokenize(file))
    thread.join()
    (message,) = {message for message in caplog.messages if message.startswith("waiting")}
    assert f"another process is tokenizing {file}" in message


def test_progress_says_rows_rate_and_time_left_in_lines(monkeypatch, caplog, request) -> None:
    log = logging.getLogger("lightning.pytorch.lit_lora")
    log.addHandler(caplog.handler)
    request.addfinalizer(lambda: log.removeHandler(caplog.handler))
    caplog.set_level(logging.INFO, logger=log.name)
    now = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    progress = waiting.TokenizingProgress("rows.jsonl", 1000)
    progress.found(100, 100)
    for done in (200, 300, 400, 500):
        now[0] += 2.5
        progress.add(100, done)
    assert list(dict.fromkeys(caplog.messages)) == [
        "tokenizing rows.jsonl: 100 rows are there from an earlier start",
        "tokenizing rows.jsonl: 500 rows, 40 rows/s, 00:12 left",
    ]
    assert not any("\r" in message for message in caplog.messages)
