"""Writing a checkpoint while training goes on: a copy to the host, then a thread on each rank.

Each rank writes its parts, and a record of their sizes and SHA-256 after them. Rank 0 waits for all
records and commits with the manifest, which comes last: on a local disk every file appears by rename,
on an object store by its own completion. Whatever goes wrong before, there is no checkpoint, and those
that were there before are as they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save as pack_tensors
from torch import Tensor

from jem.checkpoint import (
    MANIFEST,
    SAMPLER,
    SCHEMA,
    chains_file,
    part_record,
    rank_file,
    sampler_tensors,
    sealed,
    to_json,
)
from jem.errors import CheckpointError, DivergedError
from jem.files import Location
from jem.optim import optimizer_tensors
from jem.train import TrainState
from jem.world import World

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
"""How often rank 0 looks for the records of the others."""


class Saved(NamedTuple):
    """How a checkpoint ended; the same on every rank."""

    step: int
    directory: Location
    fault: str | None  # why there is no such checkpoint; None: it is committed


class Writer:
    """Writes one checkpoint at a time. All ranks call its methods at the same points of their loops."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device = world, device
        self.pending: Saved | None = None
        self._thread: threading.Thread | None = None
        self._give_up = threading.Event()
        self._done = False
        self._committed = False  # on rank 0: from here on it is a checkpoint, whatever fails
        self._error: BaseException | None = None
        self._files = 0  # written so far, over all checkpoints
        self._files_of_all = 0.0  # ranks, when they last asked each other
        self._held: dict[str, dict[str, Tensor]] = {}

    def begin(
        self,
        directory: Location,
        state: TrainState,
        info: Mapping[str, Any],
        sums: Mapping[str, Tensor],
        best: Mapping[str, Tensor] | None = None,
        events: bytes = b"",
        before_write: Callable[[], None] = lambda: None,
        after_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state and write it in the background; `poll` or `finish` tell what came of it.

        `sums` are tensors of this rank that add up over ranks; `restore` gives them back. Both functions are
        called in the thread: the first on every rank before each file, the manifest included, which it keeps
        from being written by raising; the second on rank 0.
        Raises DivergedError, before anything is written, if weights or chains are not finite on any rank.
        """
        assert self.pending is None, "one checkpoint at a time"
        fault = _non_finite(state)
        if self.world.any(fault is not None, self.device):
            raise DivergedError(f"{fault or 'what another rank holds'} is not finite")
        self._give_up.clear()
        self._done, self._committed, self._error = False, False, None
        try:
            if self.world.rank == 0:
                (directory / MANIFEST).remove()  # what is there is about to be replaced: it is no checkpoint any more
                directory.remove()
                directory.mkdir()
        except OSError as error:
            self._error = error
        self.pending = Saved(state.step, directory, None)
        if self.world.any(self._error is not None, self.device):
            return
        parts = {file: self._copies(file, tensors) for file, tensors in _parts(state, self.world, sums, best).items()}
        manifest = {
            "schema": SCHEMA,
            "step": state.step,
            "world_size": self.world.size,
            "world_epoch": state.world_epoch,
            "device": state.generator.device.type,
            "info": json.loads(to_json(info)),  # as it is now: the caller's goes on changing
        }
        arguments = (directory, parts, events, manifest, before_write, after_commit)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True, name="checkpoint")
        self._thread.start()

    def poll(self) -> Saved | None:
        """What came of the checkpoint under way; None while it is being written, or where there is none."""
        if self.pending is None:
            return None
        error = self._error  # as it is before rank 0's thread gives up waiting for a record, which is none of its own
        told = torch.tensor([error is not None, self._done, self._files], dtype=torch.float64, device=self.device)
        failed, done, self._files_of_all = self.world.sum(told).tolist()
        if not failed and done < self.world.size:
            return None
        self._give_up.set()
        if self._thread is not None:
            self._thread.join()
        saved, self.pending, self._thread = self.pending, None, None
        if self.world.any(self._committed, self.device):
            return saved
        reason = self._reason(error)  # or it is raised; what lies there may then be another writer's
        if self.world.rank == 0:
            with contextlib.suppress(OSError):  # a disk that is read-only keeps the parts, which count for nothing
                saved.directory.remove()
        return saved._replace(fault=reason)

    def finish(self, alive: Callable[[], None] = lambda: None) -> Saved | None:
        """Wait for the checkpoint under way, if there is one; `alive` is called when any rank has written a file."""
        seen = self._files_of_all
        while self.pending is not None:
            saved = self.poll()
            if saved is not None:
                return saved
            if self._files_of_all > seen:
                seen = self._files_of_all
                alive()
            time.sleep(LOOK_EVERY_S)
        return None

    def _copies(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the host, as training goes on meanwhile, in memory that is kept for the next time: new pages cost more."""
        held = self._held.setdefault(file, {})
        for name, tensor in tensors.items():
            if name not in held or (held[name].shape, held[name].dtype) != (tensor.shape, tensor.dtype):
                held[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            held[name].copy_(tensor.detach())
        return {name: held[name] for name in tensors}

    def _reason(self, error: BaseException | None) -> str:
        """Why it failed, in the words of the first rank that says so. What is no fault of the storage is raised."""
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error
        mine = None if error is None else f"{type(error).__name__}: {error}"
        told: list[str | None] = [mine]
        if self.world.size > 1:
            told = [None] * self.world.size
            dist.all_gather_object(told, mine)
        rank, reason = next((rank, reason) for rank, reason in enumerate(told) if reason)
        return f"rank {rank}: {reason}" if self.world.size > 1 else reason

    def _write(
        self,
        directory: Location,
        parts: dict[str, dict[str, Tensor]],
        events: bytes,
        manifest: dict[str, Any],
        before_write: Callable[[], None],
        after_commit: Callable[[], None],
    ) -> None:
        """The thread: no collectives, which belong to the training loop."""
        try:
            written = {}
            for name, tensors in parts.items():
                before_write()
                written[name] = _write_part(directory / name, bytes(pack_tensors(tensors)))
                self._files += 1
            if self.world.rank == 0:
                before_write()
                written["events.jsonl"] = _write_part(directory / "events.jsonl", events)
            (directory / part_record(self.world.rank, self.world.size)).write(to_json(written))
            if self.world.rank == 0:
                manifest["files"] = self._records(directory)
                before_write()
                (directory / MANIFEST).write(sealed(manifest))
                self._committed = True
                for rank in range(self.world.size):
                    (directory / part_record(rank, self.world.size)).remove()
                after_commit()
            self._done = True
        except BaseException as error:  # told by poll, where it matters
            self._error = error
            if self._committed:
                log.warning("%s is written, and then: %s", directory.uri, error)

    def _records(self, directory: Location) -> dict[str, Any]:
        """What all ranks have written, once they have."""
        files: dict[str, Any] = {}
        for rank in range(self.world.size):
            path = directory / part_record(rank, self.world.size)
            while not path.exists():
                if self._give_up.wait(LOOK_EVERY_S):
                    raise OSError(f"{path.uri} was not written")
            files |= json.loads(path.read())
        return files


def save(
    directory: Location,
    state: TrainState,
    world: World,
    info: Mapping[str, Any],
    sums: Mapping[str, Tensor],
    best: Mapping[str, Tensor] | None = None,
    events: bytes = b"",
) -> None:
    """Write a checkpoint and wait for it; every rank calls this. Raises CheckpointError if it cannot be written."""
    writer = Writer(world, state.generator.device)
    writer.begin(directory, state, info, sums, best, events)
    saved = writer.finish()
    if saved is not None and saved.fault:
        raise CheckpointError(f"{directory.uri}: cannot be written ({saved.fault})")


def _write_part(path: Location, data: bytes) -> dict[str, Any]:
    path.write(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _parts(
    state: TrainState, world: World, sums: Mapping[str, Tensor], best: Mapping[str, Tensor] | None
) -> dict[str, Mapping[str, Tensor]]:
    """The files this rank writes."""
    parts: dict[str, Mapping[str, Tensor]] = {}
    parts[rank_file(world.rank, world.size)] = {**sums, "generator": state.generator.get_state()}
    if state.replay is not None:
        parts[chains_file(world.rank, world.size)] = state.replay.tensors()
    if world.rank > 0:
        return parts
    parts["model.safetensors"] = state.network.state_dict()
    parts["optimizer.safetensors"] = optimizer_tensors(state.network, state.optimizer)
    if state.average is not None:
        parts["ema.safetensors"] = state.average.state_dict()
    if state.replay is not None and (sampler := sampler_tensors(state)):
        parts[SAMPLER] = sampler
    if best is not None:
        parts["best.safetensors"] = best
    return parts


def _non_finite(state: TrainState) -> str | None:
    """The name of a tensor that holds NaN or infinity."""
    tensors = dict(state.network.state_dict())
    if state.average is not None:
        tensors |= {f"the average's {name}": value for name, value in state.average.state_dict().items()}
    if state.replay is not None:
        tensors["the replay buffer"] = state.replay.chains
    floats = ((name, t) for name, t in tensors.items() if t.is_floating_point())
    return next((name for name, t in floats if not _finite(t)), None)


def _finite(tensor: Tensor) -> bool:
    """The sum tells nearly always, twenty times faster; one that overflows tells nothing."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
