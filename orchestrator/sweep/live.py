"""How far a sweep is, on stderr: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.sweep.space import words
from orchestrator.sweep.table import GOING_ON, STATUSES

_LINE_EVERY_S = 10.0
_NAMED = 4  # trials in a line, or of a Pareto front
_AROUND = 12  # lines of a terminal that the table leaves to what is around it


@dataclass(frozen=True)
class TrialState:
    """A trial that has begun. `values` are its newest objectives, as far as it has them; `point` what was drawn."""

    name: str
    status: str
    step: int
    steps: int
    values: Mapping[str, float] = field(default_factory=dict)
    point: Mapping[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.status not in GOING_ON


@dataclass(frozen=True)
class _Standing:
    """What there is to show. `ended`: the trials that are over since the last time."""

    objectives: Sequence[str]
    rows: Sequence[TrialState]
    best: Sequence[TrialState]
    ended: Sequence[TrialState]
    n_trials: int
    elapsed_s: float
    eta_s: float | None

    @property
    def running(self) -> list[TrialState]:
        return [row for row in self.rows if row.status == "running"]

    def counts(self) -> str:
        """done: over, however they ended."""
        statuses = [row.status for row in self.rows]
        told = [f"{statuses.count(s)} {s}" for s in ("running", *STATUSES) if s in statuses and s != "finished"]
        parts = [f"{sum(row.over for row in self.rows)}/{self.n_trials} done", *dict.fromkeys(told)]
        return ", ".join(parts + ([f"ETA {clock(self.eta_s)}"] if self.eta_s else []))

    def figures(self, row: TrialState) -> str:
        return " ".join(f"{key} {row.values[key]:.4g}" for key in self.objectives if key in row.values)

    def leader(self) -> str:
        """The best so far, or the Pareto front; empty while there is none."""
        if not self.best:
            return ""
        names = ", ".join(row.name for row in self.best[:_NAMED]) + (", ..." if len(self.best) > _NAMED else "")
        if len(self.objectives) > 1:
            return f"front {names}"
        return f"best {self.best[0].values.get(self.objectives[0], float('nan')):.4g} by {self.best[0].name}"


class _View(Protocol):
    def show(self, now: _Standing) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Board:
    """What a person sees while a sweep runs. `n_trials`, all that there are to be, may be changed meanwhile."""

    def __init__(
        self, sweep_name: str, objectives: Sequence[str], n_trials: int, at_once: int, stream: TextIO | None = None
    ) -> None:
        """`objectives` are keys such as "val/nll"; `at_once` trials run at the same time."""
        stream = stream or sys.stderr
        self.n_trials = n_trials
        self._objectives = objectives
        self._view: _View = _LiveTable(sweep_name, at_once, stream) if stream.isatty() else _Lines(sweep_name, stream)
        self._over: set[str] | None = None
        self._since = (0.0, 0)

    def update(
        self,
        rows: Sequence[TrialState],
        best: Sequence[TrialState],
        elapsed_s: float,
        budget_s: float | None = None,
    ) -> None:
        """Show all trials that have begun, and the `best`: none yet, one, or of several objectives the Pareto front.

        `elapsed_s` and `budget_s`, of the whole sweep, are counted from the same moment.
        """
        over = {row.name for row in rows if row.over}
        if self._over is None:  # what an earlier driver did is no news, and says nothing of the pace
            self._over = over
            self._since = (elapsed_s, sum(row.step for row in rows)) if over else (0.0, 0)
        ended = [row for row in rows if row.name in over - self._over]
        self._over = over
        left = eta(rows, self.n_trials, elapsed_s, budget_s, self._since)
        self._view.show(_Standing(self._objectives, rows, best, ended, self.n_trials, elapsed_s, left))

    def say(self, text: str) -> None:
        self._view.say(text)

    def close(self) -> None:
        self._view.close()


def eta(
    rows: Sequence[TrialState],
    n_trials: int,
    elapsed_s: float,
    budget_s: float | None = None,
    since: tuple[float, int] = (0.0, 0),
) -> float | None:
    """Seconds until all trials are over, at the steps per second so far; at most what the budget leaves.

    A trial that is over, at whatever step, has none left, one that has not begun has as many as the longest.
    `since`: (elapsed seconds, steps done) where this driver began. None while no step says how fast it goes.
    """
    going_on = sum(max(0, row.steps - row.step) for row in rows if not row.over)
    not_begun = max(0, n_trials - len(rows)) * max((row.steps for row in rows), default=0)
    seconds, done = elapsed_s - since[0], sum(row.step for row in rows) - since[1]
    if seconds <= 0 or done <= 0:
        return None
    left = (going_on + not_begun) * seconds / done
    return left if budget_s is None else min(left, max(0.0, budget_s - elapsed_s))


def clock(seconds: float) -> str:
    """4:10, 1:04:10"""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def drawn(point: Mapping[str, Any]) -> str:
    """A point, short: keys by their last word where that names but one of them."""
    last = [key.rpartition(".")[2] for key in point]
    names = [short if last.count(short) == 1 else key for key, short in zip(point, last, strict=True)]
    return " ".join(f"{name}={words(value)}" for name, value in zip(names, point.values(), strict=True)) or "base"


class _Lines:
    """A line for each trial that ends, and one every few seconds; the last one is never swallowed."""

    def __init__(self, sweep_name: str, stream: TextIO) -> None:
        self._name, self._stream = sweep_name, stream
        self._last = -_LINE_EVERY_S
        self._held_back: str | None = None

    def show(self, now: _Standing) -> None:
        for row in now.ended:
            leader = f" ({now.leader()})" if now.best else ""
            where = "" if row.status == "finished" else f" at step {row.step}/{row.steps}"
            figures = now.figures(row) or f"no {' '.join(now.objectives)}"
            self.say(f"{row.name} {row.status}{where}: {figures}{leader}; {now.counts()}")
            self._last, self._held_back = now.elapsed_s, None
        if now.ended:
            return
        running = now.running
        trials = [f"{row.name} {row.step}/{row.steps} {now.figures(row)}".rstrip() for row in running[:_NAMED]]
        trials += ["..."] if len(running) > _NAMED else []
        line = "; ".join(filter(None, [f"{self._name}: {now.counts()}", ", ".join(trials), now.leader()]))
        if now.elapsed_s - self._last >= _LINE_EVERY_S:
            self.say(line)
            self._last, self._held_back = now.elapsed_s, None
        else:
            self._held_back = line

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._held_back:
            self.say(self._held_back)
        self._held_back = None


class _LiveTable:
    def __init__(self, sweep_name: str, at_once: int, stream: TextIO) -> None:
        self._name, self._at_once = sweep_name, at_once
        # rich would carry what is printed on stdout over to stderr
        self._live = Live(console=Console(file=stream), redirect_stdout=False)
        self._live.start()

    def show(self, now: _Standing) -> None:
        head = f"{self._name}: {now.counts()}; {clock(now.elapsed_s)} so far, {self._at_once} at once"
        table = Table("trial", "step", *now.objectives, "drawn", box=None, pad_edge=False)
        room = max(1, self._live.console.size.height - _AROUND)
        for row in now.running[:room]:
            table.add_row(*_cells(row, now.objectives))
        hidden = len(now.running) - room
        for number, row in enumerate(now.best[:_NAMED]):
            if number == 0:
                table.add_section()
            label = "front" if len(now.objectives) > 1 else "best"
            table.add_row(*(Text(cell, "bold") for cell in _cells(row, now.objectives, f"{label} {row.name}")))
        parts: list[RenderableType] = [Text(head), table, *([Text(f"and {hidden} more")] if hidden > 0 else [])]
        self._live.update(Group(*parts))

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()


def _cells(row: TrialState, objectives: Sequence[str], label: str | None = None) -> list[str]:
    figures = [f"{row.values[key]:.4g}" if key in row.values else "-" for key in objectives]
    return [label or row.name, f"{row.step}/{row.steps}", *figures, drawn(row.point)]
