"""When the trials of a sweep are measured and saved, and whether the sweep's parts go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jem.errors import Problem
from orchestrator.config import RunConfig
from orchestrator.remedies import REMEDIES
from orchestrator.sweep.axes import valid
from orchestrator.sweep.space import Space, grid, is_whole_grid

if TYPE_CHECKING:
    from orchestrator.sweep.config import SweepConfig

COUNTED = 1000
"""A grid of more points than these is not looked through for those that cannot be."""


def resolved(config: SweepConfig, run: RunConfig) -> SweepConfig:
    """The configuration with the steps that follow from each other filled in."""
    scheduler = config.scheduler
    if scheduler.name == "asha" and scheduler.grace_steps is None:
        scheduler = replace(scheduler, grace_steps=max(1, run.steps // 4))
    if scheduler.name == "pbt" and scheduler.interval_steps is None:
        scheduler = replace(scheduler, interval_steps=max(1, run.steps // 5))
    return replace(config, scheduler=scheduler, budget=replace(config.budget, steps=run.steps))


def shared(config: SweepConfig, run: RunConfig, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What all trials have beside the base's settings; what is `fixed` stays as it is.

    A trial is measured about ten times at least, at the steps at which the scheduler compares, and where it ends.
    """
    every = {
        "evaluate.every": measured_every(config, run),
        "checkpoint.every": min(run.checkpoint.every, max(1, run.steps // 2)),
        "tracking.images_every": run.steps,
    }
    if config.scheduler.name == "pbt":
        every["checkpoint.every"] = every["evaluate.every"]
    always = {"evaluate.suite": "none", "evaluate.register": False, "seed": config.seed, "name": None}
    return {key: value for key, value in every.items() if key not in fixed} | always


def measured_every(config: SweepConfig, run: RunConfig) -> int:
    """Steps between measurements: the recipe's, fewer where trials are short; they meet the scheduler's steps."""
    scheduler = config.scheduler
    if scheduler.name == "pbt" and scheduler.interval_steps is not None:
        return scheduler.interval_steps
    every = min(run.evaluate.every, max(1, run.steps // 10))
    if scheduler.name == "asha" and scheduler.grace_steps is not None:
        every = min(every, scheduler.grace_steps)
        even = [n for n in range(max(1, every // 2), every + 1) if scheduler.grace_steps % n == 0]
        return even[-1] if even else every
    return every


def check(config: SweepConfig, run: RunConfig, space: Space) -> list[Problem]:
    """What does not go together, with the origins of axes only."""
    return [*_scheduler(config, run, space), *_grid(config, run, space), *_gpus(config, run), *_seeds(config)]


def _scheduler(config: SweepConfig, run: RunConfig, space: Space) -> Iterator[Problem]:
    scheduler, steps = config.scheduler, run.steps
    if scheduler.name == "asha":
        grace = scheduler.grace_steps or 0
        if grace >= steps:
            message = f"is {grace}, must be less than budget.steps ({steps}), or no trial could end early"
            yield Problem("scheduler.grace_steps", message)
        elif run.evaluate.every > grace:
            message = (
                f"is {run.evaluate.every}, must be at most scheduler.grace_steps ({grace}), when trials are compared"
            )
            yield Problem("evaluate.every", message)
    if scheduler.name != "pbt":
        return
    interval = scheduler.interval_steps or 0
    if interval >= steps:
        message = f"is {interval}, must be less than budget.steps ({steps}), or no trial could go on from another"
        yield Problem("scheduler.interval_steps", message)
    for key, every in (("evaluate.every", run.evaluate.every), ("checkpoint.every", run.checkpoint.every)):
        if interval % every:
            yield Problem(
                key, f"is {every}, must divide scheduler.interval_steps ({interval}), when trials are compared"
            )
    for axis in space:
        if axis.key not in REMEDIES:
            message = (
                f"cannot change in the middle of a run, as scheduler.name=pbt does; these can: {', '.join(REMEDIES)}"
            )
            yield Problem(f"space.{axis.key}", message, axis.origin)


def _grid(config: SweepConfig, run: RunConfig, space: Space) -> Iterator[Problem]:
    axes = [axis for axis in space if axis.kind == "grid"]
    if config.searcher != "grid":
        for axis in axes:
            message = f"is for searcher=grid, it is {config.searcher}; write choice in its place"
            yield Problem(f"space.{axis.key}.grid", message, axis.origin)
    elif not axes:
        message = "is grid, but no axis is one; write grid: [...] for one at least, or use searcher=random"
        yield Problem("searcher", message)
    else:
        needed = grid_trials(run, space) if is_whole_grid(space) else 1 + len(grid(space))
        if config.budget.trials < needed:
            message = f"is {config.budget.trials}, must be at least {needed}: each point of the grid, and the base"
            yield Problem("budget.trials", message)


def grid_trials(run: RunConfig, space: Space) -> int:
    """A trial for each point of a grid that there can be, and the base's."""
    points = grid(space)
    return 1 + (len(points) if len(points) > COUNTED else sum(valid(run, point) for point in points))


def _seeds(config: SweepConfig) -> Iterator[Problem]:
    last = config.seed + config.seeds
    if config.finalists and last >= 2**31:
        message = f"is {config.seed}, too large: the last of the finalists' {config.seeds}, {last}, must be below 2**31"
        yield Problem("seed", message)


def _gpus(config: SweepConfig, run: RunConfig) -> Iterator[Problem]:
    gpu = config.resources.gpu
    if gpu == 0 and run.device == "cuda":
        yield Problem("resources.gpu", "is 0, but device=cuda; leave it out, or set device=cpu")
    if gpu and gpu % 1 and run.max_workers > 1:
        message = f"is {gpu:g} with workers={run.workers}: two workers of a trial would share a GPU, which NCCL refuses"
        yield Problem("resources.gpu", f"{message}; set workers=1, or whole GPUs")
    if gpu and run.device == "cpu":
        yield Problem("resources.gpu", f"is {gpu:g}, but device=cpu; leave it out, or set device=cuda")
