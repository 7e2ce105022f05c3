"""What is kept of an ablation's trial beside its run: a small JSON that can be committed, enough to compare arms by."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jem.errors import ConfigError
from jem.files import Location
from jem.settings import flatten
from orchestrator import events
from orchestrator.config import RunConfig, load_run_config, plain
from orchestrator.recovery import FILE
from orchestrator.survey import log_of, mapping
from orchestrator.sweep.config import Sweep, trial_config
from orchestrator.sweep.table import Row


@dataclass(frozen=True)
class TrialReport:
    """`settings`: in which the arm differs from the sweep's base; `seconds`: of training_seconds; `rollbacks`: of
    recovery from divergence; `metrics`: the newest of each; `command`: trains the same, alone.
    """

    arm: str
    seed: int
    settings: dict[str, Any]
    status: str
    reason: str
    steps: int
    seconds: float
    rollbacks: int
    metrics: dict[str, float]
    command: str
    hardware: str

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def report(row: Row, sweep: Sweep, folder: Location) -> TrialReport:
    """Of a trial, from its row and its folder; one that has not begun has no seconds and no hardware."""
    point = sweep.arm(row.candidate).point
    config, log_path = trial_config(sweep, point, seed=row.seed), log_of(folder)
    return TrialReport(
        arm=row.candidate,
        seed=row.seed,
        settings=point,
        status=row.status,
        reason=" ".join(row.reason.split()),
        steps=row.step,
        seconds=round(training_seconds(log_path, config.batch_size), 2),
        rollbacks=_rollbacks(folder),
        metrics=row.metrics,
        command=command(sweep.config.base, config),
        hardware=_hardware(log_path),
    )


def training_seconds(log_path: Path, batch_size: int) -> float:
    """Wall clock of the training steps alone, over all attempts, from the rates that are logged.

    Neither start-up nor validation, pictures, checkpoints and evaluation are in it; steps that were run again, after a
    rollback or a death, count again. What is not known: the steps after the last point of an attempt that was killed.
    """
    seconds, at, rate = 0.0, 0, 0.0  # at: the step from which on nothing is counted yet
    for event in events.read(log_path)[0]:
        if event["kind"] == "attempt":
            at = event["step"]
        elif event["kind"] == "rollback":
            seconds += max(0, event["from_step"] - at) * batch_size / rate if rate else 0.0
            at = event["step"]
        elif event["kind"] == "metrics" and "train/images_per_s" in event["metrics"]:
            rate = event["metrics"]["train/images_per_s"]
            seconds += max(0, event["step"] - at) * batch_size / rate
            at = event["step"]
    return seconds


def command(base: str, config: RunConfig) -> str:
    """What is typed to train this configuration from the recipe `base`; where it is kept and tracked is left out."""
    usual: dict[str, Any] = {}
    with suppress(ConfigError):  # a recipe that is none without what the sweep adds
        usual = flatten(load_run_config(base, []))
    changed = {
        key: value
        for key, value in flatten(config).items()
        if not (key in usual and usual[key] == value) and key.split(".")[0] not in ("name", "storage_path", "tracking")
    }
    typed = [f"{key}={_as_typed(value)}" for key, value in changed.items()]
    return shlex.join(["python", "jobs/train.py", Path(base).name, *typed])


def _as_typed(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(plain(value))


def _rollbacks(folder: Location) -> int:
    if not (folder / FILE).exists():
        return 0
    with suppress(ValueError):  # damaged: the trial has failed of that, and says so
        return len(mapping(folder / FILE).get("rollbacks", []))
    return 0


def _hardware(log_path: Path) -> str:
    """Of the last attempt."""
    tags = [event["tags"] for event in events.read(log_path)[0] if event["kind"] == "tags"]
    return next((str(one["hardware"]) for one in reversed(tags) if "hardware" in one), "")
