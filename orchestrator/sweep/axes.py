"""A sweep's search space as it is written: `KEY.KIND: values` and `KEY.when.OTHERKEY: values`, dotted.

A file's axes are changed by the command line's, then checked against the base: each value must be one that the base
can have, in a trial in which the axis is drawn. Every mistake is collected with where it was written.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jem.errors import ConfigError, Problem
from jem.settings import Entry, flatten, override
from orchestrator.config import ON_DISK, RunConfig, anchored, data_problems, mistakes, plain
from orchestrator.sweep.space import OPTIONS, RANGES, Axis, Space, words

KINDS = (*RANGES, *OPTIONS)

SAME_FOR_ALL = {
    "seed": "every trial has the sweep's seed, and the finalists several: seeds=",
    "seeds": "a trial is one run, and the finalists have several seeds: seeds=",
    "name": "the sweep names its trials",
    "steps": "all trials have the same budget: budget.steps=",
    "init_from": "all trials start from the same weights",
    "workers": "all trials take the same resources",
    "device": "all trials take the same resources",
    "storage_path": "all trials are kept in one place",
    "tracking": "all trials are kept in one place",
    "evaluate": "all trials are measured alike, or they could not be compared",
    "checkpoint": "it does not change what is trained",
    "recovery": "all trials are helped alike where they diverge",
    "deterministic": "all trials run alike",
    "data.name": "figures of other images cannot be compared",
    "data.root": "figures of other images cannot be compared",
    "data.validation_size": "all trials are measured alike, or they could not be compared",
}
"""Settings, or groups of them, that cannot be an axis, and why."""

CONTEXTS = 64
"""Combinations of conditions that a value is tried with at most, before it counts as impossible."""


@dataclass
class Written:
    """What was written of one axis."""

    kinds: dict[str, Entry] = field(default_factory=dict)
    when: dict[str, Entry] = field(default_factory=dict)


def gather(
    entries: Mapping[str, Entry], axes: dict[str, Written], removed: set[str], problems: list[Problem]
) -> set[str]:
    """Add entries, dotted and without `space.`, to `axes`: a kind replaces the kinds that were there before.

    `KEY: none` removes an axis, which is then in `removed`, and `KEY.when: none` its conditions. Returns the keys
    whose kind was given.
    """
    replaced: set[str] = set()
    for name, entry in entries.items():
        *parts, last = name.split(".")
        if "when" in parts[1:]:
            at = parts.index("when", 1)
            axes.setdefault(".".join(parts[:at]), Written()).when[".".join([*parts[at + 1 :], last])] = entry
        elif last == "when" and parts and _empty(entry):
            axes.setdefault(".".join(parts), Written()).when.clear()
        elif last == "when" and parts:
            problems.append(Problem(f"space.{name}", "is not a mapping of other axes to values", entry.origin))
        elif last in KINDS and parts:
            key = ".".join(parts)
            axis = axes.setdefault(key, Written())
            removed.discard(key)
            if key not in replaced:
                replaced.add(key)
                axis.kinds = {}
            axis.kinds[last] = entry
        elif _empty(entry):
            if axes.pop(name, None) is None:
                problems.append(Problem(f"space.{name}", _no_axis(name, axes), entry.origin))
            removed.add(name)
        else:
            problems.append(Problem(f"space.{name}", _no_kind(name, last, entry), entry.origin))
    return replaced


def read_space(axes: Mapping[str, Written], run: RunConfig | None, removed: set[str], problems: list[Problem]) -> Space:
    """The axes in order; what is wrong with the others is added to `problems`.

    `run` is the base that values are tried on; None: there is none, values are checked alone. A condition on an axis
    that was removed is settled by the value that `run` has there.
    """
    settled = axes if run is None else _settled(axes, run, removed)
    space: dict[str, Axis] = {}
    for key in _in_order(settled, removed, problems):
        axis = _axis(key, settled[key], space, run, problems)
        if axis is not None:
            space[key] = axis
    return tuple(space.values())


def _settled(axes: Mapping[str, Written], run: RunConfig, removed: set[str]) -> dict[str, Written]:
    settled: dict[str, Written] = {}
    gone: set[str] = set()
    for key in _in_order(axes, removed, []):
        axis = axes[key]
        if gone & axis.when.keys() or not all(
            _meant(value_at(run, other), entry.value) for other, entry in axis.when.items() if other in removed
        ):
            gone.add(key)
        else:
            settled[key] = Written(axis.kinds, {k: entry for k, entry in axis.when.items() if k not in removed})
    return settled | {key: axis for key, axis in axes.items() if key not in settled and key not in gone}


def valid(run: RunConfig, point: Mapping[str, Any]) -> bool:
    """Whether there can be a run at this point, and it is another than the base."""
    try:
        return changed(run, point) != run
    except ConfigError:
        return False


def changed(run: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The run with these settings; ConfigError if there can be no such run, its data included."""
    config = override(run, changes)
    if any(key.startswith("data.") for key in changes) and config.data.name not in ON_DISK:
        problems = data_problems(config)
        if problems:
            raise ConfigError(problems)
    return config


def _axis(
    key: str, written: Written, space: Mapping[str, Axis], run: RunConfig | None, problems: list[Problem]
) -> Axis | None:
    """One axis, after those that it depends on; None if something is wrong with it, which is added to `problems`."""
    before = len(problems)
    origin = next((e.origin for e in (*written.kinds.values(), *written.when.values())), "")
    reason = SAME_FOR_ALL.get(key) or SAME_FOR_ALL.get(key.split(".")[0])
    unknown = [p for p in mistakes({key: Entry(None, "here")}) if p.origin and p.message.startswith("no such setting")]
    if reason:
        problems.append(Problem(f"space.{key}", f"cannot be searched: {reason}", origin))
    elif unknown:
        problems.append(Problem(f"space.{key}", unknown[0].message, origin))
    elif len(written.kinds) != 1:
        given = f"has {' and '.join(written.kinds)}" if written.kinds else "has only conditions"
        last = [Entry(None, origin), *written.kinds.values()][-1]
        problems.append(Problem(f"space.{key}", f"{given}, must have exactly one of {', '.join(KINDS)}", last.origin))
    when = _conditions(key, written, space, problems)
    if len(problems) > before or (run is not None and written.when.keys() - space.keys()):
        return None  # or something is wrong with an axis that this one depends on, which was said
    ((kind, entry),) = written.kinds.items()
    name = f"space.{key}.{kind}"
    try:
        values = _options(entry) if kind in OPTIONS else _bounds(kind, entry)
    except ValueError as error:
        problems.append(Problem(name, str(error), entry.origin))
        return None
    contexts = _contexts(when, space)
    tried = []
    for value in values:
        try:
            tried.append(_tried(key, value, contexts, run))
        except ConfigError as error:
            said = "; ".join(_about(p, key) for p in error.problems)
            problems.append(Problem(name, f"has {words(value)}, {said}", entry.origin))
    if len(problems) > before:
        return None
    if kind in RANGES:
        if kind in ("uniform", "loguniform") and _whole(key, tried[0], run):
            whole = {"uniform": "int", "loguniform": "logint"}[kind]
            problems.append(Problem(name, f"draws fractions of what is a whole number; write {whole}", entry.origin))
            return None
        return Axis(key, kind, values, when, entry.origin)
    twice = next((value for i, value in enumerate(tried) if value in tried[:i]), ...)
    if twice is not ...:
        problems.append(Problem(name, f"has {words(twice)} twice", entry.origin))
        return None
    return Axis(key, kind, tuple(tried), when, entry.origin)


def _conditions(
    key: str, written: Written, space: Mapping[str, Axis], problems: list[Problem]
) -> dict[str, tuple[Any, ...]]:
    when = {}
    for other, entry in written.when.items():
        if other not in space:
            continue
        name, axis = f"space.{key}.when.{other}", space[other]
        single = _possible(axis, entry.value)
        several = [_possible(axis, v) for v in entry.value] if isinstance(entry.value, list) else []
        values = single or tuple(v for found in several for v in found or ())
        if axis.kind in ("uniform", "loguniform"):
            message = f"depends on a single value of what is drawn from {axis.text}; make that a choice"
            problems.append(Problem(name, message, entry.origin))
        elif not values or (single is None and None in several):
            message = f"is {words(entry.value)}, but {other} is {axis.text}"
            problems.append(Problem(name, message, entry.origin))
        else:
            when[other] = values
    return when


def _in_order(axes: Mapping[str, Written], elsewhere: set[str], problems: list[Problem]) -> list[str]:
    """Keys such that an axis comes after those that it depends on."""
    ordered: list[str] = []
    left = dict(axes)
    for key, axis in axes.items():
        for other in axis.when.keys() - axes.keys() - elsewhere:
            problems.append(Problem(f"space.{key}.when.{other}", _no_axis(other, axes), axis.when[other].origin))
    while left:
        ready = [k for k, axis in left.items() if not axis.when.keys() & left.keys()]
        if not ready:
            for key, axis in left.items():
                through = sorted(axis.when.keys() & left.keys())[0]
                message = "the conditions depend on each other in a circle"
                problems.append(Problem(f"space.{key}.when.{through}", message, axis.when[through].origin))
            break
        ordered.append(ready[0])
        del left[ready[0]]
    return ordered


def _bounds(kind: str, entry: Entry) -> tuple[Any, Any]:
    if not isinstance(entry.value, list) or len(entry.value) != 2:
        raise ValueError(f"is {words(entry.value)}, must be [low, high]")
    low, high = (_number(value) for value in entry.value)
    if kind in ("int", "logint"):
        if not (low.is_integer() and high.is_integer()):
            raise ValueError(f"is {words(entry.value)}, must be two whole numbers")
        low, high = int(low), int(high)
    if low >= high:
        raise ValueError(f"is {words(entry.value)}, whose low is not less than its high")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"is {words(entry.value)}, whose low must be greater than 0")
    return low, high


def _options(entry: Entry) -> tuple[Any, ...]:
    if not isinstance(entry.value, list) or not entry.value:
        raise ValueError(f"is {words(entry.value)}, must be a list of what there is to choose from")
    return tuple(entry.value)


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML 1.1 reads 1e-3 as text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"has {words(value)}, a number was expected")
    return number


def _contexts(when: Mapping[str, tuple[Any, ...]], space: Mapping[str, Axis]) -> list[dict[str, Any]]:
    """What else a trial has in which the axis is drawn: values of all that it depends on, however indirectly."""
    merged: dict[str, tuple[Any, ...]] = {}
    waiting = list(when.items())
    while waiting:
        key, values = waiting.pop()
        merged[key] = tuple(v for v in values if v in merged.get(key, values))
        waiting += space[key].when.items()
    combinations = itertools.islice(itertools.product(*merged.values()), CONTEXTS)
    return [dict(zip(merged, values, strict=True)) for values in combinations]


def _tried(key: str, value: Any, contexts: list[dict[str, Any]], run: RunConfig | None) -> Any:
    """The value as a run has it. Raises ConfigError if there is no context in which it is possible."""
    if run is None:
        found = [p for p in mistakes({key: Entry(value, "here")}) if p.origin]
        if found:
            raise ConfigError(found)
        return value
    first: ConfigError | None = None
    for context in contexts:
        try:
            return value_at(changed(run, context | {key: anchored(key, Entry(value))}), key)
        except ConfigError as error:
            first = first or error
    raise first or ConfigError([Problem(key, "which is never drawn: its conditions exclude each other")])


def value_at(run: RunConfig, key: str) -> Any:
    """What a run has at a dotted key, which can be one inside a mapping such as model.options."""
    flat = flatten(run)
    if key in flat:
        return flat[key]
    home = next(k for k, value in flat.items() if key.startswith(f"{k}.") and isinstance(value, dict))
    value = flat[home]
    for part in key[len(home) + 1 :].split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _whole(key: str, value: Any, run: RunConfig | None) -> bool:
    return run is not None and key in flatten(run) and isinstance(value, int)


def _possible(axis: Axis, value: Any) -> tuple[Any] | None:
    """The value of an axis that was meant by what was written, as one; None if it cannot have it."""
    if axis.kind in OPTIONS:
        return next(((option,) for option in axis.values if _same(option, value)), None)
    low, high = axis.values
    return (value,) if type(value) is int and low <= value <= high else None


def _meant(value: Any, written: Any) -> bool:
    """Whether a condition, a value or a list of them, has this value."""
    return _same(value, written) or (isinstance(written, list) and any(_same(value, one) for one in written))


def _same(value: Any, written: Any) -> bool:
    """Whether it is what was written: 1 is 1.0, `none` is none, a list is a tuple; true is not 1."""
    if isinstance(written, str) and isinstance(value, (int, float)):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(written) == value
    if value is None:
        return written in (None, "none", "None")
    return bool(plain(value) == plain(written)) and isinstance(value, bool) == isinstance(written, bool)


def _about(problem: Problem, key: str) -> str:
    if problem.key == key:  # without the value, which is said already
        expected = re.search(r", ((must|an? |true or false|text) ?.*)", problem.message)
        return expected[1] if expected else problem.message
    return f"with which {problem.key} {problem.message}"


def _empty(entry: Entry) -> bool:
    return entry.value in (None, "none", "None", {})


def _no_axis(key: str, axes: Mapping[str, Written]) -> str:
    close = difflib.get_close_matches(key, axes, 1)
    hint = f"; did you mean {close[0]!r}?" if close else f": they are {', '.join(axes) or 'none'}"
    return f"{key} is no axis of the space{hint}"


def _no_kind(name: str, last: str, entry: Entry) -> str:
    close = difflib.get_close_matches(last, KINDS, 1)
    if close and "." in name:
        return f"no such kind {last!r}; did you mean {close[0]!r}?"
    return f"is {words(entry.value)}, must say how it is drawn: {name}.KIND with KIND one of {', '.join(KINDS)}"
