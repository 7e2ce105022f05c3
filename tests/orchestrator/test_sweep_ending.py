"""What is said of trials that did not finish."""

import pytest
from made_sweeps import made_trial, sweep_of

from jem.files import Location
from orchestrator.sweep.driver import Search
from orchestrator.sweep.ending import SHOWN, close_lost, message_of
from orchestrator.sweep.session import Record
from orchestrator.sweep.table import read_trials
from orchestrator.sweep.trial import search_trial

FINISHED = {"status": "finished"}
TEXT = "base: digits\nbudget: {trials: 2, steps: 20}\nspace: {sgld.step_size: {uniform: [0.5, 1.0]}}\n"


@pytest.fixture
def sweep(tmp_path):
    return sweep_of(tmp_path, TEXT, f"storage_path={tmp_path}")


def test_a_trial_that_could_not_begin_is_in_the_tables_with_the_reason(sweep, tmp_path):
    root = Location.of(tmp_path) / "lost"
    trial = search_trial(sweep, 1, {"sgld.step_size": 0.75})
    close_lost(sweep, root, {"t001": "FileNotFoundError: no such folder"}, [trial])
    (row,) = read_trials(root)
    assert (row.name, row.status, row.point, row.number) == ("t001", "failed", {"sgld.step_size": 0.75}, 1)
    assert row.reason == "its process died, and so did those after it: FileNotFoundError: no such folder"


def test_a_trial_that_was_running_has_failed_and_one_that_had_ended_has_not(sweep, tmp_path):
    root = Location.of(tmp_path) / "lost"
    made_trial(root, "t000", status="running")
    made_trial(root, "t001", metrics={"val/nll": 0.5})
    trials = [search_trial(sweep, number, {}) for number in range(2)]
    close_lost(sweep, root, {"t000": "killed", "t001": "killed"}, trials)
    assert [row.status for row in read_trials(root)] == ["failed", "finished"]


def test_a_suggested_trial_that_could_not_begin_is_told(sweep, tmp_path, caplog):
    root = Location.of(tmp_path) / "lost"
    close_lost(sweep, root, {"t007": "killed"}, [])
    assert "trial t007 could not begin: killed" in caplog.text
    assert read_trials(root) == []


def test_a_search_in_which_no_trial_finished_has_not_finished_either(sweep, tmp_path):
    root = Location.of(tmp_path) / sweep.name
    for number in range(2):
        made_trial(root, f"t{number:03}", status="diverged", message=f"reason {number}")
    record = Record(sweep.name, sweep.science, stages=["search", "finalists"])
    result = Search(sweep, Location.of(tmp_path), root, record).run()
    assert (result.status, result.exit_code, result.trials) == ("diverged", 4, {"diverged": 2})
    assert "no trial finished; t000" in result.message
    assert "reason 1; --fresh starts them anew" in result.message


def test_not_every_reason_is_in_the_message(tmp_path):
    root = Location.of(tmp_path)
    for number in range(SHOWN + 3):
        made_trial(root, f"t{number:03}", status="failed", message="why")
    told = message_of(FINISHED, read_trials(root), "all failed")
    assert told.count("failed: why") == SHOWN
    assert "; and 3 more; " in told
