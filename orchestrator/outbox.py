"""Which events of a run go to MLflow, in which order: a pure function of the log, with no MLflow in it.

A point that MLflow has cannot be withdrawn, so points wait until a checkpoint commits them (or the attempt ends).
Steps that are run again are not sent a second time: each metric has a high-water mark. Because nothing here
depends on when the log is read, an uploader that crashed sends exactly the same rows again, and MLflow drops
identical rows: every (metric, step) is there once.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.events import Event

RUN_ID = "RUN-ID-IN-MLFLOW"
"""Stands in a tag for the id of the MLflow run, which is known only where it is sent."""

_SAID = ("time", "kind", "attempt", "step", "why")
_MAX_NAME = 250
_MAX_TAG = 8000


EVALUATED = (
    *("test/", "test_scaled/", "ood/", "noise", "val/temperature"),
    *("robust/", "robust_k", "gen/", "chains/"),
)
"""What the metrics begin with that an evaluation gives, of a run's own end or of jobs/evaluate.py."""


@dataclass(frozen=True)
class Point:
    key: str
    value: float
    time: int
    step: int


@dataclass(frozen=True)
class Image:
    key: str
    path: str
    time: int
    step: int


@dataclass(frozen=True)
class Artifact:
    path: str


@dataclass(frozen=True)
class Tags:
    tags: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A final model to be registered; `metrics` are the latest points of what it was evaluated on."""

    path: str
    step: int
    name: str
    champion: str  # the validation figure that decides
    digest: str
    metrics: tuple[Point, ...] = ()


Item = Point | Image | Artifact | Tags | Model


@dataclass
class Outbox:
    """Feed it the log from the start; it says what may be sent now.

    `floor`: the last step of each metric that the MLflow run has from a log that is lost (the run moved to
    another machine); these steps are not sent again.
    `rewritten`: stretches of steps (first, last) that MLflow has from before a rollback and that are run again.
    """

    floor: Mapping[str, int] = field(default_factory=dict)
    waiting: list[Point | Image] = field(default_factory=list)
    rewritten: list[tuple[int, int]] = field(default_factory=list)
    ended: bool = False
    status: str | None = None
    _marks: dict[str, int] = field(default_factory=dict)
    _latest: dict[str, Point] = field(default_factory=dict)
    _attempts: list[str] = field(default_factory=list)
    _recoveries: list[str] = field(default_factory=list)

    def feed(self, event: Event) -> list[Item]:
        """Take the next event; return what it makes ready."""
        kind = event["kind"]
        self.ended = kind == "end"
        if kind == "metrics":
            points = [
                Point(legal_name(key), float(value), event["time"], event["step"])
                for key, value in event["metrics"].items()
                if isinstance(value, int | float)
            ]
            self.waiting += points
            self._latest |= {point.key: point for point in points}
        elif kind == "image":
            self.waiting.append(Image(event["key"], event["path"], event["time"], event["step"]))
        elif kind == "checkpoint":
            return self._commit(event["step"])
        elif kind == "attempt":
            details = [f"{key}={value}" for key, value in event.items() if key not in _SAID]
            self._attempts.append(" ".join([f"{event.get('attempt', '?')}: from step {event['step']}", *details]))
            return [*self._go_back(event["step"]), Tags({"attempts": _newest(self._attempts, "; ")})]
        elif kind == "rollback":
            about = f"{event['number']}: step {event['from_step']} to {event['step']}, {event['remedy']}"
            self._recoveries.append(f"{about} ({event['reason']})")
            return [*self._go_back(event["step"]), Tags({"recoveries": _newest(self._recoveries, "; ")})]
        elif kind == "end":
            self.status = event.get("status")
            return self._commit(None)
        elif kind == "artifact":
            return [Artifact(event["path"])]
        elif kind == "model":
            return [self._model(event)]
        elif kind == "tags":
            return [Tags(event["tags"])]
        return []

    def _model(self, event: Event) -> Model:
        """With the points of its step that were not of training: the same rows as the run's own."""
        of_it = (point for point in self._latest.values() if point.step == event["step"])
        metrics = tuple(point for point in of_it if not point.key.startswith("train/"))
        return Model(event["path"], event["step"], event["name"], event["champion"], event["digest"], metrics)

    def _commit(self, step: int | None) -> list[Item]:
        """Release what waits, up to and including `step`: a checkpoint may be committed while later steps run."""
        ready: list[Item] = []
        later: list[Point | Image] = []
        for item in self.waiting:
            if step is not None and item.step > step:
                later.append(item)
            elif item.step > self._mark(item):
                self._marks[_line(item)] = item.step
                ready.append(item)
        self.waiting = later
        return ready

    def _mark(self, item: Point | Image) -> int:
        line = _line(item)
        return max(self._marks.get(line, -1), self.floor.get(line, -1))

    def _go_back(self, step: int) -> list[Item]:
        """The run goes on from a checkpoint at `step`: up to there is committed, what waits beyond is run again."""
        ready = self._commit(step)
        self.waiting = []
        furthest = max(self._marks.values(), default=-1)
        if furthest > step:
            if (step + 1, furthest) not in self.rewritten:
                self.rewritten.append((step + 1, furthest))
            ready.append(self.rewritten_tag())
        return ready

    def rewritten_tag(self) -> Tags:
        return Tags({"rewritten": _newest([f"{first}-{last}" for first, last in self.rewritten], ",")})


def legal_name(name: str) -> str:
    """`name` as MLflow accepts it: one odd name must not hold back everything behind it."""
    legal = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(legal).lstrip("./")[:_MAX_NAME] or "_"


def _line(item: Point | Image) -> str:
    """What has its own high-water mark: a metric, or a series of images."""
    return item.key if isinstance(item, Point) else f"image:{item.key}"


def _newest(parts: list[str], separator: str) -> str:
    """Joined, and short enough for a tag by leaving out the oldest."""
    text = separator.join(parts)
    return text if len(text) <= _MAX_TAG else "..." + text[-(_MAX_TAG - 3) :]
