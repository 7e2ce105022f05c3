"""A report as files: report.json, its pictures, the model card, and the outputs that it was made from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jem import checkpoint
from jem.errors import ConfigError, JEMError, Problem
from jem.evaluate.measured import Measured
from jem.files import Location, existing
from jem.predict import read_card
from orchestrator.card import model_card
from orchestrator.config import RunConfig
from orchestrator.final_model import FOLDER
from orchestrator.report_pictures import picture_names, pictures

CARD = "model_card.md"


def final_report(folder: Path, config: RunConfig, outcome: Mapping[str, Any], name: str) -> str | None:
    """Write what the workers of a finished run measured at its end; the path below `folder`, None if they did not.

    The portable model, where there is one, gets its card, with pictures. Raises CheckpointError or OSError.
    """
    manifest = checkpoint.read_manifest(Location.of(outcome["checkpoint"]))
    digest = manifest.files[f"{outcome['weights']}.safetensors"]["sha256"]
    served, report, path = served_of(folder, digest), outcome.get("report"), None
    if report is not None:
        about = {"source": manifest.directory.uri, "name": name, "digest": digest, "step": manifest.step}
        about |= {"weights": outcome["weights"], "checkpoint": manifest.directory.uri, "config": config.science}
        trained = {f"training.{key}": value for key, value in manifest.info["facts"].items()}
        report = {**report, "model": report["model"] | about, "facts": trained}
        path = f"evaluations/{report['suite']}-step{manifest.step}"
        write_report(report, None, folder / path, served, config.registered_name)
    if served is not None:
        model = Location.of(folder / FOLDER / digest[:12])
        card = model_card(report, served, _links(config.registered_name))
        for picture in picture_names(report) if report is not None else ():
            (model / picture).write((folder / str(path) / picture).read_bytes())
        (model / CARD).write(card.encode())
    return path


def write_report(
    report: dict[str, Any],
    measured: Measured | None,
    folder: Path,
    served: dict[str, Any] | None = None,
    registered: str = "",
) -> None:
    """Everything that belongs to a report, all of it or nothing.

    `served`: model.json of the portable model, if there is one; `registered`: the registered model it is a version of.
    """
    drawn = pictures(report)
    card = model_card(report, served, _links(registered))

    def fill(target: Path) -> None:
        if measured is not None:
            measured.save(target / "outputs.safetensors")
        for name, content in drawn.items():
            (target / name).write_bytes(content)
        (target / CARD).write_text(card, encoding="utf-8")
        (target / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False))

    whole_folder(folder, fill)


def _links(registered: str) -> dict[str, str]:
    return {"model": f"models:/{registered}@champion"} if registered else {}


def served_of(run_folder: Path | None, digest: str) -> dict[str, Any] | None:
    """What the run's portable model with these weights says of itself, where there is one."""
    if run_folder is None:
        return None
    with suppress(JEMError):
        return dataclasses.asdict(read_card(run_folder / FOLDER / digest[:12]))
    return None


def check_writable(folder: Path) -> None:
    """Raises ConfigError where `folder` cannot be made: before an hour's work and not after it."""
    there = existing(folder)
    if not os.access(there, os.W_OK):
        message = f"the report would go to {folder}, and {there} cannot be written by this user; give a folder that can"
        raise ConfigError([Problem("storage_path", message)])


def whole_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is there with all it holds or not at all; what was there before is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
