"""The search space of a sweep: what is drawn for a trial. Reading it from a file is in axes.py.

`draw` is the one definition of what a trial can be: random candidates, the grid, Optuna's sampler and the sampled
examples of --dry-run all go through it. Optuna is imported where it is needed: mistakes and --help are instant.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config import plain

RANGES = ("uniform", "loguniform", "int", "logint")
"""Kinds whose values are (low, high), both of which can be drawn."""

OPTIONS = ("choice", "grid")
"""Kinds whose values are what there is to choose from; a grid tries each."""

REDRAWS = 100
"""How often a point that cannot be, or is there already, is drawn again before its place stays empty."""


@dataclass(frozen=True)
class Axis:
    """One setting of a run that a sweep varies."""

    key: str
    kind: str
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Other axes and the values of theirs with which this one is drawn; with none of them the base's value holds."""
    origin: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """What is drawn, in words."""
        if self.kind in RANGES:
            low, high = map(words, self.values)
            return f"{self.kind} {low} to {high}"
        return f"{'one' if self.kind == 'choice' else 'each'} of {', '.join(map(words, self.values))}"

    @property
    def condition(self) -> str:
        """With what it is drawn, in words; empty: always."""
        return ", ".join(f"{key} {' or '.join(map(words, values))}" for key, values in self.when.items())


Space = tuple[Axis, ...]
"""In an order in which an axis comes after those that it depends on."""


def draw(space: Space, trial: Any) -> dict[str, Any]:
    """A point, {key: value}, suggested by `trial`: an optuna.Trial or whatever has its suggest_... methods.

    An axis whose condition does not hold is not drawn and not in the point.
    """
    point: dict[str, Any] = {}
    for axis in space:
        if not drawn(axis, point):
            continue
        if axis.kind in OPTIONS:
            held = trial.suggest_categorical(axis.key, [_held(value) for value in axis.values])
            point[axis.key] = next(value for value in axis.values if _same(_held(value), held))
        else:
            suggest = trial.suggest_int if axis.kind in ("int", "logint") else trial.suggest_float
            point[axis.key] = suggest(axis.key, *axis.values, log=axis.kind.startswith("log"))
    return point


def drawn(axis: Axis, point: Mapping[str, Any]) -> bool:
    """Whether the conditions of an axis hold at a point that has the axes before it."""
    return all(key in point and point[key] in values for key, values in axis.when.items())


def distributions(space: Space) -> dict[str, Any]:
    """The optuna distribution of each axis, such as `draw` suggests it from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for axis in space:
        if axis.kind in OPTIONS:
            made[axis.key] = CategoricalDistribution([_held(value) for value in axis.values])
        else:
            of = IntDistribution if axis.kind in ("int", "logint") else FloatDistribution
            low, high = axis.values
            made[axis.key] = of(low, high, log=axis.kind.startswith("log"))
    return made


def to_params(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as the parameters of an optuna trial: lists and mappings are held as JSON text."""
    options = {axis.key for axis in space if axis.kind in OPTIONS}
    return {key: _held(value) if key in options else value for key, value in point.items()}


def in_space(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """The point of the space nearest to one that PBT perturbed: within bounds, whole where whole, of the options.

    Axes that are missing stay so, and those whose condition does not hold go.
    """
    inside: dict[str, Any] = {}
    for axis in space:
        if axis.key not in point or not drawn(axis, inside):
            continue
        value = point[axis.key]
        if axis.kind in OPTIONS:
            inside[axis.key] = _nearest(axis.values, value)
        else:
            low, high = axis.values
            inside[axis.key] = min(max(round(value) if axis.kind in ("int", "logint") else value, low), high)
    return inside


def points(
    space: Space, searcher: str, n: int, seed: int, valid: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """At most `n` different points that are `valid`, the same for the same seed; more of them begin with these.

    grid: each of the grid's points in turn, with the other axes drawn anew each time; a grid of no other axes gives
    each of its points once. Any other searcher: drawn at random. There are fewer than `n` where the space has no more.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    combinations = grid(space) if searcher == "grid" else [{}]
    rounds = 1 if searcher == "grid" and is_whole_grid(space) else -(-n // len(combinations)) + 1
    found: dict[str, dict[str, Any]] = {}
    refused: set[str] = set()
    for combination in itertools.chain.from_iterable(itertools.repeat(combinations, rounds)):
        if len(found) >= n:
            break
        for _ in range(1 if rounds == 1 else REDRAWS):
            if combination:
                study.enqueue_trial(to_params(space, combination))
            point = draw(space, study.ask())
            name = json.dumps(point, sort_keys=True)
            if name in found or name in refused:
                continue
            if valid(point):
                found[name] = point
                break
            refused.add(name)
        else:
            if not combination:
                break  # there are no more
    return list(found.values())


def is_whole_grid(space: Space) -> bool:
    """Whether each point of the grid is one trial: no axis besides is drawn."""
    return all(axis.kind == "grid" for axis in space)


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of the grid's axes; those that depend on each other only where their conditions can hold."""
    axes = [axis for axis in space if axis.kind == "grid"]
    keys = {axis.key for axis in axes}
    combinations: list[dict[str, Any]] = [{}]
    for axis in axes:
        within = Axis(axis.key, axis.kind, axis.values, {k: v for k, v in axis.when.items() if k in keys})
        combinations = [wider for narrow in combinations for wider in _extended(within, narrow)]
    return combinations


def words(value: Any) -> str:
    """A value for people: short, and as the command line takes it."""
    if value is None or isinstance(value, str):
        return value or "none"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(plain(value), default=str)


def _extended(axis: Axis, point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not drawn(axis, point):
        yield point
        return
    for value in axis.values:
        yield point | {axis.key: value}


def _held(value: Any) -> Any:
    """An option as optuna can hold it: itself, or its JSON text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _nearest(options: tuple[Any, ...], value: Any) -> Any:
    if value in options:
        return next(option for option in options if option == value)
    numbers = [option for option in options if isinstance(option, (int, float))]
    if isinstance(value, (int, float)) and numbers:
        return min(numbers, key=lambda option: abs(option - value))
    return options[0]
