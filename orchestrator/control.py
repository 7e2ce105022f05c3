"""A request to stop, and the step at which all ranks heed it."""

from __future__ import annotations

import threading
import time
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
        self.looking: threading.Thread | None = None

    def due(self, step: int) -> bool:
        """Whether all ranks look up after this step; the same answer on every rank."""
        return step >= self.next_step

    def stop_requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer on every rank, which ask when a look is due."""
        word = torch.zeros(2, dtype=torch.int64, device=self.device)
        if self.world.rank == 0:
            before, then = self.last
            rate = max(0, step - before) / max(time.monotonic() - then, 1e-3) if self.next_step else 1.0
            word[0] = int(self._look())
            word[1] = step + max(1, min(1000, round(rate * LOOK_EVERY_S)))
        if self.world.size > 1:
            dist.broadcast(word, src=0)
        stop, self.next_step = bool(word[0].item()), int(word[1].item())
        self.last = (step, time.monotonic())
        return stop

    def _look(self) -> bool:
        """On a disk at once; what an object store answers is seen by the next look: it may take seconds to say no."""
        if self.root.is_local:
            self._ask()
        elif self.looking is None or not self.looking.is_alive():
            self.looking = threading.Thread(target=self._ask, daemon=True, name="look for a stop")
            self.looking.start()
        return self.seen

    def _ask(self) -> None:
        with suppress(OSError):  # a store that is away for a moment: the next look asks again
            self.seen = (self.root / "stop").exists()

    def went_back(self, step: int) -> None:
        """Look up at once: the steps that were counted on are run again."""
        self.next_step = step
