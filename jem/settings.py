"""Frozen dataclasses as configuration: typed, bounded, documented, built from `key = value` entries.

A settings class is a frozen dataclass that inherits from `Settings` and declares its fields with
`setting(...)`. The same declaration validates direct construction, YAML files, the command line and a
sweep, and writes `--help`. Standard library only: a mistake is reported before torch is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeVar

from jem.errors import ConfigError, Problem

S = TypeVar("S", bound="Settings")
_HINTS: dict[type, dict[str, Any]] = {}


@dataclass(frozen=True)
class Entry:
    """A value as somebody wrote it. `raw` is its text where the text is known (command line)."""

    value: Any
    origin: str = ""
    raw: str | None = None


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field with its meaning and its bounds. Without a default it is required."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"doc": doc, "choices": choices, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type[S]) -> S:
    """A field that is itself a settings class with defaults throughout."""
    field: Any = dataclasses.field(default_factory=cls, metadata={"doc": (cls.__doc__ or "").splitlines()[0]})
    return field  # type: ignore[no-any-return]


class Settings:
    """Base of all settings classes: validates when made, compares and prints as a dataclass does."""

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            hint = _hints(type(self))[field.name]
            if _is_group(hint):
                continue
            try:
                value = _coerce(hint, Entry(getattr(self, field.name)), field)
                object.__setattr__(self, field.name, value)
            except ValueError as error:
                problems.append(Problem(field.name, str(error)))
        if not problems:
            problems = [Problem(key, message) for key, message in self.conflicts()]
        if problems:
            raise ConfigError(problems)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for values that are each right but do not go together."""
        yield from ()


def build(cls: type[S], entries: Mapping[str, Entry]) -> S:
    """Make a `cls` from dotted keys, or raise one ConfigError that lists every mistake with its origin."""
    entries = _spread(cls, entries)
    known = {key: (field, hint) for key, field, hint in _leaves(cls)}
    problems = [
        Problem(key, f"no such setting{_did_you_mean(key, known)}", entry.origin)
        for key, entry in entries.items()
        if key not in known
    ]
    values: dict[str, Any] = {}
    for key, (field, hint) in known.items():
        if key not in entries:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                problems.append(Problem(key, f"is required: {field.metadata['doc']}"))
            continue
        try:
            values[key] = _coerce(hint, entries[key], field)
        except ValueError as error:
            problems.append(Problem(key, str(error), entries[key].origin))
    failed = {problem.key for problem in problems}
    instance, conflicts = _assemble(cls, values, "", failed)
    for key, message in conflicts:
        if key not in failed:
            problems.append(Problem(key, message, entries[key].origin if key in entries else ""))
    if problems or instance is None:
        raise ConfigError(problems)
    return instance


def override(config: S, changes: Mapping[str, Any], origin: str = "") -> S:
    """A copy of `config` with dotted keys changed: the one way to change a field."""
    entries = {key: Entry(value) for key, value in flatten(config).items()}
    entries |= {key: v if isinstance(v, Entry) else Entry(v, origin) for key, v in changes.items()}
    return build(type(config), entries)


def flatten(config: Settings, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Dotted key to value. `keys` limits it to these top-level fields."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if keys is not None and field.name not in keys:
            continue
        if isinstance(value, Settings):
            flat |= {f"{field.name}.{key}": v for key, v in flatten(value).items()}
        else:
            flat[field.name] = value
    return flat


def digest(values: Mapping[str, Any]) -> str:
    """Eight hex digits that name a flat configuration."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def describe(cls: type[Settings]) -> Iterator[tuple[str, str, str]]:
    """Yield (key, default or bounds in words, meaning) for every setting: the text of --help."""
    for key, field, _ in _leaves(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "required" if default is dataclasses.MISSING else _show(default)
        allowed = _allowed(field)
        yield key, shown, field.metadata["doc"] + (f" [{allowed}]" if allowed else "")


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Settings)


def _leaves(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = _hints(cls)[field.name]
        if _is_group(hint):
            yield from _leaves(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, hint


def _spread(cls: type[Settings], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Turn `{"model.options.depth": 3}` into the mapping-valued `model.options`."""
    mappings = [key for key, _, hint in _leaves(cls) if typing.get_origin(hint) is dict]
    spread: dict[str, Entry] = {}
    for key, entry in entries.items():
        home = next((m for m in mappings if key.startswith(m + ".")), None)
        if home is None:
            spread[key] = entry
            continue
        merged = spread[home].value if home in spread else {}
        spread[home] = Entry(_with(merged, key[len(home) + 1 :].split("."), entry.value), entry.origin)
    return spread


def _with(mapping: Any, path: list[str], value: Any) -> Any:
    """`mapping` with the value at `path` changed, and mappings made on the way there."""
    if not path:
        return value
    kept = dict(mapping) if isinstance(mapping, Mapping) else {}
    return kept | {path[0]: _with(kept.get(path[0]), path[1:], value)}


def _assemble(
    cls: type[S], values: Mapping[str, Any], prefix: str, failed: Set[str]
) -> tuple[S | None, list[tuple[str, str]]]:
    arguments: dict[str, Any] = {}
    conflicts: list[tuple[str, str]] = []
    complete = True
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key, hint = f"{prefix}{field.name}", _hints(cls)[field.name]
        if _is_group(hint):
            below, found = _assemble(hint, values, f"{key}.", failed)
            conflicts += found
            if below is not None:  # else its defaults, so that conflicts elsewhere are found too
                arguments[field.name] = below
        elif key in values:
            arguments[field.name] = values[key]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            complete = False  # reported as required
    if not complete:
        return None, conflicts
    try:
        return cls(**arguments), conflicts
    except ConfigError as error:
        own = [(f"{prefix}{p.key}", p.message) for p in error.problems]
        # a group with a mistake has defaults here: what they do not go together with is no mistake as well
        wrong = {f"{key.rpartition('.')[0]}." for key in (*failed, *(key for key, _ in conflicts)) if "." in key}
        return None, conflicts + [
            (k, said) for k, said in own if not any(g in said for g in wrong if not k.startswith(g))
        ]


def _coerce(hint: Any, entry: Entry, field: dataclasses.Field[Any]) -> Any:
    value = _convert(hint, entry.value, entry.raw)
    for item in value if isinstance(value, tuple) else (value,):
        if item is None or isinstance(item, dict):
            continue
        choices = field.metadata.get("choices")
        if choices and item not in choices:
            known = ALIASES.get(str(item).lower())
            close = [known] if known in choices else difflib.get_close_matches(str(item), choices, 1)
            hint_text = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"is {item!r}, must be one of {', '.join(choices)}{hint_text}")
        if not isinstance(item, bool) and isinstance(item, (int, float)):
            _check_bounds(item, field.metadata.get("bounds", {}))
    return value


ALIASES = {"gpu": "cuda"}
"""What people type for a choice."""


def _check_bounds(item: float, bounds: Mapping[str, float]) -> None:
    ok = {
        "ge": lambda bound: item >= bound,
        "gt": lambda bound: item > bound,
        "le": lambda bound: item <= bound,
        "lt": lambda bound: item < bound,
    }
    if not math.isfinite(item) or not all(ok[name](bound) for name, bound in bounds.items()):
        raise ValueError(f"is {_show(item)}, must be {_bounds_in_words(bounds) or 'a finite number'}")


def _convert(hint: Any, value: Any, raw: str | None) -> Any:
    """`value` as the annotated type, exactly: nothing is rounded and no text becomes a truth value."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if type(None) in options and (value is None or (raw or value) in ("none", "None")):
            return None
        *others, last = (option for option in options if option is not type(None))
        for option in others:  # the first that fits
            with contextlib.suppress(ValueError):
                return _convert(option, value, raw)
        return _convert(last, value, raw)
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else None
        if items is None:
            raise ValueError(f"is {_show(value)}, a list was expected: [{_show(value).strip(chr(39))}]")
        return tuple(_convert(options[0], item, None) for item in items)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"is {_show(value)}, a mapping was expected")
        try:
            json.dumps(dict(value), sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"is {value}, must be of numbers, text, lists and mappings ({error})") from None
        return dict(value)
    if hint is str and raw is not None:
        return raw
    if hint is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-3 as text
    if hint is int and isinstance(value, str):
        number = _number(value)
        value = int(number) if number.is_integer() else number
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ValueError(f"is {_show(value)}, {names[hint]} was expected")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"is {text!r}, a number was expected") from None


def _did_you_mean(key: str, known: Mapping[str, Any]) -> str:
    if any(k.startswith(f"{key}.") for k in known):
        return f": a group, of which {key}.SETTING=... sets one; --help lists them"
    close = difflib.get_close_matches(key, known, 1, 0.6)
    if not close:  # the right field under the wrong group, or without its group
        last = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {close[0]!r}?" if close else "; --help lists them all"


def _bounds_in_words(bounds: Mapping[str, float]) -> str:
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{words[name]} {_show(bound)}" for name, bound in bounds.items())


def _allowed(field: dataclasses.Field[Any]) -> str:
    if field.metadata.get("choices"):
        return " | ".join(field.metadata["choices"])
    return _bounds_in_words(field.metadata.get("bounds", {}))


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)
