"""Scores of a data set of any size, as Parquet: what jobs/score.py does. Torch is imported once needed."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jem.errors import ConfigError, DataError, JEMError, Problem
from orchestrator.bundled import bundled_models, place_of
from orchestrator.result import Result
from orchestrator.score_config import ScoreConfig, score_config

if TYPE_CHECKING:
    from jem.files import Location
    from jem.predict import Card
    from orchestrator.score_units import Plan

LINE_EVERY_S = 5.0


@dataclass
class Scored(Result):
    """`out` is where the scores lie, `summary` what their scores.json is called."""

    out: str = ""
    rows: int = 0
    units: int = 0
    summary: str = ""


def score(model: str, data: str, out: str, changes: Sequence[str], stream: TextIO | None = None) -> Scored:
    """Score all of `data` that `out` has no scores of yet; progress goes to `stream`, else stderr."""
    config = score_config(changes)
    source, target = _location("DATA", data), _location("OUT", out)
    inside = (target.path.rstrip("/") + "/").startswith(source.path.rstrip("/") + "/")
    if inside and target.scheme == source.scheme:
        raise ConfigError([Problem("OUT", f"{target.uri} is inside DATA, where it would be taken for data")])
    from jem.predict import read_card

    try:
        with tempfile.TemporaryDirectory(prefix="jem-score-") as temporary:
            folder = portable_folder(model, config.tracking.uri, Path(temporary), config.storage_path)
            return _score(config, folder, read_card(folder), source, target, stream or sys.stderr)
    except OSError as error:  # a full disk, a store that refuses: for the user to mend
        raise JEMError(str(error)) from error


def portable_folder(source: str, tracking_uri: str | None, into: Path, storage: str = "./runs") -> Path:
    """The local folder of the portable model (see jem.predict) that `source` names; copied below `into` where needed.

    source: such a folder, a run's folder (the model of its newest checkpoint), the name of a bundled model,
    models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID.
    Raises ConfigError or DataError for one that is none of these.
    """
    from jem.predict import CARD
    from orchestrator.registry import SCHEMES, model_folder

    if source.startswith(SCHEMES):
        return model_folder(source, tracking_uri, storage, into).folder
    location = _location("MODEL", place_of(source, storage))
    found = next((place for place in (location, *_final_models(location)) if (place / CARD).exists()), None)
    if found is None:
        what = f"holds no {CARD}, here or in models/" if location.exists() else "does not exist"
        names = "the folder of a portable model, a run's folder, models:/NAME@ALIAS, runs:/ID or a model that comes "
        names += f"with this project: {', '.join(bundled_models())}"
        raise ConfigError([Problem("MODEL", f"{location.uri} {what}; give {names}")])
    if found.is_local:
        return found.local
    target = into / found.name  # the same name each time, by which MLflow knows what it has
    try:
        target.mkdir()
        for file in found.children():
            if not file.is_dir():
                (target / file.name).write_bytes(file.read())
    except OSError as error:
        raise DataError(f"{found.uri}: cannot be read: {error}") from error
    return target


def _final_models(run: Location) -> list[Location]:
    """The portable model of a run's newest checkpoint."""
    from jem import checkpoint
    from orchestrator.final_model import FOLDER

    newest = checkpoint.committed(run / "checkpoints")[:1]
    manifests = [checkpoint.read_manifest(directory) for directory in newest]
    digests = [manifest.files[f"{manifest.info['final']}.safetensors"]["sha256"] for manifest in manifests]
    return [run / FOLDER / digest[:12] for digest in digests]


def _score(config: ScoreConfig, folder: Path, card: Card, source: Location, target: Location, stream: TextIO) -> Scored:
    from orchestrator.score_files import SUMMARY, finished, identity, look, summary
    from orchestrator.score_units import Columns, make_plan

    columns = Columns(config.column, config.label, config.keep)
    plan = make_plan(source, config.split, columns, config.rows_per_unit, card.image_shape, card.classes)
    same = identity(plan, card, config.rows_per_unit)
    content = finished(target, same)
    if content is None:
        with _alone(target):
            there = look(target, plan, same)
            if len(there) < len(plan.units):
                _score_rest(config, folder, plan, same, target, set(there), stream)
                there = look(target, plan, same)
            missing = [unit.name for unit in plan.units if unit.number not in there]
            if missing:
                where = "not here: workers on other machines wrote to their own disks; OUT must be a shared storage"
                raise JEMError(f"{target.uri}: {missing[0]} was written, but is {where}")
            content = summary(plan, same, there)
            (target / SUMMARY).write((json.dumps(content, indent=1) + "\n").encode())
    return _result(target, content, stream)


def _score_rest(
    config: ScoreConfig,
    folder: Path,
    plan: Plan,
    same: dict[str, Any],
    target: Location,
    there: set[int],
    stream: TextIO,
) -> None:
    from jem.predict import Predictor
    from orchestrator.score_files import is_leftover
    from orchestrator.score_ray import score_on_ray
    from orchestrator.score_rows import Work

    Predictor.load(folder)  # a model that cannot be loaded is said before Ray is started
    for file in filter(is_leftover, target.children()):
        file.remove()
    target.mkdir()
    work = Work(plan.root, target, plan.columns, plan.classes, same, plan.images)
    missing = [unit for unit in plan.units if unit.number not in there]
    if there:
        stream.write(f"going on: {len(there)} of {len(plan.units)} units are scored already\n")
    rows = sum(unit.rows for unit in missing)
    try:
        with _progress(rows, len(missing), stream) as done:
            score_on_ray(folder, work, missing, config.workers, config.device, done)
    except KeyboardInterrupt:
        kept = sum(file.name in {unit.name for unit in plan.units} for file in target.children())
        stream.write(f"{kept} of {len(plan.units)} units are scored and kept; the same command goes on\n")
        raise


def _result(target: Location, content: dict[str, Any], stream: TextIO) -> Scored:
    from orchestrator.score_files import SUMMARY

    shown = ("in_distribution", "mean_probability", "accuracy")
    metrics = {key: content[key] for key in shown if content[key] is not None}
    rows, labelled = content["rows"], content["labelled"]
    told = f"{rows:,} rows, {content['in_distribution']:.1%} in distribution"
    told += f", accuracy {content['accuracy']:.4f}" if labelled else ""
    stream.write(f"scores: {target.uri}: {told}\n")
    strange = rows - labelled if content["settings"]["label"] else 0
    message = f"{strange:,} of {rows:,} labels are none of the model's classes, and count for no accuracy"
    return Scored(
        message=message if strange else "",
        metrics=metrics,
        status="finished",
        out=target.uri,
        rows=content["rows"],
        units=content["units"],
        summary=(target / SUMMARY).uri,
    )


@contextmanager
def _alone(target: Location) -> Iterator[None]:
    """Hold OUT, so that no other command writes there at the same time."""
    from contextlib import ExitStack

    from orchestrator.runs import lock

    with ExitStack() as stack:
        try:
            stack.enter_context(lock(target, tidy=True))
        except ConfigError as error:
            who = str(error).partition(" is working on")[0]
            raise ConfigError(f"{who} is writing scores there; wait for it, stop it, or give another OUT") from None
        yield


@contextmanager
def _progress(rows: int, units: int, stream: TextIO) -> Iterator[Callable[[int], None]]:
    """What is to be told the rows of each unit that is done: a bar on a terminal, lines elsewhere."""
    if stream.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(file=stream), redirect_stdout=False) as bar:
            task = bar.add_task("", total=rows)
            yield lambda n: bar.advance(task, n)
        return
    seen: list[tuple[float, int]] = []  # when so many rows were done
    told = 0.0

    def done(n: int) -> None:
        nonlocal told
        seen.append((time.monotonic(), n + (seen[-1][1] if seen else 0)))
        (first, before), (now, so_far) = seen[0], seen[-1]
        if now - told >= LINE_EVERY_S or len(seen) == units:
            lasting = now > first + 1  # the first unit's end on: without Ray's start
            rate = f"  {(so_far - before) / (now - first):,.0f} rows/s" if lasting else ""
            stream.write(f"{so_far:,} of {rows:,} rows, {len(seen)} of {units} units{rate}\n")
            stream.flush()
            told = now

    yield done


def _location(what: str, uri: str) -> Location:
    from jem.files import Location

    try:
        return Location.of(uri)
    except ValueError as error:
        raise ConfigError([Problem(what, str(error))]) from error
