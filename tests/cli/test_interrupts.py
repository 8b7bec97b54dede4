"""Ctrl-C while Python can raise nothing."""

from __future__ import annotations

import signal
import time

import pytest

from lit_lora.cli.interrupts import no_interrupt_lost


class _Interrupted:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def _interrupted_in_a_finalizer() -> None:
    _Interrupted()  # gone at once, and nobody can catch what is raised then
    time.sleep(10)


def test_an_interrupt_within_a_finalizer_is_raised_after_it(capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), no_interrupt_lost():
            _interrupted_in_a_finalizer()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_errors_of_finalizers_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr("sys.unraisablehook", lambda lost: told.append(lost.exc_type))

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    with no_interrupt_lost():
        Broken()
    assert told == [ValueError]
