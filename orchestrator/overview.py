"""The runs of a storage, as a table or one in detail: what jobs/runs.py prints and returns."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from jem.files import Location
from orchestrator import details
from orchestrator.advice import Advice, advise, sync_command
from orchestrator.details import Checkpoint
from orchestrator.result import Result
from orchestrator.survey import SCORES, Run, choose, find, look
from orchestrator.sweep.folders import TRIALS, about, is_group, print_group

LINES = 3
"""Of what is wrong with a run, in the table of all."""


@dataclass
class Overview(Result):
    """`runs` has an entry a run; that of a run in detail has `details` too. `folders`: of many runs each."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    folders: list[dict[str, Any]] = field(default_factory=list)


def overview(arguments: list[str], verify: bool = False, jobs: str = "jobs") -> Overview:
    """Print the runs that are named in detail, or all of a storage as a table.

    `verify` reads every byte of the checkpoints; `jobs` is the folder of the commands, as it was typed.
    """
    storage, named, _ = choose(arguments, ("storage_path",))
    now = time.time()
    found = named or find(storage)
    groups = [root for root in found if is_group(root)]
    if len(named) == 1 and groups:  # its trials, as a table
        storage, named = named[0] / TRIALS, []
        found = find(storage)
    told = [_tell(root, bool(named), verify, jobs, now) for root in found if root not in groups]
    told.sort(key=lambda one: one.run.begun, reverse=True)
    entries = [facts(one.run, one.advice) for one in told]
    if named:
        for entry, one in zip(entries, told, strict=True):
            entry["details"] = _print_one(one, jobs, now)
    elif told or not groups:
        _print_all(storage, told, jobs, now)
    folders = [about(root, jobs) for root in groups]
    for folder in folders:
        print_group(folder, jobs)
    result = _result(entries, [kept for one in told for kept in one.kept], verify)
    result.folders = folders
    return result


@dataclass
class Told:
    """All that is to be said of a run."""

    run: Run
    advice: Advice
    kept: list[Checkpoint] = field(default_factory=list)
    story: details.Story = field(default_factory=details.Story)


def _tell(root: Location, in_detail: bool, verify: bool, jobs: str, now: float) -> Told:
    """One damaged run must not hide the others: whatever its folder makes this raise is what is said of it."""
    try:
        run = look(root)
        kept = details.checkpoints(root, verify) if in_detail or verify else []
        story = details.story(run.log_path) if in_detail else details.Story()
        return Told(run, advise(run, jobs, now, kept), kept, story)
    except Exception as error:
        return Told(Run(root), Advice(f"{root.uri}: cannot be read ({type(error).__name__}: {error})"))


def facts(run: Run, advice: Advice) -> dict[str, Any]:
    """A run as JSON. Times are in seconds since the epoch."""
    return {
        "name": run.name,
        "folder": run.root.uri,
        "status": run.status,
        "step": run.step,
        "steps": run.steps,
        "scores": run.scores,
        "attempts": len(run.attempts),
        "rollbacks": len(run.rollbacks),
        "remedies": run.remedies,
        "bytes": run.bytes,
        "begun": run.begun,
        "seen": run.seen,
        "run_id": run.mlflow.get("run_id"),
        "sent": run.sent,
        "problem": advice.problem,
        "next": advice.next,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Aligned columns; those whose head is in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    flush = [name in right for name in head]
    lines = []
    for row in (head, *rows):
        cells = [c.rjust(w) if f else c.ljust(w) for c, w, f in zip(row, widths, flush, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _print_all(storage: Location, told: list[Told], jobs: str, now: float) -> None:
    if not told:
        print(f"no runs in {storage.uri}; the first one: python {jobs}/train.py digits")
        return
    rows = [_row(one.run, now) for one in told]
    head = ("run", "status", "step", *SCORES, "attempts", "disk", "begun", "last sign", "rollbacks")
    print(table(head, rows, ("step", *SCORES, "attempts", "disk")))
    for one in told:
        if one.advice.problem or one.advice.next:
            print(f"\n{one.run.name}: {_shortened(one.advice.problem or one.run.status)}")
        if one.advice.next:
            print(f"  next: {one.advice.next}")
    print()


def _row(run: Run, now: float) -> tuple[str, ...]:
    scores = [f"{run.scores[key]:.3f}" if key in run.scores else "-" for key in SCORES]
    reached = (run.name, run.status, _steps(run), *scores, str(len(run.attempts)))
    return (*reached, _size(run.bytes), _when(run.begun), _ago(run.seen, now), _rollbacks(run))


def _print_one(one: Told, jobs: str, now: float) -> dict[str, Any]:
    """Print everything of a run; the same as JSON."""
    run, advice, kept, told = one.run, one.advice, one.kept, one.story
    attempts = details.attempts(run, told)
    lines = {
        "folder": f"{run.root.uri}, {_size(run.bytes)}",
        "last sign": _ago(run.seen, now) + (f", {run.holder} is working on it" if run.holder else ""),
        "MLflow": _mlflow(run, jobs),
        "problem": _wrapped(advice.problem, 11),
        "next": advice.next or "",
        ("or" if advice.next else "to go on"): advice.alternative or "",
    }
    print(f"{run.name}: {run.status} at step {_steps(run)}\n")
    print("\n".join(f"{label:<9}  {text}" for label, text in lines.items() if text))
    _print_attempts(attempts)
    _print_rollbacks(run)
    if kept:
        rows = [(str(c.step), _size(c.bytes), c.state if c.good else "damaged") for c in kept]
        print("\n" + table(("checkpoint", "size", "files"), rows, ("checkpoint", "size")))
    for event in told.failed_checkpoints:
        print(f"\nno checkpoint could be written at step {event.get('step')}: {event.get('reason')}")
    if told.metrics:
        rows = [(key, _figure(value), str(step)) for key, (value, step) in told.metrics.items()]
        print("\n" + table(("newest metrics", "value", "step"), rows, ("value", "step")))
    if told.damaged_lines:
        print(f"\n{told.damaged_lines} lines of {run.log_path} cannot be read")
    print()
    return {
        "attempts": attempts,
        "rollbacks": run.rollbacks,
        "checkpoints": [asdict(one) for one in kept],
        "failed_checkpoints": told.failed_checkpoints,
        "metrics": {key: value for key, (value, _) in told.metrics.items()},
        "mlflow": run.mlflow,
        "alternative": advice.alternative,
    }


def _print_attempts(attempts: list[dict[str, Any]]) -> None:
    rows = []
    for entry in attempts:
        known = [str(entry.get(key, "?")) for key in ("number", "host", "pid", "workers", "restarts")]
        times = [_when(entry.get("started")), _when(entry.get("ended"))]
        rows.append((*known, *times, str(entry.get("status", "?")), _or_dash(entry.get("step"))))
    if rows:
        head = ("attempt", "host", "pid", "workers", "restarts", "begun", "ended", "status", "step")
        print("\n" + table(head, rows, ("attempt", "pid", "workers", "restarts", "step")))


def _print_rollbacks(run: Run) -> None:
    rows = []
    for entry in run.rollbacks:
        numbers = [str(entry.get(key, "?")) for key in ("number", "diverged_at", "to")]
        remedies = entry.get("remedies") if isinstance(entry.get("remedies"), list) else []
        rows.append((*numbers, ", ".join(map(str, remedies or [])), str(entry.get("reason", "?"))))
    if rows:
        head = ("rollback", "diverged at", "back to", "remedies", "reason")
        print("\n" + table(head, rows, head[:3]))


def _mlflow(run: Run, jobs: str) -> str:
    if not run.mlflow.get("uri"):
        return ""
    what = f"run {run.mlflow.get('run_id') or '(none yet)'} in {run.mlflow['uri']}"
    if run.sent:
        return f"{what}: everything is there"
    if run.status == "running":
        return f"{what}: sent up to the newest checkpoint while it runs"
    return f"{what}: not everything is there; {sync_command(run, jobs)}"


def _result(entries: list[dict[str, Any]], kept: list[Checkpoint], verify: bool) -> Overview:
    bad = sum(not one.good for one in kept)
    result = Overview(runs=entries, status="listed")
    if verify and bad:
        result.status = "failed" if bad < len(kept) else "no good checkpoint"
        result.message = f"{bad} of {len(kept)} checkpoints are not as they were written"
    if len(entries) == 1 and "details" in entries[0]:
        one = entries[0]
        result.name, result.run_id, result.step = one["name"], one["run_id"], one["step"]
        result.metrics = one["details"]["metrics"]
        result.tracking_uri = one["details"]["mlflow"].get("uri")
        result.checkpoint = next((c.directory for c in kept if c.good), None)
    return result


def _steps(run: Run) -> str:
    return f"{_or_dash(run.step)}/{_or_dash(run.steps)}"


def _rollbacks(run: Run) -> str:
    return f"{len(run.rollbacks)}: {', '.join(run.remedies)}" if run.rollbacks else "0"


def _wrapped(text: str, by: int) -> str:
    """Lines of at most 110 characters, all but the first indented."""
    lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, 110) or [""]]
    return ("\n" + " " * by).join(lines)


def _shortened(text: str) -> str:
    """The first lines; the run in detail has them all."""
    lines = _wrapped(text, 2).splitlines()
    return "\n".join(lines[:LINES]) + (" ..." if len(lines) > LINES else "")


def _size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def _when(moment: Any) -> str:
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M}" if isinstance(moment, int | float) and moment else "-"


def _ago(moment: float | None, now: float) -> str:
    if moment is None:
        return "-"
    seconds = max(0.0, now - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)
