"""Trials that are all known from the start: several seeds of one recipe, or of each arm of an ablation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.published import workbench
from orchestrator.ray_cluster import Cluster, start_ray
from orchestrator.registry import resolve_model
from orchestrator.result import Result
from orchestrator.runs import read_record
from orchestrator.sweep.resources import Fit
from orchestrator.sweep.session import Session
from orchestrator.sweep.table import GOING_ON, Row, read_trials
from orchestrator.sweep.trial import CLOSING, TRIALS, Setting, Trial, over
from orchestrator.upload import is_whole

R = TypeVar("R", bound=Result)


class FixedTrials(Session[R]):
    """One driver's work on such trials; its kind is also the name of the stage that they are of."""

    @abstractmethod
    def trials(self) -> list[Trial]:
        """All of them, in the order in which they begin."""

    @abstractmethod
    def fit(self, cluster: Cluster) -> Fit:
        """How many run at once."""

    @abstractmethod
    def threads(self, cluster: Cluster, fitting: Fit) -> float:
        """Cores of a trial of one worker."""

    def left(self) -> list[Trial]:
        """Those that have not ended yet, failed, or finished with fewer steps."""
        return [t for t in self.trials() if not _over(self.root / TRIALS / t.name, self.sweep.steps_at(t.point))]

    def sent(self) -> bool:
        """Whether MLflow has everything."""
        folders = [self.folder, *(workbench(self.root / TRIALS / row.name) for row in read_trials(self.root))]
        return all(is_whole(folder) for folder in folders)

    def work(self) -> dict[str, Any]:
        left, n, kind = self.left(), len(self.trials()), self.record.kind
        if not left:  # but MLflow has not got everything, or the driver was killed while it made the tables
            with self.watching(kind, n, 1):
                return {"status": "finished"}
        with suppress(OSError):
            (self.root / "tune" / kind).remove()  # the runs themselves know how far they are
        with start_ray(self.sweep.run) as cluster:
            fitting = self.fit(cluster)
            init_from = resolve_model(self.sweep.run.init_from, self.root, self.uri)
            setting = Setting(self.sweep, self.root, cluster, self.threads(cluster, fitting), init_from)
            self.run_stage(kind, left, setting, fitting, n)
        return {"status": "finished"}

    def rows(self, stopped: bool) -> list[Row]:
        """A row for each trial that was asked for, and for others that have ended: they are figures, too."""
        asked = {trial.name: trial for trial in self.trials()}
        found = [row for row in read_trials(self.root) if row.name in asked or row.status not in GOING_ON]
        for name in asked.keys() - {row.name for row in found}:
            trial = asked[name]
            beside = (trial.stage, trial.number, trial.candidate, trial.point, trial.seed)
            found.append(Row(name, *beside, *self._why_not_begun(stopped)))
        return sorted(found, key=lambda row: row.number)

    def _why_not_begun(self, stopped: bool) -> tuple[str, str]:
        if stopped:
            return "stopped", "not begun"
        if (self.root / CLOSING).exists():
            return "out of time", "not begun"
        return "failed", "it could not begin"


def ends_of(intervals: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    """The ends of intervals as metrics of their own."""
    for key, (low, high) in intervals.items():
        yield f"{key}/low", low
        yield f"{key}/high", high


def _over(folder: Location, steps: int) -> bool:
    try:
        record = read_record(folder)
    except ConfigError:
        return True  # damaged: it counts as failed, and says why
    return record is not None and over(record, steps, again=True)
