"""Send to MLflow what runs' local logs still hold, after the runs: what jobs/sync.py does.

A sweep is a run, the parent, with a folder of trials: they are sent with it, and after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jem.errors import JEMError
from jem.files import Location
from orchestrator import events
from orchestrator.config import shown
from orchestrator.mlflow_run import RunSpec
from orchestrator.result import Result
from orchestrator.runs import RunRecord, lock, read_record
from orchestrator.survey import Run, choose, find, holder, log_of, look
from orchestrator.tracking import default_uri
from orchestrator.upload import STATE_NAME, child_of, is_whole, kept_spec, send_rest

Say = Callable[[str], None]

TRIALS = "trials"
"""Below a sweep's folder: its trials, each a run's folder."""


@dataclass
class Synced(Result):
    """`runs` has an entry a run: name, status (sent, open, skipped, failed), run_id, message."""

    runs: list[dict[str, Any]] = field(default_factory=list)


def sync_runs(arguments: list[str], say: Say = print) -> Synced:
    """Those that are named, or all of a storage that MLflow has not got whole; `say` is told of each at once."""
    storage, named, settings = choose(arguments, ("storage_path", "tracking.uri"))
    uri = settings.get("tracking.uri")
    if uri is not None:
        uri = default_uri(storage, uri)[0]
    chosen = [look(below) for root in named or find(storage) for below in (root, *find(root / TRIALS))]
    parents: dict[str, str] = {}
    entries = []
    for run in chosen if named else [run for run in chosen if not _sent(run, uri)]:
        entry = _entry(run, uri, parents)
        say(f"{entry['name']}: {entry['status']}: {entry['message']}")
        entries.append(entry)
    if not entries:
        say(f"{storage.uri}: MLflow has everything" if chosen else f"no runs in {storage.uri}")
    failed = [entry["name"] for entry in entries if entry["status"] == "failed"]
    result = Synced(status="failed" if failed else "finished", runs=entries)
    result.message = f"not everything could be sent of {', '.join(failed)}" if failed else ""
    if len(entries) == 1:
        result.name, result.run_id = entries[0]["name"], entries[0]["run_id"]
    return result


def sweep_of(root: Location) -> Location | None:
    """The sweep's folder, if the run in this one is a trial."""
    sweep = root.parent.parent
    return sweep if root.parent.name == TRIALS and (sweep / "sweep.json").exists() else None


def remember_sent(root: Location, record: RunRecord, spec: RunSpec, run_id: str, whole: bool) -> None:
    """Write into run.json where in MLflow the run is, and whether that is everything."""
    known = {"uri": shown(spec.uri), "experiment": spec.experiment, "run_id": run_id, "complete": whole}
    if known.items() <= record.mlflow.items() and (record.result is None or record.result.get("run_id") == run_id):
        return
    record.mlflow |= known
    if record.result is not None:
        record.result |= {"run_id": run_id, "tracking_uri": shown(spec.uri)}
    record.save(root)


def _sent(run: Run, uri: str | None) -> bool:
    """Whether all is there, in the MLflow of `uri` (none: wherever it was sent to).

    A sweep has no run.json of a run's kind, and a trial that crashed early may have none.
    """
    if uri is not None and _place(run) != shown(uri):
        return False
    return run.sent or (not run.record and not run.holder and is_whole(log_of(run.root).parent))


def _place(run: Run) -> str | None:
    """The MLflow that it was sent to, as far as known."""
    if run.mlflow:
        return str(run.mlflow.get("uri"))
    folder = log_of(run.root).parent
    return shown(kept_spec(folder)[0].uri) if (folder / STATE_NAME).exists() else None


def _entry(run: Run, uri: str | None, parents: dict[str, str] | None = None) -> dict[str, Any]:
    """What came of one run; an error of it is told and does not keep the others waiting.

    `parents` remembers the MLflow runs of the sweeps whose trials have been sent.
    """
    sweep = sweep_of(run.root)
    name = f"{sweep.name}/{run.name}" if sweep else run.name
    entry: dict[str, Any] = {"name": name, "status": "failed", "run_id": run.mlflow.get("run_id"), "message": ""}
    try:
        held = run.holder or (holder(sweep) if sweep else None)
        if held:
            return entry | {"status": "skipped", "message": f"{held} is working on it, and sends it itself"}
        with lock(sweep or run.root):
            run_id, where, whole = _send(run.root, uri, sweep, {} if parents is None else parents)
        what = "everything is in" if whole else "sent up to its last checkpoint, as its log does not end, to"
        status = "sent" if whole else "open"
        return entry | {"status": status, "run_id": run_id, "message": f"{what} run {run_id} in {where}"}
    except (JEMError, OSError) as error:
        return entry | {"message": str(error)}


def _send(root: Location, uri: str | None, sweep: Location | None, parents: dict[str, str]) -> tuple[str, str, bool]:
    """Send a run that nobody works on and remember it; its MLflow run, where that is, whether it is whole now."""
    record, log_path = read_record(root), log_of(root)
    if not log_path.exists():
        raise JEMError(f"{log_path}: there is no such log here; sync on the machine where the run's driver was")
    storage = (sweep or root).parent
    spec = _spec(root, storage, record, log_path.parent)
    if uri or not spec.uri:
        uri = uri or _with_password(record)
        spec = replace(spec, uri=uri or "", artifact_root=default_uri(storage, uri)[1] if uri else None)
    if sweep is not None:
        if sweep.uri not in parents:
            parents[sweep.uri] = _send(sweep, uri, None, parents)[0]
        spec = child_of(parents[sweep.uri], spec)
    known = record.mlflow.get("run_id") if record and record.mlflow.get("uri") == shown(spec.uri) else None
    run_id = send_rest(spec, log_path, log_path.parent, known)
    whole = _ends(log_path)
    if record is not None:
        remember_sent(root, record, spec, run_id, whole)
    if (root / TRIALS).is_dir():
        parents[root.uri] = run_id
    return run_id, shown(spec.uri), whole


def _spec(root: Location, storage: Location, record: RunRecord | None, folder: Path) -> RunSpec:
    """The MLflow run as its uploader remembers it, or, where that never came so far, as the driver would name it."""
    if (folder / STATE_NAME).exists() or record is None:
        return kept_spec(folder)[0]
    uri = str(record.mlflow.get("uri") or "")
    uri = "" if ":***@" in uri else uri
    artifacts = default_uri(storage, uri or None)[1] if uri or root.is_local else None
    params = {key: str(value) for key, value in record.science.items()}
    tags = {"folder": root.uri, "digest": record.digest}
    return RunSpec(uri, str(record.mlflow.get("experiment") or "jem"), record.name, artifacts, params, tags)


def _with_password(record: RunRecord | None) -> str | None:
    """MLFLOW_TRACKING_URI, where it is the run's: passwords are not kept on disk."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return uri if uri and record and shown(uri) == record.mlflow.get("uri") else None


def _ends(log_path: Path) -> bool:
    """Whether the log says how the run ended: until then, what no checkpoint has is not sent."""
    written, _ = events.read(log_path)
    return bool(written) and written[-1]["kind"] == "end"
