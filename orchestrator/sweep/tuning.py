"""Ray Tune over the trials of a stage: what it is told, and what it tells of a trial to who searches."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from jem.errors import DataError
from jem.files import Location
from orchestrator.curves import series_of
from orchestrator.shared import NOT_SHARED, Word, apart, sees, word_in
from orchestrator.sweep.axes import valid
from orchestrator.sweep.config import OBJECTIVES, Sweep
from orchestrator.sweep.orphans import freeing_orphans
from orchestrator.sweep.resources import SHARE, Fit
from orchestrator.sweep.shared_log import told_by
from orchestrator.sweep.space import draw, points
from orchestrator.sweep.trial import TRIALS, Setting, Trial, Work, search_trial

RESTARTS = 3
"""How often a trial is started again whose process has died."""

REPEATS = 10
"""How often a point is drawn again that was tried already: each time is kept, and makes the next one slower."""

DRAWS = 100
"""How often a point is drawn again that cannot be, or is the base itself."""

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials have logs of their own
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # what Tune forgets when the driver is killed
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class SweepTrial(tune.Trainable):  # type: ignore[misc]
    """A process that works on one trial after the other: importing torch is paid once."""

    def setup(self, config: dict[str, Any], setting: Setting, word: Word | None) -> None:
        """`word`: left in the sweep's folder by the driver. Raises DataError where it is not seen from here."""
        self.setting = setting
        self.work: Work | None = None
        if word is not None and not sees(setting.root, word):
            raise apart(setting.root, [socket.gethostname()], word)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.trial = Trial(**new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        self.work = self.work or Work(self.setting, self.trial)
        return self.work.next()

    def cleanup(self) -> None:
        if self.work is not None:
            self.work.leave("pruned")
        self.work = None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Runs keep their own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Runs find their own."""


class Limited(Searcher):  # type: ignore[misc]
    """Trials, no more of them under way than `at_once`.

    Tune's own limit is part of what it remembers of a stage: who goes on with another one would not get it.
    """

    at_once = 1
    """Of the class, as Tune restores the object that an earlier driver made."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.count = 0
        self.live: set[str] = set()

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if len(self.live) >= self.at_once:
            return None  # it is asked again
        found = self.next_trial(trial_id)
        if found is None:
            return Searcher.FINISHED
        self.live.add(trial_id)
        self.count += 1
        return {"trial": asdict(found)}

    def next_trial(self, trial_id: str) -> Trial | None:
        raise NotImplementedError

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ends alone tell."""

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        self.live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        self.__dict__.update({"live": set(), **pickle.loads(Path(checkpoint_path).read_bytes())})


class Given(Limited):
    """Trials that do not depend on each other, in their order."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__()
        self.trials = list(trials)

    def next_trial(self, trial_id: str) -> Trial | None:  # noqa: ARG002
        return self.trials[self.count] if self.count < len(self.trials) else None


class Suggestions(Limited):
    """Optuna's suggestions as trials. The base comes first, and a trial that came to nothing is a bad one."""

    def __init__(self, sweep: Sweep) -> None:
        keys = list(sweep.config.objective)
        modes = [OBJECTIVES[key].mode for key in keys]
        super().__init__(metric=keys, mode=modes)
        self.sweep = sweep
        metric, mode = (keys, modes) if len(keys) > 1 else (keys[0], modes[0])
        space = partial(draw, sweep.space)
        self.inner = OptunaSearch(space, metric=metric, mode=mode, seed=sweep.config.seed)
        self.inner_ids: dict[str, str] = {}  # Optuna's trial of one of Tune's; the base has none
        self.names: dict[str, str] = {}  # of the points, by Tune's trials
        self.seen: dict[str, dict[str, float] | None] = {}  # what came of a point; None: not yet known

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"names": {}, "seen": {}, **state})  # an older version knew neither

    def next_trial(self, trial_id: str) -> Trial | None:
        point = self._drawn(trial_id) if self.count else {}
        return None if point is None else search_trial(self.sweep, self.count, point)

    def _drawn(self, trial_id: str) -> dict[str, Any] | None:
        """A point that can be and was not tried yet, of which Optuna is told what is known, and asked again.

        Where it has no other idea one is drawn at random; None: there are no more.
        """
        keys, repeated = {axis.key for axis in self.sweep.space}, 0
        for again in range(DRAWS):
            inner_id = f"{trial_id}-{again}"
            point = {key: value for key, value in self.inner.suggest(inner_id).items() if key in keys}
            name, can_be = json.dumps(point, sort_keys=True), valid(self.sweep.run, point)
            if can_be and name not in self.seen:
                self.inner_ids[trial_id] = inner_id
                return self._noted(trial_id, point)
            known = self.seen.get(name) if can_be else self.worst
            self.inner.on_trial_complete(inner_id, known, error=known is None)
            repeated += can_be
            if repeated == REPEATS:
                break
        space, run, seed = self.sweep.space, self.sweep.run, self.sweep.config.seed
        drawn = points(space, "random", len(self.seen) + 1, seed, lambda point: valid(run, point))
        others = [point for point in drawn if json.dumps(point, sort_keys=True) not in self.seen]
        return self._noted(trial_id, others[0]) if others else None

    def _noted(self, trial_id: str, point: dict[str, Any]) -> dict[str, Any]:
        self.names[trial_id] = json.dumps(point, sort_keys=True)
        self.seen[self.names[trial_id]] = None
        return point

    @property
    def worst(self) -> dict[str, float]:
        return {key: OBJECTIVES[key].worst for key in self.sweep.config.objective}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        super().on_trial_complete(trial_id)
        if error or not result or any(key not in result for key in self.sweep.config.objective):
            result = self.worst
        if trial_id in self.names:
            self.seen[self.names[trial_id]] = {key: result[key] for key in self.sweep.config.objective}
        if trial_id in self.inner_ids:
            self.inner.on_trial_complete(self.inner_ids[trial_id], result)


def run_stage(stage: str, trials: Sequence[Trial], setting: Setting, fit: Fit) -> dict[str, str]:
    """Run all trials of a stage, or what is left of them; the names of those that Tune gave up, and why.

    Without `trials` they are suggested as the search goes on. Tune is asked for what it remembers before anything of
    the same name is made: that would be overwritten, and the scheduler with it.
    """
    sweep, folder = setting.sweep, setting.root / "tune"
    if not folder.is_local:  # some requests each time; the trials themselves forget nothing
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "10")
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    workers = sweep.run.max_workers
    # A driver of several workers only waits: with a CPU of its own they would not fit. Of nothing at all no bundle can
    # be made, hence a byte; where it is not needed an autoscaler whose machines declare no memory would bring none.
    resources = {"CPU": 0.0, "memory": 1.0}
    if workers == 1:
        resources = {"CPU": fit.cpu_each} | ({"GPU": fit.gpu_each} if fit.gpu_each else {})
        resources |= {sweep.config.resources.label: SHARE} if sweep.config.resources.label else {}
    with word_in(setting.root) as word, freeing_orphans() if workers > 1 else nullcontext():
        trainable = tune.with_parameters(SweepTrial, setting=setting, word=word)
        tuner = _tuner(stage, trials, setting, fit, tune.with_resources(trainable, resources))
        results = tuner.fit()
    given_up = {Path(str(result.path)).name: _told(result.error) for result in results if result.error is not None}
    apart_from_us = [told for told in given_up.values() if NOT_SHARED in told]
    if apart_from_us and len(apart_from_us) == len(results):
        raise DataError(apart_from_us[0].partition(": ")[2])
    return given_up


def _tuner(stage: str, trials: Sequence[Trial], setting: Setting, fit: Fit, trainable: Any) -> tune.Tuner:
    """One that goes on where there is one."""
    sweep, folder = setting.sweep, setting.root / "tune"
    path = str(Path(folder.path) / stage)
    Limited.at_once, Rungs.root = fit.at_once, setting.root
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(fit.at_once)  # else they start one after the other
    # A driver that died between Tune's two files left one that Tune takes, and then forgets all trials.
    begun = any(child.name.startswith("experiment_state-") for child in (folder / stage).children())
    if not begun:
        (folder / stage).remove()  # the trials themselves know how far they are
    elif tune.Tuner.can_restore(path, storage_filesystem=folder.fs):
        return tune.Tuner.restore(
            path, trainable=trainable, storage_filesystem=folder.fs, resume_unfinished=True, restart_errored=True
        )
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=len(trials) or sweep.config.budget.trials,
            search_alg=Given(trials) if trials else Suggestions(sweep),
            scheduler=scheduler(sweep) if stage == "search" else None,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=stage,
            storage_path=folder.path,
            storage_filesystem=folder.fs,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            verbose=0,
        ),
    )


def scheduler(sweep: Sweep) -> TrialScheduler | None:
    """What ends trials early."""
    config = sweep.config.scheduler
    if config.name != "asha":
        return None
    assert config.grace_steps is not None
    objective = OBJECTIVES[sweep.config.objective[0]]
    return Rungs(
        time_attr="step",
        metric=objective.key,
        mode=objective.mode,
        max_t=sweep.run.steps,
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
    )


class Rungs(ASHAScheduler):  # type: ignore[misc]
    """ASHA that learns from the trials' logs what they have shown before: Tune forgets it with the driver.

    Without it a trial that goes on would enter the rungs that it has passed with what it shows now, and those that
    are not so far would be compared with that.
    """

    root: Location
    """The sweep's folder; of the class, as Tune restores the object that an earlier driver made."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        shown = series_of(told_by(self.root / TRIALS / _name(trial))).get(str(self._metric), {})
        for step, value in sorted(shown.items()):
            if step < self._max_t:  # what it ends with is told when it ends
                self.on_trial_result(tune_controller, trial, {str(self._time_attr): step, str(self._metric): value})


def _told(error: BaseException) -> str:
    """The last line of what Ray says: those before it say where in Ray it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _name(trial: Any) -> str:
    return str(trial.config["trial"]["name"])
