"""Batch scoring that is stopped, or loses a worker."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from test_score_command import PER_UNIT, Scoring, contents, ended, folder, scores_in, whole

__all__ = ["folder", "whole"]  # fixtures


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["the command", "a worker"])
def test_scoring_that_is_disturbed_ends_with_the_same_scores(folder, whole, which):
    """A worker that is killed is replaced; the command that is stopped is typed again."""
    name = which.rpartition(" ")[2]
    arguments = ("slow", "data", name, f"rows_per_unit={PER_UNIT}", "workers=2")
    command = Scoring(folder, *arguments, SLOWLY="0.5")
    try:
        command.wait_until(lambda: scores_in(folder / name))
        if which == "a worker":
            command.scorers()[0].kill()
            last = command.end()
        else:
            os.kill(command.process.pid, signal.SIGTERM)
            stopped = command.end()
            assert (stopped.code, stopped.result["status"]) == (143, "stopped"), stopped.err
            assert command.left() == [], "processes were left behind"
            assert "Connecting to existing Ray cluster" not in stopped.err, "a call after ray.shutdown found another"
            kept = {path: path.stat().st_mtime_ns for path in scores_in(folder / name)}
            assert 0 < len(kept) < 10
            assert not (folder / name / "scores.json").exists()
            last = ended(folder, *arguments)
            assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished units stay"
    finally:
        command.kill()
    assert last.code == 0, last.err
    assert all(a.equals(b) for a, b in zip(contents(folder / name), contents(folder / "whole"), strict=True))
    expected = {**whole.result, "out": str(folder / name), "summary": str(folder / name / "scores.json")}
    assert last.result == expected
