"""RankMonitor: when one process of a distributed run dies, all of them end, saying why, instead of waiting for it.

A process that waits in a collective for one that has gone finds out when the process group's timeout is over (10
minutes with NCCL, 30 with gloo), or, started by Lightning, is killed without a word. Here every process has a thread
that writes a heartbeat into a small store, and looks for news from the others: an exception that one of them had, or a
heartbeat that has stopped (killed, or its machine gone). Then it prints that and ends its process. The others' silence
is counted in heartbeats of one's own: a run that is paused as a whole (by SLURM, or by hand) wakes up as it was.

Logs nothing. Does nothing with one process. Works with any LightningModule.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

EXIT_CODE = 1


class RankMonitor(pl.Callback):
    """Ends every process of a run within ``timeout_s`` of the death of one.

    Args:
        timeout_s: seconds without a heartbeat after which a process counts as dead. The heartbeat has a thread of its
            own, so a long computation or a slow disk is not taken for death.
        interval_s: seconds between heartbeats.
    """

    def __init__(self, timeout_s: float = 45.0, interval_s: float = 1.0) -> None:
        super().__init__()
        if not 0 < interval_s < timeout_s:
            raise ValueError(f"expected 0 < interval_s < timeout_s, got {interval_s} and {timeout_s}")
        self.timeout_s = timeout_s
        self.interval_s = interval_s
        self._store: dist.Store | None = None
        self._done: threading.Event | None = None  # a lock, which neither pickle nor deepcopy takes: made in setup
        self._thread: threading.Thread | None = None
        self._launcher: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the store and start watching."""
        if trainer.world_size == 1 or self._thread is not None:
            return
        rank, world_size = trainer.global_rank, trainer.world_size
        # The first process listens on a port of its own choice; the others learn it through the process group.
        timeout = timedelta(seconds=self.timeout_s)
        host, store = socket.gethostname(), None
        if rank == 0:
            host = os.environ.get("MASTER_ADDR", host)
            store = dist.TCPStore(host, 0, world_size, True, timeout, wait_for_workers=False)
        address = trainer.strategy.broadcast((host, store.port) if store is not None else None)
        self._store = store or dist.TCPStore(address[0], address[1], world_size, False, timeout)
        self._launcher = trainer.strategy.launcher
        self._done = threading.Event()
        arguments = (self._store, self._done, rank, world_size)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="rank-monitor", daemon=True)
        self._thread.start()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others. What all of them stop for alike (Ctrl-C, termination) is no news."""
        if self._store is None or isinstance(exception, (KeyboardInterrupt, SystemExit)):
            self._stop()
            return
        reason = "".join(traceback.format_exception_only(exception)).strip()
        try:
            self._store.set(f"failed/{trainer.global_rank}", reason)
            time.sleep(2 * self.interval_s)  # the store is gone with its process: let the others read it
        except RuntimeError as error:
            print(f"rank {trainer.global_rank} could not tell the others: {error}", file=sys.stderr)
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._stop()

    def _stop(self) -> None:
        if self._done is not None and self._thread is not None:
            self._done.set()
            self._thread.join()
        self._thread = self._store = self._done = self._launcher = None

    def _watch(self, store: dist.Store, done: threading.Event, rank: int, world_size: int) -> None:
        others = [other for other in range(world_size) if other != rank]
        heard: dict[int, bytes | None] = dict.fromkeys(others)
        silence_s = dict.fromkeys(others, 0.0)
        finished: set[int] = set()
        beat = 0
        while not done.wait(self.interval_s):
            beat += 1
            try:
                store.set(f"beat/{rank}", str(beat))
                for other in others:
                    if store.check([f"failed/{other}"]):
                        self._end(done, rank, f"rank {other} failed: {store.get(f'failed/{other}').decode()}")
                    if store.check([f"finished/{other}"]):
                        finished.add(other)
                    value = store.get(f"beat/{other}") if store.check([f"beat/{other}"]) else None
                    silence_s[other] = silence_s[other] + self.interval_s if value == heard[other] else 0.0
                    heard[other] = value
                    if other not in finished and silence_s[other] > self.timeout_s:
                        self._end(done, rank, f"rank {other} has given no sign of life for {self.timeout_s:.0f} s")
            except (RuntimeError, dist.DistError):
                if done.is_set():
                    return
                self._end(done, rank, "rank 0 is gone")
        try:
            store.set(f"finished/{rank}", "1")
        except (RuntimeError, dist.DistError):
            return  # the first process has finished before this one, and the store with it

    def _end(self, done: threading.Event, rank: int, reason: str) -> None:
        if done.wait(0.5):  # the end of the run, in order
            return
        print(f"lit-lora: rank {rank} stops: {reason}", file=sys.stderr, flush=True)
        if isinstance(self._launcher, _SubprocessScriptLauncher):  # processes that this one has started
            self._launcher.kill(signal.SIGKILL)
        os._exit(EXIT_CODE)
