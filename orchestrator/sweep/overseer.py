"""While trials run: who they are and how far, on the screen and for MLflow; and whether there is time for more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jem.files import Location
from orchestrator import events
from orchestrator.mlflow_run import RunSpec
from orchestrator.published import bring, publish, workbench
from orchestrator.survey import log_of
from orchestrator.sweep.config import Sweep
from orchestrator.sweep.live import Board, TrialState
from orchestrator.sweep.shared_log import Following
from orchestrator.sweep.table import ABLATION, SEEDS, Row, best, read_trials
from orchestrator.sweep.trial import CLOSING, TRIALS
from orchestrator.sweep.upload import Uploads
from orchestrator.upload import STATE_NAME

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
ASK_EVERY_S = 4.0
"""The same where each trial is some requests to an object store."""

OVER = ("finished", "pruned", "diverged", "failed")
WINNER_S = 25.0
"""Kept for the end: the winner is measured, tables and pictures are made."""


class Overseer:
    """Reads the trials' folders about once a second."""

    def __init__(
        self,
        sweep: Sweep,
        root: Location,
        uploads: Uploads,
        spec: Callable[[str], RunSpec | None],
        stage: str,
        n: int,
        at_once: int,
    ) -> None:
        self.sweep, self.root, self.uploads, self.spec, self.stage = sweep, root, uploads, spec, stage
        self.at_once = at_once
        title = sweep.name if stage in (SEEDS, ABLATION) else f"{sweep.name}, {stage}"
        self.board = Board(title, sweep.config.objective, n, at_once)
        self.sent: set[str] = set()
        self.closed: set[str] = set()
        self.following = Following()
        self.error: Exception | None = None
        self.stop = threading.Event()
        self.watch: threading.Thread | None = None

    @contextmanager
    def watching(self, spent: float, began: float, reserve: int) -> Iterator[None]:
        """`spent`: seconds of earlier attempts; `reserve`: how many whole trials must still fit after this stage."""

        def watch() -> None:
            try:
                while not self.stop.wait(LOOK_EVERY_S if self.root.is_local else ASK_EVERY_S):
                    self._look(spent + time.time() - began, reserve)
                self._look(spent + time.time() - began, reserve, last=True)
            except Exception as error:  # of a disk that is full, say: whoever waits for the trials looks once more
                self.error = error
            finally:
                self.board.close()

        self.watch = threading.Thread(target=watch, daemon=True, name="overseer")
        self.watch.start()
        try:
            yield
        finally:
            self.leave()
            if self.error is not None:
                self.look(spent + time.time() - began, reserve, last=True)

    def leave(self, timeout: float | None = None) -> None:
        """Look a last time and take the board away; also from outside, while Tune's thread goes on."""
        self.stop.set()
        if self.watch is not None:
            self.watch.join(timeout)

    def _look(self, elapsed: float, reserve: int, last: bool = False) -> None:
        try:
            self.look(elapsed, reserve, last)
        except OSError as error:
            if self.root.is_local:
                raise
            log.warning("%s: %s", self.root.uri, error)  # a store that is away for a moment: the next look asks again

    def look(self, elapsed: float, reserve: int, last: bool = False) -> None:
        """`last`: no trial is worked on any more."""
        rows = read_trials(self.root)
        self.follow()
        for row in rows:
            spec = self.spec(row.name) if row.name not in self.sent else None
            if spec is not None:
                trial = self.root / TRIALS / row.name
                try:
                    bring(trial, STATE_NAME)  # which run of MLflow's it is: another machine may know
                    self.uploads.add(row.name, spec, log_of(trial), workbench(trial), trial)
                    publish(trial, STATE_NAME)
                except OSError:  # a store that is away for a moment: the next look does it again
                    continue
                self.sent.add(row.name)
            if row.status in OVER and row.name in self.sent - self.closed and (last or self._has_all(row.name)):
                self.closed.add(row.name)
                self.uploads.reopen(row.name)
                self.uploads.close_trial(row.name, row.status, row.reason)
            elif row.status == "running" and row.name in self.closed:  # it was over, and more steps are asked of it
                self.closed.remove(row.name)
                self.uploads.reopen(row.name)
        minutes = self.sweep.config.budget.minutes
        budget = minutes * 60 if minutes else None
        own = [row for row in rows if row.stage == self.stage]
        if budget is not None and elapsed > budget - self.needed(own, reserve):
            (self.root / CLOSING).write(b"the budget is spent")
        self.board.update(
            [self.state(row) for row in own], [self.state(row) for row in best(rows, self.sweep)], elapsed, budget
        )

    def _has_all(self, name: str) -> bool:
        """Whether the log of a trial that is over is here to its end: in an object store it comes after the record."""
        if self.root.is_local:
            return True
        return [event["kind"] for event in events.read(log_of(self.root / TRIALS / name))[0]][-1:] == ["end"]

    def follow(self) -> None:
        """Bring the copies of the trials' logs up to date, where those are on an object store."""
        if self.root.is_local:
            return
        for trial in (self.root / TRIALS).children():
            try:
                self.following.catch_up(trial)
            except OSError as error:  # a store that is away for a moment: the next look asks again
                log.debug("%s: %s", trial.uri, error)

    def needed(self, rows: list[Row], reserve: int) -> float:
        """Seconds for a trial that would begin now, for those of the next stage, and for the end."""
        whole = [row.seconds for row in rows if row.status == "finished"]
        each = sum(whole) / len(whole) if whole else 0.0
        return each + each * -(-reserve // self.at_once) + WINNER_S

    def state(self, row: Row) -> TrialState:
        values = {key: row.metrics[key] for key in self.sweep.config.objective if key in row.metrics}
        return TrialState(row.name, row.status, row.step, self.sweep.steps_at(row.point), values, row.point)
