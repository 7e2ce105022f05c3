"""From a configuration to a finished run: the run's folder, MLflow, Ray, the workers, the result."""

from __future__ import annotations

import dataclasses
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
from jem.files import Location
from orchestrator.command import RAY_THREAD
from orchestrator.config import RunConfig, check_folder, shown, to_yaml
from orchestrator.control import clear_request, request_stop
from orchestrator.curves import curves_png, latest
from orchestrator.events import EventLog
from orchestrator.facts import facts
from orchestrator.mirror import Mirror, spool_of
from orchestrator.progress import Progress, follow
from orchestrator.ray_cluster import start_ray, train_on_ray
from orchestrator.registry import resolve_model
from orchestrator.result import Result
from orchestrator.runs import RunRecord, aside, lock, open_record, storage_of, write_config
from orchestrator.signals import StopSignals
from orchestrator.tracking import Uploader, default_uri

STOP_PATIENCE_S = 25.0
"""How long workers may take to reach a checkpoint after a request to stop."""


def launch(config: RunConfig, fresh: bool = False) -> Result:
    """Train, or continue, or read out the run that `config` names."""
    storage = storage_of(config)
    uri, artifact_root = default_uri(storage, config.tracking.uri)
    assert config.name
    root = storage / config.name
    check_folder(config)
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
        if not self.record.mlflow.get("complete") and self.log_path.exists():
            self.uploader.start()
            result.run_id = self.uploader.finish(result.status, timeout=60)
            self._remember_upload(result)
        return result

    def run(self) -> Result:
        entry = {"number": self.number, "host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        self.record.attempts.append(entry | {"workers": self.config.workers})
        self.record.status = "running"
        self._save()
        clear_request(self.root)
        seen = self.log_path.stat().st_size if self.log_path.exists() else 0
        EventLog(self.log_path).close()
        self.uploader.start()
        with StopSignals() as self.signals:
            try:
                with self._progress(seen):
                    outcome = self._train()
            except BaseException as error:  # the run is closed as what it is, whatever happened
                outcome = self._failed(error)
            return self._close(outcome)

    def _train(self) -> dict[str, Any]:
        """Ray up, all steps, Ray down; what the workers say of it."""
        init_from = resolve_model(self.config.init_from, self.root, self.uri)
        with start_ray(self.config) as cluster, Mirror(self.root, self.log_path, needed=not cluster.private):
            self.signals.listen()  # again: ray.init has put handlers of its own there
            if self.signals.stopping:
                return {"status": "stopped", "message": "stopped before training began"}
            return self._in_thread(
                lambda: train_on_ray(self.config, self.root, self.log_path, self.number, init_from, cluster)
            )

    def _in_thread(self, function: Any) -> dict[str, Any]:
        """Wait in the main thread, where signals arrive, while Ray works in another.

        On the main thread fit() would take SIGINT for itself and abort.
        """
        box: list[Any] = []

        def call() -> None:
            try:
                box.append(function())
            except BaseException as error:  # handed over to the main thread
                box.append(error)

        thread = threading.Thread(target=call, daemon=True, name=RAY_THREAD)
        thread.start()
        deadline = None
        while thread.is_alive():
            thread.join(0.2)
            if self.signals.stopping and deadline is None:
                with suppress(OSError):  # a store that is away for a moment: asked again
                    request_stop(self.root)
                    deadline = time.monotonic() + STOP_PATIENCE_S
            if deadline is not None and time.monotonic() > deadline:
                return {"status": "stopped", "message": "stopped before the workers could write a checkpoint"}
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]  # type: ignore[no-any-return]

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
        log.append("end", status=status)
        log.close()
        run_id = self.uploader.finish(status, timeout=60)
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
        self.record.status = status
        self.record.attempts[-1] |= {"ended": time.time(), "status": status, "step": result.step}
        self._remember_upload(result)
        return result

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
        recipe = to_yaml(self.config).encode()
        for name, content in (("recipe.yaml", recipe), ("curves.png", curves_png(self.log_path))):
            if content is not None:
                (self.folder / name).write_bytes(content)
                yield name

    def _newest_picture(self) -> str | None:
        pictures = (self.root / "samples").children()
        return pictures[-1].uri if pictures else None

    def _remember_run(self, run_id: str) -> None:
        self.record.mlflow["run_id"] = run_id
        self._save()

    def _save(self) -> None:
        with self.saving:
            self.record.save(self.root)
