"""Images drawn from a trained model: what jobs/sample.py does. Torch is imported once the settings are in order."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jem.errors import ConfigError, JEMError, Problem
from jem.settings import Settings, build, describe, digest, flatten, group, setting
from orchestrator.config import parse_arguments
from orchestrator.result import Result
from orchestrator.score_config import MLflowConfig

if TYPE_CHECKING:
    from orchestrator.opened import Opened
    from orchestrator.sample_files import Plan

ALL = "all"
FILES = ("grid.png", "samples.npy", "samples.json", "chain.gif")
FOLDER = "sampled"
"""Not samples/, where a run's training looks for its own newest picture."""

OF_MODEL = ("model.", "data.", "precision=", "storage_path=", "tracking.", "device=")
"""Arguments that say which model it is; those that describe one are for a released .pt alone."""


@dataclass(frozen=True, kw_only=True)
class StepConfig(Settings):
    """How chains move, where it is to differ from the training."""

    step_size: float | None = setting(None, gt=0, doc="factor of the energy's gradient in a step; none: the model's")
    noise_scale: float | None = setting(None, ge=0, doc="standard deviation of a step's noise; none: the model's")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """What is drawn, and how."""

    count: int = setting(100, ge=1, doc="images; chains run in batches of 100, each whole, so that more change none")
    class_: str | None = setting(
        None,
        doc="a class's name or number: chains follow E(x, y); all: every class in turn, a row each, count rounded up "
        "to a multiple of the classes; none: chains follow E(x)",
    )
    steps: int | None = setting(
        None,
        ge=0,
        doc="SGLD steps of a chain; none: for fresh chains the mean life of one in training, sgld.steps * "
        "sgld.inner_steps / replay.reinit_prob (20 sgld.steps where none restarts), for those of the buffer 0",
    )
    init: str = setting(
        "fresh",
        choices=("fresh", "buffer"),
        doc="fresh: from the model's prior, which holds no image; buffer: chains of the checkpoint's replay buffer, "
        "drawn without replacement",
    )
    out: str | None = setting(
        None, doc=f"folder; none: {FOLDER}/NAME in the run's folder where that can be written, else here"
    )
    seed: int = setting(0, ge=0, lt=2**31, doc="the same seed gives the same images, whatever the count")
    frames: int = setting(40, ge=2, doc="of chain.gif, denser at the start; the first is where the chains start")
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), doc="auto: a GPU where there is one")
    storage_path: str = setting("./runs", doc="folder of all runs, for MLflow's SQLite file in it")
    tracking: MLflowConfig = group(MLflowConfig)
    sgld: StepConfig = group(StepConfig)


@dataclass
class Sampled(Result):
    """`folder` holds `files`; figures, of the images as they are saved, are in `metrics` and samples.json."""

    folder: str = ""
    files: list[str] = field(default_factory=list)
    count: int = 0
    steps: int = 0
    predicted: dict[str, int] = field(default_factory=dict)  # images by the class that the model gives them


def sample(source: str, arguments: Sequence[str]) -> Sampled:
    """Draw images of the model that `source` names, and write them; progress goes to stderr.

    Raises ConfigError or DataError for a model or settings that will not do, CheckpointError for a damaged model and
    DivergedError for chains that are not finite; nothing is written then.
    """
    config, of_model = sample_config(arguments)
    from orchestrator.opened import open_model
    from orchestrator.registry import SCHEMES, model_folder

    with tempfile.TemporaryDirectory(prefix="jem-sample-") as temporary:
        place = source
        if source.startswith(SCHEMES):
            place = str(model_folder(source, config.tracking.uri, config.storage_path, Path(temporary)).folder)
        opened = replace(open_model(place, of_model), source=source)
        return _sample(opened, make_plan(opened, config, classes_of(place, opened)))


def _sample(opened: Opened, plan: Plan) -> Sampled:
    from orchestrator.sample_files import draw, write

    drawn = draw(opened, plan)
    try:
        content = write(plan.folder, opened, plan, drawn)
    except OSError as error:  # a full disk: for the user to mend
        raise JEMError(f"{plan.folder}: {error}") from error
    place = _published(opened, plan.folder)
    print(f"{plan.count} images of {opened.name}: {place}")
    shown = {"confidence": content["confidence"], "energy": content["energy"]["mean"]}
    shown |= {"saturation": content["saturation"]}
    if content["class_probability"] is not None:
        shown["class_probability"] = content["class_probability"]
    return Sampled(
        name=opened.name,
        checkpoint=opened.checkpoint,
        step=opened.step,
        weights=opened.weights,
        metrics=shown,
        status="finished",
        samples=f"{place}/grid.png",
        message="; ".join(content["notes"]),
        folder=place,
        files=content["files"],
        count=plan.count,
        steps=plan.steps,
        predicted=content["predicted"],
    )


def _published(opened: Opened, folder: Path) -> str:
    """Where the images lie for all to see: those of a run on an object store in its folder there, too."""
    from orchestrator.published import publish, workbench

    run = opened.run
    if run is None or run.is_local or folder.parent != workbench(run) / FOLDER:
        return str(folder)
    path = f"{FOLDER}/{folder.name}"
    try:
        publish(run, path)
    except OSError as error:
        raise JEMError(f"{folder} was made, but {(run / path).uri} cannot be written: {error}") from error
    return (run / path).uri


def sample_config(arguments: Sequence[str]) -> tuple[SampleConfig, list[str]]:
    """`key=value` settings, and those arguments that are about the model; every mistake in one ConfigError."""
    of_model = [argument for argument in arguments if argument.startswith(OF_MODEL)]
    described = ("model.", "data.", "precision=")
    entries, problems = parse_arguments([a for a in arguments if not a.startswith(described)])
    if "class" in entries:  # which Python keeps for itself
        entries["class_"] = entries.pop("class")
    try:
        config = build(SampleConfig, entries)
    except ConfigError as error:
        problems += [replace(p, message=p.message.replace("'class_'", "'class'")) for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return config, of_model


def _typed(key: str) -> str:
    return "class" if key == "class_" else key


def settings_help() -> str:
    """Every setting with its default and meaning."""
    lines = ["settings (defaults):"]
    for key, default, meaning in describe(SampleConfig):
        lines += [
            f"  {_typed(key)} = {default}",
            *textwrap.wrap(meaning, 104, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines)


def classes_of(place: str, opened: Opened) -> tuple[str, ...]:
    """The names of the classes; their numbers where the model does not know them."""
    from jem.checkpoint import read_manifest
    from jem.files import Location
    from jem.predict import CARD, read_card

    if opened.served is not None:
        return tuple(opened.served["classes"])
    if (Path(place) / CARD).exists():
        return read_card(Path(place)).classes
    if opened.checkpoint is not None:
        return tuple(read_manifest(Location.of(opened.checkpoint)).info["classes"])
    return tuple(map(str, range(opened.n_classes)))


def make_plan(opened: Opened, config: SampleConfig, classes: tuple[str, ...]) -> Plan:
    """What is to be drawn of this model. Raises ConfigError with all that is wrong with it."""
    from orchestrator.sample_files import Plan, default_steps

    label = _number_of(config.class_, classes)
    count = -(-config.count // len(classes)) * len(classes) if label == ALL else config.count
    changes = {key: value for key, value in flatten(config.sgld).items() if value is not None}
    changes |= {f"final_{key}": None for key in changes}  # what is typed is that of every step, not a schedule's first
    steps = config.steps
    if steps is None:
        steps = default_steps(opened.config) if config.init == "fresh" else 0
    sgld = replace(opened.config.sgld, **changes)
    kind = config.class_ if config.class_ is None or label in (None, ALL) else classes[int(label)]
    words = [config.init, str(count), *([_plain(kind)] if kind else []), f"{steps}steps", f"seed{config.seed}"]
    words.append(digest({"model": opened.digest, "sgld": flatten(sgld)}))
    folder = Path(config.out).expanduser().absolute() if config.out else _home(opened) / "-".join(words)
    problems = list(_problems(opened, config, classes, label, count, folder))
    if problems:
        raise ConfigError(problems)
    notes = []
    if count != config.count:
        notes.append(f"count={config.count} was rounded up to {count}, a multiple of the {len(classes)} classes")
    if config.init == "buffer" and label is not None and not opened.config.sgld.conditional:
        notes.append("the buffer's chains keep no class: they were chosen by the model's own answer")
    return Plan(
        count=count,
        label=label,
        classes=classes,
        steps=steps,
        init=config.init,
        seed=config.seed,
        sgld=sgld,
        frames=config.frames,
        device=config.device,
        folder=folder,
        notes=tuple(notes),
    )


def _number_of(wanted: str | None, classes: tuple[str, ...]) -> int | str | None:
    """The class's number, ALL, or None for none and for what is no class."""
    if wanted is None or wanted == ALL:
        return wanted
    if wanted in classes:
        return classes.index(wanted)
    return int(wanted) if wanted.isdecimal() and int(wanted) < len(classes) else None


def _problems(
    opened: Opened,
    config: SampleConfig,
    classes: tuple[str, ...],
    label: int | str | None,
    count: int,
    folder: Path,
) -> Iterator[Problem]:
    import torch

    said = "command line"
    if not opened.config.objective.samples_needed:
        yield Problem("MODEL", f"{opened.source} was trained without chains: there is nothing to draw")
    elif config.init == "buffer" and opened.buffer is None:
        where = opened.run.uri if opened.run else opened.checkpoint
        remedy = f", such as {where}" if where else ""
        yield Problem(
            "init",
            f"is buffer, but {opened.source} holds weights alone, no chains; give the run's folder or one of its "
            f"checkpoints as MODEL{remedy}, or init=fresh",
            said,
        )
    elif config.init == "buffer" and count > opened.config.replay.capacity:
        yield Problem("count", f"is {count}, the replay buffer holds {opened.config.replay.capacity} chains", said)
    if config.class_ is not None and label is None:
        names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        known = f"must be {ALL}, a number from 0 to {len(classes) - 1}, or one of {names}"
        yield Problem("class", f"is {config.class_!r}, {known}", said)
    if config.device == "cuda" and not torch.cuda.is_available():
        yield Problem("device", "is cuda, but PyTorch sees no GPU here; set device=cpu", said)
    yield from _problems_of_out(config, folder)


def _problems_of_out(config: SampleConfig, folder: Path) -> Iterator[Problem]:
    """Nothing but older samples is ever replaced."""
    from jem.files import existing

    said = "command line"
    there = existing(folder)
    if config.out is not None and "://" in config.out:
        yield Problem("out", f"is {config.out!r}, must be a folder on this machine", said)
    elif not there.is_dir():
        yield Problem("out", f"{there} is a file, a folder was expected", said)
    elif not os.access(folder.parent if there == folder else there, os.W_OK):
        yield Problem("out", f"{folder} cannot be written by this user; give another out=FOLDER", said)
    elif there == folder:
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
        if foreign:
            yield Problem("out", f"{folder} holds {foreign[0]}, which is no file of samples; give another folder", said)


def _home(opened: Opened) -> Path:
    """Where samples are made: for the run where its folder can be written, else where the command is typed."""
    from orchestrator.published import workbench

    run = opened.run
    if run is not None and (not run.is_local or os.access(run.local, os.W_OK)):
        return workbench(run).absolute() / FOLDER
    return Path.cwd() / FOLDER / _plain(opened.name)


def _plain(name: str) -> str:
    """A name as part of a folder's."""
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in name).lstrip(".") or "_"
