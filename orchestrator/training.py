"""A run on one rank, from its first step of this attempt to its last: train, log, save, evaluate."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jem import checkpoint
from jem.data.batches import BatchSource
from jem.data.sources import DataSet
from jem.errors import DivergedError
from jem.evaluate.evaluate import evaluate_fast, validate
from jem.files import Location
from jem.meter import Meter, named
from jem.settings import flatten
from jem.train import StepInfo, TrainState, dtype_of, frozen_logits, train
from jem.world import World
from orchestrator.config import RunConfig, shareable
from orchestrator.control import Control
from orchestrator.events import EventLog
from orchestrator.mirror import TAIL
from orchestrator.pictures import by_class, grid_png

log = logging.getLogger(__name__)

POOL = 400
"""Chains a picture is made of: enough that every class has ten."""

Report = Callable[[dict[str, float], str], None]
"""Called on every rank with the latest metrics and the URI of a checkpoint that has just been committed."""


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    config: RunConfig
    root: Location  # the run's folder
    log_path: Path  # of events.jsonl, where rank 0 runs
    attempt: int = 1
    init_from: str | None = None  # config.init_from as a path that can be read here
    facts: dict[str, Any] = field(default_factory=dict)  # versions and the like, for the checkpoints


@dataclass
class Training:
    """A run on one rank, from its first step of this attempt to its last."""

    job: Job
    world: World
    device: torch.device
    report: Report
    data: DataSet
    batches: BatchSource
    state: TrainState
    best: dict[str, Any] | None = None  # the best validation so far: {step, accuracy, nll, weights}
    metrics: dict[str, float] = field(default_factory=dict)  # the latest of each
    saved: Location | None = None  # the last checkpoint committed
    skipped: int = 0  # updates skipped in a row, as far as the host knows

    def __post_init__(self) -> None:
        self.config = self.job.config
        self.meter = Meter(self.device)
        self.log = EventLog(self.job.log_path) if self.world.rank == 0 else None
        self.logged = self.log.size if self.log else 0  # where the events begin that the next checkpoint carries
        self.clock = (self.state.step, time.monotonic())

    def run(self) -> dict[str, Any]:
        try:
            return self.train()
        finally:
            self.leave_tail()

    def train(self) -> dict[str, Any]:
        config, state = self.config, self.state
        self.event("attempt", attempt=self.job.attempt, step=state.step, workers=self.world.size)
        self.event("tags", tags=self.tags)
        wrapped = data_parallel(state.network, self.batches.at(state.step).images, self.world)
        control = Control(self.world, self.job.root, self.device)
        self.clock = (state.step, time.monotonic())
        for info in train(state, self.batches.at, config, config.steps, self.world, wrapped):
            self.meter.add(info, self.world)
            last = info.step == config.steps
            stopping = control.stop_requested(info.step)
            if last or info.step % config.tracking.every == 0:
                self.log_training(info)
            if last or info.step % config.evaluate.every == 0:
                self.validate()
            if last or info.step % config.tracking.images_every == 0:
                self.draw_chains()
            if last or stopping or info.step % config.checkpoint.every == 0:
                self.save()
            if stopping and not last:
                return self.outcome("stopped", f"stopped on request at step {info.step}, with a checkpoint")
        self.evaluate()
        return self.outcome("finished", "")

    def restore(self, manifest: checkpoint.Manifest) -> None:
        sums = checkpoint.restore(manifest, self.state, self.world, self.config.seed)
        self.meter.sums.copy_(sums["meter"])
        self.metrics = dict(manifest.info["metrics"])
        self.saved = manifest.directory
        if self.config.evaluate.final == "best" and manifest.info["best"] is not None:
            self.best = {**manifest.info["best"], "weights": manifest.tensors("best.safetensors")}

    def save(self) -> None:
        """Commit a checkpoint of this step; the events up to it are in it."""
        best = self.best if self.config.evaluate.final == "best" else None
        info = {
            "config": flatten(shareable(self.config)),
            "image_shape": list(self.data.image_shape),
            "classes": list(self.data.classes),
            "data_digest": self.data.digest,
            "final": self.final_weights,
            "best": {k: v for k, v in best.items() if k != "weights"} if best else None,
            "metrics": self.metrics,
            "facts": self.job.facts,
        }
        step = self.state.step
        directory = self.job.root / "checkpoints" / step
        carried = self.log.since(self.logged) if self.log else b""
        sums = {"meter": self.meter.sums}
        checkpoint.save(directory, self.state, self.world, info, sums, best and best["weights"], carried)
        self.event("checkpoint", step=step)
        self.logged = self.log.size if self.log else 0
        self.saved = directory
        if self.world.rank == 0:
            self.prune(directory)
        self.report(self.metrics, directory.uri)
        self.clock = (self.state.step, time.monotonic())  # the rate is that of training alone

    def prune(self, newest: Location) -> None:
        """Keep the newest few. Those of later steps were found damaged, or this run would not be before them."""
        found = checkpoint.committed(newest.parent)
        later = [d for d in found if int(d.name) > self.state.step]
        for directory in later + found[len(later) + self.config.checkpoint.keep :]:
            directory.remove()

    def log_training(self, info: StepInfo) -> None:
        """The training curves' point: means over all ranks and the steps since the last point."""
        figures = self.meter.read(self.world)
        every_one = figures["skipped"] == figures["steps"]
        self.skipped = self.skipped + round(figures["skipped"]) if every_one else 0
        if self.skipped >= self.config.recovery.max_skipped:
            raise DivergedError(
                f"step {info.step}: not one of the last {self.skipped} updates was finite; the weights are "
                f"those of step {info.step - self.skipped}. Lower optimizer.learning_rate, raise "
                "sgld.steps, data.noise_std or objective.energy_l2"
            )
        metrics = named(figures, self.config.objective, info.learning_rate)
        since, began = self.clock
        elapsed = time.monotonic() - began
        if info.step > since:
            metrics["train/images_per_s"] = (info.step - since) * self.config.batch_size / elapsed
        self.clock = (info.step, time.monotonic())
        self.log_metrics(metrics)

    def validate(self) -> None:
        weights = self.candidate()
        logits = frozen_logits(weights, self.config)
        figures = validate(logits, self.data.validation, self.config.evaluate, self.world, self.like)
        self.log_metrics({f"val/{key}": value for key, value in figures.items()})
        if self.config.evaluate.final == "best" and (self.best is None or _better(figures, self.best)):
            tensors = {key: value.detach().cpu().clone() for key, value in weights.state_dict().items()}
            self.best = {"step": self.state.step, **figures, "weights": tensors}
        self.clock = (self.state.step, time.monotonic())  # the rate is that of training alone

    def draw_chains(self) -> None:
        """A picture of rank 0's chains as they stand, a row a class where there are at most ten."""
        replay = self.state.replay
        if replay is None or self.world.rank > 0:
            return
        chains = replay.chains[:POOL]
        if self.data.n_classes <= 10:
            slots = torch.arange(len(chains), device=self.device)
            logits = frozen_logits(self.state.network, self.config)
            with torch.no_grad():
                classes = replay.labels(slots) if self.config.sgld.conditional else logits(chains).argmax(dim=1)
            chains = by_class(chains, classes, self.data.n_classes)
        path = f"samples/{self.state.step:08d}.png"
        picture = grid_png(chains[:100], columns=10)
        (self.job.root / path).write(picture)
        if not self.job.root.is_local:  # the uploader sends what lies beside the log
            Location.of(self.job.log_path.parent / path).write(picture)
        self.event("image", step=self.state.step, key="samples", path=path)
        self.clock = (self.state.step, time.monotonic())

    def evaluate(self) -> None:
        if self.config.evaluate.suite == "none":
            return
        logits = frozen_logits(self.final_network(), self.config)
        self.log_metrics(evaluate_fast(logits, self.data, self.config.evaluate, self.world, self.like))

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics
        self.event("metrics", step=self.state.step, metrics=metrics)

    def event(self, kind: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.append(kind, **fields)

    def leave_tail(self) -> None:
        """Where the driver does not see the log: what was logged since the last checkpoint."""
        if self.log is not None and not self.job.root.is_local:
            try:
                (self.job.root / TAIL).write(self.log.since(self.logged))
            except OSError as error:  # the run is what it is; only these events are late
                log.warning("%s cannot be written: %s", (self.job.root / TAIL).uri, error)

    def outcome(self, status: str, message: str) -> dict[str, Any]:
        return {
            "status": status,
            "step": self.state.step,
            "checkpoint": self.saved.uri if self.saved else None,
            "metrics": self.metrics,
            "weights": self.final_weights,
            "message": message,
        }

    @property
    def tags(self) -> dict[str, str]:
        """What only a worker knows of where it runs, and on which data."""
        gpu = self.device.type == "cuda"
        sizes = {f"data.{name}": str(len(split)) for name, split in self.data.splits.items()}
        return {
            "workers": str(self.world.size),
            "device": torch.cuda.get_device_name(self.device) if gpu else "cpu",
            "threads": str(torch.get_num_threads()),
            "data.digest": self.data.digest,
            **sizes,
        }

    @property
    def like(self) -> Tensor:
        """Of the device and dtype of the network's inputs."""
        return torch.zeros((), device=self.device, dtype=dtype_of(self.config))

    @property
    def final_weights(self) -> str:
        """Which of a checkpoint's weights are the model: `model`, `ema` or `best`."""
        if self.config.evaluate.final == "best" and self.best is not None:
            return "best"
        return "ema" if self.config.evaluate.ema else "model"

    def candidate(self) -> nn.Module:
        """The weights that validation looks at."""
        return self.state.average if self.config.evaluate.ema and self.state.average else self.state.network

    def final_network(self) -> nn.Module:
        network = self.candidate()
        if self.final_weights == "best" and self.best is not None:
            network = copy.deepcopy(network)
            network.load_state_dict(self.best["weights"])
        return network


def data_parallel(network: nn.Module, images: Tensor, world: World) -> nn.Module | None:
    """The network in DistributedDataParallel where there are several ranks. Buffers are averaged by the step.

    It lays out its buckets anew after the first backward pass, and the layout is the order in which gradients
    are summed. That pass is spent here, on zeros like `images`: a run that goes on sums as one never stopped.
    """
    if world.size == 1:
        return None
    devices = [images.device.index] if images.device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    network.eval()
    wrapped(torch.zeros_like(images[:1])).sum().backward()
    network.zero_grad()
    return wrapped


def _better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Higher validation accuracy, or the same and a lower NLL."""
    return (one["accuracy"], -one["nll"]) > (other["accuracy"], -other["nll"])
