"""Where an evaluation is computed: in this process, or dealt out to Ray workers. The figures are the same bits.

On a CPU each process computes with one thread, as float32 sums depend on how threads share them; several cores are
used by several workers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from jem.errors import ConfigError, Problem
from jem.evaluate.passes import Part, Pass, run_pass
from jem.evaluate.suite import Dealt, Subjects, compute_here
from jem.train import dtype_of
from jem.world import World
from orchestrator.config import RunConfig
from orchestrator.ray_cluster import Cluster, ray_session
from orchestrator.score_ray import interruptibly


class Progress:
    """How far a command is, on stderr: a bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._bar: Bar | None = None
        self._total, self._done, self._told = 0, 0.0, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, total: int) -> None:
        self._total = total
        if sys.stderr.isatty() and total:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=sys.stderr), transient=True)
            self._bar.add_task(self._doing, total=total)
            self._bar.start()

    def add(self, part: float) -> None:
        self._done += part
        tenths = int(10 * self._done / max(1, self._total) + 1e-9)  # parts add up to a little less
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif tenths > self._told:
            self._told = tenths
            print(f"{self._doing}: {10 * self._told} %", file=sys.stderr, flush=True)


def _cost(subjects: Subjects) -> int:
    return sum(subjects.cost(which) for which in subjects.passes)


def device_here(config: RunConfig) -> torch.device:
    """A GPU where there is one and `config.device` allows it. ConfigError for cuda where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Problem("device", "is cuda, but PyTorch sees no GPU here; set device=cpu")])
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def compute_in_this_process(network: nn.Module, config: RunConfig, device: torch.device, progress: Progress) -> Dealt:
    """All passes, on `device`."""

    def compute(subjects: Subjects) -> dict[Pass, Tensor]:
        progress.begin(_cost(subjects))

        def on_part(which: Pass, images: float) -> None:
            progress.add(images * subjects.cost(which) / len(subjects.images[which.images]))

        like = torch.zeros((), device=device, dtype=dtype_of(config))
        network.requires_grad_(False)  # attacks by foolbox would compute the weights' gradients, too
        with one_thread():
            on_device = network.to(device)
            dealt = compute_here(on_device, config, config.evaluate, World(), like, on_part)
            found = dict(dealt(subjects))
            network.cpu()
        return found

    return compute


def compute_on_ray(network: nn.Module, config: RunConfig, workers: int, progress: Progress) -> Dealt:
    """Spread over `workers` Ray actors, a GPU each where the cluster has as many."""

    def compute(subjects: Subjects) -> dict[Pass, Tensor]:
        return interruptibly(lambda: spread(subjects))

    def spread(subjects: Subjects) -> dict[Pass, Tensor]:
        with ray_session(workers) as cluster:
            import ray

            progress.begin(_cost(subjects))
            _check(cluster, workers, config.device)
            gpus = config.device == "cuda" or (config.device == "auto" and cluster.gpus >= workers)
            actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Evaluator)
            held = ray.put((network, config))
            actors = [actor.remote(held, rank, workers, gpus) for rank in range(workers)]
            images = {name: ray.put(subjects.images[name]) for name in {which.images for which in subjects.passes}}
            pending: dict[Any, Pass] = {
                one.run.remote(which, images[which.images], subjects.labels.get(which.images)): which
                for which in subjects.passes
                for one in actors
            }
            found: dict[Pass, Tensor] = {}
            while pending:
                (ready, *_), _ = ray.wait(list(pending))
                which = pending.pop(ready)
                part = ray.get(ready)
                found[which] = found[which] + part if which in found else part.clone()
                progress.add(subjects.cost(which) / workers)
            return {which: found[which] for which in subjects.passes}

    return compute


def _check(cluster: Cluster, workers: int, device: str) -> None:
    """Raise ConfigError for workers that would wait for ever; to a cluster an autoscaler may bring what is missing."""
    has, what = (cluster.gpus, "GPUs") if device == "cuda" else (cluster.cpus, "CPUs")
    if has < workers and not cluster.private:
        told = f"workers={workers}, the cluster has {has:g} {what} at present: waiting for more"
        print(told, file=sys.stderr, flush=True)
    elif has < workers:
        message = f"is {workers}, the cluster has {has:g} {what}; lower it" + (
            ", or set device=cpu" * (device == "cuda")
        )
        raise ConfigError([Problem("workers", message)])


class _Evaluator:
    """A Ray actor: it has the network, and computes its share of the batches of each pass."""

    def __init__(self, held: tuple[nn.Module, RunConfig], rank: int, workers: int, gpu: bool) -> None:
        self.network, self.config = held
        torch.set_num_threads(1)
        # all GPUs of a machine are visible to an actor that was given none
        cuda = gpu and (torch.cuda.is_available() or self.config.device == "cuda")
        self.like = torch.zeros((), device="cuda" if cuda else "cpu", dtype=dtype_of(self.config))
        self.network.to(self.like.device).requires_grad_(False)
        self.part = Part(rank, workers)

    def run(self, which: Pass, images: Tensor, labels: Tensor | None) -> Tensor:
        settings = self.config.evaluate
        part = run_pass(self.network, which, images, self.config, settings, self.part, self.like, labels=labels)
        return part.cpu()


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
