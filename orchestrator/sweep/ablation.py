"""Named arms of settings over one recipe, each trained with several seeds, and a comparison of all with the first.

STORAGE/NAME/trials/ARM-sSEED is a run; arms/ARM-sSEED.json what is kept of it beside; the other files are those of
session.py, and summary.md, arms.json, tables.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from jem.files import Location
from jem.settings import digest
from orchestrator.config import shown
from orchestrator.launch import check_before
from orchestrator.mlflow_run import RunSpec
from orchestrator.ray_cluster import Cluster, cores
from orchestrator.result import Result
from orchestrator.runs import lock, storage_of
from orchestrator.sweep.comparison import Comparison, compare, summary_of, verdict_of
from orchestrator.sweep.config import Sweep, to_yaml, trial_config
from orchestrator.sweep.ending import message_of, status_of
from orchestrator.sweep.fixed import FixedTrials, ends_of
from orchestrator.sweep.resources import GIB, Fit, fit
from orchestrator.sweep.session import RECORD, Record, open_folder, shortened
from orchestrator.sweep.summary import shown_figures
from orchestrator.sweep.table import ABLATION, Row, counts, write_tables
from orchestrator.sweep.trial import TRIALS, Trial
from orchestrator.sweep.trial_report import TrialReport, report

log = logging.getLogger(__name__)

ARMS = "arms"


@dataclass
class AblationResult(Result):
    """`metrics`: ARM/FIGURE, means over the seeds that finished, `intervals` their 95 % t-intervals; the rest is in
    arms.json. `trials`: how many there are (`all`), and how many ended as what.
    """

    intervals: dict[str, list[float]] = field(default_factory=dict)
    trials: dict[str, int] = field(default_factory=dict)
    verdict: str = ""


def run_ablation(sweep: Sweep, fresh: bool = False) -> AblationResult:
    """Train all arms with all seeds, or go on with those that are left, or read out what came of them."""
    storage = storage_of(trial_config(sweep, {}, name=sweep.name))
    root = storage / sweep.name
    if fresh or not (root / RECORD).exists():
        for arm in sweep.arms:
            check_before(trial_config(sweep, arm.point))
    with lock(root):
        record = open_folder(root, Record(sweep.name, sweep.science, ABLATION), fresh)
        work = AblationWork(sweep, storage, root, record)
        if record.status == "finished" and record.result and not work.left() and work.sent():
            return AblationResult(**record.result)
        return work.run()


def trials_of(sweep: Sweep) -> list[Trial]:
    """All arms with the first seed, then all with the next: what is cut short compares as many of each."""
    seeds = range(sweep.config.seed, sweep.config.seed + sweep.config.seeds)
    pairs = [(seed, arm) for seed in seeds for arm in sweep.arms]
    return [
        Trial(f"{arm.name}-s{seed}", ABLATION, number, arm.name, arm.point, seed)
        for number, (seed, arm) in enumerate(pairs)
    ]


class AblationWork(FixedTrials[AblationResult]):
    """One driver's work on an ablation."""

    def __init__(self, sweep: Sweep, storage: Location, root: Location, record: Record) -> None:
        config = sweep.config
        params = {f"arms.{arm.name}": arm.text or "the base" for arm in sweep.arms}
        params |= {"base": config.base, "steps": str(sweep.run.steps), "seed": str(config.seed)}
        super().__init__(sweep, storage, root, record, params, {"digest": digest(sweep.science)})

    def recipe(self) -> tuple[str, str]:
        return "sweep.yaml", to_yaml(self.sweep)

    def trials(self) -> list[Trial]:
        return trials_of(self.sweep)

    def fit(self, cluster: Cluster) -> Fit:
        if not cluster.private:
            return fit(self.sweep, cluster.cpus, cluster.gpus, cluster.memory, grows=True)
        return fit(self.sweep, cores(), cluster.gpus, psutil.virtual_memory().available / GIB)

    def threads(self, cluster: Cluster, fitting: Fit) -> float:  # noqa: ARG002
        """The same however many run at once: seconds are compared."""
        return self.sweep.config.resources.cpu

    def trial_spec(self, name: str) -> RunSpec | None:
        spec = super().trial_spec(name)
        arm = next((arm for arm in self.sweep.arms if arm.name == name.rpartition("-s")[0]), None)
        if spec is None or arm is None:
            return None
        return replace(spec, tags={**spec.tags, "candidate": arm.name, "steps": str(self.sweep.steps_at(arm.point))})

    def rows(self, stopped: bool) -> list[Row]:
        names = {arm.name for arm in self.sweep.arms}
        return [row for row in super().rows(stopped) if row.candidate in names]  # no folder that somebody left there

    def close(self, outcome: dict[str, Any]) -> AblationResult:
        """Reports, tables, the summary and the comparison; MLflow, the record."""
        rows = self.rows(outcome["status"] != "finished")
        reports = {row.name: report(row, self.sweep, self.root / TRIALS / row.name) for row in rows}
        self._keep(reports)
        found = compare(rows, reports, self.sweep.arms)
        text = summary_of(found, rows, self.record.name, self.sweep.config.base)
        files = [*write_tables(rows, self.folder), "summary.md", "arms.json", "sweep.yaml"]
        (self.folder / "summary.md").write_text(text)
        (self.folder / "arms.json").write_text(json.dumps(found, indent=1) + "\n")
        status = status_of(outcome, rows, self.root)
        metrics, intervals = _figures(found)
        finished = [row for row in rows if row.status == "finished"]
        told = f"{len(finished)} of {len(rows)} trials finished"
        sent = metrics | dict(ends_of(intervals)) if status == "finished" else {}
        steps = sum(row.step for row in finished)  # so that more seeds are a later point: MLflow keeps one a step
        result = AblationResult(
            run_id=self.tell(status, files, shortened(text), {"trials": told}, sent, steps),
            name=self.record.name,
            step=max((row.step for row in rows), default=0),
            metrics=metrics,
            status=status,
            tracking_uri=shown(self.uri),
            message=message_of(outcome, rows, told),
            intervals=intervals,
            trials={"all": len(rows), **counts(rows)},
            verdict=verdict_of(found, rows),
        )
        return self.remember(result)

    def _keep(self, reports: dict[str, TrialReport]) -> None:
        for name, one in reports.items():
            try:
                (self.root / ARMS / f"{name}.json").write(one.json().encode())
            except OSError as error:  # a full disk, a store that is away: the run itself has all of it
                log.warning("%s cannot be written: %s", (self.root / ARMS / name).uri, error)


def _figures(found: Comparison) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The figures that are shown, by ARM/FIGURE, and their intervals, where there are two seeds or more."""
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for name, arm in found.items():
        for key in shown_figures(arm["figures"]):
            one = arm["figures"][key]
            metrics[f"{name}/{key}"] = one["mean"]
            if one["low"] is not None:
                intervals[f"{name}/{key}"] = [one["low"], one["high"]]
    return metrics, intervals
