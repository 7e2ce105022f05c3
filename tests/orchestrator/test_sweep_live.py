from __future__ import annotations

import io
import re
import sys

import pytest

from orchestrator.sweep.live import Board, TrialState, clock, drawn, eta


class Terminal(io.StringIO):
    def isatty(self):
        return True


def trial(number, status="running", step=0, nll=None, steps=300, **point):
    values = {} if nll is None else {"val/nll": nll}
    return TrialState(
        f"t{number:03}", status, step, steps, values, {key.replace("__", "."): point[key] for key in point}
    )


def board(stream, n_trials=20, objectives=("val/nll",)):
    return Board("digits_sgld", objectives, n_trials, at_once=2, stream=stream)


def lines(*updates, n_trials=20, **changes):
    """What is printed after (elapsed_s, rows, best) each."""
    stream = io.StringIO()
    shown = board(stream, n_trials, **changes)
    for elapsed, rows, best in updates:
        shown.update(rows, best, elapsed)
    shown.close()
    return stream.getvalue().splitlines()


def test_a_trial_that_ends_gets_a_line_with_the_best_the_counts_and_the_time_left():
    best = trial(3, "finished", 300, 0.0734)
    before = [trial(n, "pruned", 100) for n in (0, 1, 2)] + [best] + [trial(5, "diverged", 100)]
    before += [trial(n, "finished", 300, 0.1) for n in (4, 6)]
    begun = [trial(n, step=0) for n in range(7)]
    now = [*before, trial(7, "finished", 300, 0.0812), trial(8, step=150), trial(9, step=50)]
    shown = lines((0, begun, []), (100, [*before, trial(7, step=299)], [best]), (110, now, [best]))
    # 1800 steps in 110 s; 400 of those that run and 10 x 300 are left
    expected = (
        "t007 finished: val/nll 0.0812 (best 0.0734 by t003); 8/20 done, 2 running, 3 pruned, 1 diverged, ETA 3:28"
    )
    assert shown[-1] == expected


def test_a_trial_that_came_to_nothing_says_at_which_step():
    shown = lines((0, [trial(0)], []), (1, [trial(0, "failed", 7)], []))
    assert shown[-1].startswith("t000 failed at step 7/300: no val/nll; 1/20 done, 1 failed, ETA")


def test_other_lines_come_every_ten_seconds_and_the_last_is_not_swallowed():
    shown = lines(*((second, [trial(0, step=second, nll=0.5)], []) for second in range(1, 25)), n_trials=1)
    assert [line.split("; ")[1] for line in shown] == [f"t000 {s}/300 val/nll 0.5" for s in (1, 11, 21, 24)]
    assert shown[1].startswith("digits_sgld: 0/1 done, 1 running, ETA 4:49;")


def test_what_an_earlier_driver_did_is_no_news_and_no_pace():
    over = [trial(n, "finished", 300, 0.1) for n in range(8)]
    shown = lines((500, over, over[:1]), (510, [*over, trial(8, step=20)], over[:1]), n_trials=9)
    assert shown[0] == "digits_sgld: 8/9 done; best 0.1 by t000"
    assert "ETA 2:20" in shown[1], "20 steps in 10 s, 280 are left"
    assert len(shown) == 2


def test_of_several_objectives_the_front_is_named():
    front = [TrialState(f"t{n:03}", "finished", 300, 300, {"val/nll": 0.1 * n, "val/ece": 0.1}) for n in range(6)]
    shown = lines((1, [trial(9)], []), (2, front, front), objectives=("val/nll", "val/ece"))
    assert "t001 finished: val/nll 0.1 val/ece 0.1 (front t000, t001, t002, t003, ...); 6/20 done" in "\n".join(shown)


@pytest.mark.parametrize(
    ("rows", "n_trials", "elapsed_s", "budget_s", "expected"),
    [
        ([], 4, 10, None, None),
        ([trial(0)], 4, 10, None, None),
        ([trial(0, step=150)], 1, 10, None, 10),
        ([trial(0, step=150)], 4, 10, None, 10 * (150 + 3 * 300) / 150),
        ([trial(0, step=150), trial(1, step=50)], 2, 10, None, 10 * 400 / 200),
        ([trial(0, "pruned", 50), trial(1, step=50)], 2, 10, None, 10 * 250 / 100),
        ([trial(0, "stopped", 50), trial(1, step=50)], 2, 10, None, 10 * 500 / 100),
        ([trial(0, "finished", 300), trial(1, "diverged", 10)], 2, 10, None, 0),
        ([trial(0, step=150)], 4, 10, 60, 50),
        ([trial(0, step=150)], 1, 10, 600, 10),
        ([trial(0, step=150)], 4, 70, 60, 0),
    ],
)
def test_the_time_left_is_that_of_the_steps_left_at_the_pace_so_far(rows, n_trials, elapsed_s, budget_s, expected):
    assert eta(rows, n_trials, elapsed_s, budget_s) == (None if expected is None else pytest.approx(expected))


def test_the_pace_is_that_of_this_driver():
    assert eta([trial(0, "finished", 300), trial(1, step=100)], 2, 20, since=(10, 300)) == pytest.approx(20)


def test_times_and_points_are_short():
    assert [clock(s) for s in (0, 9.6, 250, 3850)] == ["0:00", "0:10", "4:10", "1:04:10"]
    point = {"sgld.step_size": 0.123456, "sgld.steps": 20, "other.steps": 3, "data.flip": True}
    assert drawn(point) == "step_size=0.1235 sgld.steps=20 other.steps=3 flip=true"
    assert drawn({}) == "base"


def screen(stream):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_terminal_gets_a_table_of_what_runs_and_of_the_best(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    stream = Terminal()
    shown = board(stream)
    best = trial(3, "finished", 300, 0.0734, sgld__step_size=0.25)
    rows = [best, trial(7, step=120, nll=0.0812, sgld__step_size=0.5), trial(8, step=3, sgld__step_size=1.0)]
    shown.update(rows, [best], 60, None)
    shown.say("[t005] crashed: /no markup/")
    sys.stdout.write("a result\n")
    shown.close()
    last = [line.rstrip() for line in screen(stream).splitlines()][-6:]
    assert any("digits_sgld: 1/20 done, 2 running" in line and "1:00 so far, 2 at once" in line for line in last)
    assert [line.split() for line in last if line.startswith(("trial", "t00", "best"))] == [
        ["trial", "step", "val/nll", "drawn"],
        ["t007", "120/300", "0.0812", "step_size=0.5"],
        ["t008", "3/300", "-", "step_size=1"],
        ["best", "t003", "300/300", "0.0734", "step_size=0.25"],
    ]
    assert "[t005] crashed: /no markup/" in screen(stream)
    assert capsys.readouterr().out == "a result\n", "stdout belongs to the result"


def test_a_table_that_is_higher_than_the_terminal_says_how_many_more(monkeypatch):
    monkeypatch.setenv("LINES", "24")
    stream = Terminal()
    shown = board(stream)
    shown.update([trial(n, step=1) for n in range(30)], [], 60)
    shown.close()
    assert "and 18 more" in screen(stream)


def test_it_writes_to_stderr_by_default(capsys):
    shown = board(None)
    shown.update([trial(0)], [], 1)
    shown.close()
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "0/20 done, 1 running" in caught.err
