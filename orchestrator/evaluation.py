"""`jobs/evaluate.py`: one model, or two side by side, measured once, kept beside the run and told to its MLflow run.

    HOME/evaluations/SUITE-KEY/report.json, outputs.safetensors, *.png, model_card.md

KEY is a digest of the model, the data, the sets and the settings: what was measured once is read, not computed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jem.data.sources import load
from jem.errors import ConfigError, DataError, Problem
from jem.evaluate import others
from jem.evaluate.against import against as compare
from jem.evaluate.against import transfer
from jem.evaluate.extractors import shipped
from jem.evaluate.measured import Measured
from jem.evaluate.report import SCHEMA
from jem.evaluate.suite import FAST_SETS, Dealt, evaluate
from jem.settings import digest, flatten
from jem.train import frozen_logits
from orchestrator.config import RunConfig
from orchestrator.evaluate_on import Progress, compute_in_this_process, compute_on_ray, device_here, one_thread
from orchestrator.facts import facts
from orchestrator.final_model import FOLDER
from orchestrator.opened import Opened, open_model
from orchestrator.published import bring, publish, workbench
from orchestrator.report_files import check_writable, served_of, whole_folder, write_report
from orchestrator.report_images import against_robustness
from orchestrator.report_pictures import against_picture, against_reliability
from orchestrator.report_table import show_against, show_report
from orchestrator.report_upload import send_report
from orchestrator.result import Result
from orchestrator.runs import planned_storage

EVALUATIONS = "evaluations"
VERSION = 6
"""Of how figures are computed: a change of it makes old reports be computed anew."""


@dataclass
class Evaluated(Result):
    """`report` is the path of report.json, `against` that of the comparison; `cached`: nothing had to be computed."""

    report: str | None = None
    against: str | None = None
    cached: bool = False
    difference: dict[str, list[float | None]] = field(default_factory=dict)  # first minus second, with its interval


def evaluate_model(source: str, other: str | None, arguments: Sequence[str], console: Console) -> Evaluated:
    """Measure `source`, and `other` beside it; print tables, send everything to MLflow."""
    workers, arguments = _workers(arguments)
    opened = [open_model(s, _fit_for(s, arguments) if other else arguments) for s in (source, other) if s is not None]
    if any(one.config.evaluate.suite == "none" for one in opened):
        raise ConfigError([Problem("evaluate.suite", "is none, which measures nothing; give fast, full or paper")])
    digests = {one.data_digest for one in opened} - {None}
    if len(digests) > 1:
        known = ", ".join(f"{one.source}: {one.config.data.name}, digest {str(one.data_digest)[:12]}" for one in opened)
        raise ConfigError(f"--against: the models are of different data ({known}); both must have the same test images")
    done = [report_of(one, workers) for one in opened]
    first = done[0]
    if other is None:
        show_report(first.report, console)
    result = Evaluated(
        name=opened[0].name,
        step=opened[0].step,
        checkpoint=opened[0].checkpoint,
        weights=opened[0].weights,
        metrics=first.report["metrics"],
        status="finished",
        cached=all(each.cached for each in done),
    )
    if len(done) == 2:
        comparison = _against(done[0], done[1], opened[0], opened[1])
        found = json.loads((comparison / "against.json").read_text())
        show_against(found, console)
        result.difference = {_row_key(row): row["difference"] for row in found["rows"]}
    faults = []
    for one, each in zip(opened, done, strict=True):
        run_id, uri, fault = send_report(one, each.report, each.folder)
        if one is opened[0]:
            result.run_id, result.tracking_uri = run_id, uri
        faults += [fault] if fault else []
    reports = [f"{_published(one, each.folder)}/report.json" for one, each in zip(opened, done, strict=True)]
    for report in reports:
        console.print(f"report: {report}", soft_wrap=True, highlight=False)
    result.report = reports[0]
    if len(done) == 2:
        result.against = f"{_published(opened[0], comparison)}/against.json"
    result.message = "; ".join(faults)
    return result


@dataclass(frozen=True)
class Done:
    """An evaluation as it lies on the disk."""

    folder: Path
    report: dict[str, Any]
    cached: bool


def report_of(opened: Opened, workers: int = 1) -> Done:
    """The report of a model, from the disk where it was made before."""
    path = f"{EVALUATIONS}/{opened.config.evaluate.suite}-{_key(opened, workers)}"
    if opened.run is not None:
        bring(opened.run, path)
        bring(opened.run, f"{FOLDER}/{opened.digest[:12]}")
    folder = _home(opened) / path
    if (folder / "report.json").exists() and (folder / "outputs.safetensors").exists():
        return Done(folder, json.loads((folder / "report.json").read_text()), cached=True)
    check_writable(folder)
    config = opened.config
    data = load(config.data)
    if opened.data_digest not in (None, data.digest):
        raise DataError(
            f"data.name={config.data.name}: the images or labels are not those that {opened.source} was trained with "
            f"(digest {data.digest[:12]}, its own {str(opened.data_digest)[:12]}); say where they are with data.root="
        )
    network = opened.network()
    with Progress(f"evaluating {opened.name}") as progress:
        compute: Dealt
        device = _device_of_driver(config)
        if workers > 1 or os.environ.get("RAY_ADDRESS"):
            compute = compute_on_ray(network, config, workers, progress)
        else:
            compute = compute_in_this_process(network, config, device, progress)
        report, measured = evaluate(network, data, config, config.evaluate, compute, opened.buffer, device=device)
    report["model"] |= {
        "source": opened.source,
        "name": opened.name,
        "digest": opened.digest,
        "step": opened.step,
        "weights": opened.weights,
        "checkpoint": opened.checkpoint,
        "config": config.science,
    }
    report["facts"] = {**facts(), **{f"training.{key}": value for key, value in opened.facts.items()}}
    served = opened.served or served_of(workbench(opened.run) if opened.run else None, opened.digest)
    write_report(report, measured, folder, served, config.registered_name)
    return Done(folder, json.loads((folder / "report.json").read_text()), cached=False)


def _against(first: Done, second: Done, one: Opened, two: Opened) -> Path:
    """The comparison of two reports, and of each model on the other's adversarials, kept beside the first."""
    other = f"{second.report['model']['digest'][:8]}-{second.folder.name.rpartition('-')[2]}"
    folder = first.folder.parent / f"{first.folder.name}-against-{other}"
    if (folder / "against.json").exists():
        return folder
    outputs = [Measured.load(each.folder / "outputs.safetensors") for each in (first, second)]
    comparison = compare((first.report, outputs[0]), (second.report, outputs[1]))
    if outputs[0].attacked and outputs[1].attacked:
        device = _device_of_driver(one.config)
        networks = [
            frozen_logits(opened.network().float().to(device), replace(opened.config, precision="float32"))
            for opened in (one, two)
        ]
        with one_thread():
            comparison["of_twin"] = "robust_k" in second.report["left_out"]
            comparison["transfer"] = transfer((networks[0], networks[1]), (outputs[0], outputs[1]), device)

    def fill(target: Path) -> None:
        (target / "against.png").write_bytes(against_picture(comparison))
        (target / "against_reliability.png").write_bytes(against_reliability(first.report, second.report))
        if "robust" in first.report and "robust" in second.report:
            (target / "against_robustness.png").write_bytes(against_robustness(first.report, second.report, comparison))
        (target / "against.json").write_text(json.dumps(comparison, indent=1, allow_nan=False))

    whole_folder(folder, fill)
    return folder


def _device_of_driver(config: RunConfig) -> torch.device:
    """Of what is not dealt out: on a cluster the driver has no GPU of its own."""
    return torch.device("cpu") if os.environ.get("RAY_ADDRESS") else device_here(config)


def _key(opened: Opened, workers: int) -> str:
    """Names what is measured: equal keys, equal figures."""
    settings, config = opened.config.evaluate, opened.config
    described = {key: value for key, value in config.science.items() if key.startswith(("model.", "data."))}
    names = settings.sets or FAST_SETS
    further = {
        "attack": [flatten(settings.attack), _version("foolbox")],
        "generate": [flatten(settings.generate), _version("torch-fidelity")],
        "inception": _sha256(settings.generate.inception),
        "buffer": opened.buffer_digest,
        "extractors": shipped(),
    }
    if settings.complete:
        names = settings.sets or others.default_sets(config.data, opened.image_shape)[0]
    return digest(
        {
            "version": [VERSION, SCHEMA],
            "model": [opened.digest, described],
            "data": opened.data_digest or others.fingerprint(config.data.name, config.data),
            "suite": settings.suite,
            "noise_std": settings.noise_std,
            "max_images": settings.max_images,
            "sets": {name: others.fingerprint(name, config.data) for name in names},
            "further": further if settings.complete else None,
            "baselines": importlib.util.find_spec("pytorch_ood") is not None,
            "precision": config.precision,
            "device": "cpu" if config.device == "cpu" or not _gpus(workers) else "cuda",
        }
    )


def _gpus(workers: int) -> bool:
    """Whether there is a GPU for each worker; of a cluster that is not known before it is joined."""
    return torch.cuda.is_available() and ("RAY_ADDRESS" in os.environ or torch.cuda.device_count() >= workers)


def _version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(path: str | None) -> str | None:
    """Of a file that may not be there: what is wrong with it is said where it is used."""
    try:
        return None if path is None else hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:
        return None


def _home(opened: Opened) -> Path:
    """Where evaluations are made: for the run where its folder can be written, else in the storage."""
    if opened.run is not None and (not opened.run.is_local or os.access(opened.run.local, os.W_OK)):
        return workbench(opened.run)
    if "://" in opened.config.storage_path:
        return Path("~/.cache/jem").expanduser()
    return Path(planned_storage(opened.config))


def _published(opened: Opened, folder: Path) -> str:
    """Where it lies for all to see: in the run's folder, also where that is an object store. Raises OSError."""
    if opened.run is None or opened.run.is_local:
        return str(folder)
    path = f"{EVALUATIONS}/{folder.name}"
    publish(opened.run, path)
    return (opened.run / path).uri


def _workers(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """`workers=N` and the other arguments."""
    rest = [a for a in arguments if not a.startswith("workers=")]
    given = [a.partition("=")[2] for a in arguments if a.startswith("workers=")]
    if given and not (given[-1].isdecimal() and int(given[-1]) >= 1):
        raise ConfigError([Problem("workers", f"is {given[-1]!r}, must be a number from 1 up", "command line")])
    return int(given[-1]) if given else 1, rest


def _fit_for(source: str, arguments: Sequence[str]) -> list[str]:
    """The arguments that concern this model: what describes a released file is not said of a model of ours."""
    described = ("model.", "precision=", "data.")
    both = ("data.root=", "data.download=")
    if source.endswith(".pt") or not any(a.startswith(described) and not a.startswith(both) for a in arguments):
        return list(arguments)
    return [a for a in arguments if a.startswith(both) or not a.startswith(described)]


def _row_key(row: dict[str, Any]) -> str:
    return str(row["metric"]) if row["group"] != "after temperature" else f"after temperature/{row['metric']}"
