"""The arms of an ablation: bundles of settings over one recipe, all of them trained with the same seeds and compared.

An arm may set whatever changes what is trained, its steps too. Where its trials run and how they are measured is the
same for all. Written as `NAME.KEY: value`, dotted; every mistake is collected with where it was written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jem.config import SCIENCE
from jem.errors import ConfigError, Problem
from jem.settings import Entry, build, flatten
from orchestrator.config import (
    DEFAULTS,
    ON_DISK,
    RECIPES,
    EvaluateConfig,
    RecoveryConfig,
    RunConfig,
    anchored,
    data_problems,
    find_yaml,
    mistakes,
    plain,
    read_recipe,
)
from orchestrator.sweep.axes import SAME_FOR_ALL, changed
from orchestrator.sweep.space import words

RECIPE = "recipe"
"""The key of an arm that names another recipe, which it then starts from."""

SEARCHED = ("objective", "searcher", "scheduler", "budget.trials", "finalists")
"""Settings of a sweep, or groups of them, that are about what is searched for."""

SHARED = {
    "name": "the sweep names its trials",
    "seed": "every arm has the same seeds, from the sweep's seed= on",
    "seeds": "every arm has the same seeds, as many as the sweep's seeds=",
    **{key: why for key, why in SAME_FOR_ALL.items() if key not in ("seed", "seeds", "name", "steps")},
}
"""Settings, or groups of them, in which arms cannot differ, and why."""

OWN_ALL_THE_SAME = ("evaluate.ema",)
"""An average of the weights is what such an arm trains, and an arm without one has none to be measured."""

NO_FIGURES = ("register", "model_name", "champion", "input_layout", "input_dtype")
"""Settings of the evaluation that are about the model that is kept."""

NO_TRAINING = ("max_failures", "hang_timeout")
"""Settings of recovery that change nothing of what is trained."""


@dataclass(frozen=True)
class Arm:
    """`point`: the settings in which its runs differ from the sweep's, JSON. The first arm is the baseline."""

    name: str
    point: dict[str, Any]

    @property
    def text(self) -> str:
        return " ".join(f"{key}={words(value)}" for key, value in self.point.items())


@dataclass
class WrittenArm:
    """What was written of one arm, and where it began."""

    origin: str
    entries: dict[str, Entry] = field(default_factory=dict)


def gather_arms(
    entries: Mapping[str, Entry], arms: dict[str, WrittenArm], problems: list[Problem], *, typed: bool
) -> None:
    """Add entries, dotted and without `arms.`, to `arms`. Typed, `NAME: none` removes an arm."""
    for key, entry in entries.items():
        name, _, setting = key.partition(".")
        if setting:
            arms.setdefault(name, WrittenArm(entry.origin)).entries[setting] = entry
        elif isinstance(entry.value, dict) or (entry.value is None and not typed):
            arm = arms.setdefault(name, WrittenArm(entry.origin))
            arm.entries |= dict(_dotted(entry.value or {}, "", entry.origin))
        elif entry.value not in (None, "none", "None"):
            message = f"is {words(entry.value)}, must be a mapping of settings; {{}} for the base as it is"
            problems.append(Problem(f"arms.{name}", message, entry.origin))
        elif arms.pop(name, None) is None:
            close = difflib.get_close_matches(name, arms, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f": they are {', '.join(arms) or 'none'}"
            problems.append(Problem(f"arms.{name}", f"no such arm{hint}", entry.origin))


def read_arms(
    arms: Mapping[str, WrittenArm],
    run: RunConfig | None,
    fixed: Mapping[str, Entry],
    beside: Path,
    problems: list[Problem],
) -> tuple[Arm, ...]:
    """The arms in order; what is wrong with the others is added to `problems`.

    `run` is the base with the sweep's own settings, which are `fixed`; None: there is none, values are checked alone.
    `beside`: the sweep's file, which the path of a recipe is relative to.
    """
    found: dict[str, Arm] = {}
    for name, written in arms.items():
        wrong = [*_misnamed(name, written), *_refused(name, written)]
        mine = {key: entry for key, entry in written.entries.items() if key != RECIPE and not _reason(key)}
        mine = {key: anchored(key, entry) for key, entry in mine.items()}
        problems += wrong
        if run is None:
            problems += [_of_arm(p, name, written) for p in mistakes(mine) if p.origin]
            continue
        try:
            config = build(RunConfig, _start(written, run, fixed, beside) | mine)
            if config.data != run.data and config.data.name not in ON_DISK and data_problems(config):
                raise ConfigError(data_problems(config))
        except ConfigError as error:
            problems += [_of_arm(p, name, written) for p in error.problems]
            continue
        usual = flatten(run)
        found[name] = Arm(name, {key: plain(value) for key, value in flatten(config).items() if value != usual[key]})
        problems += [Problem(f"arms.{name}", said, written.origin) for said in _same(found, name, arms) if not wrong]
    return tuple(found.values())


def science_of(run: RunConfig, arms: tuple[Arm, ...]) -> dict[str, Any]:
    """What makes an ablation this one, flat, without what is as usual. Which arm is the baseline is part of it."""
    science: dict[str, Any] = {"seed": run.seed, "baseline": arms[0].name}
    defaults, given = flatten(EvaluateConfig()), flatten(run.evaluate).items()
    science |= {f"evaluate.{k}": value for k, value in given if value != defaults[k] and k not in NO_FIGURES}
    science |= recovery_of(run)
    for arm in arms:
        config = changed(run, arm.point)
        own = {key: value for key, value in config.science.items() if key != "seed" and value != DEFAULTS[key]}
        own |= {key: arm.point[key] for key in OWN_ALL_THE_SAME if key in arm.point}
        science[f"arms.{arm.name}"] = own | {"steps": config.steps}
    return science


def recovery_of(run: RunConfig) -> dict[str, Any]:
    """What of the recovery changes what comes of a run that diverges, without what is as usual."""
    defaults, given = flatten(RecoveryConfig()), flatten(run.recovery).items()
    return {f"recovery.{k}": value for k, value in given if value != defaults[k] and k not in NO_TRAINING}


def _start(written: WrittenArm, run: RunConfig, fixed: Mapping[str, Entry], beside: Path) -> dict[str, Entry]:
    """The settings that an arm changes: the base's, or those of its recipe and what the sweep fixes of them."""
    base = {key: Entry(value) for key, value in flatten(run).items()}
    recipe = written.entries.get(RECIPE)
    if recipe is None:
        return base
    problems: list[Problem] = []
    try:
        if not isinstance(recipe.value, str):
            raise ConfigError([Problem("", f"is {words(recipe.value)}, must be a recipe's name or file")])
        path = find_yaml(recipe.value, None if recipe.raw else beside, RECIPES, "recipe")
        theirs = read_recipe(str(path), problems)
    except ConfigError as error:
        raise ConfigError([replace(p, key=RECIPE, origin=p.origin or recipe.origin) for p in error.problems]) from None
    if problems:
        raise ConfigError(problems)
    name = theirs.get("data.name", Entry(DEFAULTS["data.name"])).value
    if name != run.data.name:
        message = f"{recipe.value} is of the data {name}, and arms are compared on the same, {run.data.name}"
        raise ConfigError([Problem(RECIPE, message, recipe.origin)])
    theirs = {key: anchored(key, entry) for key, entry in (theirs | dict(fixed)).items() if _trained(key)}
    return {key: entry for key, entry in base.items() if not _trained(key)} | theirs


def _trained(key: str) -> bool:
    return key in ("steps", *OWN_ALL_THE_SAME) or (key.split(".")[0] in SCIENCE and not _reason(key))


def _reason(key: str) -> str | None:
    """Why arms cannot differ in a setting, if so."""
    if key in OWN_ALL_THE_SAME:
        return None
    return SHARED.get(key) or SHARED.get(key.split(".")[0])


def _misnamed(name: str, written: WrittenArm) -> Iterator[Problem]:
    if not re.fullmatch(r"\w+", name, re.ASCII):
        message = "must be named by letters, digits and underscores: it names folders"
        yield Problem(f"arms.{name}", message, written.origin)


def _refused(name: str, written: WrittenArm) -> Iterator[Problem]:
    for key, entry in written.entries.items():
        reason = _reason(key)
        if reason:
            elsewhere = "" if key in ("name", "seed", "seeds") else f"; settings.{key} is that of every arm"
            yield Problem(f"arms.{name}.{key}", f"cannot differ between arms: {reason}{elsewhere}", entry.origin)


def _same(found: Mapping[str, Arm], name: str, arms: Mapping[str, WrittenArm]) -> Iterator[str]:
    """Whether an arm would be trained twice."""
    point = found[name].point
    if not point and name != next(iter(arms)):
        yield "is the base as it is: write it first, for the others to be compared with, or leave it out"
        return
    twins = [other.name for other in found.values() if other.name != name and other.point == point]
    if twins:
        yield f"trains what {twins[0]} does; give it a setting of its own, or leave it out"


def _of_arm(problem: Problem, name: str, written: WrittenArm) -> Problem:
    key, origin = problem.key, problem.origin or written.origin
    if key == "base":
        return Problem(f"arms.{name}.base", f"no such setting; did you mean {RECIPE!r}?", origin)
    if key in written.entries or not key:
        return Problem(".".join(filter(None, ("arms", name, key))), problem.message, origin)
    return Problem(f"arms.{name}", f"gives a run whose {key} {problem.message}", origin)


def _dotted(content: Mapping[str, Any], prefix: str, origin: str) -> Iterator[tuple[str, Entry]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.", origin)
        else:
            yield f"{prefix}{key}", Entry(value, origin)
