"""What every worker runs: set up or restore, then train. It knows torch and files, not Ray.

Ray Train calls `run` on each worker (see ray_cluster.py); tests call it in one process, or in several that
gloo connects.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from jem import checkpoint
from jem.data.batches import BatchSource
from jem.data.sources import load
from jem.errors import DataError, JEMError, StorageError
from jem.prior import fit_classes, make_prior
from jem.train import dtype_of, prepare_first_step, start
from jem.world import World
from orchestrator.agreement import on_rank_0, same_data, same_folder
from orchestrator.checkpoints import Checkpoints, Superseded, find, write_failure
from orchestrator.config import RunConfig
from orchestrator.initialize import initialize_from
from orchestrator.recovery import Recovery, read_recovery
from orchestrator.training import Job, Report, Training

ELASTIC_STARTS = 30


def run(job: Job, world: World, device: torch.device, report: Report = lambda *_: None) -> dict[str, Any]:
    """Train to the end or until stopped; `{status, step, checkpoint, metrics, weights, message}`.

    Every rank returns the same. A failure that trying again would not mend (JEMError, but for StorageError) is
    returned as a status too, so that Ray does not retry it; anything else is raised.
    """
    if job.config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(job.config.deterministic)  # or not: a trial's process may have had another
    try:
        return setup(job, world, device, report).run()
    except StorageError:
        write_failure(job.root, world)
        raise
    except JEMError as error:
        return {"status": error.status, "exit_code": error.exit_code, "message": str(error)}
    except Superseded:
        raise
    except Exception:
        write_failure(job.root, world)
        raise


def setup(job: Job, world: World, device: torch.device, report: Report) -> Training:
    """Data, network, chains, and the newest good checkpoint if there is one; the same error on every rank."""
    config = job.config
    checkpoints = Checkpoints(world, job.root, config.checkpoint, device, config.recovery.healthy_steps)
    same_folder(world, job.root, job.word)
    checkpoints.claim(job.attempt, patience(config), config.recovery.hang_timeout)
    data = world.together(lambda: load(config.data))
    same_data(world, data.digest)
    recovery = on_rank_0(world, lambda: read_recovery(job.root, config))
    manifest, faults = on_rank_0(world, lambda: find(job.root, config, recovery))
    gaussian = on_rank_0(world, lambda: fit_classes(config, data.train, data.n_classes))  # one fit for all

    def prepare() -> Training:
        dtype, n = dtype_of(config), data.n_classes
        batches = BatchSource(data.train, config.data, config.batch_size, config.seed, device, world.share, dtype, n)
        prior = make_prior(config, data.train, data.n_classes, gaussian, device)
        state = start(config, data.image_shape, data.n_classes, world, device, prior)
        training = Training(job, world, device, report, data, batches, state, checkpoints, recovery)
        if manifest is not None:
            if manifest.info["data_digest"] != data.digest:
                remedy = "put them back as they were, or give the run another name="
                changed = f"data.name={config.data.name}: the images or labels are not those the run began with"
                digests = f"digest {data.digest[:12]}, {manifest.directory.uri} has another"
                raise DataError(f"{changed} ({digests}); {remedy}")
            training.restore(manifest)
            training.began = _why(manifest, faults, recovery, world, device)
        elif job.init_from is not None:
            initialize_from(job.init_from, state, world, config)
        elif config.model.norm == "act":
            whole = BatchSource(
                data.train, config.data, config.batch_size, config.seed, device, World().share, dtype, n
            )
            prepare_first_step(state, whole.at(0).images)
        return training

    return world.together(prepare)


def patience(config: RunConfig) -> int:
    """How often workers may die without a new checkpoint. Elastic ones are also started anew when nodes come."""
    most = config.recovery.max_failures
    return max(most, ELASTIC_STARTS) if config.min_workers < config.max_workers else most


def _why(
    manifest: checkpoint.Manifest, faults: list[str], recovery: Recovery, world: World, device: torch.device
) -> str:
    """Why the run goes on from just this checkpoint, and whether exactly."""
    told = ["its newest checkpoint"] if not faults else [f"the newest good checkpoint; damaged: {'; '.join(faults)}"]
    if "fork" in manifest.info:
        told = [manifest.info["fork"]["why"]]
    if recovery.count > manifest.info["rollbacks"]:
        told.append(f"rollback {recovery.rollbacks[-1]}")
    if manifest.world_size != world.size:
        told.append(f"{manifest.world_size} workers wrote it, {world.size} go on: chains are shared anew")
    if manifest.device != device.type:
        told.append(f"it was written on {manifest.device}, {device.type} goes on")
    return "; ".join(told)
