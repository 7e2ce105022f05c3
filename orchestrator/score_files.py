"""Files of scores: one a unit, which appears when it is whole and says whose scores of what it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from jem.data.rows import UNREADABLE
from jem.errors import ConfigError, DataError, Problem
from jem.files import Location
from jem.predict import Card, Predictions
from orchestrator.score_folder import READERS
from orchestrator.score_units import Plan

SCHEMA = 1
KEY = b"jem.scores"
"""Of the Parquet metadata that says what a file holds."""

SUMMARY = "scores.json"
OTHER = {"model": "of another model", "data": "of other data", "settings": "made with other settings"}


@dataclass
class Totals:
    """Of a unit's rows; kept with them, so that what was scored before need not be read again."""

    rows: int = 0
    in_distribution: int = 0
    probability: float = 0.0  # sum
    labelled: int = 0  # rows whose right class is one of the model's
    correct: int = 0
    predicted: list[int] = field(default_factory=list)  # rows that were given to each class

    def add(self, p: Predictions, truth: np.ndarray | None, classes: int) -> None:
        """`truth` [n] has the right class of each row, or one that the model does not have."""
        self.rows += len(p.index)
        self.in_distribution += int(p.in_distribution.sum())
        self.probability += math.fsum(p.probability)
        counts = np.bincount(p.index, minlength=classes)
        self.predicted = (counts + self.predicted if self.predicted else counts).tolist()
        if truth is not None:
            self.labelled += int(((truth >= 0) & (truth < classes)).sum())
            self.correct += int((truth == p.index).sum())


def identity(plan: Plan, card: Card, rows_per_unit: int) -> dict[str, Any]:
    """What all files of one OUT have in common, as JSON reads it back."""
    model = {"digest": card.digest, "temperature": card.temperature, "threshold": card.threshold}
    model["classes"] = list(card.classes)
    settings = {"rows_per_unit": rows_per_unit, "column": plan.columns.image, "label": plan.columns.label}
    settings["keep"] = list(plan.columns.keep)
    if plan.columns.label and plan.classes not in (None, card.classes):
        settings["true_label"] = "names"  # numbers once, which were of the data's classes
    return {"schema": SCHEMA, "model": model, "data": plan.data, "settings": settings}


def look(out: Location, plan: Plan, same: Mapping[str, Any]) -> dict[int, tuple[int, Totals]]:
    """The units that are there already: number -> (bytes, totals).

    A file of the data that was mended meanwhile leaves what was scored of the others as it is, until all is scored.
    Raises ConfigError if `out` holds anything else, scores of other data or by another model among it.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError([Problem("OUT", f"{out.uri} is a file, a folder was expected")])
    numbers = {unit.name: unit.number for unit in plan.units}
    files = [file for file in out.children() if not file.name.startswith(".")]
    ours = [file for file in files if file.name.startswith("scores-") and file.name.endswith(".parquet")]
    alien = [file for file in files if file not in ours and file.name != SUMMARY]
    if alien:
        raise ConfigError([Problem("OUT", f"{out.uri} holds {alien[0].name}, which is no file of scores; {_REMEDY}")])
    if (out / SUMMARY) in files:
        _refuse_other(out, _summary_of(out), same)
    with ThreadPoolExecutor(READERS) as pool:
        contents = list(pool.map(_content, ours))
    there = {}
    for file, content in zip(ours, contents, strict=True):
        known = file.name in numbers and content["unit"] == asdict(plan.units[numbers[file.name]])
        _refuse_other(out, content | ({"data": same["data"]} if known else {}), same)
        if not known:
            raise DataError(f"{file.uri}: is not of this data's units; delete it")
        there[numbers[file.name]] = (file.size(), Totals(**content["totals"]))
    return there


def summary(plan: Plan, same: Mapping[str, Any], there: Mapping[int, tuple[int, Totals]]) -> dict[str, Any]:
    """What scores.json says of all units."""
    totals = [there[unit.number][1] for unit in plan.units]
    rows, labelled = sum(t.rows for t in totals), sum(t.labelled for t in totals)
    predicted = [sum(counts) for counts in zip(*(t.predicted for t in totals), strict=True)]
    return {
        **same,
        "rows": rows,
        "units": len(plan.units),
        "in_distribution": sum(t.in_distribution for t in totals) / rows,
        "mean_probability": math.fsum(t.probability for t in totals) / rows,
        "labelled": labelled,
        "accuracy": sum(t.correct for t in totals) / labelled if labelled else None,
        "predicted": dict(zip(same["model"]["classes"], predicted, strict=True)),
        "files": [
            {"name": u.name, "bytes": there[u.number][0], "of": u.file, "start": u.start, "rows": u.rows}
            for u in plan.units
        ],
    }


def finished(out: Location, same: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of scores that are complete already; one listing of `out` tells."""
    if not (out / SUMMARY).exists():
        return None
    found = _summary_of(out)
    _refuse_other(out, found, same)
    sizes = {file.name: file.size() for file in out.children()}
    return found if all(sizes.get(file["name"]) == file["bytes"] for file in found["files"]) else None


def _summary_of(out: Location) -> dict[str, Any]:
    where = out / SUMMARY
    try:
        found: dict[str, Any] = json.loads(where.read())
        _check(found, {"files", "rows"}, where)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where.uri}: is damaged ({error}); delete it") from error


def is_leftover(file: Location) -> bool:
    """A file that was being written when its writer was killed; see Location.write."""
    return file.name.startswith(".scores") and file.name.endswith(".tmp")


_REMEDY = "nothing was overwritten; give another OUT"


def _refuse_other(out: Location, found: Mapping[str, Any], same: Mapping[str, Any]) -> None:
    for key, what in OTHER.items():
        if found[key] != same[key]:
            differ = [k for k in same[key] if found[key].get(k) != same[key][k]]
            details = ", ".join(f"{k} {_short(found[key].get(k))}, now {_short(same[key][k])}" for k in differ)
            raise ConfigError([Problem("OUT", f"{out.uri} holds scores {what} ({details}); {_REMEDY}")])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _content(file: Location) -> dict[str, Any]:
    """What a file of scores says of itself."""
    try:
        with pq.ParquetFile(file.path, filesystem=file.fs) as opened:
            content: dict[str, Any] = json.loads(opened.metadata.metadata[KEY])
        _check(content, {"unit", "totals"}, file)
        return content
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise DataError(f"{file.uri}: is no whole file of scores ({error}); delete it, or give another OUT") from error


def _check(content: Mapping[str, Any], needed: set[str], file: Location) -> None:
    if content["schema"] != SCHEMA:
        raise ConfigError([Problem("OUT", f"{file.uri} has schema {content['schema']}, not {SCHEMA}; {_REMEDY}")])
    missing = {*OTHER, *needed} - content.keys()
    if missing:
        raise ValueError(f"without {', '.join(sorted(missing))}")
