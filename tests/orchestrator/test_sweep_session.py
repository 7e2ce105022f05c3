"""What searches and several seeds have in common, without Ray."""

import os

from made_runs import Driver
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


def test_a_damaged_trial_ends_neither_the_watch_nor_the_wait_for_the_others(tmp_path):
    config = load_run_config("digits", [f"storage_path={tmp_path}", "steps=300", "seeds=2"])
    root = Location.of(tmp_path) / f"{config.name}-seeds"
    made_trial(root, "s0", stage="seeds", metrics={"val/nll": 0.5})
    made_trial(root, "s1", status="running", stage="seeds", number=1)
    (root / "trials" / "s0" / "run.json").write(b'{"name": ')
    work = SeedsWork(config, Location.of(tmp_path), root, Record(root.name, config.science, "seeds"))
    assert work.trial_spec("s0") is None
    assert work.trial_spec("s1") is not None
    assert work._all_stopped(), "s1 was killed with an earlier driver: nobody works on it"
    with Driver((root / "trials" / "s1").path):
        assert not work._all_stopped()
