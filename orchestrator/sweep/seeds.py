"""One recipe with several seeds: a run each, as jobs/train.py makes them, below a parent with means and intervals.

STORAGE/NAME-seeds/trials/sSEED is a run; the other files are those of session.py, and summary.md, seeds.json, tables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from jem.errors import ConfigError
from jem.evaluate.others import check_sets
from jem.files import Location
from orchestrator.config import DEFAULTS, RunConfig, check_folder, shown, to_yaml
from orchestrator.published import workbench
from orchestrator.ray_cluster import Cluster, cores, start_ray
from orchestrator.registry import resolve_model
from orchestrator.result import Result
from orchestrator.runs import lock, read_record, storage_of
from orchestrator.sweep.config import BudgetConfig, Sweep, SweepConfig
from orchestrator.sweep.decide import over_seeds
from orchestrator.sweep.resources import GIB, Fit, fit, gpus_a_worker, machine
from orchestrator.sweep.session import Record, Session, open_folder, shortened
from orchestrator.sweep.summary import counts_text, seeds_summary
from orchestrator.sweep.table import BASE, GOING_ON, SEEDS, Row, counts, read_trials, write_tables
from orchestrator.sweep.trial import TRIALS, Setting, Trial, over
from orchestrator.upload import is_whole

SUFFIX = "-seeds"
"""Of the folder's name, after that of the first seed's run."""

SHOWN = ("accuracy", "nll", "ece")


@dataclass
class SeedsResult(Result):
    """`metrics` are means over the seeds that finished, `intervals` the 95 % t-intervals, where there are two or more.

    `seeds`: how many there are (`all`), and how many ended as what.
    """

    intervals: dict[str, list[float]] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)


def run_seeds(config: RunConfig, fresh: bool = False) -> SeedsResult:
    """Train with all seeds, or go on with those that are left, or read out what came of them."""
    check_folder(config)
    if config.evaluate.complete:
        check_sets(config.evaluate.sets, config.data)  # now, not when all is trained
    storage = storage_of(config)
    root = storage / f"{config.name}{SUFFIX}"
    with lock(root):
        record = open_folder(root, Record(root.name, config.science, SEEDS), fresh, DEFAULTS)
        work = SeedsWork(config, storage, root, record)
        if record.status == "finished" and record.result and not work.left() and work.sent():
            return SeedsResult(**record.result)
        return work.run()


def as_sweep(config: RunConfig) -> Sweep:
    """What trials are told: a sweep in which nothing is searched, and each of them is the recipe as it is."""
    budget = BudgetConfig(trials=max(2, config.seeds), steps=config.steps)
    shown_while_running = ("val/accuracy", "val/nll")
    own = SweepConfig(
        base=str(config.name), name=f"{config.name}{SUFFIX}", objective=shown_while_running, budget=budget, finalists=0
    )
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


class SeedsWork(Session[SeedsResult]):
    """One driver's work on several seeds."""

    def __init__(self, config: RunConfig, storage: Location, root: Location, record: Record) -> None:
        self.config = config
        tags = {"steps": config.steps, "digest": config.digest}
        super().__init__(as_sweep(config), storage, root, record, config.science, tags)

    def recipe(self) -> tuple[str, str]:
        return "recipe.yaml", to_yaml(self.config)

    def left(self) -> list[Trial]:
        """Those that have not ended yet, or finished with fewer steps."""
        return [trial for trial in trials_of(self.config) if not _over(self.root / TRIALS / trial.name, self.config)]

    def sent(self) -> bool:
        """Whether MLflow has everything."""
        folders = [self.folder, *(workbench(self.root / TRIALS / row.name) for row in read_trials(self.root))]
        return all(is_whole(folder) for folder in folders)

    def work(self) -> dict[str, Any]:
        left, n = self.left(), self.config.seeds
        if not left:  # but MLflow has not got everything, or the driver was killed while it made the tables
            with self.watching(SEEDS, n, 1):
                return {"status": "finished"}
        with suppress(OSError):
            (self.root / "tune" / SEEDS).remove()  # the runs themselves know how far they are
        with start_ray(self.sweep.run) as cluster:
            fitting = self.fit(cluster)
            init_from = resolve_model(self.config.init_from, self.root, self.uri)
            setting = Setting(self.sweep, self.root, cluster, _threads(cluster, fitting), init_from)
            self.run_stage(SEEDS, left, setting, fitting, n)
        return {"status": "finished"}

    def fit(self, cluster: Cluster) -> Fit:
        if not cluster.private:
            return fit_seeds(self.sweep, cluster.cpus, cluster.gpus, cluster.memory)
        return fit_seeds(self.sweep, cores(), cluster.gpus, psutil.virtual_memory().available / GIB)

    def rows(self, stopped: bool) -> list[Row]:
        """A row for each seed that was asked for, and for others that have ended: they are figures, too."""
        asked = {trial.name: trial for trial in trials_of(self.config)}
        found = [row for row in read_trials(self.root) if row.name in asked or row.status not in GOING_ON]
        for name in asked.keys() - {row.name for row in found}:
            status, reason = ("stopped", "not begun") if stopped else ("failed", "it could not begin")
            seed = asked[name].seed
            found.append(Row(name, SEEDS, seed, BASE, {}, seed, status, reason))
        return sorted(found, key=lambda row: row.number)

    def close(self, outcome: dict[str, Any]) -> SeedsResult:
        """Tables, the summary, means and intervals; MLflow, the record."""
        stopped = outcome["status"] != "finished"
        rows = self.rows(stopped)
        finished = [row for row in rows if row.status == "finished"]
        figures = over_seeds(rows)
        metrics, intervals = means(figures), intervals_of(figures)
        status = outcome["status"] if stopped or finished else self._of_failures(rows)
        text, files = seeds_summary(rows, self.record.name), write_tables(rows, self.folder)
        (self.folder / "summary.md").write_text(text)
        (self.folder / "seeds.json").write_text(json.dumps(figures, indent=1) + "\n")
        files += ["summary.md", "seeds.json", "recipe.yaml"]
        told = f"{len(finished)} of {len(rows)} seeds finished"
        sent = metrics | dict(_ends(intervals)) if status == "finished" else {}
        # so that more seeds, and more steps, are later points: MLflow keeps one point a step
        steps = sum(row.step for row in finished)
        result = SeedsResult(
            run_id=self.tell(status, files, shortened(text), {"seeds": told}, sent, steps),
            name=self.record.name,
            step=max((row.step for row in rows), default=0),
            metrics=metrics,
            status=status,
            tracking_uri=shown(self.uri),
            message=_message(outcome, rows, told),
            intervals=intervals,
            seeds={"all": len(rows), **counts(rows)},
        )
        return self.remember(result)

    def _of_failures(self, rows: Sequence[Row]) -> str:
        """The status that all failures have in common, bad data say; else they failed."""
        statuses = set()
        for row in rows:
            record = None
            with suppress(ConfigError):
                record = read_record(self.root / TRIALS / row.name)
            statuses.add(record.status if record else "failed")
        return statuses.pop() if len(statuses) == 1 else "failed"


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


def shown_figures(metrics: Mapping[str, float]) -> list[str]:
    split = "test" if any(key.startswith("test/") for key in metrics) else "val"
    sets = [key for key in metrics if key.endswith("/log_px/auroc") and key.startswith("val/") == (split == "val")]
    return [key for key in (f"{split}/{name}" for name in SHOWN) if key in metrics] + sets


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


def _over(folder: Location, config: RunConfig) -> bool:
    try:
        record = read_record(folder)
    except ConfigError:
        return True  # damaged: it counts as failed, and says why
    return record is not None and over(record, config.steps)


def _threads(cluster: Cluster, fitting: Fit) -> float:
    """Cores of a run of one worker: all that the machine has are shared; of a cluster's machines one."""
    return max(1, cores() // fitting.at_once) if cluster.private else 1


def _ends(intervals: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    for key, (low, high) in intervals.items():
        yield f"{key}/low", low
        yield f"{key}/high", high


def _first_line(reason: str) -> str:
    """What follows it says how a single run would go on."""
    return (reason.splitlines() or ["no reason is known"])[0].removesuffix(" Tried:")


def _message(outcome: Mapping[str, Any], rows: Sequence[Row], told: str) -> str:
    """What is wrong, if anything: with the attempt, or with single seeds."""
    ended = [
        f"{row.name} {row.status}: {_first_line(row.reason)}" for row in rows if row.status in ("diverged", "failed")
    ]
    if outcome["status"] != "finished":
        return "; ".join(filter(None, [str(outcome.get("message", "")), f"{told} ({counts_text(rows)})"]))
    if not ended:
        return ""
    alone = [] if any(row.status == "finished" for row in rows) else ["--fresh starts them anew"]
    return "; ".join([told, *ended, *alone])
