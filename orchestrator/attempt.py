"""One attempt at a run: written down in the run's folder and log as it begins, and as it ends."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from jem import checkpoint
from jem.errors import CheckpointError, JEMError
from jem.files import Location
from orchestrator.checkpoints import owner
from orchestrator.config import RunConfig, to_yaml
from orchestrator.control import clear_request
from orchestrator.curves import curves_png, latest
from orchestrator.events import EventLog
from orchestrator.final_model import write_model
from orchestrator.outbox import RUN_ID
from orchestrator.published import clear_workbench, publish, workbench
from orchestrator.report_files import final_report
from orchestrator.result import Result
from orchestrator.runs import RunRecord

log = logging.getLogger(__name__)

SAMPLES = "samples.png"
SHOWN = "Chains at step {step}:\n\n![samples](get-artifact?path=" + SAMPLES + "&run_uuid=" + RUN_ID + ")"
"""The description of a run in MLflow: its page shows the newest picture of the chains."""


class Attempt:
    """Work on a run by somebody who holds its lock: `begin`, train, `close`. It knows neither Ray nor MLflow."""

    tracking_uri: str | None = None

    def __init__(self, config: RunConfig, root: Location, record: RunRecord, folder: Path | None = None) -> None:
        """`folder`: where log, pictures and models are made on this machine; none: the run's workbench."""
        self.config, self.root, self.record = config, root, record
        known = [entry["number"] for entry in record.attempts]
        self.number = max([*known, owner(root).get("attempt", 0)]) + 1  # run.json may be lost, or an older one
        self.folder = folder or workbench(root)
        self.fetched = folder is not None and not root.is_local  # from the store, by whoever reads the log
        if not record.attempts:
            clear_workbench(root, self.folder)
        self.log_path = self.folder / "events.jsonl"
        self.saving = threading.Lock()

    def begin(self) -> int:
        """Write down that this attempt has begun; where the log ends at present."""
        entry = {"number": self.number, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        self.record.attempts.append(entry | {"workers": self.config.workers})
        self.record.status = "running"
        self.record.mlflow["complete"] = False
        self.save()
        clear_request(self.root)
        EventLog(self.log_path).close()  # half a line that a death has left is cut off
        return self.log_path.stat().st_size

    def close(self, outcome: dict[str, Any]) -> Result:
        """Write down what came of the attempt: in the log, run.json and the result, and wherever else it is told."""
        status = outcome["status"]
        log = EventLog(self.log_path)
        for path in self._summaries():
            log.append("artifact", path=path)
        if (self.folder / SAMPLES).exists() and "step" in outcome:  # the note of another picture stays
            log.append("tags", tags={"mlflow.note.content": SHOWN.format(step=outcome["step"])})
        self._offer_model(outcome, log)
        log.append("end", status=status)
        log.close()
        run_id = self.finish_upload(status)
        newest = self._newest_checkpoint() if status != CheckpointError.status else []
        result = Result(
            run_id=run_id,
            name=self.record.name,
            checkpoint=outcome.get("checkpoint") or next((d.uri for d in newest), None),
            step=outcome.get("step", next((int(d.name) for d in newest), 0)),
            metrics=outcome.get("metrics") or latest(self.log_path),
            status=status,
            weights=outcome.get("weights"),
            samples=self._newest_picture(),
            curves=self._place_of("curves.png"),
            tracking_uri=self.tracking_uri,
            message=outcome.get("message", ""),
        )
        self.record.status = status
        self.record.attempts[-1] |= {"ended": time.time(), "status": status, "step": result.step}
        self.remember(result)
        return result

    def finish_upload(self, status: str) -> str | None:  # noqa: ARG002
        """Tell MLflow, where that is the business of who works on the run; the id of its run there."""
        return None

    def remember(self, result: Result) -> None:
        self.record.result = dataclasses.asdict(result)
        self.save()

    def save(self) -> None:
        try:
            with self.saving:
                self.record.save(self.root)
        except OSError as error:  # the disk is full: checkpoints and log say the same, and what came of it is printed
            log.warning("%s cannot be written: %s", (self.root / "run.json").uri, error)

    def _offer_model(self, outcome: dict[str, Any], event_log: EventLog) -> None:
        """Write the final model's folder and the report of its evaluation beside the log, and tell MLflow of them."""
        if outcome["status"] != "finished":
            return
        try:
            run = {"name": self.record.name, "folder": self.root.uri, "digest": self.record.digest}
            model = write_model(self.folder, self.config, outcome, run) if outcome.get("calibrated") else None
            report = final_report(self.folder, self.config, outcome, self.record.name)
        except Exception as error:  # whatever drawing and writing make of it, the run is what it is
            log.warning("the final model cannot be written to %s, so it is not registered: %r", self.folder, error)
            return
        if not self._publish(*([report] if report else []), *([model["path"]] if model else [])) and self.fetched:
            return
        if report is not None:
            event_log.append("artifact", path=report)
        if model is not None:
            event_log.append("model", **model)

    def _summaries(self) -> Iterator[str]:
        """Write the recipe and the curves beside the log, for MLflow; the names of the files."""
        contents = {"recipe.yaml": to_yaml(self.config).encode(), "curves.png": curves_png(self.log_path)}
        with suppress(OSError):  # a store that is away: the picture itself is there
            newest = (self.root / "samples").children()
            contents[SAMPLES] = newest[-1].read() if newest else None
        for name, content in contents.items():
            if content is not None:
                try:
                    (self.folder / name).write_bytes(content)
                except OSError as error:  # a full disk
                    log.warning("%s cannot be written: %s", self.folder / name, error)
                else:
                    if self._publish(name) or not self.fetched:
                        yield name

    def _publish(self, *names: str) -> bool:
        """A store that is away costs the copies there: what was made here, and MLflow, have the same."""
        try:
            for name in names:
                publish(self.root, name, self.folder)
        except OSError as error:
            log.warning("%s has not got what lies in %s (%s)", self.root.uri, self.folder, error)
            return False
        return True

    def _place_of(self, name: str) -> str | None:
        return (self.root / name).uri if (self.folder / name).exists() else None

    def _newest_checkpoint(self) -> list[Location]:
        with suppress(OSError):  # a store that is away
            return checkpoint.committed(self.root / "checkpoints")[:1]
        return []

    def _newest_picture(self) -> str | None:
        with suppress(OSError):
            pictures = (self.root / "samples").children()
            return pictures[-1].uri if pictures else None
        return None


def failed(error: BaseException) -> dict[str, Any]:
    """The outcome of an attempt that this ended."""
    if isinstance(error, JEMError):
        return {"status": error.status, "message": str(error)}
    if isinstance(error, KeyboardInterrupt):
        return {"status": "stopped", "message": "interrupted at once, without a new checkpoint"}
    traceback.print_exception(error)
    lines = str(error).strip().splitlines() or [""]
    return {"status": "failed", "message": f"{type(error).__name__}: {lines[0]}"}
