"""From a configuration to a finished run: the run's folder, MLflow, Ray, the workers, the result."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jem import checkpoint
from jem.errors import CheckpointError, JEMError
from jem.evaluate.others import check_sets
from jem.files import Location
from orchestrator import events
from orchestrator.command import RAY_THREAD
from orchestrator.config import RunConfig, check_folder, shown, to_yaml
from orchestrator.control import clear_request, request_stop
from orchestrator.curves import curves_png, latest
from orchestrator.events import EventLog
from orchestrator.facts import facts
from orchestrator.final_model import write_model
from orchestrator.mirror import Mirror
from orchestrator.outbox import RUN_ID
from orchestrator.progress import Progress, follow
from orchestrator.ray_cluster import leave_ray, start_ray, train_on_ray
from orchestrator.registry import resolve_model
from orchestrator.report_files import final_report
from orchestrator.result import Result
from orchestrator.runs import RunRecord, aside, lock, open_record, spool_of, storage_of, write_config
from orchestrator.signals import StopSignals
from orchestrator.tracking import Uploader, default_uri

log = logging.getLogger(__name__)

CLOSING_S = 7.0
"""Of the time that a signal leaves (signals.STOP_WITHIN_S): for what follows the workers' last checkpoint."""

SAVING_S = 2.0
"""Of that time: for run.json and the last line, after MLflow."""

SAMPLES = "samples.png"
SHOWN = "Chains at step {step}:\n\n![samples](get-artifact?path=" + SAMPLES + "&run_uuid=" + RUN_ID + ")"
"""The description of a run in MLflow: its page shows the newest picture of the chains."""

UPLOAD_S = 60.0
"""How long the end waits for MLflow."""


def launch(config: RunConfig, fresh: bool = False) -> Result:
    """Train, or continue, or read out the run that `config` names."""
    storage = storage_of(config)
    uri, artifact_root = default_uri(storage, config.tracking.uri)
    assert config.name
    root = storage / config.name
    check_folder(config)
    if config.evaluate.suite == "full":
        check_sets(config.evaluate.sets, config.data)  # now, not when all is trained
    with lock(root):
        record = open_record(root, config, fresh)
        done = record.status == "finished" and record.result and record.result["step"] >= config.steps
        attempt = Attempt(config, root, record, uri, artifact_root)
        if done:
            return attempt.read_out()
        write_config(root, config)
        return attempt.run()


class Attempt:
    """One driver's work on a run."""

    def __init__(self, config: RunConfig, root: Location, record: RunRecord, uri: str, artifacts: str | None) -> None:
        self.config, self.root, self.record = config, root, record
        self.number = len(record.attempts) + 1
        self.folder = root.local if root.is_local else spool_of(root)
        if not root.is_local and not record.attempts and self.folder.exists():
            Location.of(self.folder).move_to(aside(Location.of(self.folder)))  # of a run that --fresh has moved away
        self.log_path = self.folder / "events.jsonl"
        self.saving = threading.Lock()
        self.uri = uri
        known = record.mlflow.get("run_id") if record.mlflow.get("uri") == shown(uri) else None
        self.uploader = Uploader(
            log_path=self.log_path,
            run_dir=self.folder,
            uri=uri,
            experiment=config.tracking.experiment,
            run_name=record.name,
            run_id=known,
            artifact_root=artifacts,
            params=config.science,
            tags=facts() | {"steps": config.steps, "folder": root.uri, "digest": record.digest},
            on_run=self._remember_run,
        )
        complete = record.mlflow.get("complete", False)
        record.mlflow = {"uri": shown(uri), "experiment": config.tracking.experiment, "run_id": known}
        record.mlflow["complete"] = complete

    def read_out(self) -> Result:
        """The result of a finished run; what MLflow did not take at the time is sent now."""
        assert self.record.result is not None
        result = Result(**self.record.result)
        sending = not self.record.mlflow.get("complete") and self.log_path.exists()
        if sending:
            self.uploader.start()
            result.run_id = self.uploader.finish(result.status, timeout=UPLOAD_S)
        if result.model is None:
            self._name_model(result)
        if sending:
            self._remember_upload(result)
        return result

    def run(self) -> Result:
        with StopSignals(self._last_word) as self.signals:
            seen = self._begin()
            try:
                with self._progress(seen):
                    outcome = self._wait_for_training()
            except BaseException as error:  # the run is closed as what it is, whatever happened
                outcome = self._failed(error)
            return self._close(outcome)

    def _begin(self) -> int:
        """Write down that this attempt has begun; where the log ends at present."""
        entry = {"number": self.number, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        self.record.attempts.append(entry | {"workers": self.config.workers})
        self.record.status = "running"
        self.record.mlflow["complete"] = False
        self._save()
        clear_request(self.root)
        seen = self.log_path.stat().st_size if self.log_path.exists() else 0
        EventLog(self.log_path).close()
        self.uploader.start()
        return seen

    def _train(self) -> dict[str, Any]:
        """Ray up, all steps, Ray down; what the workers say of it."""
        init_from = resolve_model(self.config.init_from, self.root, self.uri)
        with start_ray(self.config) as cluster, Mirror(self.root, self.log_path, needed=not cluster.private):
            if self.signals.stopping:
                return {"status": "stopped", "message": "stopped before training began"}
            return train_on_ray(self.config, self.root, self.log_path, self.number, init_from, cluster)

    def _wait_for_training(self) -> dict[str, Any]:
        """Wait in the main thread, where signals arrive, while Ray works in another.

        On the main thread ray.init would exit at a SIGTERM, and fit() abort at a SIGINT. The thread lives as long
        as Ray does: on Linux the processes of a private Ray are killed when it ends.
        """
        box: list[Any] = []

        def call() -> None:
            try:
                box.append(self._train())
            except BaseException as error:  # handed over to the main thread
                box.append(error)

        thread = threading.Thread(target=call, daemon=True, name=RAY_THREAD)
        thread.start()
        asking = None
        while thread.is_alive():
            self.signals.listen()  # Ray's C++ side takes SIGTERM at some point of ray.init, and would abort
            thread.join(0.05)
            if self.signals.stopping and asking is None:
                asking = threading.Thread(target=self._ask_to_stop, daemon=True, name="ask to stop")
                asking.start()
            if self.signals.left < CLOSING_S:
                leave_ray(patience_s=CLOSING_S / 2)
                return {
                    "status": "stopped",
                    "message": "stopped before the workers ended by themselves",
                }
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]  # type: ignore[no-any-return]

    def _ask_to_stop(self) -> None:
        """In a thread of its own: a storage that hangs may not keep the driver from ending."""
        while True:
            try:
                request_stop(self.root)
                return
            except OSError:  # a store that is away for a moment: asked again
                time.sleep(1)

    @contextmanager
    def _progress(self, seen: int) -> Iterator[None]:
        progress, done = Progress(self.config.steps), threading.Event()
        arguments = (self.log_path, seen, progress.update, done)
        thread = threading.Thread(target=follow, args=arguments, daemon=True, name="progress")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(5)
            progress.close()

    def _close(self, outcome: dict[str, Any]) -> Result:
        """Write down what came of the attempt: in the log, MLflow, run.json and the result."""
        status = outcome["status"]
        log = EventLog(self.log_path)
        for path in self._summaries():
            log.append("artifact", path=path)
        if (self.folder / SAMPLES).exists():
            log.append("tags", tags={"mlflow.note.content": SHOWN.format(step=outcome.get("step"))})
        self._offer_model(outcome, log)
        log.append("end", status=status)
        log.close()
        run_id = self._finish_upload(status)
        newest = checkpoint.committed(self.root / "checkpoints")[:1] if status != CheckpointError.status else []
        result = Result(
            run_id=run_id,
            name=self.record.name,
            checkpoint=outcome.get("checkpoint") or next((d.uri for d in newest), None),
            step=outcome.get("step", next((int(d.name) for d in newest), 0)),
            metrics=outcome.get("metrics") or latest(self.log_path),
            status=status,
            weights=outcome.get("weights"),
            samples=self._newest_picture(),
            curves=str(self.folder / "curves.png") if (self.folder / "curves.png").exists() else None,
            tracking_uri=shown(self.uri),
            message=outcome.get("message", ""),
        )
        self._name_model(result)
        self.record.status = status
        self.record.attempts[-1] |= {"ended": time.time(), "status": status, "step": result.step}
        self._remember_upload(result)
        return result

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
        if report is not None:
            event_log.append("artifact", path=report)
        if model is not None:
            event_log.append("model", **model)

    def _name_model(self, result: Result) -> None:
        """The final model's name in MLflow, if it has one by now."""
        models = [event for event in events.read(self.log_path)[0] if event["kind"] == "model"]
        found = self.uploader.registered(models[-1]["digest"]) if models else None
        if found is not None and models[-1]["step"] == result.step:
            result.model, result.champion = found.model, found.champion

    def _finish_upload(self, status: str) -> str | None:
        """Send what is left to MLflow and close the run there, as far as time allows; its id."""
        patience = max(0.0, min(UPLOAD_S, self.signals.left - SAVING_S))
        thread = threading.Thread(target=self.uploader.finish, args=(status, patience), daemon=True, name="finish")
        thread.start()
        while thread.is_alive() and self.signals.left > SAVING_S / 2:
            thread.join(0.1)
        return self.uploader.run_id

    def _last_word(self) -> int:
        """Time is up and something hangs: the last line, without asking anybody anything."""
        message = "stopped, and ended before all was written: the storage or MLflow does not answer"
        result = Result(run_id=self.uploader.run_id, name=self.record.name, status="stopped", message=message)
        print(result.json(), flush=True)
        return result.exit_code

    def _remember_upload(self, result: Result) -> None:
        self.record.result = dataclasses.asdict(result)
        self.record.mlflow["complete"] = self.uploader.complete
        self._save()

    def _failed(self, error: BaseException) -> dict[str, Any]:
        if isinstance(error, JEMError):
            return {"status": error.status, "message": str(error)}
        if isinstance(error, KeyboardInterrupt):
            return {"status": "stopped", "message": "interrupted at once, without a new checkpoint"}
        traceback.print_exception(error)
        lines = str(error).strip().splitlines() or [""]
        return {"status": "failed", "message": f"{type(error).__name__}: {lines[0]}"}

    def _summaries(self) -> Iterator[str]:
        """Write the recipe and the curves beside the log, for MLflow; the names of the files."""
        contents = {"recipe.yaml": to_yaml(self.config).encode(), "curves.png": curves_png(self.log_path)}
        newest = (self.root / "samples").children()
        with suppress(OSError):  # a store that is away for a moment: the picture itself is there
            contents[SAMPLES] = newest[-1].read() if newest else None
        for name, content in contents.items():
            if content is not None:
                try:
                    (self.folder / name).write_bytes(content)
                except OSError as error:  # a full disk
                    log.warning("%s cannot be written: %s", self.folder / name, error)
                else:
                    yield name

    def _newest_picture(self) -> str | None:
        pictures = (self.root / "samples").children()
        return pictures[-1].uri if pictures else None

    def _remember_run(self, run_id: str) -> None:
        self.record.mlflow["run_id"] = run_id
        self._save()

    def _save(self) -> None:
        try:
            with self.saving:
                self.record.save(self.root)
        except OSError as error:  # the disk is full: checkpoints and log say the same, and what came of it is printed
            log.warning("%s cannot be written: %s", (self.root / "run.json").uri, error)
