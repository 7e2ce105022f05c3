"""What searches and several seeds have in common, without Ray."""

import os

from made_sweeps import BEGUN, made_trial

from jem.files import Location
from orchestrator.config import load_run_config
from orchestrator.sweep.seeds import SeedsWork
from orchestrator.sweep.session import Record


def test_the_time_of_a_driver_that_was_killed_counts(tmp_path):
    config = load_run_config("digits", [f"storage_path={tmp_path}", "steps=300", "seeds=2"])
    root = Location.of(tmp_path) / f"{config.name}-seeds"
    made_trial(root, "s0", stage="seeds", metrics={"val/nll": 0.5})
    os.utime((root / "trials" / "s0" / "events.jsonl").local, (BEGUN + 90, BEGUN + 90))
    attempts = [{"started": BEGUN - 50, "ended": BEGUN - 40}, {"started": BEGUN}]
    record = Record(root.name, config.science, "seeds", attempts=attempts)
    assert SeedsWork(config, Location.of(tmp_path), root, record).spent == 10 + 90
