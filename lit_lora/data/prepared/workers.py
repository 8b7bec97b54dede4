"""Processes that tokenize, beside the one that reads.

They are started anew instead of forked, since this process has threads (torch's, perhaps CUDA's), and by a command of
their own instead of ``multiprocessing``, which would run the user's script a second time. A worker ends when its input
does: however this process ends, none is left. It talks over pipes, by pickles of a length that comes first.

python -m lit_lora.data.prepared.workers
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from transformers import PreTrainedTokenizerBase

from lit_lora.data.prepared.encoding import EncodedBlock, Encoding, encode_block
from lit_lora.data.rows.readers import Block
from lit_lora.wording import setting

MOST_WORKERS = 16
"""That are started unasked."""

_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

Encode = Callable[[Block], EncodedBlock]


def num_cores() -> int:
    """That this process may use, but no more than :data:`MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def can_be_sent(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether another process knows the tokenizer's class: not if its code came with the model, or from a script."""
    return type(tokenizer).__module__.partition(".")[0] in ("transformers", "lit_lora")


def encoded_blocks(
    encoding: Encoding,
    blocks: Iterator[Block],
    num_workers: int,
    through: Callable[[Encode, Block], EncodedBlock],
) -> Iterator[tuple[Block, EncodedBlock]]:
    """Encode blocks, in their order.

    Args:
        encoding: how.
        blocks: are taken a few ahead of what is yielded.
        num_workers: processes; with 0 it is done in this one.
        through: gets what encodes a block, and the block; may do without. With workers it is called in threads.
    """
    if num_workers == 0:
        for block in blocks:
            yield block, through(lambda block: encode_block(encoding, block), block)
        return
    context = pickle.dumps(encoding)
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(num_workers, "tokenize"))
        workers = [stack.enter_context(_Worker(context)) for _ in range(num_workers)]
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def encode(block: Block) -> EncodedBlock:
            worker = idle.get()
            try:
                return worker.encode(block)
            finally:
                idle.put(worker)

        ahead: deque[tuple[Block, Future[EncodedBlock]]] = deque()
        try:
            for block in blocks:
                ahead.append((block, threads.submit(through, encode, block)))
                if len(ahead) > 3 * num_workers:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


class _Worker:
    """One process."""

    def __init__(self, context: bytes) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}
        command = [sys.executable, "-m", "lit_lora.data.prepared.workers"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._context: bytes | None = context

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()  # it writes nothing but to us
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def encode(self, block: Block) -> EncodedBlock:
        """Have the process encode a block; from one thread at a time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._context is not None:
                _send(self._process.stdin, self._context)
                self._context = None
            _send(self._process.stdin, pickle.dumps(block))
            answer = pickle.loads(_received(self._process.stdout))
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise ChildProcessError(
                f"a process that tokenizes ended with code {code}"
                + (", killed perhaps for lack of memory" if code == -signal.SIGKILL else "")
                + f". What was tokenized is kept: start again, perhaps with {setting('data.tokenize_workers', 1)}"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, EncodedBlock)
        return answer


def _send(stream: BinaryIO | Any, content: bytes) -> None:
    stream.write(len(content).to_bytes(8, "little"))
    stream.write(content)
    stream.flush()


def _received(stream: BinaryIO | Any) -> bytes:
    length = stream.read(8)
    content = stream.read(int.from_bytes(length, "little"))
    if len(length) < 8 or len(content) < int.from_bytes(length, "little"):
        raise EOFError
    return bytes(content)


def _work() -> None:
    """Encode blocks until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no answer
    with contextlib.suppress(EOFError, BrokenPipeError):
        encoding = pickle.loads(_received(sys.stdin.buffer))
        while True:
            block = pickle.loads(_received(sys.stdin.buffer))
            answer: EncodedBlock | Exception
            try:
                answer = encode_block(encoding, block)
            except Exception as error:
                answer = error
            try:
                content = pickle.dumps(answer)
            except Exception:  # an error that cannot be sent
                content = pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
            _send(answers, content)
    os._exit(0)  # nothing here needs an end of its own, and what is left in the pipe has no reader


if __name__ == "__main__":
    _work()
