"""What came of trials, where not all finished: of the whole, and of those that could not say so themselves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.result import Result
from orchestrator.runs import open_record, read_record
from orchestrator.sweep.config import Sweep, trial_config
from orchestrator.sweep.fork import write_trial
from orchestrator.sweep.summary import counts_text
from orchestrator.sweep.table import FIXED, Row
from orchestrator.sweep.trial import TRIALS, Trial

log = logging.getLogger(__name__)

SHOWN = 5
"""Trials of which the message says why; the summary has more."""


def status_of(outcome: Mapping[str, Any], rows: Sequence[Row], root: Location) -> str:
    """That of the attempt; where no trial finished, the status that all failures have in common, bad data say."""
    if outcome["status"] != "finished" or any(row.status == "finished" for row in rows):
        return str(outcome["status"])
    statuses = set()
    for row in rows:
        record = None
        with suppress(ConfigError):
            record = read_record(root / TRIALS / row.name)
        statuses.add(record.status if record else "failed")
    return statuses.pop() if len(statuses) == 1 else "failed"


def message_of(outcome: Mapping[str, Any], rows: Sequence[Row], told: str) -> str:
    """What is wrong, if anything: with the attempt, or with single trials."""
    ended = [
        f"{row.name} {row.status}: {_first_line(row.reason)}"
        for row in rows
        if row.status in ("diverged", "failed") or (row.status == "finished" and row.reason)
    ]
    if outcome["status"] != "finished":
        return "; ".join(filter(None, [str(outcome.get("message", "")), f"{told} ({counts_text(rows)})"]))
    if not ended:
        return ""
    more = [f"and {len(ended) - SHOWN} more"] if len(ended) > SHOWN else []
    again = [row for row in rows if row.status == "failed" or (row.status == "finished" and row.reason)]
    if any(row.stage in FIXED for row in again):
        alone = ["the same command tries again what failed"]
    else:
        alone = [] if any(row.status == "finished" for row in rows) else ["--fresh starts them anew"]
    return "; ".join([told, *ended[:SHOWN], *more, *alone])


def close_lost(sweep: Sweep, root: Location, lost: Mapping[str, str], trials: Sequence[Trial]) -> None:
    """Write down that trials failed whose process died again and again, perhaps before they began, and of what."""
    known = {trial.name: trial for trial in trials}
    for name, why in lost.items():
        folder, trial = root / TRIALS / name, known.get(name)
        try:
            record = read_record(folder)
        except ConfigError as error:  # damaged: it counts as failed, and says why
            log.warning("%s", error)
            continue
        if record is None and trial is None:  # suggested as the search went on: its settings went with it
            log.warning("trial %s could not begin: %s", name, why)
        if record is None and trial is not None:
            storage = (root / TRIALS).uri
            config = trial_config(sweep, trial.point, name=name, seed=trial.seed, storage_path=storage)
            record = open_record(folder, config, fresh=False)
            write_trial(folder, {"sweep": sweep.name, **asdict(trial)}, [])
        if record is not None and record.status in ("new", "running"):
            message = f"its process died, and so did those after it: {why}"
            record.status, record.result = "failed", asdict(Result(name=name, status="failed", message=message))
            record.save(folder)


def _first_line(reason: str) -> str:
    """What follows it says how a single run would go on."""
    return (reason.splitlines() or ["no reason is known"])[0].removesuffix(" Tried:")
