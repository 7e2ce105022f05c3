"""What a sweep would be, without running it: --dry-run. No Ray, no data, no training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from jem.data.catalog import describe
from jem.errors import ConfigError
from jem.models import make_network
from orchestrator.launch import check_before
from orchestrator.plan import forward_cost, passes
from orchestrator.result import Result
from orchestrator.runs import planned_folder
from orchestrator.sweep.axes import valid, value_at
from orchestrator.sweep.config import OBJECTIVES, Sweep
from orchestrator.sweep.plan_arms import about_arms, counts_of_arms, table_of_arms
from orchestrator.sweep.resources import fit, machine
from orchestrator.sweep.space import points, words

EXAMPLES = 5


def plan(sweep: Sweep, cpus: float | None = None, gpus: float | None = None, memory_gib: float | None = None) -> Result:
    """Print the sweep, examples of its trials and what it takes; the same figures as a Result.

    Without figures of a cluster they are this machine's. Raises ConfigError if no trial fits, but for a cluster
    that RAY_ADDRESS names: that is looked at when the sweep starts.
    """
    check_before(sweep.run)
    here = machine()
    asked = zip((cpus, gpus, memory_gib), here, strict=True)
    have_cpus, have_gpus, have_memory = (there if given is None else given for given, there in asked)
    elsewhere = "RAY_ADDRESS" in os.environ and cpus is None
    rows = [("name", sweep.name), ("folder", planned_folder(replace(sweep.run, name=sweep.name)))]
    rows += about_arms(sweep) if sweep.arms else _about(sweep)
    metrics = counts_of_arms(sweep) if sweep.arms else _counts(sweep)
    try:
        fitted = fit(sweep, have_cpus, have_gpus, have_memory)
        rows.append(("resources", f"{fitted.at_once} at once: {fitted.why}"))
        metrics["at_once"] = float(fitted.at_once)
    except ConfigError as error:
        if not elsewhere:
            raise
        rows.append(("resources", f"not on this machine: {error}"))
    if elsewhere:
        rows.append(("", "the cluster at RAY_ADDRESS is looked at when the sweep starts"))
    if sweep.arms:
        rows.append(("steps", f"{metrics['steps']:,.0f} over all trials, {metrics['passes']:,.0f} forward passes"))
    else:
        rows += _cost(metrics)
    _table(rows)
    print()
    if sweep.arms:
        _table(table_of_arms(sweep))
    else:
        _print_space(sweep)
    return Result(name=sweep.name, step=0, metrics=metrics, status="planned")


def _print_space(sweep: Sweep) -> None:
    _table([("axis", "drawn", "only with", "base"), *_axes(sweep)])
    found = examples(sweep)
    print(f"\n{len(found)} of the points that can be drawn:")
    for point in found:
        print("  " + " ".join(f"{key}={words(value)}" for key, value in point.items()))


def examples(sweep: Sweep, n: int = EXAMPLES) -> list[dict[str, Any]]:
    """Points of the space: those that the sweep begins with, but for a searcher that learns."""
    config = sweep.config
    return points(sweep.space, config.searcher, n, config.seed, lambda point: valid(sweep.run, point))


def _about(sweep: Sweep) -> Iterator[tuple[str, str]]:
    config, scheduler, run = sweep.config, sweep.config.scheduler, sweep.run
    details = {
        "none": "all trials run in full",
        "asha": f"one in {scheduler.reduction_factor:g} goes on after {scheduler.grace_steps} steps, and so on",
        "pbt": f"every {scheduler.interval_steps} steps the worst {scheduler.quantile:.0%} go on from the best",
    }
    names = {"none": "none", "asha": "ASHA", "pbt": "PBT"}
    minutes = "no limit of time" if config.budget.minutes is None else f"at most {config.budget.minutes:g} minutes"
    yield "base", config.base
    yield "objective", ", ".join(f"{key} ({OBJECTIVES[key].mode})" for key in config.objective)
    yield "searcher", config.searcher
    yield "scheduler", f"{names[scheduler.name]}: {details[scheduler.name]}"
    yield "measured", f"every {run.evaluate.every} steps; checkpoints every {run.checkpoint.every}"
    yield "budget", f"{sweep.trials} trials of {run.steps:,} steps, the base's among them; {minutes}"
    if config.finalists:
        count = f"the best {config.finalists} and the base" if config.finalists > 1 else "the best and the base"
        yield "finalists", f"{count}, each with {config.seeds} seeds"
    else:
        yield "finalists", "none"


def _counts(sweep: Sweep) -> dict[str, float]:
    config = sweep.config
    again = (config.finalists + 1) * config.seeds if config.finalists else 0
    counts: dict[str, float] = {
        "axes": len(sweep.space),
        "trials": sweep.trials,
        "search_steps": sweep.trials * sweep.run.steps,
        "finalist_trials": again,
        "finalist_steps": again * sweep.run.steps,
    }
    flop = _flop_per_step(sweep)
    if flop is not None:
        counts["flop"] = flop * (counts["search_steps"] + counts["finalist_steps"])
    return {key: float(value) for key, value in counts.items()}


def _cost(counts: dict[str, float]) -> Iterator[tuple[str, str]]:
    steps = counts["search_steps"] + counts["finalist_steps"]
    sum_of = f"search {counts['search_steps']:,.0f} + finalists {counts['finalist_steps']:,.0f}"
    yield "steps", f"at most {steps:,.0f}: {sum_of} ({counts['finalist_trials']:.0f} trials)"
    if "flop" in counts:
        yield "", f"{counts['flop'] / 1e12:,.4g} TFLOP with the base's settings"


def _flop_per_step(sweep: Sweep) -> float | None:
    import torch

    spec, run = describe(sweep.run.data), sweep.run
    if spec.image_shape is None or spec.n_classes is None:
        return None
    with torch.device("meta"):
        network = make_network(run.model, spec.image_shape, spec.n_classes)
    return forward_cost(network, spec.image_shape)[0] * passes(run) * run.batch_size


def _axes(sweep: Sweep) -> Iterator[tuple[str, str, str, str]]:
    for axis in sweep.space:
        yield axis.key, axis.text, axis.condition or "", words(value_at(sweep.run, axis.key))


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
