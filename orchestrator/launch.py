"""From a configuration to a finished run: the run's folder, MLflow, Ray, the workers, the result."""

from __future__ import annotations

import logging
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from jem.evaluate.others import check_sets
from jem.files import Location
from orchestrator import events
from orchestrator.attempt import Attempt, failed
from orchestrator.config import RunConfig, check_folder, plain, shown
from orchestrator.control import request_stop
from orchestrator.facts import facts
from orchestrator.mirror import Mirror
from orchestrator.progress import Progress, follow
from orchestrator.ray_cluster import start_ray, train_on_ray
from orchestrator.registry import check_source, resolve_model
from orchestrator.result import Result
from orchestrator.runs import RunRecord, check_kind, lock, open_record, storage_of, write_config
from orchestrator.signals import StopSignals
from orchestrator.tracking import Uploader, check_uri, default_uri
from orchestrator.waiting import wait_for_ray

log = logging.getLogger(__name__)

SAVING_S = 2.0
"""Of the time that a signal leaves (signals.STOP_WITHIN_S): for run.json and the last line, after MLflow."""

UPLOAD_S = 60.0
"""How long the end waits for MLflow."""


def launch(config: RunConfig, fresh: bool = False) -> Result:
    """Train, or continue, or read out the run that `config` names."""
    storage = storage_of(config)
    uri, artifact_root = default_uri(storage, config.tracking.uri)
    assert config.name
    root = storage / config.name
    check_kind(root)
    if fresh or not (root / "run.json").exists():  # one that has begun may go on though these have gone since
        check_before(config)
    with lock(root):
        record = open_record(root, config, fresh)
        done = record.status == "finished" and record.result and record.result["step"] >= config.steps
        attempt = Launch(config, root, record, uri, artifact_root)
        if done:
            return attempt.read_out()
        write_config(root, config)
        return attempt.run()


def check_before(config: RunConfig) -> None:
    """What a new run would find out when Ray is up, or when all is trained. Raises ConfigError or DataError."""
    check_folder(config)
    if config.evaluate.suite != "none":
        check_sets(config.evaluate.sets, config.data)
    check_source(config.init_from)
    check_uri(config.tracking.uri)


class Launch(Attempt):
    """An attempt with Ray, MLflow and signals: what jobs/train.py does."""

    def __init__(self, config: RunConfig, root: Location, record: RunRecord, uri: str, artifacts: str | None) -> None:
        super().__init__(config, root, record)
        self.tracking_uri = shown(uri)
        self.uri = uri
        before = record.mlflow.get("uri")
        self.moved_from = before if before != shown(uri) else None
        known = record.mlflow.get("run_id") if before == shown(uri) else None
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
        self._tell_of_changes()
        result = Result(**self.record.result)
        sending = not self.record.mlflow.get("complete") and self.log_path.exists()
        if sending:
            self.uploader.start()
            result.run_id = self.uploader.finish(result.status, timeout=UPLOAD_S)
            result.tracking_uri = self.tracking_uri
            self.remember(result)
        elif result.model is None:
            self._name_model(result)
        return result

    def _tell_of_changes(self) -> None:
        """What is no science, and comes too late for a run that has finished."""
        try:
            before = yaml.safe_load((self.root / "recipe.yaml").read())["evaluate"]
        except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
            return
        root, places = self.root.uri, f"storage_path={self.config.storage_path} tracking.uri={self.tracking_uri}"
        for key in (
            "register",
            "model_name",
            "champion",
            "input_layout",
            "input_dtype",
            "suite",
            "sets",
            "final",
            "ema",
        ):
            now = plain(getattr(self.config.evaluate, key))
            if now == before.get(key, now) or (key, now) == ("suite", "none"):
                continue
            shows = f"[{','.join(now)}]" if isinstance(now, list) else now
            changed, again = f"evaluate.{key}={shows}", "--fresh trains it anew"
            if key in ("register", "model_name", "champion"):
                asked = "" if key == "register" else f" {changed}"
                again = f"python jobs/register.py {root}{asked} {places} registers it again, {again}"
            elif key in ("suite", "sets"):
                again = f"{shlex.join(['python', 'jobs/evaluate.py', root, changed])} measures it"
            self._changes_nothing(changed, again)
        if self.config.tracking.uri and self.moved_from and self.record.mlflow["complete"]:
            again = f"it is in {self.moved_from}, python jobs/sync.py {root} {places} sends it there, too"
            self._changes_nothing(f"tracking.uri={self.tracking_uri}", again)

    def _changes_nothing(self, changed: str, again: str) -> None:
        print(f"{changed} changes nothing: {self.record.name} has finished; {again}", file=sys.stderr)

    def run(self) -> Result:
        with StopSignals(self._last_word) as self.signals:
            seen = self.begin()
            self.uploader.start()
            try:
                with self._progress(seen):
                    outcome = self._wait_for_training()
            except BaseException as error:  # the run is closed as what it is, whatever happened
                outcome = failed(error)
            return self.close(outcome)

    def _train(self) -> dict[str, Any]:
        """Ray up, all steps, Ray down; what the workers say of it."""
        init_from = resolve_model(self.config.init_from, self.root, self.uri)
        with start_ray(self.config) as cluster, Mirror(self.root, self.log_path, needed=not cluster.private):
            if self.signals.stopping:
                return {"status": "stopped", "message": "stopped before training began"}
            return train_on_ray(self.config, self.root, self.log_path, self.number, init_from, cluster)

    def _wait_for_training(self) -> dict[str, Any]:
        return wait_for_ray(self._train, self.signals, self._ask_to_stop)

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

    def _name_model(self, result: Result) -> None:
        """The final model's name in MLflow, if it has one by now."""
        models = [event for event in events.read(self.log_path)[0] if event["kind"] == "model"]
        found = self.uploader.registered(models[-1]["digest"]) if models else None
        if found is not None and models[-1]["step"] == result.step:
            result.model, result.champion = found.model, found.champion

    def finish_upload(self, status: str) -> str | None:
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

    def remember(self, result: Result) -> None:
        self._name_model(result)
        self.record.mlflow["complete"] = self.uploader.complete
        super().remember(result)

    def _remember_run(self, run_id: str) -> None:
        self.record.mlflow["run_id"] = run_id
        self.save()
