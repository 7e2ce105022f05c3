"""The main thread waits, and hears signals, while Ray works in another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from orchestrator.command import RAY_THREAD
from orchestrator.ray_cluster import leave_ray
from orchestrator.signals import StopSignals

CLOSING_S = 7.0
"""Of the time that a signal leaves (signals.STOP_WITHIN_S): for what follows the workers' last checkpoint."""

_TOO_LATE = "stopped before the workers ended by themselves; what was saved last is there, and the same command goes on"


def wait_for_ray(
    work: Callable[[], dict[str, Any]],
    signals: StopSignals,
    ask_to_stop: Callable[[], None],
    all_stopped: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """What `work` returns or raises, called in a thread; on a signal `ask_to_stop` is, in another.

    On the main thread ray.init would exit at a SIGTERM, and fit() abort at a SIGINT. The thread lives as long
    as Ray does: on Linux the processes of a private Ray are killed when it ends. Where `work` does not end by itself
    in time, Ray is left.

    `all_stopped`, of Ray Tune, which never ends by itself: when its trials have. Tune goes on asking Ray in its thread,
    and Ray ends a process that asks after having left it: it is left as the command ends.
    """
    box: list[Any] = []

    def call() -> None:
        try:
            box.append(work())
        except BaseException as error:  # handed over to the main thread
            box.append(error)

    thread = threading.Thread(target=call, daemon=True, name=RAY_THREAD)
    thread.start()
    asking = None
    while thread.is_alive():
        signals.listen()  # Ray's C++ side takes SIGTERM at some point of ray.init, and would abort
        thread.join(0.05)
        if signals.stopping and asking is None:
            asking = threading.Thread(target=ask_to_stop, daemon=True, name="ask to stop")
            asking.start()
        stopped = asking is not None and all_stopped is not None and all_stopped()
        if stopped or signals.left < CLOSING_S:
            if all_stopped is None:
                leave_ray(patience_s=CLOSING_S / 2)
            by_themselves = "stopped on request" if stopped else _TOO_LATE
            return {"status": "stopped", "message": by_themselves}
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]  # type: ignore[no-any-return]
