"""A run's checkpoints on one rank: written in the background, counted, pruned, and found again."""

from __future__ import annotations

import contextlib
import json
import socket
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from jem import checkpoint
from jem.checkpoint import Manifest
from jem.errors import CheckpointError, JEMError, StorageError
from jem.files import Location
from jem.saving import Saved, Writer
from jem.train import TrainState
from jem.world import World
from orchestrator.agreement import on_rank_0
from orchestrator.config import CheckpointConfig, RunConfig
from orchestrator.control import Look
from orchestrator.recovery import Recovery
from orchestrator.shared import REMEDY

OWNER = "owner"
FAILURE = "failure.txt"
"""In the run's folder: the last exception that ended a worker, and where it came from."""


def owner(root: Location) -> dict[str, Any]:
    """The group of workers that may write the run's checkpoints: {attempt, token, starts}; empty where none did yet."""
    try:
        return dict(json.loads((root / OWNER).read()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


class Superseded(RuntimeError):  # noqa: N818 - it is no error of the run, another process has taken it over
    """Another group of workers has taken the run over: this one was thought dead."""


class Checkpoints:
    """All ranks call `begin`, `poll` and `finish` at the same points of their loops."""

    def __init__(
        self,
        world: World,
        root: Location,
        config: CheckpointConfig,
        device: torch.device,
        healthy_steps: int = 0,
    ) -> None:
        self.world, self.root, self.config, self.healthy_steps = world, root, config, healthy_steps
        self.writer = Writer(world, device)
        self.failures = 0  # in a row
        self.newest: Location | None = None
        self.attempt, self.token = 1, ""
        self.starts = 0  # of groups of workers in this attempt since the last checkpoint, this one's included
        self.regular: dict[int, bool] = {}  # by step, as far as known
        self.look = Look(root, self._watch)
        self.superseded: Superseded | None = None

    @property
    def folder(self) -> Location:
        return self.root / "checkpoints"

    def claim(self, attempt: int = 1, max_failures: int = 3, hang_timeout: float = 300.0) -> None:
        """From now on this group of workers, and no earlier one, writes checkpoints of the run.

        Raises JEMError on every rank if a later driver has the run, if the workers have died `max_failures`
        times since the last checkpoint, or if the run's folder cannot be written.
        """

        def take() -> str:
            owner = self._owner()
            if owner.get("attempt", 0) > attempt:
                raise JEMError(f"{self.root.uri}: another driver has taken this run over (attempt {owner['attempt']})")
            self.starts = 1 + (owner.get("starts", 0) if owner.get("attempt") == attempt else 0)
            if self.starts > max_failures + 1:
                raise JEMError(
                    f"{self.root.uri}: the workers died {max_failures + 1} times without a new checkpoint; "
                    f"{_last_failure(self.root, hang_timeout)}. recovery.max_failures={max_failures} allows no more"
                )
            with contextlib.suppress(OSError):
                (self.root / FAILURE).remove()  # what ended others is no reason for the end of this one
            self._write_owner(attempt, token)
            self._collect_halves()
            return token

        token = uuid.uuid4().hex
        self.attempt, self.token = attempt, on_rank_0(self.world, take)

    def check_claim(self) -> None:
        """Raises Superseded if another group has claimed the run: a stopped process may come back to life."""
        if self._owner().get("token") != self.token:
            raise Superseded(f"{self.root.uri}: another group of workers has taken this run over")

    def watch_claim(self) -> None:
        """`check_claim` between two steps: what it raises may be an object store's answer to an earlier call."""
        self.look()
        if self.superseded is not None:
            raise self.superseded

    def _watch(self) -> None:
        try:
            self.check_claim()
        except Superseded as error:
            self.superseded = error

    def _owner(self) -> dict[str, Any]:
        return owner(self.root)

    def _write_owner(self, attempt: int, token: str) -> None:
        content = {"attempt": attempt, "token": token, "starts": self.starts}
        try:
            (self.root / OWNER).write(json.dumps(content).encode())
        except OSError as error:
            raise JEMError(f"{self.root.uri}: cannot be written ({error}); {REMEDY}") from error

    def _collect_halves(self) -> None:
        """Remove what workers left that died while they wrote one of these two files."""
        with contextlib.suppress(OSError):
            for file in self.root.children():
                if file.name.endswith(".tmp") and file.name.startswith((f".{OWNER}.", f".{FAILURE}.")):
                    file.remove()

    def _committed(self, step: int) -> None:
        """In the writer's thread, on rank 0: there is a new checkpoint."""
        self.check_claim()  # of another group, where this one was stopped between commit and here: the run is its own
        self.prune(step)
        if self.starts != 1:  # workers that die from here on have something to show
            self.starts = 1
            self._write_owner(self.attempt, self.token)

    def begin(
        self,
        state: TrainState,
        info: Mapping[str, Any],
        sums: Mapping[str, Tensor],
        best: Mapping[str, Tensor] | None,
        events: bytes,
    ) -> None:
        """Start writing a checkpoint of `state`. Raises DivergedError if the state is not finite on any rank."""
        with contextlib.suppress(OSError):  # a store that is away for a moment; the commit asks again
            self.check_claim()  # what lies there is about to be replaced
        step = state.step
        self.regular[step] = bool(info.get("regular", True))
        directory = self.folder / step
        arguments = (directory, state, info, sums, best, events)
        self.writer.begin(*arguments, before_write=self.check_claim, after_commit=lambda: self._committed(step))

    def poll(self) -> Saved | None:
        """What came of the checkpoint under way, once that is known."""
        return self._count(self.writer.poll())

    def finish(self, alive: Callable[[], None] = lambda: None) -> Saved | None:
        """Wait for the checkpoint under way, if there is one; `alive` is called while it gets on."""
        return self._count(self.writer.finish(alive))

    def give_up_if_hopeless(self) -> None:
        """Raises JEMError when as many checkpoints in a row could not be written as are allowed."""
        if self.failures >= self.config.max_failures:
            last = f"the newest is {self.newest.uri}" if self.newest else "there is none"
            raise JEMError(
                f"{self.folder.uri}: {self.failures} checkpoints in a row could not be written, {last}; {REMEDY}"
            )

    def steps(self) -> list[int]:
        """Of all committed checkpoints, newest first."""
        return [int(d.name) for d in checkpoint.committed(self.folder)]

    def staying(self) -> list[int]:
        """Those among which a rollback chooses, newest first.

        Neither what a death between a commit and its pruning has left, nor what a stop has: a run that was
        stopped goes back to where one never stopped does.
        """
        newest = int(self.newest.name) if self.newest else -1
        steps = self.steps()
        between = self.between(steps)
        stay = kept(steps, newest, self.config, between, self.healthy_steps)
        return sorted(stay - between or stay, reverse=True)

    def between(self, steps: Sequence[int]) -> set[int]:
        """Those that were written between the regular steps: at a stop, or at the end."""
        for step in steps:
            if step not in self.regular:
                try:
                    info = checkpoint.read_manifest(self.folder / step).info
                except (CheckpointError, StorageError):
                    continue  # damaged, or just removed; or a store that is away for a moment
                self.regular[step] = bool(info.get("regular", True))
        return {step for step in steps if not self.regular.get(step, True)}

    def prune(self, newest: int) -> None:
        """Remove what need not stay. Those of later steps were found damaged, or the run would not be before them."""
        with contextlib.suppress(OSError):  # the next checkpoint tries again
            steps = self.steps()
            stay = kept(steps, newest, self.config, self.between(steps), self.healthy_steps)
            for directory in checkpoint.committed(self.folder):
                if int(directory.name) not in stay:
                    checkpoint.discard(directory)
            for child in self.folder.children():  # what could not be removed when it could not be written
                if child.name.isdecimal() and int(child.name) < newest and int(child.name) not in steps:
                    child.remove()

    def remove_after(self, step: int) -> None:
        """A stretch that is given up leaves no checkpoints."""
        for directory in checkpoint.committed(self.folder):
            if int(directory.name) > step:
                checkpoint.discard(directory)

    def _count(self, saved: Saved | None) -> Saved | None:
        if saved is not None:
            self.failures = self.failures + 1 if saved.fault else 0
            if not saved.fault:
                self.newest = saved.directory
        return saved


def kept(
    steps: Sequence[int],
    newest: int,
    config: CheckpointConfig,
    between: Set[int] = frozenset(),
    healthy_steps: int = 0,
) -> set[int]:
    """Which checkpoints stay: the newest few, and of every 4th, every 16th, ... the last two each.

    Two, so that one of them is always at least a whole such stretch old. Those younger than `healthy_steps` do not
    count as good yet: all of them stay, and the one before. Those `between` the regular steps (of a stop,
    of the end) take nobody's place, and stay while they are the newest.
    """
    before = sorted((s for s in steps if s <= newest), reverse=True)
    regular = [s for s in before if s not in between]
    young = sum(s > regular[0] - healthy_steps for s in regular)
    stay = set(before[:1]) | set(regular[: max(config.keep, young + 1)])
    for level in range(1, config.spaced + 1):
        period = config.every * 4**level
        stay |= set([s for s in before if s % period == 0][:2])
    return stay


def find(root: Location, config: RunConfig, recovery: Recovery) -> tuple[Manifest | None, list[str]]:
    """The newest good checkpoint to go on from, and what is wrong with newer ones; half-written ones are removed.

    None where there never was one. Raises CheckpointError where there are some and none is good, StorageError
    where that cannot be found out at present.
    """
    folder = root / "checkpoints"
    directories = checkpoint.committed(folder)
    for directory in directories:
        made = _rollbacks_made(directory)
        if made is not None and recovery.abandoned(int(directory.name), made):
            checkpoint.discard(directory)  # a rollback was written down and then interrupted
    directories = checkpoint.committed(folder)
    manifest, faults = checkpoint.newest_good(directories, lambda found: _check_science(found, config))
    newest = manifest.step if manifest else 0
    unfinished = [d for d in folder.children() if d.name.isdecimal() and d not in directories and int(d.name) > newest]
    faults = [f"{d.uri}: has no manifest, its writing was interrupted" for d in unfinished] + faults
    if manifest is None and faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        remedy = "restore one of them from a backup, or start anew with --fresh"
        raise CheckpointError(f"{folder.uri}: no checkpoint is as it was written:\n{listed}\n{remedy}")
    _collect_orphans(folder, {d.path for d in directories})
    return manifest, faults


def find_for_rollback(folder: Location, steps: Sequence[int], to: int) -> Manifest:
    """The checkpoint of step `to`, or the newest good one before it.

    Raises CheckpointError if none is good, StorageError where that cannot be found out at present.
    """
    manifest, faults = checkpoint.newest_good(folder / step for step in steps if step <= to)
    if manifest is None:
        raise CheckpointError(f"{folder.uri}: nothing to go back to: {'; '.join(faults)}")
    return manifest


def write_failure(root: Location, world: World) -> None:
    """Keep the exception at hand: Ray replaces the workers, and what they said is in some log of some node."""
    text = f"rank {world.rank} of {world.size} on {socket.gethostname()}\n{traceback.format_exc()}"
    with contextlib.suppress(OSError):
        (root / FAILURE).write(text.encode())


def _last_failure(root: Location, hang_timeout: float) -> str:
    try:
        last = (root / FAILURE).read().decode().strip().splitlines()[-1]
        return f"the last time with {last} ({(root / FAILURE).uri})"
    except (OSError, IndexError):
        return (
            "the last time without a word, as a process does that is killed (out of memory?), or that makes no step "
            f"for recovery.hang_timeout={hang_timeout:g} s: raise that if a step takes longer; if it hung, in a "
            "collective or on a disk, the .err files of Ray's logs have its stacks"
        )


def _check_science(manifest: Manifest, config: RunConfig) -> None:
    """A checkpoint of other settings was copied here from another run."""
    theirs, ours = manifest.info["config"], json.loads(json.dumps(config.science))
    for key, value in ours.items():
        if key in theirs and theirs[key] != value:
            message = f"belongs to another run: its {key} is {theirs[key]!r}, {value!r} here"
            raise CheckpointError(f"{manifest.directory.uri}: {message}")


def _rollbacks_made(directory: Location) -> int | None:
    """None if its manifest is damaged, which is said when it would be used."""
    try:
        return int(checkpoint.read_manifest(directory).info.get("rollbacks", 0))
    except CheckpointError:
        return None


def _collect_orphans(folder: Location, committed: set[str]) -> None:
    """Remove what a death in the middle of writing has left: directories without a manifest, temporary files."""
    with contextlib.suppress(OSError):
        for path in folder.children():
            if path.path not in committed and (path.name.isdecimal() or path.name.endswith(".tmp")):
                path.remove()
            elif path.path in committed:
                for file in path.children():
                    if file.name.endswith(".tmp") or file.name.startswith("part-"):
                        file.remove()
