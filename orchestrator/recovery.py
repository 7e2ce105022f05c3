"""Divergence: which checkpoint a run goes back to, and what it then does differently.

All decisions are functions of the run's rollbacks so far and of a step, so that a run that is stopped and
continued decides as one never stopped. The rollbacks are in STORAGE/NAME/recovery.json; a rollback counts
from when it is written there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jem.errors import CheckpointError, DivergedError
from jem.files import Location
from orchestrator.config import RunConfig
from orchestrator.remedies import remedied

FILE = "recovery.json"


@dataclass(frozen=True)
class Rollback:
    """A divergence found at step `diverged_at`; the run went back to the checkpoint of step `to`."""

    number: int  # from 1
    diverged_at: int
    to: int
    reason: str
    level: int  # rungs of the ladder in force from there on
    remedies: tuple[str, ...]
    time: int  # ms since the epoch

    def __str__(self) -> str:
        return f"{self.number}. step {self.diverged_at}: {self.reason}; back to {self.to} with {self.tried}"

    @property
    def tried(self) -> str:
        return ", ".join(self.remedies) or "another chain seed"


class Recovery:
    """The rollbacks of a run, and what follows from them."""

    def __init__(self, config: RunConfig, rollbacks: Sequence[Rollback] = ()) -> None:
        self.config, self.rollbacks = config, list(rollbacks)

    @property
    def count(self) -> int:
        return len(self.rollbacks)

    def level(self, step: int) -> int:
        """How many rungs of the ladder are in force: each rollback adds one, each healthy stretch takes one back."""
        if not self.rollbacks:
            return 0
        last = self.rollbacks[-1]
        return max(0, last.level - max(0, step - last.diverged_at) // self.config.recovery.relax_steps)

    def settings(self, step: int) -> tuple[RunConfig, int]:
        """The configuration of the steps from `step` on, and the step at which it changes, if only by ending."""
        config, end = self.config, self.config.steps
        level = self.level(step)
        if level == 0:
            return config, end
        for remedy in config.recovery.ladder[:level]:
            for change in remedy.split():
                config = remedied(config, change)
        last, relax = self.rollbacks[-1].diverged_at, config.recovery.relax_steps
        return config, min(end, last + relax * (max(0, step - last) // relax + 1))

    def next(self, diverged_at: int, reason: str, checkpoints: Sequence[int]) -> Rollback:
        """The rollback to make; `checkpoints` are the steps that there are, newest first.

        Raises DivergedError if there have been as many as are allowed.
        """
        limit = self.config.recovery.max
        if self.count >= limit:
            tried = "".join(f"\n  {rollback}" for rollback in self.rollbacks) or "\n  nothing: recovery.max=0"
            raise DivergedError(
                f"step {diverged_at}: {reason}; {self.count} rollbacks are made, recovery.max={limit}. Tried:{tried}\n"
                "raise recovery.max to go on, or change the settings under another name="
            )
        if not checkpoints:
            raise DivergedError(f"step {diverged_at}: {reason}; there is no checkpoint to go back to")
        level = self.level(diverged_at) + 1
        good = self.good(diverged_at, checkpoints) or list(checkpoints[-1:])
        to = good[min(level, len(good)) - 1]  # each further failure: one checkpoint further back
        remedies = self.config.recovery.ladder[:level]
        return Rollback(self.count + 1, diverged_at, to, reason, level, remedies, time.time_ns() // 1_000_000)

    def good(self, diverged_at: int, checkpoints: Sequence[int]) -> list[int]:
        """Those past which the run stayed healthy for long enough; the first one has nothing before it to spoil it."""
        return [s for s in checkpoints if s == 0 or s + self.config.recovery.healthy_steps <= diverged_at]

    def abandoned(self, step: int, made: int) -> bool:
        """Whether a checkpoint of `step`, written after `made` rollbacks, is of a stretch that was given up."""
        return any(rollback.number > made and rollback.to < step for rollback in self.rollbacks)


def read_recovery(root: Location, config: RunConfig) -> Recovery:
    """What was tried so far. Raises CheckpointError if the file is damaged: the run would not go on as it was."""
    path = root / FILE
    if not path.exists():
        return Recovery(config)
    try:
        entries = json.loads(path.read())["rollbacks"]
        return Recovery(config, [Rollback(**entry | {"remedies": tuple(entry["remedies"])}) for entry in entries])
    except (ValueError, KeyError, TypeError) as error:
        remedy = "remove it to go on from the newest checkpoint with plain settings"
        raise CheckpointError(f"{path.uri}: damaged ({error}); {remedy}") from error


def write_recovery(root: Location, recovery: Recovery) -> None:
    content = {"rollbacks": [asdict(rollback) for rollback in recovery.rollbacks]}
    (root / FILE).write(json.dumps(content, indent=1).encode())
