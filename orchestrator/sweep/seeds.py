"""One recipe with several seeds: a run each, as jobs/train.py makes them, below a parent with means and intervals.

STORAGE/NAME-seeds/trials/sSEED is a run; the other files are those of session.py, and summary.md, seeds.json, tables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from jem.files import Location
from orchestrator.config import DEFAULTS, RunConfig, shown, to_yaml
from orchestrator.launch import check_before
from orchestrator.ray_cluster import Cluster, cores
from orchestrator.result import Result
from orchestrator.runs import lock, storage_of
from orchestrator.sweep.config import SHOWN, BudgetConfig, Sweep, SweepConfig
from orchestrator.sweep.decide import over_seeds
from orchestrator.sweep.ending import message_of, status_of
from orchestrator.sweep.fixed import FixedTrials, ends_of
from orchestrator.sweep.resources import GIB, Fit, fit, gpus_a_worker, machine
from orchestrator.sweep.session import RECORD, Record, open_folder, shortened
from orchestrator.sweep.summary import seeds_summary, shown_figures
from orchestrator.sweep.table import BASE, SEEDS, counts, write_tables
from orchestrator.sweep.trial import TRIALS, Trial

SUFFIX = "-seeds"
"""Of the folder's name, after that of the first seed's run."""


@dataclass
class SeedsResult(Result):
    """`metrics` are means over the seeds that finished, `intervals` the 95 % t-intervals, where there are two or more.

    `seeds`: how many there are (`all`), and how many ended as what.
    """

    intervals: dict[str, list[float]] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


def run_seeds(config: RunConfig, fresh: bool = False) -> SeedsResult:
    """Train with all seeds, or go on with those that are left, or read out what came of them."""
    storage = storage_of(config)
    root = storage / f"{config.name}{SUFFIX}"
    if fresh or not (root / RECORD).exists():
        check_before(config)
    with lock(root):
        record = open_folder(root, Record(root.name, config.science, SEEDS), fresh, DEFAULTS)
        work = SeedsWork(config, storage, root, record)
        if record.status == "finished" and record.result and not work.left() and work.sent():
            return SeedsResult(**record.result)
        return work.run()


def as_sweep(config: RunConfig) -> Sweep:
    """What trials are told: a sweep in which nothing is searched, and each of them is the recipe as it is."""
    budget = BudgetConfig(trials=max(2, config.seeds), steps=config.steps)
    own = SweepConfig(base=str(config.name), name=f"{config.name}{SUFFIX}", objective=SHOWN, budget=budget, finalists=0)
    return Sweep(own, replace(config, name=None, seeds=1), (), config.science, str(config.name))


def trials_of(config: RunConfig) -> list[Trial]:
    seeds = range(config.seed, config.seed + config.seeds)
    return [Trial(f"s{seed}", SEEDS, seed, BASE, {}, seed) for seed in seeds]


def fit_seeds(sweep: Sweep, cpus: float, gpus: float, memory_gib: float) -> Fit:
    """How many run at once where there is so much: one at least, as a single run does with workers beyond the cores."""
    workers = sweep.run.max_workers
    if gpus_a_worker(sweep, gpus):
        gpus = max(gpus, workers)
    return fit(sweep, max(cpus, workers), gpus, max(memory_gib, workers * sweep.config.resources.memory))


class SeedsWork(FixedTrials[SeedsResult]):
    """One driver's work on several seeds."""

    def __init__(self, config: RunConfig, storage: Location, root: Location, record: Record) -> None:
        self.config = config
        tags = {"steps": config.steps, "digest": config.digest}
        super().__init__(as_sweep(config), storage, root, record, config.science, tags)

    def recipe(self) -> tuple[str, str]:
        return "recipe.yaml", to_yaml(self.config)

    def trials(self) -> list[Trial]:
        return trials_of(self.config)

    def fit(self, cluster: Cluster) -> Fit:
        if not cluster.private:
            return fit_seeds(self.sweep, cluster.cpus, cluster.gpus, cluster.memory)
        return fit_seeds(self.sweep, cores(), cluster.gpus, psutil.virtual_memory().available / GIB)

    def threads(self, cluster: Cluster, fitting: Fit) -> float:
        """All cores that the machine has are shared; of a cluster's machines each run has one."""
        return max(1, cores() // fitting.at_once) if cluster.private else 1

    def close(self, outcome: dict[str, Any]) -> SeedsResult:
        """Tables, the summary, means and intervals; MLflow, the record."""
        rows = self.rows(outcome["status"] != "finished")
        finished = [row for row in rows if row.status == "finished"]
        figures = over_seeds(rows)
        metrics, intervals = means(figures), intervals_of(figures)
        status = status_of(outcome, rows, self.root)
        text, files = seeds_summary(rows, self.record.name), write_tables(rows, self.folder)
        (self.folder / "summary.md").write_text(text)
        (self.folder / "seeds.json").write_text(json.dumps(figures, indent=1) + "\n")
        files += ["summary.md", "seeds.json", "recipe.yaml"]
        told = f"{len(finished)} of {len(rows)} seeds finished"
        sent = metrics | dict(ends_of(intervals)) if status == "finished" else {}
        # so that more seeds, and more steps, are later points: MLflow keeps one point a step
        steps = sum(row.step for row in finished)
        result = SeedsResult(
            run_id=self.tell(status, files, shortened(text), {"seeds": told}, sent, steps),
            name=self.record.name,
            step=max((row.step for row in rows), default=0),
            metrics=metrics,
            status=status,
            tracking_uri=shown(self.uri),
            message=message_of(outcome, rows, told),
            intervals=intervals,
            seeds={"all": len(rows), **counts(rows)},
        )
        return self.remember(result)


def means(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {key: float(found["mean"]) for key, found in figures.items()}


def intervals_of(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Where there are two seeds or more."""
    return {key: [found["low"], found["high"]] for key, found in figures.items() if found["low"] is not None}


def show_seeds(result: SeedsResult) -> None:
    """A short table on stdout: accuracy, NLL, ECE and the AUROC of log p(x), of test data where they were measured."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(width=100), Table()
    told = ", ".join(f"{n} {status}" for status, n in result.seeds.items() if status != "all")
    console.print(
        f"{result.name}: {result.status}; {result.seeds.get('all', 0)} seeds: {told or 'none'}",
        soft_wrap=True,
        highlight=False,
    )
    table.add_column("figure")
    table.add_column("mean", justify="right")
    table.add_column("95 % t-interval", justify="right")
    for key in shown_figures(result.metrics):
        ends = ", ".join(f"{end:.4f}" for end in result.intervals.get(key, []))
        table.add_row(key, f"{result.metrics[key]:.4f}", f"[{ends}]" if ends else "")
    if table.row_count:
        console.print(table)
    if result.tracking_uri:
        console.print(f"MLflow: run {result.run_id} in {result.tracking_uri}", soft_wrap=True, highlight=False)


def planned(config: RunConfig) -> tuple[dict[str, str], dict[str, float]]:
    """For --dry-run: what several seeds are, in words and figures."""
    sweep, last = as_sweep(config), config.seed + config.seeds - 1
    at_once = min(fit_seeds(sweep, *machine()).at_once, config.seeds)
    elsewhere = "; the cluster at RAY_ADDRESS is looked at when it starts" if "RAY_ADDRESS" in os.environ else ""
    workers = f"{config.workers} worker{'s' if config.max_workers > 1 else ''} each"
    rows = {
        "name": sweep.name,
        "seeds": f"{config.seeds}: {config.seed} to {last}, each a run as below, in {TRIALS}/s{config.seed} and so on",
        "at once": f"{at_once} on this machine, {workers}{elsewhere}",
        "steps": f"{config.seeds} x {config.steps:,} = {config.seeds * config.steps:,}",
    }
    return rows, {"seeds": float(config.seeds), "at_once": float(at_once)}
