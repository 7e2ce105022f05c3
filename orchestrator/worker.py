"""What every worker runs: set up or restore, then train. It knows torch and files, not Ray.

Ray Train calls `run` on each worker (see ray_cluster.py); tests call it in one process, or in several that
gloo connects.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jem import checkpoint
from jem.data.batches import BatchSource
from jem.data.sources import load
from jem.errors import CheckpointError, DataError, JEMError
from jem.files import Location
from jem.train import dtype_of, prepare_first_step, start
from jem.world import World
from orchestrator.initialize import initialize_from
from orchestrator.training import Job, Report, Training

T = TypeVar("T")


def run(job: Job, world: World, device: torch.device, report: Report = lambda *_: None) -> dict[str, Any]:
    """Train to the end or until stopped; `{status, step, checkpoint, metrics, weights, message}`.

    Every rank returns the same. A failure that trying again would not mend (JEMError) is returned as a
    status too, so that Ray does not retry it; anything else is raised.
    """
    try:
        return setup(job, world, device, report).run()
    except JEMError as error:
        return {"status": error.status, "exit_code": error.exit_code, "message": str(error)}


def setup(job: Job, world: World, device: torch.device, report: Report) -> Training:
    """Data, network, chains, and the newest good checkpoint if there is one; the same error on every rank."""
    config = job.config
    data = together(world, lambda: load(config.data))
    same_everywhere(world, job.root, data.digest)
    found = together(world, lambda: find_checkpoint(job.root / "checkpoints") if world.rank == 0 else None)
    found = from_rank_0(world, found)

    def prepare() -> Training:
        dtype = dtype_of(config)
        batches = BatchSource(data.train, config.data, config.batch_size, config.seed, device, world.share, dtype)
        state = start(config, data.image_shape, data.n_classes, world, device)
        training = Training(job, world, device, report, data, batches, state)
        if found is not None:
            manifest = checkpoint.read_manifest(found)
            if manifest.info["data_digest"] != data.digest:
                remedy = "put them back as they were, or give the run another name="
                changed = f"data.name={config.data.name}: the images or labels are not those the run began with"
                raise DataError(f"{changed} (digest {data.digest[:12]}, {found.uri} has another); {remedy}")
            training.restore(manifest)
        elif job.init_from is not None:
            initialize_from(job.init_from, state, world)
        elif config.model.norm == "act":
            whole = BatchSource(data.train, config.data, config.batch_size, config.seed, device, World().share, dtype)
            prepare_first_step(state, whole.at(0).images)
        return training

    return together(world, prepare)


def same_everywhere(world: World, root: Location, digest: str) -> None:
    """DataError on every rank unless all ranks see the same folder for the run and hold the same data."""
    if world.size == 1:
        return
    token = from_rank_0(world, uuid.uuid4().hex)
    path = root / "same-folder"
    if world.rank == 0:
        path.write(token.encode())
    world.barrier()
    seen = path.exists() and path.read().decode() == token
    told: list[tuple[str, bool, str]] = [("", False, "")] * world.size
    dist.all_gather_object(told, (socket.gethostname(), seen, digest))
    if world.rank == 0:
        path.remove()
    apart = sorted({host for host, sees, _ in told if not sees})
    if apart:
        remedy = "storage_path must be a folder that all nodes share, or an object store"
        raise DataError(f"{root.uri} on {', '.join(apart)} is not the folder that rank 0 on {told[0][0]} has: {remedy}")
    others = sorted({host for host, _, theirs in told if theirs != told[0][2]})
    if others:
        raise DataError(f"the data on {', '.join(others)} are not those on {told[0][0]}: put the same under data.root")


def find_checkpoint(root: Location) -> Location | None:
    """The newest good checkpoint; None where there never was one, CheckpointError where none is good."""
    manifest, faults = checkpoint.newest_good(root)
    if manifest is None and faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        remedy = "restore one of them from a backup, or start anew with --fresh"
        raise CheckpointError(f"{root.uri}: no checkpoint is as it was written:\n{listed}\n{remedy}")
    return manifest.directory if manifest else None


def together(world: World, function: Callable[[], T]) -> T:
    """Call `function`; if it raises a JEMError on any rank, raise that on every rank."""
    value, error = None, None
    try:
        value = function()
    except JEMError as raised:
        error = raised
    if world.size > 1:
        errors: list[JEMError | None] = [None] * world.size
        dist.all_gather_object(errors, error)
        error = next((e for e in errors if e is not None), None)
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def from_rank_0(world: World, value: T) -> T:
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
