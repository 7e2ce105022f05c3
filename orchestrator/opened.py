"""A trained model by the name that people have for it: a checkpoint, a run, a model of MLflow's, a released file.

Opening reads what the model says of itself, no weights and no images: whether it was evaluated before is then
known at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jem import checkpoint
from jem.data.catalog import describe
from jem.errors import CheckpointError, ConfigError, DataError, Problem
from jem.files import Location
from jem.models import make_network
from jem.prior import Prior
from jem.settings import Entry, build
from jem.train import dtype_of
from orchestrator.bundled import bundled_models, place_of
from orchestrator.config import RunConfig, anchored, mistakes, model_name, parse_arguments, read_recipe
from orchestrator.free import FREE, REGISTERED
from orchestrator.registry import SCHEMES, model_folder
from orchestrator.runs import read_record

RELEASED_RECIPE = "cifar10_paper"


@dataclass(frozen=True)
class Opened:
    """A trained model that has not been loaded yet."""

    source: str
    name: str
    digest: str  # sha256 of the file of its weights
    config: RunConfig  # of its training, but for what was asked to differ
    image_shape: tuple[int, int, int]
    n_classes: int
    read: Callable[[], dict[str, Tensor]] = field(repr=False)  # its weights, checked
    step: int | None = None
    weights: str = "model"  # which of the checkpoint's: model, ema, best
    checkpoint: str | None = None
    data_digest: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)  # versions and code of its training
    run: Location | None = None  # the folder of the run that trained it, as far as known
    served: dict[str, Any] | None = field(default=None, repr=False)  # model.json, of a portable model
    mlflow: Mapping[str, Any] = field(default_factory=dict)  # uri, experiment, run_id of that run, as far as known
    buffer: Callable[[], Tensor] | None = field(default=None, repr=False)  # the chains of its checkpoint, [n, c, h, w]
    buffer_digest: str = ""  # of the files that hold them
    prior_tensors: Callable[[], dict[str, Tensor]] = field(default=dict, repr=False)  # see jem.prior.Prior.tensors

    def network(self) -> nn.Module:
        """The network with its weights, in eval mode. Raises CheckpointError for damaged ones."""
        network = make_network(self.config.model, self.image_shape, self.n_classes).to(dtype_of(self.config))
        checkpoint.load_weights(network, self.read(), self.source)
        return network.eval()

    def prior(self) -> Prior:
        """What its chains start from; no training image is in it. Raises CheckpointError for one that is not there."""
        tensors, prior = self.prior_tensors(), Prior(self.config.replay, self.image_shape)
        if self.config.replay.prior != "uniform" and not tensors:
            raise CheckpointError(f"{self.source}: holds no statistics of replay.prior={self.config.replay.prior}")
        return prior.with_tensors(tensors)


def open_model(source: str, arguments: Sequence[str] = ()) -> Opened:
    """The model that `source` names, with `key=value` arguments (see `FREE`).

    source: a checkpoint directory, a run's folder (its newest checkpoint), the folder of a portable model, the name of
    a bundled one, runs:/ID, models:/NAME@ALIAS, models:/NAME/VERSION, or a released JEM .pt, for which model.*, data.*
    and precision may be given too. Raises ConfigError or DataError for what is none of these, CheckpointError for what
    is damaged.
    """
    changes, problems = parse_arguments(arguments)
    changes = {key: anchored(key, entry) for key, entry in changes.items()}
    if problems:
        raise ConfigError(problems)
    if source.startswith(SCHEMES):
        return _of_mlflow(source, changes)
    try:
        location = Location.of(place_of(source, _storage(changes)))
    except ValueError as error:
        raise ConfigError([Problem("MODEL", str(error))]) from error
    if (location / checkpoint.MANIFEST).exists():
        return _of_checkpoint(source, location, changes)
    if (location / "checkpoints").exists():
        newest = checkpoint.committed(location / "checkpoints")
        if not newest:
            raise CheckpointError(f"{source}: the run has no checkpoint yet")
        return _of_checkpoint(source, newest[0], changes)
    if (location / "model.json").exists() and location.is_local:
        return _of_folder(source, location.local, changes, {})
    if location.exists() and not location.is_dir():
        return _of_released(source, location, changes)
    what = "holds no checkpoint, run or model" if location.exists() else "does not exist"
    names = "a checkpoint directory, a run's folder, runs:/ID, models:/NAME@ALIAS, a released JEM .pt"
    names += f" or a model that comes with this project: {', '.join(bundled_models())}"
    raise ConfigError([Problem("MODEL", f"{source} {what}; give {names}")])


def _of_checkpoint(source: str, directory: Location, changes: Mapping[str, Entry]) -> Opened:
    manifest = checkpoint.read_manifest(directory)
    info, file = manifest.info, f"{manifest.info['final']}.safetensors"
    config = _config(info["config"], changes, FREE)
    root = directory.parent.parent
    record = read_record(root)
    return Opened(
        source=source,
        name=record.name if record else str(info["config"].get("name") or root.name),
        digest=manifest.files[file]["sha256"],
        config=config,
        image_shape=_shape(info["image_shape"]),
        n_classes=len(info["classes"]),
        read=lambda: manifest.tensors(file),
        step=manifest.step,
        weights=info["final"],
        checkpoint=directory.uri,
        data_digest=info["data_digest"],
        facts=info["facts"],
        run=root if record else None,
        mlflow=record.mlflow if record else {},
        buffer=checkpoint.chains_of(manifest, config),
        buffer_digest="-".join(
            entry["sha256"][:16] for name, entry in manifest.files.items() if name.startswith("chains")
        ),
        prior_tensors=lambda: checkpoint.prior_tensors(manifest),
    )


def _of_mlflow(source: str, changes: Mapping[str, Entry]) -> Opened:
    uri = str(changes["tracking.uri"].value) if "tracking.uri" in changes else None
    storage = _storage(changes)
    found = model_folder(source, uri, storage, Path(tempfile.mkdtemp(prefix="jem-model-")))
    return _of_folder(source, found.folder, changes, {"uri": found.uri, "run_id": found.run_id})


def _of_folder(source: str, folder: Path, changes: Mapping[str, Entry], mlflow: Mapping[str, Any]) -> Opened:
    from jem.predict import read_card, read_prior, read_weights
    from orchestrator.final_model import FOLDER

    card = read_card(folder)
    info = card.info
    trained = Path(str(info.get("folder") or "/nowhere"))  # an object store's is not looked for
    return Opened(
        source=source,
        name=str(info.get("name") or folder.name),
        digest=card.digest,
        config=_config(card.config | {"workers": 1, "steps": max(1, info.get("step") or 1)}, changes, FREE),
        image_shape=card.image_shape,
        n_classes=len(card.classes),
        read=lambda: read_weights(folder),
        step=info.get("step"),
        weights=str(info.get("weights") or "model"),
        checkpoint=info.get("checkpoint"),
        data_digest=info.get("data_digest"),
        facts=info.get("facts") or {},
        run=Location.of(trained) if (trained / FOLDER / card.digest[:12]).exists() else None,  # not after --fresh
        served=dataclasses.asdict(card),
        mlflow=mlflow,
        prior_tensors=lambda: read_prior(folder),
    )


def _of_released(source: str, location: Location, changes: Mapping[str, Entry]) -> Opened:
    from jem.released import read_released

    problems: list[Problem] = []
    recipe = {k: v for k, v in read_recipe(RELEASED_RECIPE, problems).items() if not k.startswith("model.")}
    norm = changes["model.norm"].value if "model.norm" in changes else None
    released = read_released(location, norm=norm)
    model = released.model
    found = {"model.name": model.name, "model.depth": model.depth, "model.width": model.width, "model.norm": model.norm}
    entries = recipe | {key: Entry(value) for key, value in found.items()}
    chains = released.replay
    if chains is not None:
        entries["replay.capacity"] = Entry(max(len(chains), RunConfig.batch_size))  # a step draws so many
    config = _config(entries, changes, (*FREE, "model.", "data.", "precision"))
    spec = describe(config.data)
    if spec.n_classes is not None and spec.n_classes != released.n_classes:
        raise DataError(
            f"{source}: a network of {released.n_classes} classes, data.name={config.data.name} has {spec.n_classes}; "
            "name its data set with data.name="
        )
    digest = hashlib.sha256(location.read()).hexdigest()
    return Opened(
        source=source,
        name=location.name.rsplit(".", 1)[0],
        digest=digest,
        config=config,
        image_shape=released.image_shape,
        n_classes=released.n_classes,
        read=lambda: released.weights,
        facts={"note": released.note} if released.note else {},
        buffer=None if chains is None else lambda: chains,
        buffer_digest="" if chains is None else digest[:16],
    )


def _config(recorded: Mapping[str, Any], changes: Mapping[str, Entry], free: tuple[str, ...]) -> RunConfig:
    """The settings of the training with those changed that may be; the suite is `full` unless said otherwise."""
    of_place = ("tracking.", "storage_path", "device", "workers", "name", "evaluate.")
    kept = {k: v for k, v in recorded.items() if not k.startswith(of_place) or k in REGISTERED}
    entries = {k: v if isinstance(v, Entry) else Entry(v) for k, v in kept.items()}
    name, root = kept.get("data.name"), kept.get("data.root")
    if isinstance(name, str) and not kept.get("evaluate.model_name"):
        # of where it was trained, not of another data.root
        entries["evaluate.model_name"] = Entry(model_name(name, root if isinstance(root, str) else None))
    entries |= {"workers": Entry(1), "evaluate.suite": Entry("full"), **changes}
    fixed = [key for key in changes if not key.startswith(free)]
    if fixed:
        told = {problem.key: problem for problem in mistakes(entries) if problem.origin}
        may = f"is not to be changed of a model that is trained; what may be said: {', '.join(FREE)}"
        of_fixed = [told.pop(key, Problem(key, may, changes[key].origin)) for key in fixed]  # unknown ones are told so
        raise ConfigError([*of_fixed, *(problem for key, problem in told.items() if key.startswith(free))])
    return build(RunConfig, entries)


def _storage(changes: Mapping[str, Entry]) -> str:
    return str(changes["storage_path"].value) if "storage_path" in changes else "./runs"


def _shape(values: Sequence[int]) -> tuple[int, int, int]:
    c, h, w = values
    return c, h, w
