"""SIGTERM and Ctrl-C, noted: the driver then asks the workers for a checkpoint at a step they agree on."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class StopSignals:
    """While open, the first signal sets `stopping` and a second Ctrl-C interrupts at once.

    Python delivers signals to the main thread alone; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self.before:
                signal.signal(number, self._stop)

    def __enter__(self) -> StopSignals:
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True
        print("stopping: a checkpoint first (Ctrl-C again: at once)", file=sys.stderr)
