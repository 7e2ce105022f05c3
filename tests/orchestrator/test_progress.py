from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest

from orchestrator.events import EventLog
from orchestrator.progress import Progress, follow


class Terminal(io.StringIO):
    def isatty(self):
        return True


def metrics(step, at_s, **values):
    named = {f"train/{key}": value for key, value in values.items()}
    return {"time": int(at_s * 1000), "kind": "metrics", "step": step, "metrics": named or {"train/loss": 0.5}}


def lines(total, *events):
    stream = io.StringIO()
    progress = Progress(total, stream)
    for event in events:
        progress.update(event)
    progress.close()
    return stream.getvalue().splitlines()


def test_a_line_says_step_rate_time_left_and_losses():
    shown = lines(
        1500,
        metrics(300, 100),
        metrics(500, 110, loss=0.3141, energy_gap=-0.02, accuracy=0.97, images_per_s=1280.0),
    )
    assert shown[-1] == "step 500/1500  20 steps/s  1,280 images/s  ETA 0:00:50  loss 0.314  gap -0.02  acc 0.97"


def test_lines_come_every_five_seconds_and_the_last_is_not_swallowed():
    shown = lines(100, *(metrics(step, step) for step in range(1, 14)))
    assert [line.split()[1] for line in shown] == ["1/100", "6/100", "11/100", "13/100"]


def test_after_a_rollback_the_step_goes_back_and_the_rate_starts_anew():
    shown = lines(
        100,
        metrics(10, 0),
        metrics(90, 10),
        {"time": 60_000, "kind": "attempt", "attempt": 2, "step": 50, "workers": 1},
        metrics(51, 61),
        metrics(56, 66),
    )
    assert "attempt 2: going on from step 50, 1 workers" in shown
    assert shown[-1].startswith("step 56/100  1 steps/s  ETA 0:00:44")


def test_the_first_attempt_is_not_worth_a_line_and_a_note_is():
    shown = lines(
        10,
        {"time": 0, "kind": "attempt", "attempt": 1, "step": 0, "workers": 2},
        {"time": 0, "kind": "note", "text": "chains re-sharded"},
        {"time": 0, "kind": "end", "status": "finished"},
    )
    assert shown == ["chains re-sharded"]


def test_a_validation_result_stays_in_the_line():
    val = {"time": 5000, "kind": "metrics", "step": 2, "metrics": {"val/accuracy": 0.9}}
    assert lines(10, metrics(1, 0), val, metrics(3, 10))[-1].endswith("loss 0.5  val acc 0.9")


def test_a_terminal_gets_a_bar_that_follows_the_step_back(capsys):
    stream = Terminal()
    progress = Progress(1500, stream)
    progress.update({"time": 0, "kind": "attempt", "attempt": 2, "step": 400})
    progress.update(metrics(400, 0))
    progress.update(metrics(500, 10, loss=0.25))
    progress.update({"time": 11_000, "kind": "attempt", "attempt": 3, "step": 450})
    sys.stdout.write("a result\n")
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "attempt 3: going on from step 450" in shown
    assert "step 450/1500" in shown.splitlines()[-1]
    assert "loss 0.25" in shown
    assert capsys.readouterr().out == "a result\n", "stdout belongs to the result"


def test_it_writes_to_stderr_by_default(capsys):
    progress = Progress(10)
    progress.update(metrics(1, 0))
    progress.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 1/10" in shown.err


@pytest.mark.parametrize("exists", [True, False])
def test_following_a_log_gives_each_event_once_up_to_the_stop(tmp_path, exists):
    path, seen, stop = tmp_path / "events.jsonl", [], threading.Event()
    offset = 0
    if exists:
        before = EventLog(path)
        before.append("note", text="earlier")
        offset = before.size
    thread = threading.Thread(target=follow, args=(path, offset, lambda e: seen.append(e["text"]), stop))
    thread.start()
    log = EventLog(path)
    for number in range(3):
        log.append("note", text=str(number))
        time.sleep(0.15)
    log.append("note", text="last")
    stop.set()
    thread.join(5)
    assert seen == ["0", "1", "2", "last"]
