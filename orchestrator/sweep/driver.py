"""From a sweep to its decision: the folder, Ray, the stages, MLflow, the winner."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil

from jem.errors import ConfigError, Problem
from jem.files import Location
from jem.settings import digest
from orchestrator.attempt import Attempt, failed
from orchestrator.config import check_folder, load_run_config, shown
from orchestrator.control import request_stop
from orchestrator.events import EventLog
from orchestrator.facts import facts
from orchestrator.mlflow_run import RunSpec
from orchestrator.outbox import RUN_ID
from orchestrator.ray_cluster import cores, ray_session
from orchestrator.registry import resolve_model
from orchestrator.result import Result
from orchestrator.runs import lock, read_record, set_aside, storage_of, write_config
from orchestrator.signals import StopSignals
from orchestrator.sweep import decide
from orchestrator.sweep.axes import valid
from orchestrator.sweep.config import OBJECTIVES, Sweep, to_yaml, trial_config
from orchestrator.sweep.decide import Decision, winner_recipe
from orchestrator.sweep.drawing import base_value
from orchestrator.sweep.overseer import Overseer
from orchestrator.sweep.plots import draw_plots
from orchestrator.sweep.population import evolve, stretches
from orchestrator.sweep.resources import fit
from orchestrator.sweep.space import points
from orchestrator.sweep.summary import summary
from orchestrator.sweep.table import Row, counts, read_trials, write_tables
from orchestrator.sweep.trial import CLOSING, STOPPING, TRIALS, Setting, Trial, search_trial, train_here
from orchestrator.sweep.upload import Uploads
from orchestrator.tracking import default_uri
from orchestrator.waiting import wait_for_ray

RECORD = "sweep.json"
UPLOAD_S = 60.0
ASK_EVERY_S = 0.5
GIB = 2**30
PICTURES = ("objectives.png", "importance.png", "parallel.png", "pareto.png", "progress.png")


@dataclass
class SweepResult(Result):
    """`best`: the winner's name, point and figures; `recipe`: the file that trains it again."""

    best: dict[str, Any] | None = None
    recipe: str | None = None
    trials: dict[str, int] = field(default_factory=dict)  # how many ended as what
    verdict: str = ""


@dataclass
class Record:
    """What sweep.json holds."""

    name: str
    science: dict[str, Any]
    status: str = "new"
    mlflow: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)  # those that are done
    result: dict[str, Any] | None = None

    def save(self, root: Location) -> None:
        (root / RECORD).write(json.dumps(asdict(self), indent=1).encode())


def run_sweep(sweep: Sweep, fresh: bool = False) -> SweepResult:
    """Search, train the finalists, decide; or go on with that; or read out what came of it."""
    check_folder(sweep.run)
    storage = storage_of(trial_config(sweep, {}, name=sweep.name))
    if not storage.is_local:
        raise ConfigError([Problem("storage_path", f"{storage.uri}: a sweep needs a folder that all nodes share")])
    root = storage / sweep.name
    with lock(root):
        record = _opened(root, sweep, fresh)
        if record.status == "finished" and record.result:
            return SweepResult(**record.result)
        return Session(sweep, storage, root, record).run()


def _opened(root: Location, sweep: Sweep, fresh: bool) -> Record:
    if fresh and root.exists():
        set_aside(root)
    if not (root / RECORD).exists():
        root.mkdir()
        return Record(sweep.name, sweep.science)
    try:
        record = Record(**json.loads((root / RECORD).read()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{(root / RECORD).uri}: damaged ({error}); start anew with --fresh") from error
    ours = json.loads(json.dumps(sweep.science))
    changed = [key for key in sorted({*record.science, *ours}) if record.science.get(key) != ours.get(key)]
    if changed:
        problems = [Problem(k, f"is {ours.get(k)!r}, the sweep there has {record.science.get(k)!r}") for k in changed]
        raise ConfigError([*problems, Problem("", "give the sweep another name=, or start it anew with --fresh")])
    return record


class Session:
    """One driver's work on a sweep."""

    def __init__(self, sweep: Sweep, storage: Location, root: Location, record: Record) -> None:
        self.sweep, self.root, self.record = sweep, root, record
        self.uri, self.artifacts = default_uri(storage, sweep.run.tracking.uri)
        self.folder = root.local
        self.log_path = self.folder / "events.jsonl"
        self.spent = sum(a.get("ended", a["started"]) - a["started"] for a in record.attempts)
        self.began = time.time()
        config = sweep.config
        params = {f"space.{axis.key}": axis.text for axis in sweep.space} | {"base": config.base}
        params |= {"objective": ", ".join(config.objective), "searcher": config.searcher}
        params |= {"scheduler": config.scheduler.name, "steps": str(sweep.run.steps), "seed": str(config.seed)}
        tags = facts() | {"folder": root.uri, "digest": digest(sweep.science), "kind": "sweep"}
        spec = RunSpec(
            self.uri, sweep.run.tracking.experiment, sweep.name, self.artifacts, _texts(params), _texts(tags)
        )
        known = record.mlflow.get("run_id") if record.mlflow.get("uri") == shown(self.uri) else None
        self.uploads = Uploads(spec, self.log_path, self.folder, known, self._remember_run)

    def run(self) -> SweepResult:
        self.record.attempts.append({"started": self.began})
        self.record.status = "running"
        self.record.save(self.root)
        for word in (CLOSING, STOPPING):
            (self.root / word).remove()
        (self.root / "sweep.yaml").write(to_yaml(self.sweep).encode())
        EventLog(self.log_path).close()
        self.uploads.start()
        with StopSignals() as signals:
            try:
                outcome = wait_for_ray(self._stages, signals, self._ask_to_stop, self._all_stopped)
            except BaseException as error:
                outcome = failed(error)
            return self._close(outcome)

    def _stages(self) -> dict[str, Any]:
        sweep, config = self.sweep, self.sweep.config
        here = cores()
        with ray_session(here) as cluster:
            memory = psutil.virtual_memory().available / GIB if cluster.private else cluster.memory
            fitting = fit(sweep, here if cluster.private else cluster.cpus, cluster.gpus, memory)
            init_from = resolve_model(sweep.run.init_from, self.root, self.uri)
            setting = Setting(sweep, self.root, cluster, config.resources.cpu, init_from)
            spec = self._trial_spec
            from orchestrator.sweep.tuning import run_stage

            def stage(name: str, trials: Sequence[Trial], n: int, reserve: int, until: int | None = None) -> None:
                if name in self.record.stages:
                    return
                trials = [replace(trial, until=until) for trial in trials]
                left = Overseer(sweep, self.root, self.uploads, spec, name.partition("-")[0], n, fitting.at_once)
                with left.watching(self.spent, self.began, reserve):
                    for lost in run_stage(name, trials, setting, fitting):
                        _close_lost(self.root / TRIALS / lost)
                if until is not None:
                    evolve(read_trials(self.root), sweep, self.root / TRIALS, until)
                self.record.stages.append(name)
                self.record.save(self.root)
                (self.root / CLOSING).remove()

            finals = (1 + config.finalists) * config.seeds if config.finalists else 0
            trials = self._candidates()
            for stretch in stretches(sweep):
                stage(stretch.name, trials, config.budget.trials, finals, stretch.until)
            chosen = decide.finalists(read_trials(self.root), sweep)
            trials = [
                Trial(f"f-{name}-s{seed}", "finalists", number, name, point, seed)
                for number, (seed, (name, point)) in enumerate(
                    (config.seed + 1 + k, candidate) for k in range(config.seeds) for candidate in chosen
                )
            ]
            if trials:
                stage("finalists", trials, len(trials), 0)
        rows = read_trials(self.root)
        decision = decide.decide(rows, sweep)
        return {"status": "finished", "decision": decision, **self._crown(rows, decision, setting)}

    def _candidates(self) -> list[Trial]:
        """All trials of the search where they do not depend on each other; none where they are suggested."""
        config, run = self.sweep.config, self.sweep.run
        if config.searcher == "tpe":
            return []
        drawn = points(
            self.sweep.space, config.searcher, config.budget.trials - 1, config.seed, lambda p: valid(run, p)
        )
        base = {axis.key: base_value(self.sweep, axis.key) for axis in self.sweep.space}
        first = base if config.scheduler.name == "pbt" else {}  # of which others get settings near it
        return [search_trial(self.sweep, number, point) for number, point in enumerate([first, *drawn])]

    def _crown(self, rows: list[Row], decision: Decision, setting: Setting) -> dict[str, Any]:
        """Measure the winner on test data, once, and register it: of its seeds, the best on validation."""
        objective = self.sweep.config.objective[0]
        stage = decision.stage
        own = [r for r in rows if r.candidate == decision.winner and r.stage == stage and r.status == "finished"]
        if not own:
            return {"message": "no trial finished", "winner": None}
        sign = 1 if OBJECTIVES[objective].mode == "max" else -1
        row = max(own, key=lambda r: sign * r.metrics[objective])
        root, base = self.root / TRIALS / row.name, load_run_config(self.sweep.config.base, []).evaluate
        measured: dict[str, Any] = {"evaluate.suite": base.suite, "evaluate.register": base.register}
        place = {"name": row.name, "seed": row.seed, "storage_path": (self.root / TRIALS).uri}
        config = trial_config(self.sweep, row.point, **place, **measured)
        spec = self._trial_spec(row.name)
        assert spec is not None
        self.uploads.add(row.name, spec, root.local / "events.jsonl", root.local)
        self.uploads.reopen(row.name)
        with lock(root):
            record = read_record(root)
            assert record is not None
            write_config(root, config)
            attempt = Attempt(config, root, record)
            attempt.begin()
            try:
                result = attempt.close(train_here(config, root, attempt, setting.init_from, cores()))
            except Exception as error:
                result = attempt.close(failed(error))
        self.uploads.close_trial(row.name, result.status, result.message)
        return {"winner": row, "metrics": result.metrics, "checkpoint": result.checkpoint, "step": result.step}

    def _close(self, outcome: dict[str, Any]) -> SweepResult:
        """Tables, pictures, the recipe, MLflow, the record."""
        rows, decision = read_trials(self.root), outcome.get("decision")
        names = [*write_tables(rows, self.folder), *draw_plots(rows, self.sweep, self.folder), "sweep.yaml"]
        text = summary(rows, self.sweep, decision)
        (self.folder / "summary.md").write_text(text)
        recipe = None
        if decision is not None:
            (self.folder / "decision.json").write_text(json.dumps(decision.json(), indent=1))
            names.append("decision.json")
            if decision.winner is not None:
                recipe = self.folder / "recipe.yaml"
                forks = [row.forks for row in rows if (row.stage, row.candidate) == ("search", decision.winner)]
                recipe.write_text(winner_recipe(self.sweep, decision, *forks))
                names.append("recipe.yaml")
        log = EventLog(self.log_path)
        for name in [*names, "summary.md"]:
            log.append("artifact", path=name)
        shown_ = "".join(f"\n\n![{n}](get-artifact?path={n}&run_uuid={RUN_ID})" for n in PICTURES if n in names)
        log.append("tags", tags={"mlflow.note.content": text[:6000] + shown_, "status": outcome["status"]})
        metrics = outcome.get("metrics", {})
        if metrics:
            log.append("metrics", step=outcome["step"], metrics=metrics)
        log.append("end", status=outcome["status"])
        log.close()
        run_id = self.uploads.finish(outcome["status"], UPLOAD_S)
        winner = outcome.get("winner")
        result = SweepResult(
            run_id=run_id,
            name=self.sweep.name,
            checkpoint=outcome.get("checkpoint"),
            step=outcome.get("step"),
            metrics=metrics,
            status=outcome["status"],
            tracking_uri=shown(self.uri),
            message=outcome.get("message", ""),
            best=_told(winner) if winner is not None else None,
            recipe=str(recipe) if recipe else None,
            trials=dict(counts(rows)),
            verdict=decision.verdict if decision else "",
        )
        self.record.status, self.record.result = result.status, asdict(result)
        self.record.attempts[-1] |= {"ended": time.time(), "status": result.status}
        self.record.save(self.root)
        return result

    def _trial_spec(self, name: str) -> RunSpec | None:
        """A trial as a run of MLflow; None before its run.json is written."""
        record = read_record(self.root / TRIALS / name)
        if record is None:
            return None
        params = _texts(record.science)
        tags = _texts({"sweep": self.sweep.name, "folder": (self.root / TRIALS / name).uri} | facts())
        return RunSpec(self.uri, self.sweep.run.tracking.experiment, name, self.artifacts, params, tags)

    def _remember_run(self, run_id: str) -> None:
        self.record.mlflow = {"uri": shown(self.uri), "run_id": run_id}
        self.record.save(self.root)

    def _running(self) -> list[Row]:
        return [row for row in read_trials(self.root) if row.status == "running"]

    def _ask_to_stop(self) -> None:
        """Again and again: a trial that was about to begin takes no notice of what was asked before."""
        (self.root / STOPPING).write(b"1")
        while running := self._running():
            for row in running:
                request_stop(self.root / TRIALS / row.name)
            time.sleep(ASK_EVERY_S)

    def _all_stopped(self) -> bool:
        return not self._running()


def _told(row: Row) -> dict[str, Any]:
    return {"name": row.name, "candidate": row.candidate, "point": row.point, "seed": row.seed}


def _close_lost(root: Location) -> None:
    """A trial whose process died again and again could not write down what came of it."""
    record = read_record(root)
    if record is not None and record.status == "running":
        record.status = "failed"
        result = Result(name=record.name, status="failed", message="its process died, and so did those after it")
        record.result = asdict(result)
        record.save(root)


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
