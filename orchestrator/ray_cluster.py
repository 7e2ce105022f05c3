"""Ray: a private one on this machine or the cluster that RAY_ADDRESS names, and a Ray Train run on it."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jem.errors import ConfigError, Problem
from jem.files import Location
from orchestrator.config import RunConfig
from orchestrator.facts import ROOT, facts
from orchestrator.shared import word_in

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A call after ray.shutdown would join whatever cluster a file in /tmp names.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # How often the controller looks for reports and dead workers: a report waits for the next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

PRIVATE = {
    # How long a worker that is stopped (SIGSTOP) may stay before it is killed and its CPU is free.
    "RAY_actor_graceful_shutdown_timeout_ms": "5000",
    # Nobody takes this machine away, and the process that would watch for it delays the start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray's workers have niceness 15, so that each of its own processes, which wake many times a second, goes first.
    "RAY_worker_niceness": "0",
    # A Ray that can be no cluster, as on Windows and macOS, listens on the loopback alone. Read when ray is imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Else the address of the host's name, and the first network card's.
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
}
"""Of a Ray of our own."""

# A submitted job's own environment variables are kept, but for those set here: PYTHONPATH is extended.
JOINED = {
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    # How long workers may take to start: a machine that an autoscaler brings is up and installed in some minutes.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",
}

TOKEN = Path.home() / ".ray" / "auth_token"

RESIZE_EVERY_S = 15.0
"""How often an elastic run looks whether nodes have come."""

ELASTIC_START_TIMEOUT_S = "20"
"""A node that is lost is counted for some seconds more: the workers meant for it are not waited for any longer."""

ENDLESS = 1000

START_FAILURES = {"fixed": 3, "elastic": 30}
"""How often workers may fail to start, over the whole run: elastic ones do each time that a node is lost."""


@dataclass(frozen=True)
class Cluster:
    """What there is to run on."""

    private: bool  # started by us, on this machine, for this run
    cpus: float
    gpus: float
    memory: float = math.inf  # GiB, of all nodes


@contextmanager
def start_ray(config: RunConfig) -> Iterator[Cluster]:
    """Ray for a run, as long as the context lives."""
    with ray_session(config.max_workers, patience(config)) as cluster:
        _check(config, cluster)
        yield cluster


@contextmanager
def ray_session(cpus: int, settings: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Join the cluster at RAY_ADDRESS, or start a private Ray of `cpus` logical CPUs or more; left with the context.

    `settings`: environment variables of Ray's, besides those that all of our commands set.
    """
    address = os.environ.get("RAY_ADDRESS")
    for key, value in (QUIET | (JOINED if address else PRIVATE) | dict(settings or {})).items():
        os.environ.setdefault(key, value)
    import ray

    # The checkout that holds this file is what the workers import, wherever they start.
    path = os.pathsep.join(filter(None, [str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    variables = {key: os.environ[key] for key in QUIET} | {"PYTHONPATH": path}
    if address:
        ray.init(address=address, runtime_env={"env_vars": variables}, **quiet)
    else:
        # Ray's CPUs are logical: more workers than cores run, slowly, instead of waiting for ever.
        logical = max(os.cpu_count() or 1, cpus)
        environment = {"env_vars": variables}
        ray.init(address="local", num_cpus=logical, include_dashboard=False, runtime_env=environment, **quiet)
    try:
        with suppress(OSError):  # a secret that is mounted; the doctor tells of one that others can read
            TOKEN.chmod(0o600)  # Ray writes it readable for everybody
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0)
        if gpus and not address and not torch_sees_gpus():
            print(f"Ray counts {gpus:g} GPUs, but PyTorch can use none (python jobs/doctor.py)", file=sys.stderr)
            gpus = 0
        yield Cluster(not address, resources.get("CPU", 0), gpus, _memory(resources))
    finally:
        ray.shutdown()


def torch_sees_gpus() -> bool:
    """Ray counts what the driver tells of, NVIDIA's of any age and Apple's, too."""
    import torch

    return torch.cuda.is_available()


def _memory(resources: Mapping[str, float]) -> float:
    return resources["memory"] / 2**30 if "memory" in resources else math.inf


def leave_ray(patience_s: float) -> None:
    """End the workers whatever they do, from another thread than the one that waits for them."""
    import ray

    thread = threading.Thread(target=ray.shutdown, daemon=True, name="leave Ray")
    thread.start()
    thread.join(patience_s)  # a private Ray ends with this process at the latest, a joined one ends the job then


def train_on_ray(
    config: RunConfig,
    root: Location,
    log_path: Path,
    attempt: int,
    init_from: str | None,
    cluster: Cluster,
    until: int | None = None,
    place: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Run the worker function on every worker; what it returned on rank 0. Raises what Ray raises.

    `until`: a step at which the run stops as if asked to. `place`: the resources that a worker takes; none: a CPU, and
    a GPU where there is one for each.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from orchestrator.training import Job

    if not cluster.private and not root.is_local:  # the driver's log is filled from checkpoints, see Mirror
        log_path = log_path.with_name("events-of-rank-0.jsonl")
    gpu = use_gpu(config, cluster) if place is None else bool(place.get("GPU"))
    with word_in(root) as word:
        job = Job(config, root, log_path, attempt, init_from, facts(), until, word)
        trainer = (_private_trainer() if cluster.private else TorchTrainer)(
            _worker,
            # Ray sets OMP_NUM_THREADS for every worker; what the user said of it is known here alone.
            train_loop_config={"job": job, "threads": os.environ.get("OMP_NUM_THREADS") if cluster.private else None},
            scaling_config=ScalingConfig(
                num_workers=(config.min_workers, config.max_workers) if elastic(config) else config.max_workers,
                use_gpu=gpu,
                resources_per_worker=None if place is None else dict(place),
                elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            ),
            run_config=RunConfig(
                name=f"attempt-{attempt}",
                storage_path=(root / "ray").path,
                storage_filesystem=root.fs,
                failure_config=FailureConfig(
                    # the workers count for themselves, from one checkpoint to the next (checkpoints.py)
                    max_failures=ENDLESS if config.recovery.max_failures else 0,
                    controller_failure_limit=START_FAILURES["elastic" if elastic(config) else "fixed"],
                ),
            ),
        )
        return trainer.fit().return_value  # type: ignore[no-any-return]


def _private_trainer() -> type[TorchTrainer]:
    """Ray Train without two of its processes.

    One frees the workers' CPUs where a driver dies and its cluster lives on. It asks the dashboard, which a private
    Ray has not: `fit` would end up to 13 s late waiting for it. The other hands out Ray's datasets, which we have none
    of, and takes two seconds of a core to start.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class PrivateTrainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            unused = (PlacementGroupCleanerCallback, DatasetsCallback)
            return [callback for callback in callbacks if not isinstance(callback, unused)]

    return PrivateTrainer


def elastic(config: RunConfig) -> bool:
    return config.min_workers < config.max_workers


def patience(config: RunConfig) -> dict[str, str]:
    """Environment variables that say how long Ray Train waits for a worker to answer, and for workers to start."""
    answer = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.recovery.hang_timeout)}
    return answer | ({"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": ELASTIC_START_TIMEOUT_S} if elastic(config) else {})


def use_gpu(config: RunConfig, cluster: Cluster) -> bool:
    """Whether each worker gets a GPU."""
    if config.device == "auto":
        return cluster.gpus >= config.min_workers
    return config.device == "cuda"


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls on each worker: threads, device and world, then `orchestrator.worker.run`."""
    import ray.train
    import ray.train.torch
    import torch

    from jem.world import World
    from orchestrator.training import Job
    from orchestrator.worker import run

    job: Job = arguments["job"]
    context = ray.train.get_context()
    torch.set_num_threads(threads(arguments["threads"], context.get_local_world_size()))
    world, device = World.current(), ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's collectives use the current one

    def report(metrics: dict[str, float], uri: str) -> None:
        """Ray hears of the checkpoint and keeps none of it: what it would write could fail where ours did not."""
        ray.train.report({**metrics, "checkpoint": uri})

    return run(job, world, device, report)


def threads(said: str | None, workers_here: int) -> int:
    """Of a worker, instead of the one that Ray gives: workers on one machine share its cores evenly.

    `said`: OMP_NUM_THREADS, the most for each worker, so that two runs beside each other can share a machine.
    """
    share = max(1, cores() // workers_here)
    return min(share, int(said)) if said and said.isdecimal() and int(said) else share


def cores() -> int:
    """The cores that this process may use: its affinity, and a container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return allowed


def tell_of_gpus(config: RunConfig, cluster: Cluster) -> None:
    """Why a run that could use GPUs does not: too few for its workers, or none left by an autoscaler."""
    told = None
    if config.device == "auto" and 0 < cluster.gpus < config.min_workers:
        told = (
            f"{cluster.gpus:g} GPU{'s' * (cluster.gpus > 1)} for workers={config.workers}: it trains on CPUs; "
            f"workers={cluster.gpus:g} trains on what there is"
        )
    elif config.device == "auto" and not cluster.private and not cluster.gpus:
        told = "the cluster has no GPU at present: it trains on CPUs (device=cpu); device=cuda waits for GPUs"
    if told:
        print(told, file=sys.stderr)


def _check(config: RunConfig, cluster: Cluster) -> None:
    needed = config.min_workers
    tell_of_gpus(config, cluster)
    if config.device == "cuda" and cluster.gpus < needed and cluster.private:
        message = f"is {config.workers}, but there are {cluster.gpus:g} GPUs; lower it, or set device=cpu"
        raise ConfigError([Problem("workers", message)])
    has, what = (cluster.gpus, "GPUs") if config.device == "cuda" else (cluster.cpus, "CPUs")
    if has < needed:  # an autoscaler may bring them
        print(f"workers={config.workers}, the cluster has {has:g} {what} at present: waiting for more", file=sys.stderr)
