"""Where and how a run runs, and how a recipe and `key=value` arguments become a `RunConfig`.

Neither torch nor Ray is imported here: mistakes, --help and a run's name are instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from jem.config import SCIENCE, JEMConfig, too_few_chains
from jem.config import EvaluateConfig as Measured
from jem.data.catalog import describe
from jem.errors import ConfigError, JEMError, Problem
from jem.settings import Entry, Settings, build, digest, flatten, group, override, setting
from orchestrator.remedies import LADDER, malformed, remedied

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
MODELS, MODEL_CARD = RECIPES.with_name("models"), "model.json"
"""Models that come with the project, and the file that each has: jem.predict.CARD, which would import torch."""

ON_DISK = ("imagefolder", "parquet")
"""Data whose shape and size are known from their folder, which takes numpy and time to read."""

LONGEST_NAME = 200
"""Of a run, in bytes: a file's name has 255, and locks, workbenches and NAME-seeds are made of it."""

OURS = ("mlflow.db", "mlartifacts")
"""What lies beside the runs: MLflow's database and files (tracking.py)."""

PATHS = ("init_from", "data.root", "evaluate.generate.inception")
"""Settings that are a local path, or a URI such as s3://... or models:/..."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """When checkpoints are written and which stay."""

    every: int = setting(500, ge=1, doc="steps between checkpoints; the first and the last step always have one")
    keep: int = setting(3, ge=1, doc="newest checkpoints that stay; also those too young to count as good")
    spaced: int = setting(
        2, ge=0, doc="older ones stay too, for walking back: two each of every 4th, of every 16th, ... so often"
    )
    max_failures: int = setting(3, ge=1, doc="checkpoints in a row that cannot be written before the run stops")


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig(Settings):
    """What happens when a worker dies or hangs, and when training diverges."""

    max_failures: int = setting(
        3, ge=0, doc="how often dead workers are replaced without a new checkpoint before the run counts as failed"
    )
    hang_timeout: float = setting(300.0, gt=0, doc="seconds without a step after which a worker is restarted")
    every: int = setting(25, ge=1, doc="steps between looks at whether training is healthy")
    healthy_steps: int = setting(
        200, ge=0, doc="steps that must stay healthy after a checkpoint before divergence rolls back to it"
    )
    max: int = setting(10, ge=0, doc="rollbacks before the run counts as diverged")
    ladder: tuple[str, ...] = setting(
        LADDER,
        doc="what changes with each rollback, kept with what came before: seed, KEY*FACTOR, KEY=VALUE, KEY>=LEAST, "
        "KEY<=MOST (none counts as without end), KEY*FACTOR>=LEAST",
    )
    relax_steps: int = setting(1000, ge=1, doc="healthy steps after which the last remedy is taken back")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for remedy in self.ladder:
            for change in remedy.split():
                problem = malformed(change)
                if problem:
                    yield "ladder", f"has {change!r}, {problem}"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Settings):
    """What is logged, how often, and to which MLflow."""

    uri: str | None = setting(
        None, doc="MLflow tracking URI; none: MLFLOW_TRACKING_URI where set, else SQLite inside storage_path"
    )
    experiment: str = setting("jem", doc="MLflow experiment")
    every: int = setting(50, ge=1, doc="steps that a point of the training curves averages over")
    images_every: int = setting(500, ge=1, doc="steps between pictures of the chains")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Measured):
    """What is measured, when, and on which weights; and what becomes of the final model."""

    register: bool = setting(True, doc="register the final model in MLflow, once per checkpoint")
    model_name: str | None = setting(
        None, doc="of the registered model; none: jem-DATA, such as jem-digits or jem-FOLDER"
    )
    champion: str = setting(
        "nll",
        choices=("nll", "accuracy", "ece"),
        doc="validation figure, after temperature scaling, that moves the alias champion when it improves",
    )
    input_layout: str = setting("NHWC", choices=("NHWC", "NCHW"), doc="of the images that the registered model takes")
    input_dtype: str = setting("uint8", choices=("uint8", "float32"), doc="likewise: 0 to 255, or 0 to 1")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.model_name is not None and not re.fullmatch(r"[\w.-]+", self.model_name, re.ASCII):
            yield "model_name", f"is {self.model_name!r}, must be letters, digits, dots, dashes and underscores"


@dataclass(frozen=True, kw_only=True)
class RunConfig(JEMConfig):
    """A run: the model and its training, plus where and how."""

    name: str | None = setting(None, doc="of the run; none: the recipe's name and a digest of the science")
    workers: int | str = setting(
        doc="Ray Train workers that share the batch and the chains, at most batch_size; MIN..MAX: as many of them as "
        "the cluster has room for, while nodes come and go",
        ge=1,
    )
    steps: int = setting(ge=1, doc="optimiser steps; more of them continue a finished run")
    seeds: int = setting(
        1, ge=1, doc="train so many times, with seed, seed+1, ...: one run each below a parent with means and intervals"
    )
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), doc="auto: a GPU a worker where there are enough")
    deterministic: bool = setting(False, doc="GPU: deterministic kernels only")
    storage_path: str = setting("./runs", doc="folder of all runs, or any pyarrow filesystem URI such as s3://...")
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    recovery: RecoveryConfig = group(RecoveryConfig)
    tracking: TrackingConfig = group(TrackingConfig)
    evaluate: EvaluateConfig = group(EvaluateConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        for key, uri in (("storage_path", self.storage_path), ("data.root", self.data.root or "")):
            if re.match(r"(s3|gs|gcs|abfss?)://[^/@]*:[^@]*@", uri):
                yield (
                    key,
                    "holds a password, which recipes would show; set AWS_ACCESS_KEY_ID and the like instead",
                )
        if self.storage_path in ("", "none", "None"):
            yield "storage_path", f"is {self.storage_path!r}, must name a folder or a URI; leave it out for ./runs"
        if _bounds(self.workers) is None:
            yield "workers", f"is {self.workers!r}, must be N or MIN..MAX, such as 2 or 1..4"
        elif self.max_workers > self.batch_size:
            yield "workers", f"is {self.workers}, must be from 1 to batch_size ({self.batch_size})"
        elif self.objective.samples_needed and not all(
            self.shards_suffice(size) for size in range(self.min_workers, self.max_workers + 1)
        ):
            yield (
                "replay.capacity",
                f"is {self.replay.capacity}, must be at least {self.batch_size + self.max_workers} so that "
                f"each of {self.workers} workers holds the chains it draws",
            )
        unfit = _unfit(self)
        if unfit is not None:
            yield "recovery.ladder", unfit
        if self.evaluate.ema and not self.optimizer.ema_decay:
            yield "evaluate.ema", "is true, but no weights are averaged; set optimizer.ema_decay, to 0.999 say"
        if self.seed + self.seeds > 2**31:
            yield (
                "seeds",
                f"is {self.seeds}, too many: the last seed, {self.seed + self.seeds - 1}, must be below 2**31",
            )
        if self.name is not None:
            yield from folder_name("name", self.name)

    @property
    def min_workers(self) -> int:
        """With fewer of them the run waits."""
        return (_bounds(self.workers) or (1, 1))[0]

    @property
    def max_workers(self) -> int:
        return (_bounds(self.workers) or (1, 1))[1]

    @property
    def registered_name(self) -> str:
        """Of the registered model that the final model becomes a version of."""
        return self.evaluate.model_name or model_name(self.data.name, self.data.root)

    @property
    def science(self) -> dict[str, Any]:
        """What changes the numbers, flat."""
        return flatten(self, SCIENCE)

    @property
    def digest(self) -> str:
        """Names the science. Defaults are left out: a setting that a later version adds renames no run."""
        return digest({key: value for key, value in self.science.items() if key == "seed" or value != DEFAULTS[key]})


DEFAULTS = flatten(JEMConfig(seed=0), SCIENCE)

GROUPS = frozenset(f.name for f in dataclasses.fields(RunConfig) if isinstance(f.default_factory, type))
"""The settings of a run that are themselves groups of settings."""


def model_name(data: str, root: str | None) -> str:
    """jem-DATA, or jem-FOLDER for images of the user's own."""
    place = (root or "").partition("?")[0] if "://" in (root or "") else root or ""
    folder = re.sub(r"[^\w.-]+", "-", place.rstrip("/").rpartition("/")[2], flags=re.ASCII).strip("-.")
    return "jem-" + (folder if data in ON_DISK and folder else re.sub(r"[^\w.-]+", "-", data, flags=re.ASCII))


def as_name(stem: str) -> str:
    """A file's name as part of a folder's."""
    return re.sub(r"[\s/\\]+", "-", stem).lstrip(".")


def folder_name(key: str, name: str) -> Iterator[tuple[str, str]]:
    """What is wrong with the name of a run, which is that of its folder."""
    if not name or set(name) & set("/\\ ") or name.startswith("."):
        yield key, f"is {name!r}, must be a folder's name: no slashes, spaces or leading dot"
    elif len(name.encode()) > LONGEST_NAME:
        yield key, f"is {name[:20]}... of {len(name.encode())} bytes, must be a folder's name: {LONGEST_NAME} at most"
    elif name in OURS:
        yield key, f"is {name!r}, which lies beside the runs in storage_path; give another"


def load_run_config(recipe: str, arguments: Sequence[str]) -> RunConfig:
    """The configuration of RECIPE and `key=value` arguments, named; every mistake in one ConfigError."""
    changes, problems = parse_arguments(arguments)
    try:
        entries = read_recipe(recipe, problems) | changes
        entries |= _storage_of_run(Path(recipe).expanduser(), entries) if "storage_path" not in changes else {}
    except ConfigError as error:  # there is no recipe to read: what was typed is checked alone
        problems += [problem for problem in mistakes(changes) if problem.origin]
        raise ConfigError([*error.problems, *problems]) from None
    try:
        config = build(RunConfig, {key: anchored(key, entry) for key, entry in entries.items()})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if config.data.name not in ON_DISK:
        found = data_problems(config)
        problems += [replace(p, origin=entries[p.key].origin if p.key in entries else "") for p in found]
    if problems:
        raise ConfigError(problems)
    if config.name is None:
        config = replace(config, name=f"{as_name(Path(recipe).stem)}-{config.digest}")
    return config


def _storage_of_run(recipe: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Where the run lies whose recipe this is, from wherever it is named, if that is the run that is asked for."""
    folder = Path(os.path.abspath(recipe)).parent
    name, storage = (entries.get(key, Entry(None)).value for key in ("name", "storage_path"))
    if recipe.name != "recipe.yaml" or name != folder.name or not (folder / "run.json").is_file():
        return {}
    there = (
        isinstance(storage, str)
        and "://" not in storage
        and Path(storage).expanduser().resolve() == folder.parent.resolve()
    )
    return {} if there else {"storage_path": Entry(str(folder.parent))}


def bundled_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(recipe: str, problems: list[Problem]) -> dict[str, Entry]:
    """The settings of a bundled recipe or a YAML file, dotted, with the line each was written on.

    `base: NAME` starts from another recipe: a bundled one, or a path relative to this file. Entries that
    cannot be used are left out and added to `problems`; a ConfigError says that there is no recipe to read.
    """
    return _read(find_yaml(recipe, None, RECIPES, "recipe"), (), problems)


def parse_arguments(arguments: Sequence[str]) -> tuple[dict[str, Entry], list[Problem]]:
    """`key=value` arguments, whose values are YAML; and what is wrong with the others."""
    entries, problems = {}, []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        origin = "command line"
        if not equals:
            problems.append(Problem("", f"{argument!r} is not of the form key=value", origin))
            continue
        try:
            entries[key] = Entry(yaml.safe_load(text) if text else "", origin, raw=text)
        except (yaml.YAMLError, ValueError):  # a ValueError for a date such as 2026-13-01
            problems.append(Problem(key, f"is {text!r}, which is not a YAML value", origin))
    return entries, problems


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as a recipe that gives it again, but for a password in tracking.uri."""
    return yaml.safe_dump(plain(dataclasses.asdict(shareable(config))), sort_keys=False)


def shareable(config: RunConfig) -> RunConfig:
    """The configuration without the password in tracking.uri: what is written into files that people share."""
    uri = config.tracking.uri
    return config if uri is None else override(config, {"tracking.uri": shown(uri)})


def shown(uri: str) -> str:
    """The URI without its password."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def from_flat(values: dict[str, Any]) -> RunConfig:
    """The inverse of `flatten`, from JSON."""
    return build(RunConfig, {key: Entry(value) for key, value in values.items()})


def find_yaml(name: str, beside: Path | None, folder: Path, what: str) -> Path:
    """The file of a bundled name, or of a path relative to the file `beside`; ConfigError if there is none."""
    if name.endswith((".yaml", ".yml")):
        path = (beside.parent if beside else Path()) / Path(name).expanduser()
        if path.is_file():
            return path
        raise ConfigError([Problem("", f"no such {what} file: {path.absolute()}")])
    path = folder / f"{name}.yaml"
    if path.is_file():
        return path
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigError([Problem("", f"no {what} {name!r}{hint} Bundled: {', '.join(names)}; or give a .yaml file")])


def read_yaml(path: Path, groups: frozenset[str], problems: list[Problem], what: str) -> dict[str, Entry]:
    """A file's settings, dotted, with their lines; `groups` must be mappings. Raises ConfigError if it is not YAML."""
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        message = getattr(error, "problem", None) or str(error)
        raise ConfigError([Problem("", f"not valid YAML: {message}", where)]) from error
    entries: dict[str, Entry] = {}
    if isinstance(root, yaml.MappingNode):
        _walk(root, "", path, groups, entries, problems)
    elif root is not None:
        raise ConfigError([Problem("", f"a {what} is a mapping of settings", f"{path}:{root.start_mark.line + 1}")])
    return entries


def _read(path: Path, seen: tuple[Path, ...], problems: list[Problem]) -> dict[str, Entry]:
    if path.resolve() in seen:
        raise ConfigError([Problem("base", "the recipes inherit from each other in a circle", str(path))])
    found: list[Problem] = []
    entries = read_yaml(path, GROUPS, found, "recipe")
    if any(key.partition(".")[0] in ("space", "arms") for key in entries):
        raise ConfigError([Problem("RECIPE", f"is a sweep: python jobs/sweep.py {path}", str(path))])
    problems += found
    base = entries.pop("base", None)
    if base is None:
        return entries
    try:
        inherited = find_yaml(str(base.value), path, RECIPES, "recipe")
    except ConfigError as error:
        raise ConfigError([Problem("base", p.message, base.origin) for p in error.problems]) from None
    return _read(inherited, (*seen, path.resolve()), problems) | entries


def _walk(
    node: yaml.MappingNode,
    prefix: str,
    path: Path,
    groups: frozenset[str],
    entries: dict[str, Entry],
    problems: list[Problem],
) -> None:
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        origin = f"{path}:{key_node.start_mark.line + 1}"
        if key in entries:
            problems.append(Problem(key, f"is given twice, first at {entries[key].origin}", origin))
        elif isinstance(value_node, yaml.MappingNode) and (value_node.value or key in groups):
            _walk(value_node, f"{key}.", path, groups, entries, problems)
        elif key in groups:
            problems.append(Problem(key, "is a group of settings, a mapping was expected", origin))
        else:
            try:
                value = yaml.SafeLoader("").construct_object(value_node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                message = getattr(error, "problem", None) or str(error)
                problems.append(Problem(key, f"is not a YAML value: {message}", origin))
            else:
                entries[key] = Entry(value, origin)


def data_problems(config: RunConfig) -> list[Problem]:
    """Settings that do not go with what is known of the data before they are opened."""
    try:
        spec = describe(config.data)
    except ConfigError as error:
        return list(error.problems)
    except JEMError:
        return []  # of the data, not of the configuration: said when they are opened
    problems, data = [], config.data
    if spec.n_classes and config.sgld.conditional and config.objective.samples_needed:
        problems += too_few_chains(config, spec.n_classes)
    side = min(spec.image_shape[1:]) if spec.image_shape else None
    if side is not None and data.crop_padding >= side:
        message = f"is {data.crop_padding}, must be at most {side - 1}: the images are {side} pixels wide or high"
        problems.append(Problem("data.crop_padding", message))
    train = (spec.sizes or {}).get("train")
    if train is not None and train < 1:
        there = train + (data.validation_size or 0)
        message = f"is {data.validation_size}, which leaves none of {there} images to train on"
        problems.append(Problem("data.validation_size", message))
    elif train is not None and spec.n_classes and (data.labels_per_class or 0) * spec.n_classes > train:
        most = train // spec.n_classes
        message = f"is {data.labels_per_class}, must be at most {most}: {train} images of {spec.n_classes} classes"
        problems.append(Problem("data.labels_per_class", message))
    return problems


def check_folder(config: RunConfig) -> None:
    """The same for data that are described by what is on a disk. Raises ConfigError."""
    problems = data_problems(config) if config.data.name in ON_DISK else []
    if problems:
        raise ConfigError(problems)


def _unfit(config: RunConfig) -> str | None:
    """The first rung of the ladder that makes of this run's settings what cannot be."""
    try:
        changed = build(JEMConfig, {key: Entry(value) for key, value in config.science.items()})
    except ConfigError:
        return None  # which is said anyway
    for remedy in config.recovery.ladder:
        for change in remedy.split():
            try:
                changed = remedied(changed, change)
            except ConfigError as error:
                return f"has {change!r}, after which {error}"
    return None


def mistakes(entries: dict[str, Entry]) -> tuple[Problem, ...]:
    """All that keeps these entries from being a `RunConfig`."""
    try:
        build(RunConfig, entries)
    except ConfigError as error:
        return error.problems
    return ()


def anchored(key: str, entry: Entry) -> Entry:
    """Local paths are relative to where the command is typed; workers run elsewhere."""
    if key == "evaluate.sets" and isinstance(entry.value, list):
        return Entry([_anchored_set(str(one)) for one in entry.value], entry.origin)
    path = entry.raw or entry.value
    if key not in PATHS or not isinstance(path, str) or path in ("", "none", "None") or ":/" in path:
        return entry
    bundled = MODELS / path  # a name goes wherever a model does
    typed = Path(os.path.abspath(os.path.expanduser(path)))
    path = str(bundled if key == "init_from" and not typed.exists() and (bundled / MODEL_CARD).exists() else typed)
    return Entry(path, entry.origin, path)


def _anchored_set(name: str) -> str:
    """A data set's name, or the absolute path of the folder that it is."""
    return name if "://" in name or os.sep not in name else os.path.abspath(os.path.expanduser(name))


def plain(value: Any) -> Any:
    """The value with lists for tuples, as YAML and JSON have it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _bounds(workers: int | str) -> tuple[int, int] | None:
    """The fewest and the most workers that `N` or `MIN..MAX` stands for; None if it stands for nothing."""
    if isinstance(workers, int):
        return workers, workers
    match = re.fullmatch(r"(\d+)\.\.(\d+)", workers, re.ASCII)
    least, most = map(int, match.groups()) if match else (0, 0)
    return (least, most) if 1 <= least <= most else None
