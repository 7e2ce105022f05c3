"""The trials of a sweep as rows, read from their folders alone, and as files: trials.csv and trials.parquet."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jem.errors import ConfigError
from jem.files import Location
from orchestrator import events
from orchestrator.curves import read_series
from orchestrator.runs import RunRecord, read_record
from orchestrator.survey import log_of, mapping

if TYPE_CHECKING:
    from orchestrator.sweep.config import Objective, Sweep

BASE = "base"
"""The candidate that is the recipe as it is."""

SEEDS = "seeds"
"""The stage of runs that differ in their seeds alone, and the kind of their folder."""

ABLATION = "ablation"
"""The same of runs of several arms."""

FIXED = (SEEDS, ABLATION)
"""Stages whose trials are all asked for by name: one that failed is tried again by the same command."""

STAGES = ("search", SEEDS, ABLATION, "finalists")

OUT_OF_TIME = "out of time"

GOING_ON = ("running", "waiting", "stopped", OUT_OF_TIME)
"""Statuses of trials that are not over: one waits to be compared, a stopped one goes on with the sweep."""

STATUSES = ("finished", "pruned", "diverged", "failed", *GOING_ON)
"""In the order in which they are told."""

BESIDE = ("name", "stage", "number", "candidate", "seed", "status", "reason", "step", "seconds", "started", "ended")
"""Columns before those of the space; metrics, run_id and folder come after it."""


@dataclass(frozen=True)
class Row:
    """A trial. `point` is what was drawn for it, `metrics` the newest finite value of each.

    `reason`: why it did not finish, or was not evaluated. `seconds`: worked on, over all attempts; `started` and
    `ended`: since the epoch, 0 where that is not known.
    """

    name: str
    stage: str
    number: int
    candidate: str
    point: dict[str, Any]
    seed: int
    status: str
    reason: str = ""
    step: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None
    folder: str = ""
    started: float = 0.0
    ended: float = 0.0
    forks: tuple[str, ...] = ()  # what it went on from in the middle, see population.py

    @property
    def is_base(self) -> bool:
        return self.candidate == BASE


def read_trials(root: Location) -> list[Row]:
    """The trials of the sweep in a folder, by stage and number. A damaged one counts as failed and says why."""
    folders = [child for child in (root / "trials").children() if child.is_dir() and not child.name.startswith(".")]
    rows = [_read(folder) for folder in folders if not re.search(r"\.\d+$", folder.name)]  # NAME.1 was set aside
    return sorted(rows, key=lambda row: (STAGES.index(row.stage), row.number, row.name))


def value(row: Row, objective: Objective) -> float | None:
    """What a trial counts as: the worst if it came to nothing, None if that is not known (yet), or it was pruned."""
    if row.status in ("diverged", "failed"):
        return objective.worst
    return row.metrics.get(objective.key, objective.worst) if row.status == "finished" else None


def objectives(sweep: Sweep) -> list[Objective]:
    from orchestrator.sweep.config import OBJECTIVES

    return [OBJECTIVES[key] for key in sweep.config.objective]


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many trials have each status, without those that none has."""
    statuses = [row.status for row in rows]
    return {status: statuses.count(status) for status in STATUSES if status in statuses}


def measured(rows: Iterable[Row], sweep: Sweep) -> list[Row]:
    """The search's trials that finished with every objective."""
    keys = sweep.config.objective
    return [r for r in rows if r.stage == "search" and r.status == "finished" and all(key in r.metrics for key in keys)]


def best(rows: Iterable[Row], sweep: Sweep) -> list[Row]:
    """The best of the search, the base included; of several objectives all trials that no other one dominates."""
    return next(iter(fronts(measured(rows, sweep), objectives(sweep))), [])


def fronts(rows: Sequence[Row], wanted: Sequence[Objective]) -> list[list[Row]]:
    """Rows that have every objective, by nondomination rank (Deb, 2002), each front best first in the first objective.

    A row is in the front after those that dominate it: they are nowhere worse and somewhere better. With a single
    objective a front is one row, the earlier one of equals first.
    """
    losses = {row.name: [_loss(row, objective) for objective in wanted] for row in rows}
    left = sorted(rows, key=lambda row: losses[row.name][0])
    if len(wanted) == 1:
        return [[row] for row in left]
    found = []
    while left:
        front = [row for row in left if not any(_dominates(losses[other.name], losses[row.name]) for other in left)]
        found.append(front)
        left = [row for row in left if row not in front]
    return found


def write_tables(rows: Sequence[Row], folder: Path) -> list[str]:
    """Write trials.csv and trials.parquet, a row a trial; their names.

    A column a setting of the space, empty where it was not drawn, and a column a metric. Settings whose values are
    of several types, or lists, are text (JSON); none is written as such, to differ from what was not drawn.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.table(_columns(rows))
    names = {"trials.csv": pyarrow.csv.write_csv, "trials.parquet": pyarrow.parquet.write_table}
    for name, write in names.items():
        buffer = pa.BufferOutputStream()
        write(table, buffer)
        (Location.of(folder) / name).write(buffer.getvalue().to_pybytes())
    return list(names)


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    import pyarrow as pa

    types = {"number": pa.int64(), "seed": pa.int64(), "step": pa.int64()}
    types |= dict.fromkeys(("seconds", "started", "ended"), pa.float64())
    fields = {name: [asdict(row)[name] for row in rows] for name in (*BESIDE, "run_id", "folder")}
    columns = {name: pa.array(fields[name], types.get(name, pa.string())) for name in BESIDE}
    for key in dict.fromkeys(key for row in rows for key in row.point):
        columns[key] = _typed([row.point.get(key, ...) for row in rows])
    if any(row.forks for row in rows):
        columns["went on from"] = pa.array(["; ".join(row.forks) for row in rows], pa.string())
    for key in sorted({key for row in rows for key in row.metrics}):
        columns[key] = pa.array([row.metrics.get(key) for row in rows], pa.float64())
    return columns | {name: pa.array(fields[name], pa.string()) for name in ("run_id", "folder")}


def _typed(values: Sequence[Any]) -> Any:
    """A column of whole numbers, numbers, truth values or text; `...` stands for what is not there."""
    import pyarrow as pa

    kinds = {type(item) for item in values if item is not ...}
    for wanted, of in ((bool, pa.bool_()), (int, pa.int64()), (str, pa.string())):
        if kinds <= {wanted}:
            return pa.array([None if item is ... else item for item in values], of)
    if kinds <= {int, float}:
        return pa.array([None if item is ... else float(item) for item in values], pa.float64())
    return pa.array([None if item is ... else _text(item) for item in values], pa.string())


def _text(item: Any) -> str:
    if item is None:
        return "none"
    return item if isinstance(item, str) else json.dumps(item)


def _loss(row: Row, objective: Objective) -> float:
    found = value(row, objective)
    assert found is not None
    return found if objective.mode == "min" else -found


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def _read(folder: Location) -> Row:
    """Whatever a folder makes this raise is what is said of it: one damaged trial must not hide the others."""
    row = _from_name(folder)
    if not folder.is_local and (folder / "trial.json").exists():
        (folder / "trial.json").read()  # a store that is away is no damage: that is raised
    try:
        row = _identified(folder)
        record = read_record(folder)
        return _with_record(row, record, folder) if record else row
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not folder.is_local:
            raise
        said = str(error)
        reason = said if folder.uri in said else f"{folder.uri}: damaged ({type(error).__name__}: {said})"
        return replace(row, status="failed", reason=" ".join(reason.split()))


def _from_name(folder: Location) -> Row:
    """What a folder's name tells: t007 of the search, f-t007-s3 of the finalists, s3 of several seeds, ARM-s3."""
    patterns = (r"f-(.+)-s(\d+)", r"s(\d+)", r"(\w+)-s(\d+)")
    finalist, seed, arm = (re.fullmatch(pattern, folder.name) for pattern in patterns)
    if finalist:
        return Row(folder.name, "finalists", 0, finalist[1], {}, int(finalist[2]), "running", folder=folder.uri)
    if seed:
        return Row(folder.name, SEEDS, int(seed[1]), BASE, {}, int(seed[1]), "running", folder=folder.uri)
    if arm:
        return Row(folder.name, ABLATION, int(arm[2]), arm[1], {}, int(arm[2]), "running", folder=folder.uri)
    searched = re.fullmatch(r"t(\d+)", folder.name)
    number = int(searched[1]) if searched else 0
    candidate = BASE if searched and number == 0 else folder.name
    return Row(folder.name, "search", number, candidate, {}, 0, "running", folder=folder.uri)


def _identified(folder: Location) -> Row:
    """trial.json as a row of which nothing has come yet. Raises ValueError if that is not what the file holds."""
    path = folder / "trial.json"
    entries = mapping(path)
    kinds = {"name": str, "stage": str, "number": int, "candidate": str, "point": dict, "seed": int}
    wrong = [key for key, kind in kinds.items() if type(entries.get(key)) is not kind]
    if not wrong and entries["stage"] not in STAGES:
        wrong = ["stage"]
    if wrong:
        raise ValueError(f"{path.uri}: damaged (without a proper {', '.join(wrong)})")
    known = {key: entries[key] for key in kinds} | {"name": folder.name}
    forks = tuple(f"{fork['donor']} at step {fork['step']}" for fork in entries.get("forks", []) if fork["done"])
    return Row(**known, status="running", folder=folder.uri, forks=forks)


def _with_record(row: Row, record: RunRecord, folder: Location) -> Row:
    status = "running" if record.status == "new" else record.status
    reason = ""
    result = record.result if record.result and status != "running" else {}  # else it is of the attempt before
    if status not in STATUSES:  # no good checkpoint, bad data, ...: nothing came of it
        status, reason = "failed", status
    log_path = log_of(folder)
    gave_up = status in ("diverged", "failed")  # its result is of its last good checkpoint, the log of what it came to
    series = read_series(log_path) if gave_up or not result.get("metrics") else {}
    metrics = {key: points[max(points)] for key, points in series.items()} or result.get("metrics") or {}
    steps = [step for points in series.values() for step in points]
    message = str(result.get("message") or "")
    changes: dict[str, Any] = {
        "status": status,
        "reason": ": ".join(text for text in (reason, message) if text),
        "step": max([int(result.get("step") or 0), *steps]),
        "metrics": {k: float(x) for k, x in metrics.items() if isinstance(x, int | float) and math.isfinite(x)},
        "run_id": record.mlflow.get("run_id"),
    }
    return replace(row, **changes, **_times(record.attempts, log_path))


def _times(attempts: Sequence[dict[str, Any]], log_path: Path) -> dict[str, Any]:
    """`seconds`, `started` and `ended`; an attempt that was killed ended with the last event that it wrote."""
    if not attempts:
        return {}
    begun = [float(attempt["started"]) for attempt in attempts]
    ends = [attempt.get("ended") for attempt in attempts]
    if None in ends:
        written = [event["time"] / 1000 for event in events.read(log_path)[0]]
        limits = [*begun[1:], math.inf]
        for i, (start, limit) in enumerate(zip(begun, limits, strict=True)):
            ends[i] = ends[i] or max((time for time in written if start <= time < limit), default=start)
    seconds = sum(float(end) - start for start, end in zip(begun, ends, strict=True) if end)
    over = attempts[-1].get("ended")
    return {"seconds": seconds, "started": begun[0], "ended": float(over) if over else 0.0}
