"""How many trials of a sweep run at once: what one takes, and what there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from jem.errors import ConfigError, Problem
from orchestrator.ray_cluster import cores
from orchestrator.sweep.config import Sweep

GIB = 2.0**30
SLACK = 1e-9  # three trials of a third of a CPU fit one CPU


@dataclass(frozen=True)
class Fit:
    """What a trial takes, over all of its workers, and how many run at once."""

    at_once: int
    cpu_each: float
    gpu_each: float
    memory_each: float  # GiB
    why: str  # the sum, in words


@dataclass(frozen=True)
class _Need:
    what: str
    unit: str
    each: float  # a trial
    there: float
    key: str  # of what a worker is given
    remedy: str

    @property
    def trials(self) -> float:
        if not self.each:
            return math.inf
        if self.what == "GPUs" and self.each < 1:  # none of them is of two GPUs
            return math.floor(self.there) * math.floor(1 / self.each + SLACK)
        return math.floor(self.there / self.each + SLACK)

    def sum(self, trials: int, workers: int) -> str:
        """Trials x (driver + workers): a trial's driver only waits, and takes nothing."""
        worker = f"{self.each / workers:g}{self.unit}"
        return f"{trials} x (0 + {workers} x {worker}) = {trials * self.each:g}{self.unit} {self.what}"


SHARE = 0.001
"""Of a custom resource that a worker takes: any number of them fit one machine that has it."""


def fit(sweep: Sweep, cpus: float, gpus: float, memory_gib: float, grows: bool = False) -> Fit:
    """How many trials run at once where there are so many CPUs, GPUs and GiB.

    A trial takes what its workers take, the most of them if it is elastic. Raises ConfigError if not even one fits,
    or fewer than `concurrency`, with the sum and what to change. `grows`: of a cluster `concurrency` is asked for
    whatever is there: an autoscaler may bring what is missing, and until then trials wait.
    """
    config, workers = sweep.config, sweep.run.max_workers
    memory = config.resources.memory
    needs = [
        _Need("CPUs", "", workers * config.resources.cpu, cpus, "resources.cpu", "workers or resources.cpu"),
        _Need("memory", " GiB", workers * memory, memory_gib, "resources.memory", "workers or resources.memory"),
    ]
    gpu = gpus_a_worker(sweep, gpus)
    if gpu:
        remedy = "workers or resources.gpu (0.5: two share one), or set device=cpu"
        needs.append(_Need("GPUs", "", workers * gpu, gpus, "resources.gpu", remedy))
    if config.resources.label is not None and not grows:
        message = (
            f"is {config.resources.label!r}: machines of that kind are a cluster's; set RAY_ADDRESS, or leave it out"
        )
        raise ConfigError([Problem("resources.label", message)])
    whose = "the arms" if sweep.arms else "budget.trials" if sweep.trials >= sweep.finals else "the finalists"
    limits: dict[str, float] = {whose: max(sweep.trials, sweep.finals)}
    if not grows or config.concurrency is None:
        problems = list(_impossible(needs, workers, config.concurrency, grows))
        if problems:
            raise ConfigError(problems)
        limits |= {f"the {need.what}": need.trials for need in needs}
    if config.concurrency is not None:
        limits["concurrency"] = config.concurrency
    at_once = int(min(limits.values()))
    by = next(name for name, most in limits.items() if most == at_once)
    sums = "; ".join(f"{need.sum(at_once, workers)} of {need.there:.4g}{need.unit}" for need in needs)
    each = {need.what: need.each for need in needs}
    why = f"trials x (driver + workers): {sums}; limited by {by}"
    return Fit(at_once, each["CPUs"], each.get("GPUs", 0.0), each["memory"], why)


def gpus_a_worker(sweep: Sweep, gpus: float) -> float:
    """GPUs that a worker is given where there are so many: with device=auto one if there are enough for a trial."""
    asked = sweep.config.resources.gpu
    if asked is not None:
        return asked
    there = sweep.run.device == "auto" and gpus >= sweep.run.min_workers
    return 1.0 if sweep.run.device == "cuda" or there else 0.0


def worker_resources(sweep: Sweep, gpus: float) -> dict[str, float]:
    """What Ray gives a worker of a trial of several, where there are so many GPUs."""
    wanted, gpu = sweep.config.resources, gpus_a_worker(sweep, gpus)
    found = {"CPU": wanted.cpu} | ({"GPU": gpu} if gpu else {})
    return found | ({wanted.label: SHARE} if wanted.label else {})


def machine() -> tuple[float, float, float]:
    """This machine's CPUs, GPUs and GiB of memory; a container's where it has less."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # those of too old a driver are counted, too
    return float(cores()), float(gpus), _memory() / GIB


def _memory() -> float:
    there = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return float(min(there, int(Path(path).read_text())))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return float(there)


def _impossible(needs: list[_Need], workers: int, concurrency: int | None, grows: bool) -> Iterator[Problem]:
    for need in needs:
        there = f"of which there are {need.there:.4g}{need.unit}"
        if need.trials < 1:
            message = f"is {need.each / workers:g}, but a single trial takes {need.sum(1, workers)}, {there}"
            more = ", or set concurrency=N: so many are asked for, and an autoscaler brings what they take" * grows
            yield Problem(need.key, f"{message}; lower {need.remedy}{more}")
        elif concurrency is not None and need.trials < concurrency:
            message = f"is {concurrency}, which takes {need.sum(concurrency, workers)}, {there}"
            yield Problem("concurrency", f"{message}; use at most {need.trials}, or lower {need.remedy}")
