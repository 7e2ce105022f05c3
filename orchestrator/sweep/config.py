"""How a sweep's file and `key=value` arguments become a `Sweep`, or all that is wrong with them.

Neither torch nor Ray is imported here: mistakes, --help and a sweep's name are instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jem.errors import ConfigError, Problem
from jem.settings import Entry, Settings, build, describe, digest, flatten, group, override, setting
from orchestrator.config import (
    DEFAULTS,
    GROUPS,
    ON_DISK,
    RECIPES,
    EvaluateConfig,
    RunConfig,
    anchored,
    as_name,
    data_problems,
    find_yaml,
    folder_name,
    mistakes,
    parse_arguments,
    plain,
    read_recipe,
    read_yaml,
    shareable,
)
from orchestrator.sweep.arms import SEARCHED, Arm, WrittenArm, gather_arms, read_arms, recovery_of, science_of
from orchestrator.sweep.axes import Written, changed, gather, read_space
from orchestrator.sweep.schedule import check, grid_trials, resolved, shared
from orchestrator.sweep.space import Space, is_whole_grid, words

S = TypeVar("S", bound=Settings)

SWEEPS = Path(__file__).resolve().parents[2] / "jobs" / "sweeps"


@dataclass(frozen=True)
class Objective:
    """A validation figure that a sweep improves."""

    key: str
    mode: str  # min, max
    worst: float  # what a trial that crashed or diverged counts as


OBJECTIVES = {
    objective.key: objective
    for objective in (
        Objective("val/accuracy", "max", 0.0),
        Objective("val/nll", "min", 100.0),
        Objective("val/ece", "min", 1.0),
        Objective("val/ood/interp/log_px/auroc", "max", 0.0),
    )
}


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Settings):
    """Which trials end early, or go on from others."""

    name: str = setting(
        "none",
        choices=("none", "asha", "pbt"),
        doc="asha: the worse ones end early; pbt: the worst go on from the best, weights, chains and all, with "
        "settings near theirs",
    )
    grace_steps: int | None = setting(None, ge=1, doc="asha: steps every trial gets; none: a quarter of the steps")
    reduction_factor: float = setting(3.0, gt=1, doc="asha: one trial in so many goes on, and gets so many times more")
    interval_steps: int | None = setting(None, ge=1, doc="pbt: steps between comparisons; none: a fifth of the steps")
    quantile: float = setting(0.25, gt=0, le=0.5, doc="pbt: share of the trials that go on from as many of the best")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(Settings):
    """What the sweep may take."""

    trials: int = setting(16, ge=2, doc="of the search, the base's among them")
    minutes: float | None = setting(None, gt=0, doc="wall clock of the whole sweep, finalists included; none: no limit")
    steps: int | None = setting(None, ge=1, doc="optimiser steps of a trial; none: the recipe's")


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig(Settings):
    """What one worker of a trial is given: as many trials run at once as fit."""

    cpu: float = setting(1.0, gt=0, doc="CPUs a worker")
    gpu: float | None = setting(
        None, ge=0, doc="GPUs a worker, 0.5 for two to share one; none: 1 where device=cuda, or auto and there are any"
    )
    memory: float = setting(1.0, ge=0, doc="GiB a worker")
    label: str | None = setting(
        None, doc="custom resource of a cluster's machines: trials run on those alone that have it, such as spot"
    )


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Settings):
    """What is searched for, how, and with what."""

    base: str = setting(doc="recipe that the search starts from: a bundled one, or a path relative to the sweep's file")
    name: str | None = setting(None, doc="of the sweep; none: its file's name and a digest of what it does")
    objective: tuple[str, ...] = setting(
        ("val/nll",), choices=tuple(OBJECTIVES), doc="validation figures that are improved: one, or a list"
    )
    searcher: str = setting(
        "random",
        choices=("random", "grid", "tpe"),
        doc="tpe: Optuna's, which learns from the trials before; grid: every combination of the grid's axes",
    )
    scheduler: SchedulerConfig = group(SchedulerConfig)
    budget: BudgetConfig = group(BudgetConfig)
    concurrency: int | None = setting(None, ge=1, doc="trials at once; none: as many as fit")
    resources: ResourcesConfig = group(ResourcesConfig)
    finalists: int = setting(2, ge=0, doc="best candidates that are trained again, beside the base; 0: none are")
    seeds: int = setting(3, ge=1, doc="seeds that each finalist and the base are trained with, or each arm")
    seed: int = setting(
        0, ge=0, lt=2**31, doc="of the search: of what is drawn, and of every trial's training; of arms the first seed"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.name is not None:
            yield from folder_name("name", self.name)
        if not self.objective or len(set(self.objective)) < len(self.objective):
            yield "objective", f"is {plain(self.objective)}, must be one figure or several different ones"
        name, several = self.scheduler.name, len(set(self.objective)) > 1
        if several and name != "none":
            yield "scheduler.name", f"is {name}, which compares trials by one objective; use none, or one objective"
        if name == "pbt" and self.searcher != "random":
            yield "searcher", f"is {self.searcher}, must be random with scheduler.name=pbt: its population is drawn"
        if name == "pbt" and self.budget.minutes is not None:
            message = "cannot be with scheduler.name=pbt, whose trials all go on to the end; leave it out"
            yield "budget.minutes", message
        if name == "pbt" and self.budget.trials < 4:
            message = f"is {self.budget.trials}, must be at least 4 with scheduler.name=pbt: they learn from each other"
            yield "budget.trials", message


@dataclass(frozen=True)
class Sweep:
    """A sweep, ready to run."""

    config: SweepConfig  # budget.steps and the scheduler's steps are resolved
    run: RunConfig  # of every trial, but for its point: the base, the fixed settings and what all trials share
    space: Space
    science: dict[str, Any]  # what makes it this sweep and no other; JSON
    stem: str  # of its file
    final: Mapping[str, Any] = field(default_factory=dict)  # how the base is evaluated and registered: so is the winner
    arms: tuple[Arm, ...] = ()  # of an ablation, whose space is empty

    @property
    def name(self) -> str:
        return self.config.name or f"{as_name(self.stem)}-{digest(self.science)}"

    @property
    def trials(self) -> int:
        """Of the search, the base's among them."""
        if self.config.searcher == "grid" and is_whole_grid(self.space):
            return grid_trials(self.run, self.space)
        return self.config.budget.trials

    @property
    def finals(self) -> int:
        """Trials of the finalists and the base, at most."""
        return (1 + self.config.finalists) * self.config.seeds if self.config.finalists else 0

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def steps_at(self, point: Mapping[str, Any]) -> int:
        """Of a trial: arms may differ in them."""
        return int(point.get("steps", self.run.steps))


SHOWN = ("val/accuracy", "val/nll")
"""While trials run of which none is searched for: several seeds, or arms."""

USUAL = {f"evaluate.{key}": value for key, value in flatten(EvaluateConfig()).items()}

OWN = {key for key, _, _ in describe(SweepConfig)}
OWN_GROUPS = frozenset(key.split(".")[0] for key in OWN if "." in key)
RUNS = {key for key, _, _ in describe(RunConfig)}

SET_BY_SWEEP = {
    "name": "trials are named by the sweep; name= is the sweep's own",
    "seed": "seed= is the sweep's own, of every trial in the search",
    "seeds": "seeds= is the sweep's own, of the finalists",
    "steps": "the steps of a trial are budget.steps",
    "evaluate.suite": "must be none: test data are touched once, by the winner",
    "evaluate.register": "must be false: only the winner is registered",
}


SET_BY_ABLATION = {
    "name": "trials are named by the sweep; name= is the sweep's own",
    "seed": "seed= is the sweep's own, the first of every arm",
    "seeds": "seeds= is the sweep's own, of every arm",
    "steps": "the steps of all arms are budget.steps; an arm may have its own",
}


@dataclass(frozen=True)
class _Sections:
    """The settings of a sweep's file, or of what is typed, by what they are about."""

    own: dict[str, Entry]
    space: dict[str, Entry]
    arms: dict[str, Entry]
    fixed: dict[str, Entry]


def load_sweep(sweep: str, arguments: Sequence[str]) -> Sweep:
    """The sweep of a bundled name or a file and of `key=value` arguments; every mistake in one ConfigError."""
    typed, problems = parse_arguments(arguments)
    try:
        path = find_yaml(sweep, None, SWEEPS, "sweep")
        written = read_yaml(path, OWN_GROUPS | {"space", "arms", "settings"}, problems, "sweep")
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    ablation = any(key.split(".")[0] == "arms" for key in [*written, *typed, *(p.key for p in problems)])
    in_file = _sorted(written, problems, typed=False, ablation=ablation)
    on_line = _sorted(typed, problems, typed=True, ablation=ablation)
    if "steps" in on_line.fixed:
        on_line.own["budget.steps"] = on_line.fixed.pop("steps")
    own = in_file.own | on_line.own
    if "objective" in own and not isinstance(own["objective"].value, list):
        own["objective"] = Entry([own["objective"].value], own["objective"].origin)
    make = _ablation if ablation else _search
    made = make(path, own, in_file, on_line, problems)
    if problems or made is None:
        raise ConfigError(problems)
    return made


def _search(
    path: Path, own: dict[str, Entry], in_file: _Sections, on_line: _Sections, problems: list[Problem]
) -> Sweep | None:
    axes: dict[str, Written] = {}
    removed: set[str] = set()
    gather(in_file.space, axes, set(), problems)
    retyped = gather(on_line.space, axes, removed, problems)
    fixed = _one_of_both(in_file.fixed, on_line.fixed, axes, retyped, removed, problems)
    config = _built(SweepConfig, own, problems)
    base, run = _base(own.get("base"), path, config, own, fixed, problems)
    found: list[Problem] = []
    space = read_space(axes, run, removed, found)
    if not axes and not any(p.key.startswith("space") for p in problems):
        found.append(Problem("space", "has no axes, so that there is nothing to search", str(path)))
    problems += found
    if config is None or run is None:
        return None
    config = resolved(replace(config, base=base), run)
    final = {"evaluate.suite": run.evaluate.suite, "evaluate.register": run.evaluate.register}
    run = override(run, shared(config, run, fixed))
    problems += _with_origins(check(config, run, space) if not found else [], own | fixed)
    return Sweep(config, run, space, _science(config, run, space), path.stem, final)


def _ablation(
    path: Path, own: dict[str, Entry], in_file: _Sections, on_line: _Sections, problems: list[Problem]
) -> Sweep | None:
    for key, entry in (in_file.space | on_line.space).items():
        message = "is searched, and there are arms, which are all trained; leave out the arms or the space"
        problems.append(Problem(f"space.{key}", message, entry.origin))
    for key in [key for key in own if key in SEARCHED or key.split(".")[0] in SEARCHED]:
        message = "is of a search, and arms are all trained, to the end and with every seed; leave it out"
        problems.append(Problem(key, message, own.pop(key).origin))
    written: dict[str, WrittenArm] = {}
    gather_arms(in_file.arms, written, problems, typed=False)
    gather_arms(on_line.arms, written, problems, typed=True)
    if not written and not any(p.key.startswith("arms") for p in problems):
        problems.append(Problem("arms", "are all removed, so that there is nothing to train", "command line"))
    fixed = in_file.fixed | on_line.fixed
    config = _built(SweepConfig, own, problems)
    base, run = _base(own.get("base"), path, config, own, fixed, problems)
    steps = {"steps": own["budget.steps"]} if "budget.steps" in own else {}
    arms = read_arms(written, run, fixed | steps, path, problems)
    if config is None or run is None or not arms:
        return None
    last = config.seed + config.seeds - 1
    found = [Problem("seeds", f"is {config.seeds}, too many: the last seed, {last}, must be below 2**31")]
    budget = replace(config.budget, trials=max(2, len(arms) * config.seeds))
    config = resolved(replace(config, base=base, objective=SHOWN, budget=budget, finalists=0), run)
    if "evaluate.register" not in fixed:
        run = override(run, {"evaluate.register": False})
    problems += _with_origins([*(found if last >= 2**31 else []), *check(config, run, ())], own | fixed)
    science = dict(json.loads(json.dumps(science_of(run, arms))))
    return Sweep(config, run, (), science, path.stem, arms=arms)


def _with_origins(problems: Sequence[Problem], entries: Mapping[str, Entry]) -> list[Problem]:
    return [replace(p, origin=entries[p.key].origin) if p.key in entries else p for p in problems]


def trial_config(sweep: Sweep, point: Mapping[str, Any], **changes: Any) -> RunConfig:
    """The run of a trial at `point`, with other changes by their dotted keys. Raises ConfigError if it cannot be."""
    return changed(sweep.run, {**point, **changes})


def bundled_sweeps() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def to_yaml(sweep: Sweep) -> str:
    """The whole sweep as a file that gives it again, its name too, but for a password in tracking.uri."""
    text: dict[str, Any] = plain(dataclasses.asdict(replace(sweep.config, name=sweep.name)))
    settings = plain(dataclasses.asdict(shareable(sweep.run)))
    _leave_out(settings, SET_BY_ABLATION if sweep.arms else (*SET_BY_SWEEP, *(axis.key for axis in sweep.space)))
    settings = {key: value for key, value in settings.items() if value or key not in GROUPS}
    if not sweep.arms:
        return yaml.safe_dump(text | {"settings": settings, "space": _as_written(sweep.space)}, sort_keys=False)
    _leave_out(text, SEARCHED)
    arms = {arm.name: arm.point for arm in sweep.arms}
    return yaml.safe_dump(text | {"settings": settings, "arms": arms}, sort_keys=False)


def _leave_out(settings: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        *groups, last = key.split(".")
        within = settings
        for name in groups:
            within = within.get(name) or {}
        within.pop(last, None)


def _as_written(space: Space) -> dict[str, Any]:
    return {
        axis.key: {axis.kind: plain(axis.values)} | ({"when": plain(dict(axis.when))} if axis.when else {})
        for axis in space
    }


def _science(config: SweepConfig, run: RunConfig, space: Space) -> dict[str, Any]:
    """What makes a sweep this one, flat. Defaults are left out: a setting that a later version adds renames none."""
    measured = {f"evaluate.{key}": getattr(run.evaluate, key) for key in ("every", "final", "ema", "noise_std")}
    used = {"none": (), "asha": ("grace_steps", "reduction_factor"), "pbt": ("interval_steps", "quantile")}
    science = {key: value for key, value in run.science.items() if key == "seed" or value != DEFAULTS[key]}
    science |= {key: value for key, value in measured.items() if key == "evaluate.every" or value != USUAL[key]}
    science |= recovery_of(run)
    science |= {"steps": run.steps, "objective": config.objective, "searcher": config.searcher}
    science |= {f"scheduler.{key}": getattr(config.scheduler, key) for key in ("name", *used[config.scheduler.name])}
    science |= {"budget.trials": config.budget.trials}
    science |= {f"space.{key}": axis for key, axis in _as_written(space).items()}
    return dict(json.loads(json.dumps(science)))


def _sorted(entries: Mapping[str, Entry], problems: list[Problem], *, typed: bool, ablation: bool) -> _Sections:
    own: dict[str, Entry] = {}
    fixed: dict[str, Entry] = {}
    sections: dict[str, dict[str, Entry]] = {"space": {}, "arms": {}, "settings": fixed}
    for key, entry in entries.items():
        top, _, rest = key.partition(".")
        if top in sections and rest:
            sections[top][rest] = entry
        elif key in sections:
            problems.append(Problem(key, f"is a group, of which {key}.KEY... sets one", entry.origin))
        elif key in OWN or top in OWN_GROUPS:
            own[key] = entry
        elif not typed and top in {known.split(".")[0] for known in RUNS}:
            message = "is a setting of the runs: written below settings: it is that of every trial"
            problems.append(Problem(key, message, entry.origin))
        elif not typed or (top not in GROUPS and _nearer_to_own(key)):
            own[key] = entry
        else:
            fixed[key] = entry
    set_by_sweep = SET_BY_ABLATION if ablation else SET_BY_SWEEP
    for key in [k for k in fixed if k in set_by_sweep and not (typed and k == "steps")]:
        entry = fixed.pop(key)
        if (key, entry.value) not in (("evaluate.suite", "none"), ("evaluate.register", False)):
            problems.append(Problem(key, f"is {words(entry.value)}: {set_by_sweep[key]}", entry.origin))
    return _Sections(own, sections["space"], sections["arms"], fixed)


def _nearer_to_own(key: str) -> bool:
    close = difflib.get_close_matches(key, sorted(RUNS | OWN), 1) if key not in RUNS else []
    return bool(close) and close[0] in OWN


def _one_of_both(
    fixed: dict[str, Entry],
    typed: dict[str, Entry],
    axes: dict[str, Written],
    retyped: set[str],
    removed: set[str],
    problems: list[Problem],
) -> dict[str, Entry]:
    """All fixed settings. What is typed wins, over an axis of the file or over a setting of the file."""
    both = fixed | typed
    for key in sorted(axes.keys() & both.keys()):
        if key in typed and key not in retyped:
            del axes[key]
            removed.add(key)
        elif key in retyped and key not in typed:
            del both[key]
        else:
            there = next(iter(axes[key].kinds.values()), both[key]).origin
            message = f"is fixed, and an axis of the space too ({there}); leave out one of them"
            problems.append(Problem(key, message, both[key].origin))
    return both


def _built(cls: type[S], entries: Mapping[str, Entry], problems: list[Problem]) -> S | None:
    try:
        return build(cls, entries)
    except ConfigError as error:
        problems += error.problems
        return None


def _base(
    base: Entry | None,
    path: Path,
    config: SweepConfig | None,
    own: Mapping[str, Entry],
    fixed: Mapping[str, Entry],
    problems: list[Problem],
) -> tuple[str, RunConfig | None]:
    """The recipe's name or absolute path, and its run with the fixed settings and those that the sweep has.

    If the fixed settings are wrong, the recipe alone, for the space to be checked on; None: that is wrong too.
    """
    if base is None or not isinstance(base.value, str):
        problems += [p for p in mistakes(dict(fixed)) if p.origin]
        return "", None
    try:
        recipe = find_yaml(base.value, None if base.raw else path, RECIPES, "recipe")
        written = read_recipe(str(recipe), problems)
    except ConfigError as error:
        problems += [Problem("base", str(replace(p, origin="")), p.origin or base.origin) for p in error.problems]
        problems += [p for p in mistakes(dict(fixed)) if p.origin]
        return "", None
    entries = {**written, **fixed, "name": Entry(None), "seeds": Entry(1)}
    if config is not None:
        entries["seed"] = Entry(config.seed)
        if config.budget.steps is not None:
            entries["steps"] = Entry(config.budget.steps, own["budget.steps"].origin)
    entries = {key: anchored(key, entry) for key, entry in entries.items()}
    run = _built(RunConfig, entries, problems)
    if run is None:
        run = _built(RunConfig, written, [])
    elif run.data.name not in ON_DISK:
        found = data_problems(run)
        problems += [replace(p, origin=entries[p.key].origin if p.key in entries else "") for p in found]
    return str(recipe.absolute()) if recipe.parent != RECIPES else recipe.stem, run
