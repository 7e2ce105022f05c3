"""A worker that makes no step any more ends itself: Ray then replaces the workers, from the last checkpoint.

Ray sees a process that is gone or stopped. It does not see one that answers while its training hangs: in a
collective whose other side is stopped, in a kernel, in a lock, on a disk that is away.
"""

from __future__ import annotations

import faulthandler
import math
import os
import time
from types import TracebackType

_STDERR = 2


class Watchdog:
    """While open, ends the process once nothing has called `touch` for `timeout_s` seconds.

    All threads' stacks go to stderr first, which is the worker's .err file in Ray's log directory. A thread of
    faulthandler's own, written in C, keeps the time: it needs no GIL, which a hanging thread may hold. A process
    has one such thread, so one watchdog at a time. A process that was stopped (SIGSTOP) for longer makes no
    step once it is continued: others have taken its place.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.armed = math.inf  # while closed: nothing is ever late

    def __enter__(self) -> Watchdog:
        self._arm(time.monotonic())
        return self

    def touch(self) -> None:
        """Say that training goes on. To be called every step: it costs next to nothing most of the time.

        Does nothing while the watchdog is closed: what evaluates batches calls it after the training as well.
        """
        now = time.monotonic()
        if now - self.armed > self.timeout_s:  # just continued: the other thread is about to say the same
            faulthandler.dump_traceback(file=_STDERR)
            os._exit(1)
        if now - self.armed > 0.05 * self.timeout_s:
            self._arm(now)

    def _arm(self, now: float) -> None:
        self.armed = now
        faulthandler.dump_traceback_later(0.95 * self.timeout_s, file=_STDERR, exit=True)  # starts a thread

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.armed = math.inf
