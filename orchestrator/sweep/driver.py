"""From a sweep to its decision: the search, the finalists, the winner."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from jem.evaluate.others import check_sets
from jem.files import Location
from jem.settings import digest
from orchestrator.config import check_folder, shown
from orchestrator.outbox import RUN_ID
from orchestrator.published import workbench
from orchestrator.ray_cluster import cores, ray_session, tell_of_gpus
from orchestrator.registry import resolve_model
from orchestrator.result import Result
from orchestrator.runs import lock, read_record, storage_of
from orchestrator.survey import log_of
from orchestrator.sweep import decide
from orchestrator.sweep.axes import valid
from orchestrator.sweep.config import OBJECTIVES, Sweep, to_yaml, trial_config
from orchestrator.sweep.decide import Decision, winner_recipe
from orchestrator.sweep.drawing import base_value
from orchestrator.sweep.ending import message_of, status_of
from orchestrator.sweep.plots import draw_plots
from orchestrator.sweep.population import evolve, stretches
from orchestrator.sweep.resources import Fit, fit
from orchestrator.sweep.session import Record, Session, open_folder, shortened
from orchestrator.sweep.space import points
from orchestrator.sweep.summary import summary
from orchestrator.sweep.table import GOING_ON, OUT_OF_TIME, STAGES, Row, counts, read_trials, write_tables
from orchestrator.sweep.trial import CLOSING, TRIALS, Setting, Trial, search_trial
from orchestrator.upload import newest_model

GIB = 2**30
WINNER = "winner"
"""What Ray Tune calls the last stage: one trial, measured where trials run, which may be the only place with a GPU."""

PICTURES = ("objectives.png", "importance.png", "parallel.png", "pareto.png", "progress.png")


@dataclass
class SweepResult(Result):
    """`best`: the winner's name, point and figures; `recipe`: the file that trains it again."""

    best: dict[str, Any] | None = None
    recipe: str | None = None
    trials: dict[str, int] = field(default_factory=dict)  # how many ended as what
    verdict: str = ""


def run_sweep(sweep: Sweep, fresh: bool = False) -> SweepResult:
    """Search, train the finalists, decide; or go on with that; or read out what came of it."""
    check_folder(sweep.run)
    if sweep.final["evaluate.suite"] != "none":
        check_sets(sweep.run.evaluate.sets, sweep.run.data)  # of the winner: now, not when all is trained
    storage = storage_of(trial_config(sweep, {}, name=sweep.name))
    root = storage / sweep.name
    with lock(root):
        record = open_folder(root, Record(sweep.name, sweep.science), fresh)
        if record.status == "finished" and record.result:
            _tell_of_changes(sweep, record)
            return SweepResult(**record.result)
        return Search(sweep, storage, root, record).run()


class Search(Session[SweepResult]):
    """One driver's work on a sweep."""

    def __init__(self, sweep: Sweep, storage: Location, root: Location, record: Record) -> None:
        config = sweep.config
        params = {f"space.{axis.key}": axis.text for axis in sweep.space} | {"base": config.base}
        params |= {"objective": ", ".join(config.objective), "searcher": config.searcher}
        params |= {"scheduler": config.scheduler.name, "steps": str(sweep.run.steps), "seed": str(config.seed)}
        super().__init__(sweep, storage, root, record, params, {"digest": digest(sweep.science)})
        self.finalists: list[Trial] = []  # that are asked for, once that is known

    def recipe(self) -> tuple[str, str]:
        return "sweep.yaml", to_yaml(self.sweep)

    def work(self) -> dict[str, Any]:
        sweep, config = self.sweep, self.sweep.config
        here = cores()
        with ray_session(here) as cluster:
            if config.resources.gpu is None:
                tell_of_gpus(sweep.run, cluster)
            memory = psutil.virtual_memory().available / GIB if cluster.private else cluster.memory
            cpus = here if cluster.private else cluster.cpus
            fitting = fit(sweep, cpus, cluster.gpus, memory, grows=not cluster.private)
            if cpus < fitting.at_once * fitting.cpu_each:
                print(f"{fitting.why}: as many run as there is room for, until there is more", file=sys.stderr)
            init_from = resolve_model(sweep.run.init_from, self.root, self.uri)
            setting = Setting(sweep, self.root, cluster, config.resources.cpu, init_from)

            def stage(name: str, trials: Sequence[Trial], n: int, reserve: int, until: int | None = None) -> None:
                trials = [replace(trial, until=until) for trial in trials]
                self.run_stage(name, trials, setting, fitting, n, reserve)
                if until is not None:
                    evolve(read_trials(self.root), sweep, self.root / TRIALS, until)
                self.record.stages = list(dict.fromkeys([*self.record.stages, name]))
                self.record.save(self.root)
                (self.root / CLOSING).remove()

            trials = self._candidates()
            for stretch in stretches(sweep):
                if stretch.name not in self.record.stages:
                    stage(stretch.name, trials, sweep.trials, sweep.finals, stretch.until)
            self.finalists = self._finalists()
            if any(row.status in GOING_ON for row in self._rows() if row.stage == "finalists"):
                (self.root / "tune" / "finalists").remove()  # others may be asked for now; the runs know how far
                stage("finalists", self.finalists, len(self.finalists), 0)
            rows = self._rows()
            decision = decide.decide(rows, sweep)
            return {"status": "finished", "decision": decision, **self._crown(rows, decision, setting, fitting)}

    def _finalists(self) -> list[Trial]:
        """Those that are asked for, seed by seed, the base first."""
        config, chosen = self.sweep.config, decide.finalists(self._read(), self.sweep)
        seeded = [(config.seed + 1 + k, candidate) for k in range(config.seeds) for candidate in chosen]
        return [
            Trial(f"f-{name}-s{seed}", "finalists", number, name, point, seed)
            for number, (seed, (name, point)) in enumerate(seeded)
        ]

    def _rows(self) -> list[Row]:
        """The trials: a row for each finalist that is asked for, begun or not; of others, those that have ended."""
        rows = self._read()
        if not self.finalists:
            return rows
        asked = {trial.name: trial for trial in self.finalists}
        rows = [r for r in rows if r.stage != "finalists" or r.name in asked or r.status not in GOING_ON]
        for name in asked.keys() - {row.name for row in rows}:
            beside = (asked[name].number, asked[name].candidate, asked[name].point, asked[name].seed)
            status = OUT_OF_TIME if "finalists" in self.record.stages else "stopped"
            rows.append(Row(name, "finalists", *beside, status, "not begun"))
        return sorted(rows, key=lambda row: (STAGES.index(row.stage), row.number, row.name))

    def _read(self) -> list[Row]:
        """Those that have begun; the winner has finished, also while it is measured, or where that was interrupted."""
        return [self._whole(row) if row.name == self.record.winner else row for row in read_trials(self.root)]

    def _whole(self, row: Row) -> Row:
        """Its result is that of the training until the measurement has one; its log may be on another machine."""
        record = read_record(self.root / TRIALS / row.name)
        known = (record.result or {}).get("metrics", {}) if record else {}
        return replace(row, status="finished", reason="", metrics={**known, **row.metrics})

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

    def _crown(self, rows: list[Row], decision: Decision, setting: Setting, fitting: Fit) -> dict[str, Any]:
        """Measure the winner on test data, once, and register it: of its seeds, the best on validation."""
        objective = self.sweep.config.objective[0]
        stage = [r for r in rows if r.stage == decision.stage]
        own = [r for r in stage if r.candidate == decision.winner and r.status == "finished"]
        if not own:
            came = {"status": "finished"}
            return {"status": status_of(came, rows, self.root), "message": message_of(came, rows, "no trial finished")}
        sign = 1 if OBJECTIVES[objective].mode == "max" else -1
        row = max(own, key=lambda r: sign * r.metrics[objective])
        folder, measure = self.root / TRIALS / row.name, dict(self.sweep.final)
        trial = Trial(row.name, row.stage, row.number, row.candidate, row.point, row.seed, measure=measure)
        before = read_record(folder)
        assert before is not None
        if self.record.winner != row.name:
            self.record.winner = row.name
            self.record.save(self.root)  # first: with this trial at work, what it has shown would not count
        if setting.cluster.private:  # nothing else is at work here
            setting = replace(setting, cpus=max(setting.cpus, cores()))
        (self.root / "tune" / WINNER).remove()
        self.run_stage(WINNER, [trial], setting, fitting, len(stage), shown=row.stage)
        record = read_record(folder)
        assert record is not None
        assert record.result is not None
        result = Result(**record.result)
        if len(record.attempts) == len(before.attempts):
            why = "its measurement could not begin; the log of Ray's worker says why"
            result = replace(result, status="failed", message=why)
        spec = self.trial_spec(row.name)
        assert spec is not None
        self.uploads.add(row.name, spec, log_of(folder), workbench(folder), folder)
        self.uploads.reopen(row.name)  # whatever the overseer saw of it
        self.uploads.close_trial(row.name, result.status, result.message)
        if result.status != "finished":  # the trial is what it was
            record.status, record.result = "finished", before.result
            record.save(folder)
        found = {"winner": row, "metrics": result.metrics, "checkpoint": result.checkpoint, "step": result.step}
        if result.status != "finished" or result.message:  # the same command measures it again
            status = "failed" if result.status == "finished" else result.status
            found |= {"status": status, "message": f"the winner, {row.name}: {result.message or result.status}"}
        return found

    def close(self, outcome: dict[str, Any]) -> SweepResult:
        """Tables, pictures, the recipe, MLflow, the record."""
        rows, decision = self._rows(), outcome.get("decision")
        names = [*write_tables(rows, self.folder), *draw_plots(rows, self.sweep, self.folder), "sweep.yaml"]
        text = summary(rows, self.sweep, decision)
        (self.folder / "summary.md").write_text(text)
        recipe = None
        if decision is not None:
            (self.folder / "decision.json").write_text(decision.json())
            names.append("decision.json")
            if decision.winner is not None:
                recipe = self.folder / "recipe.yaml"
                forks = [row.forks for row in rows if (row.stage, row.candidate) == ("search", decision.winner)]
                recipe.write_text(winner_recipe(self.sweep, decision, *forks))
                names.append("recipe.yaml")
        pictures = "".join(f"\n\n![{n}](get-artifact?path={n}&run_uuid={RUN_ID})" for n in PICTURES if n in names)
        status, metrics, winner = outcome["status"], outcome.get("metrics", {}), outcome.get("winner")
        files, note = [*names, "summary.md"], shortened(text) + pictures
        run_id = self.tell(status, files, note, metrics=metrics, step=outcome.get("step"))
        model = newest_model(workbench(self.root / TRIALS / winner.name)) if winner is not None else None
        result = SweepResult(
            run_id=run_id,
            name=self.sweep.name,
            checkpoint=outcome.get("checkpoint"),
            step=outcome.get("step"),
            metrics=metrics,
            model=model.model if model else None,
            champion=model.champion if model else None,
            status=status,
            tracking_uri=shown(self.uri),
            message=outcome.get("message", ""),
            best=_told(winner) if winner is not None else None,
            recipe=(self.root / "recipe.yaml").uri if recipe else None,
            trials=dict(counts(rows)),
            verdict=decision.verdict if decision else "",
        )
        self.record.asked = _asked(self.sweep)
        return self.remember(result)


def _asked(sweep: Sweep) -> dict[str, Any]:
    config = sweep.config
    asked = {"seeds": config.seeds, "finalists": config.finalists, "budget.minutes": config.budget.minutes}
    return asked | {"workers": str(sweep.run.workers), "deterministic": sweep.run.deterministic}


def _tell_of_changes(sweep: Sweep, record: Record) -> None:
    for key, value in _asked(sweep).items():
        before = record.asked.get(key, value)
        if value != before:
            told = f"{key}={value} changes nothing: {record.name} has finished, with {before}"
            print(f"{told}; another name= begins another sweep, --fresh this one anew", file=sys.stderr)


def _told(row: Row) -> dict[str, Any]:
    return {"name": row.name, "candidate": row.candidate, "point": row.point, "seed": row.seed}
