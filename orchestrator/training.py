"""A run on one rank, from its first step of this attempt to its last: train, log, save, evaluate."""

from __future__ import annotations

import copy
import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jem import checkpoint
from jem.checkpoint import Manifest
from jem.data.augment import to_float
from jem.data.batches import Batch, BatchSource
from jem.data.sources import DataSet
from jem.energy import Logits
from jem.errors import DivergedError, JEMError
from jem.evaluate.evaluate import over_batches, validate
from jem.evaluate.sampled import gen_tags
from jem.evaluate.suite import compute_here, evaluate
from jem.files import Location
from jem.health import Health
from jem.meter import Meter, named
from jem.randomness import generator
from jem.saving import Saved
from jem.settings import flatten
from jem.train import StepInfo, TrainState, data_parallel, dtype_of, frozen_logits, train
from jem.world import World
from orchestrator import events
from orchestrator.agreement import on_rank_0
from orchestrator.checkpoints import Checkpoints, find_for_rollback
from orchestrator.config import RunConfig, shareable
from orchestrator.control import Control
from orchestrator.events import EventLog
from orchestrator.facts import machine
from orchestrator.final_model import calibrate
from orchestrator.mirror import TAIL
from orchestrator.pictures import by_class, grid_png
from orchestrator.recovery import Recovery, Rollback, write_recovery
from orchestrator.shared import Word
from orchestrator.watchdog import Watchdog

log = logging.getLogger(__name__)

POOL = 400
"""Chains a picture is made of: enough that every class has ten."""

TRACKING, HEALTH = 0, 1
"""Who reads the meter: each has sums of its own."""

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
    until: int | None = None  # a step at which the run stops as if asked to
    word: Word | None = None  # left in the run's folder by the driver, for workers elsewhere to look for


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
    checkpoints: Checkpoints
    recovery: Recovery
    best: dict[str, Any] | None = None  # the best validation so far: {step, accuracy, nll, weights}
    metrics: dict[str, float] = field(default_factory=dict)  # the latest of each
    saved: Location | None = None  # the last checkpoint committed
    began: str = "a new run"  # why it goes on from the step it does
    stopping: bool = False  # a request to stop was seen
    calibrated: dict[str, Any] | None = None  # see final_model.calibrate
    evaluated: dict[str, Any] | None = None  # the report of the evaluation at the end, see jem/evaluate/report.py

    def __post_init__(self) -> None:
        self.config = self.job.config
        self.meter = Meter(self.device, readers=2)
        self.health = Health.of(self.config.objective, self.data.n_classes)
        self.control = Control(self.world, self.job.root, self.device)
        self.watchdog = Watchdog(self.config.recovery.hang_timeout)
        self.log = EventLog(self.job.log_path) if self.world.rank == 0 else None
        self.logged = self.log.size if self.log else 0  # where the events begin that the next checkpoint carries
        self.carried = self.logged  # up to where the one under way carries them
        self.clock = (self.state.step, time.monotonic())

    def run(self) -> dict[str, Any]:
        try:
            return self.train()
        except DivergedError as error:
            return self.given_up(error)
        finally:
            self.leave_tail()

    def train(self) -> dict[str, Any]:
        config, state = self.config, self.state
        self.tell_of_rollbacks()
        self.event("attempt", attempt=self.job.attempt, step=state.step, workers=self.world.size, why=self.began)
        self.event("tags", tags=self.tags)
        wrapped = data_parallel(state.network, self.batch_at(state.step).images, self.world)
        with self.watchdog:
            if self.saved is None:  # divergence before the next one has something to go back to
                fault = self.save()
                if fault is not None:
                    raise DivergedError(fault)
            self.clock = (state.step, time.monotonic())
            while state.step < config.steps:
                if self.job.until is not None and state.step >= self.job.until:
                    return self.stop()
                settings, until = self.recovery.settings(state.step)
                for info in train(state, self.batch_at, settings, until, self.world, wrapped):
                    fault = self.after(info)
                    if fault is not None:
                        self.roll_back(fault)
                        break
                    if self.stopping and info.step < config.steps:
                        return self.stop()
                    if info.step == self.job.until:
                        break
        self.calibrate()  # first: the trained model is there, whatever becomes of its evaluation
        return self.outcome("finished", self.evaluate())  # not watched: it may take minutes without a batch

    def batch_at(self, step: int) -> Batch:
        """This rank's part of a batch; streamed, it is read from files, and each rank reads its own."""
        try:
            return self.batches.at(step)
        except JEMError as error:
            if self.world.size == 1:
                raise
            # The other ranks do not know: to return its status here would leave them waiting for this one's gradients.
            raise RuntimeError(str(error)) from error

    def after(self, info: StepInfo) -> str | None:
        """What is due after a step; why the run has diverged, if it has."""
        config, last = self.config, info.step == self.config.steps
        self.watchdog.touch()
        self.meter.add(info, self.world)
        if last or info.step % config.recovery.every == 0:
            fault = self.health.judge(self.meter.read(self.world, HEALTH), last)
            if fault is not None:
                return fault
        if last or info.step % config.tracking.every == 0:
            self.log_training(info)
        if last or info.step % config.evaluate.every == 0:
            try:
                self.validate()
            except DivergedError as error:
                return str(error)
        if last or info.step % config.tracking.images_every == 0:
            self.draw_chains()
        if last:
            return self.save_surely()
        fault = self.save() if info.step % config.checkpoint.every == 0 else None
        if fault is None and self.control.due(info.step):
            self.stopping = self.control.stop_requested(info.step)
            self.checkpoints.watch_claim()
            self.settle(self.checkpoints.poll())
        return fault

    def stop(self) -> dict[str, Any]:
        """A checkpoint of this step, if it has none yet, and the outcome."""
        step = self.state.step
        self.settle(self.checkpoints.finish(self.watchdog.touch))  # it may be of this very step
        fault = None if self.saved and self.saved.name == str(step) else self.save()
        self.settle(self.checkpoints.finish(self.watchdog.touch))
        if self.saved is None or self.saved.name != str(step):
            kept = self.saved.uri if self.saved else "there is none"
            reason = fault or "it cannot be written, see the log"
            return self.outcome("stopped", f"stopped on request at step {step}, its checkpoint: {reason}; last: {kept}")
        return self.outcome("stopped", f"stopped on request at step {step}, with a checkpoint")

    def given_up(self, error: DivergedError) -> dict[str, Any]:
        """Nothing is left to try: the outcome is the newest checkpoint from before the divergence."""

        def newest_good() -> Manifest | None:
            good = self.recovery.good(self.state.step, self.checkpoints.staying())
            return checkpoint.newest_good(self.checkpoints.folder / step for step in good)[0]

        manifest = on_rank_0(self.world, newest_good)
        outcome = {"status": error.status, "exit_code": error.exit_code, "message": str(error), "step": 0}
        if manifest is None:
            return outcome
        info = manifest.info
        told = {"checkpoint": manifest.directory.uri, "metrics": info["metrics"], "weights": info["final"]}
        return outcome | told | {"step": manifest.step}

    def restore(self, manifest: Manifest) -> None:
        """Go on from a checkpoint; after a rollback that it does not know of, or from another run's, with another
        chain seed.
        """
        sums = checkpoint.restore(manifest, self.state, self.world, self.config.seed)
        state, info, made = self.state, manifest.info, self.recovery.count
        self.meter.load(sums["meter"])
        self.health = Health.of(self.config.objective, self.data.n_classes)
        self.health.load(info["health"])
        self.metrics = dict(info["metrics"])
        self.saved = self.checkpoints.newest = manifest.directory
        self.best = None
        if self.config.evaluate.final == "best" and info["best"] is not None:
            self.best = {**info["best"], "weights": manifest.tensors("best.safetensors")}
        reasons = [f"rollback {made}"] if made > info["rollbacks"] else []
        reasons += [f"fork {info['fork']['id']}"] if "fork" in info else []
        if reasons:
            parts = (self.config.seed, "chains", self.world.rank, self.world.size, state.world_epoch, state.step)
            state.generator = generator(self.device, *parts, *reasons)

    def roll_back(self, reason: str) -> None:
        """Go back to a checkpoint from before the divergence, all ranks together, and on with the next remedy.

        Raises DivergedError if there is nothing left to try.
        """
        diverged_at = self.state.step
        # which one to go back to must not depend on the disk's pace
        self.settle(self.checkpoints.finish(self.watchdog.touch))

        def choose() -> tuple[Rollback, Manifest]:
            steps = self.checkpoints.staying()
            planned = self.recovery.next(diverged_at, reason, steps)
            manifest = find_for_rollback(self.checkpoints.folder, steps, planned.to)
            rollback = replace(planned, to=manifest.step)
            try:
                self.checkpoints.check_claim()
                write_recovery(self.job.root, Recovery(self.config, [*self.recovery.rollbacks, rollback]))
            except OSError as error:
                raise JEMError(f"{self.job.root.uri}: the rollback cannot be written down ({error})") from error
            self.checkpoints.remove_after(manifest.step)
            return rollback, manifest

        rollback, manifest = on_rank_0(self.world, choose)
        self.recovery.rollbacks.append(rollback)
        self.world.together(lambda: self.restore(manifest))
        self.control.went_back(self.state.step)
        self.tell_of(rollback)
        self.clock = (self.state.step, time.monotonic())

    def tell_of_rollbacks(self) -> None:
        """A death right after a rollback was written down left the log without it."""
        if self.log is None or not self.job.root.is_local:  # elsewhere the log may be another machine's
            return
        told = {event["number"] for event in events.read(self.log.path)[0] if event["kind"] == "rollback"}
        for rollback in self.recovery.rollbacks:
            if rollback.number not in told:
                self.tell_of(rollback)

    def tell_of(self, rollback: Rollback) -> None:
        fields = {"number": rollback.number, "level": rollback.level, "remedy": rollback.tried}
        self.event("rollback", step=rollback.to, from_step=rollback.diverged_at, reason=rollback.reason, **fields)

    def save(self) -> str | None:
        """Start writing a checkpoint of this step, which carries the events up to it; what is not finite, if so."""
        self.settle(self.checkpoints.finish(self.watchdog.touch))
        best = self.best if self.config.evaluate.final == "best" else None
        info = {
            "config": flatten(shareable(self.config)),
            "image_shape": list(self.data.image_shape),
            "classes": list(self.data.classes),
            "data_digest": self.data.digest,
            "final": self.final_weights,
            "best": {k: v for k, v in best.items() if k != "weights"} if best else None,
            "metrics": self.final_metrics,
            "facts": self.job.facts,
            "health": self.health.state(),
            "rollbacks": self.recovery.count,
            "regular": self.state.step % self.config.checkpoint.every == 0,
        }
        carried = self.log.since(self.logged) if self.log else b""
        self.carried = self.log.size if self.log else 0
        try:
            self.checkpoints.begin(self.state, info, {"meter": self.meter.sums}, best and best["weights"], carried)
        except DivergedError as error:
            return str(error)
        self.clock = (self.state.step, time.monotonic())  # the rate is that of training alone
        return None

    def save_surely(self) -> str | None:
        """The last checkpoint: waited for, and tried again as often as `checkpoint.max_failures` allows."""
        while self.saved is None or self.saved.name != str(self.state.step):
            fault = self.save()
            if fault is not None:
                return fault
            self.settle(self.checkpoints.finish(self.watchdog.touch))
        return None

    def settle(self, saved: Saved | None) -> None:
        """Tell what came of a checkpoint. Raises JEMError after too many failures in a row."""
        if saved is None:
            return
        if saved.fault is not None:
            self.event("failed_checkpoint", step=saved.step, reason=saved.fault, newest=self.saved and self.saved.uri)
            self.checkpoints.give_up_if_hopeless()
            return
        self.event("checkpoint", step=saved.step, rollbacks=self.recovery.count)
        self.logged, self.saved = self.carried, saved.directory
        self.report(self.metrics, saved.directory.uri)

    def log_training(self, info: StepInfo) -> None:
        """The training curves' point: means over all ranks and the steps since the last point."""
        metrics = named(self.meter.read(self.world, TRACKING), self.config.objective, info.learning_rate)
        if self.state.chain_length is not None:
            metrics["train/chain_steps"] = round(self.state.chain_length.item())
        since, began = self.clock
        elapsed = time.monotonic() - began
        if info.step > since:
            metrics["train/images_per_s"] = (info.step - since) * self.config.batch_size / elapsed
        self.clock = (info.step, time.monotonic())
        self.log_metrics(metrics)

    def validate(self) -> None:
        weights = self.candidate()
        figures = validate(self.logits(weights), self.data.validation, self.config.evaluate, self.world, self.like)
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
        chains = replay.positions(slice(POOL))
        if self.data.n_classes <= 10:
            slots = torch.arange(len(chains), device=self.device)
            logits = self.logits(self.state.network)
            with torch.no_grad():
                classes = replay.labels(slots) if self.config.sgld.conditional else logits(chains).argmax(dim=1)
            chains = by_class(chains, classes, self.data.n_classes)
        path = f"samples/{self.state.step:08d}.png"
        picture = grid_png(chains[:100], columns=10)
        try:
            (self.job.root / path).write(picture)
            if not self.job.root.is_local:  # the uploader sends what lies beside the log
                Location.of(self.job.log_path.parent / path).write(picture)
        except OSError as error:  # a full disk ends no run for the sake of a picture
            self.event("note", text=f"{(self.job.root / path).uri} cannot be written: {error}")
        else:
            self.event("image", step=self.state.step, key="samples", path=path)
        self.clock = (self.state.step, time.monotonic())

    def evaluate(self) -> str:
        """The figures of the end; why there are none, where that is nothing that more training would mend."""
        if self.config.evaluate.suite == "none":
            return ""
        self.world.be_patient()  # attacks are dealt out in batches, and one on a large network may take an hour
        network, config = self.final_network(), self.config
        compute = compute_here(
            network, config, config.evaluate, self.world, self.like, lambda *_: self.watchdog.touch()
        )
        try:
            buffer, saved = None, self.saved
            if config.evaluate.complete and saved is not None:
                manifest = on_rank_0(self.world, lambda: checkpoint.read_manifest(saved))
                buffer = checkpoint.chains_of(manifest, config)
            self.evaluated, _ = evaluate(
                network, self.data, config, config.evaluate, compute, buffer, self.world, self.device
            )
        except DivergedError:
            raise
        except Exception as error:  # whatever it is, the run has been trained
            log.exception("the evaluation of %s failed", self.job.root.uri)
            asked = [f"evaluate.suite={config.evaluate.suite}"]
            asked += [f"evaluate.sets=[{','.join(config.evaluate.sets)}]"] if config.evaluate.sets else []
            again = shlex.join(["python", "jobs/evaluate.py", self.job.root.uri, *asked])
            told = f"trained to the end, but not evaluated: {_said(error)}; {again}"
            self.event("note", text=told)
            return told
        self.log_metrics(self.evaluated["metrics"])
        if "gen" in self.evaluated:
            self.event("tags", tags=gen_tags(self.evaluated["gen"]))
        return ""

    def calibrate(self) -> None:
        """What the final model needs to be used; on images without noise, as those will be that it is asked about."""
        if not self.config.evaluate.register:
            return
        logits, split = self.logits(self.final_network()), self.data.validation
        images, clean = to_float(split.images, torch.float32), replace(self.config.evaluate, noise_std=0.0)
        found = over_batches(logits, images, clean, self.world, self.like, "clean")
        self.calibrated = calibrate(found, split.labels, split.images)

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
            # a trial that waits is compared by what it is now, and handed on as it is now
            "metrics": self.final_metrics if status == "finished" else self.metrics,
            "weights": self.final_weights,
            "calibrated": self.calibrated,
            "report": self.evaluated,
            "message": message,
        }

    def logits(self, network: nn.Module) -> Logits:
        """The network for evaluation; each batch is a sign of life."""
        logits = frozen_logits(network, self.config)

        def alive(x: Tensor) -> Tensor:
            self.watchdog.touch()
            return logits(x)

        return alive

    @property
    def tags(self) -> dict[str, str]:
        """What only a worker knows of where it runs, and on which data."""
        gpu = self.device.type == "cuda"
        threads = torch.get_num_threads()
        device = torch.cuda.get_device_name(self.device) if gpu else "cpu"
        on = device if gpu else f"{threads} thread{'s' if threads > 1 else ''}"
        sizes = {f"data.{name}": str(len(split)) for name, split in self.data.splits.items()}
        return {
            "workers": str(self.world.size),
            "device": device,
            "threads": str(threads),
            "hardware": f"{on}; {machine()}, torch {torch.__version__}",
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

    @property
    def final_metrics(self) -> dict[str, float]:
        """The newest of each figure; of validation those of the weights that are the model."""
        if self.final_weights != "best" or self.best is None:
            return self.metrics
        figures = {key: value for key, value in self.best.items() if key not in ("step", "weights")}
        return self.metrics | {f"val/{key}": value for key, value in figures.items()}

    def candidate(self) -> nn.Module:
        """The weights that validation looks at."""
        return self.state.average if self.config.evaluate.ema and self.state.average else self.state.network

    def final_network(self) -> nn.Module:
        network = self.candidate()
        if self.final_weights == "best" and self.best is not None:
            network = copy.deepcopy(network)
            network.load_state_dict(self.best["weights"])
        return network


def _better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Higher validation accuracy, or the same and a lower NLL."""
    return (one["accuracy"], -one["nll"]) > (other["accuracy"], -other["nll"])


def _said(error: Exception) -> str:
    if isinstance(error, JEMError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason is known'])[0]}"
