"""What an ablation would be, without running it: --dry-run."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.plan import passes
from orchestrator.sweep.config import Sweep, trial_config

CLASSIFIER = 3.0
"""Forward passes that a step of a plain classifier costs."""


def about_arms(sweep: Sweep) -> Iterator[tuple[str, str]]:
    """What all arms have in common."""
    config, last = sweep.config, sweep.config.seed + sweep.config.seeds - 1
    minutes = "no limit of time" if config.budget.minutes is None else f"at most {config.budget.minutes:g} minutes"
    run = sweep.run
    yield "base", config.base
    yield "arms", f"{len(sweep.arms)}, the first of which the others are compared with"
    yield "seeds", f"{config.seeds}: {config.seed} to {last}; all arms with the first one, then all with the next"
    yield "measured", f"every {run.evaluate.every} steps; at the end evaluate.suite={run.evaluate.suite}"
    yield "budget", f"{len(sweep.arms) * config.seeds} trials; {minutes}"


def table_of_arms(sweep: Sweep) -> list[tuple[str, ...]]:
    """A line an arm: its steps, what a step costs in forward passes and beside a classifier's, its settings."""
    rows: list[tuple[str, ...]] = [("arm", "steps", "passes a step", "x a classifier", "settings")]
    for arm in sweep.arms:
        config = trial_config(sweep, arm.point)
        cost = passes(config)
        rows.append((arm.name, f"{config.steps:,}", f"{cost:g}", f"{cost / CLASSIFIER:.1f}", arm.text or "the base"))
    return rows


def counts_of_arms(sweep: Sweep) -> dict[str, float]:
    """The same as figures; `passes`: forward passes of a batch, over all trials."""
    counts = {"arms": float(len(sweep.arms)), "trials": float(len(sweep.arms) * sweep.config.seeds)}
    runs = {arm.name: trial_config(sweep, arm.point) for arm in sweep.arms}
    for name, config in runs.items():
        counts |= {f"{name}/steps": float(config.steps), f"{name}/passes_per_step": passes(config)}
        counts[f"{name}/times_a_classifier"] = passes(config) / CLASSIFIER
    seeds = sweep.config.seeds
    counts["steps"] = float(sum(config.steps for config in runs.values()) * seeds)
    return counts | {"passes": sum(config.steps * passes(config) for config in runs.values()) * seeds}
