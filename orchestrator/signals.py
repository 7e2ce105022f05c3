"""SIGTERM and Ctrl-C: noted while a run works, so that it ends with a checkpoint; elsewhere they interrupt."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

NUMBERS = (signal.SIGTERM, signal.SIGINT)

STOP_WITHIN_S = 26.0
"""From the first signal to the last line: Slurm and Kubernetes kill after 30 s, and leaving Python takes up to 3."""


class StopSignals:
    """While open, the first signal sets `stopping` and a second Ctrl-C interrupts at once.

    The process ends in time whatever happens, a storage that hangs included: `last_word` is called from a
    thread `within_s` seconds after the first signal, and its value is the exit code. Python delivers
    signals to the main thread alone; elsewhere this does nothing.
    """

    def __init__(self, last_word: Callable[[], int] | None = None, within_s: float = STOP_WITHIN_S) -> None:
        self.last_word, self.within_s = last_word, within_s
        self.asked_at: float | None = None
        self.closed = threading.Event()
        self.before = {number: signal.getsignal(number) for number in NUMBERS}

    @property
    def stopping(self) -> bool:
        return self.asked_at is not None

    @property
    def left(self) -> float:
        """Seconds until the process must have ended."""
        return math.inf if self.asked_at is None else self.asked_at + self.within_s - time.monotonic()

    def listen(self) -> None:
        """Take the signals, from whoever has taken them since."""
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                signal.signal(number, self._stop)

    def __enter__(self) -> StopSignals:
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.closed.set()
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.asked_at is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked_at = time.monotonic()
        threading.Thread(target=self._end_in_time, daemon=True, name="stop in time").start()
        print("stopping: a checkpoint first (Ctrl-C again: at once)", file=sys.stderr)

    def _end_in_time(self) -> None:
        if not self.closed.wait(self.within_s) and self.last_word is not None:
            os._exit(self.last_word())


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that a command that it ends still prints its last line."""
    with _handled_by(signal.default_int_handler):
        yield


@contextmanager
def deaf() -> Iterator[None]:
    """Neither signal does anything: for the few lines that must be written as a whole."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
