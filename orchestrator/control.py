"""A request to stop, and the step at which all ranks heed it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist

from jem.files import Location
from jem.world import World

LOOK_EVERY_S = 1.0


def request_stop(root: Location) -> None:
    (root / "stop").write(b"1")


def clear_request(root: Location) -> None:
    (root / "stop").remove()


class Look:
    """Asks a run's folder something between two steps, which must not wait for an object store.

    On a disk at once; what a store answers, which may take seconds, is there at the next call or a later one. A store
    that is away for a moment has said nothing.
    """

    def __init__(self, root: Location, ask: Callable[[], None]) -> None:
        self.root, self.ask = root, ask
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        if self.root.is_local:
            self._ask()
        elif self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._ask, daemon=True, name="look into the run's folder")
            self.thread.start()

    def _ask(self) -> None:
        with suppress(OSError):
            self.ask()


class Control:
    """Lets rank 0 look for a request about once a second, and tells the others at the same step.

    Rank 0 also says at which step all will ask again, so that steps of any length cost about one look
    and one small message a second, and no step in between waits for another rank or for the device.
    """

    def __init__(self, world: World, root: Location, device: torch.device) -> None:
        self.world, self.root, self.device = world, root, device
        self.next_step = 0
        self.last = (0, time.monotonic())
        self.seen = False
        self.look = Look(root, self._ask)

    def due(self, step: int) -> bool:
        """Whether all ranks look up after this step; the same answer on every rank."""
        return step >= self.next_step

    def stop_requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every rank, which ask when a look is due."""
        word = torch.zeros(2, dtype=torch.int64, device=self.device)
        if self.world.rank == 0:
            before, then = self.last
            rate = max(0, step - before) / max(time.monotonic() - then, 1e-3) if self.next_step else 1.0
            self.look()
            word[0] = int(self.seen)
            word[1] = step + max(1, min(1000, round(rate * LOOK_EVERY_S)))
        if self.world.size > 1:
            dist.broadcast(word, src=0)
        stop, self.next_step = bool(word[0].item()), int(word[1].item())
        self.last = (step, time.monotonic())
        return stop

    def _ask(self) -> None:
        self.seen = (self.root / "stop").exists()

    def went_back(self, step: int) -> None:
        """Look up at once: the steps that were counted on are run again."""
        self.next_step = step
