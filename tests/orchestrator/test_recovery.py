"""Divergence: the rollbacks of a run, as decisions and as runs that diverge by themselves."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_runs import HOOKED, Death, Hooks, die, fit, log_of, newest, poison, state_of, steps_kept, tiny

from jem.errors import CheckpointError, DivergedError
from jem.files import Location
from orchestrator.checkpoints import Checkpoints
from orchestrator.outbox import Outbox, Point, Tags
from orchestrator.recovery import Recovery, Rollback, read_recovery, write_recovery

LADDER = "recovery.ladder=[seed,optimizer.learning_rate*0.5,sgld.steps*2,sgld.clamp=1 sgld.gradient_clamp=1]"
CONFIG = tiny("steps=5000", LADDER, "recovery.healthy_steps=200", "recovery.relax_steps=1000", "recovery.max=6")


def rollback(number=1, diverged_at=1000, to=500, level=1, remedies=("seed",)):
    return Rollback(number, diverged_at, to, "energy gap 1e+06", level, remedies, 123)


def recovered(level, diverged_at=1000, config=CONFIG):
    return Recovery(config, [rollback(level=level, diverged_at=diverged_at)])


def test_a_run_that_never_diverged_trains_with_its_own_settings_to_its_end():
    recovery = Recovery(CONFIG)
    assert recovery.level(700) == 0
    assert recovery.settings(700) == (CONFIG, 5000)


@pytest.mark.parametrize(
    ("step", "level", "changes_at", "changed"),
    [
        (500, 4, 2000, {"learning_rate": 0.005, "steps": 4, "clamp": 1, "gradient_clamp": 1}),
        (1000, 4, 2000, {"learning_rate": 0.005, "steps": 4, "clamp": 1, "gradient_clamp": 1}),
        (1999, 4, 2000, {"learning_rate": 0.005, "steps": 4, "clamp": 1, "gradient_clamp": 1}),
        (2000, 3, 3000, {"learning_rate": 0.005, "steps": 4}),
        (3000, 2, 4000, {"learning_rate": 0.005}),
        (4000, 1, 5000, {}),
        (4999, 1, 5000, {}),
    ],
)
def test_the_ladder_is_in_force_from_its_foot_and_healthy_stretches_take_back_its_top(step, level, changes_at, changed):
    recovery = recovered(level=4)
    config, until = recovery.settings(step)
    assert (recovery.level(step), until) == (level, changes_at)
    expected = {"learning_rate": 0.01, "steps": 2, "clamp": None, "gradient_clamp": None} | changed
    found = {"learning_rate": config.optimizer.learning_rate} | {
        key: getattr(config.sgld, key) for key in ("steps", "clamp", "gradient_clamp")
    }
    assert found == expected
    assert config.seed == CONFIG.seed, "the data's order is not a remedy"


def test_once_all_is_taken_back_the_settings_are_the_runs_own():
    recovery = recovered(level=2, config=tiny("steps=9000", LADDER))
    assert [recovery.level(step) for step in (2999, 3000, 8999)] == [1, 0, 0]
    assert recovery.settings(3000) == (recovery.config, 9000)
    assert recovery.settings(2999)[1] == 3000


def test_more_failures_than_rungs_keep_the_whole_ladder_for_longer():
    recovery = recovered(level=6)
    full, _ = recovered(level=4).settings(1000)
    assert recovery.settings(1000) == (full, 2000)
    assert recovery.settings(2999) == (full, 3000)
    assert recovery.settings(3999) == (full, 4000)
    assert recovery.settings(4000)[0].sgld.clamp is None


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(1, 40), st.integers(1, 50), st.integers(0, 120))
def test_the_settings_of_a_step_hold_until_the_step_that_is_said_and_no_longer(level, relax, diverged_at, step):
    config = replace(CONFIG, steps=120, recovery=replace(CONFIG.recovery, relax_steps=relax))
    recovery = recovered(level, diverged_at, config)
    trained_with, until = recovery.settings(step)
    assert until > step or step == 120
    assert {recovery.level(s) for s in range(step, until)} <= {recovery.level(step)}
    assert all(
        recovery.settings(s) == (trained_with, until) for s in {step, (step + until) // 2, until - 1} if s >= step
    )
    if until < 120:
        assert recovery.level(until) == recovery.level(step) - 1


def diverge(recovery, at, checkpoints):
    made = recovery.next(at, "sick", checkpoints)
    recovery.rollbacks.append(made)
    return made.to, made.level, made.remedies


def test_each_failure_goes_one_checkpoint_further_back_with_one_remedy_more_to_the_oldest_there_is():
    recovery, there = Recovery(CONFIG), [900, 800, 700, 600, 500]
    ladder = CONFIG.recovery.ladder
    assert diverge(recovery, 1000, there) == (800, 1, ladder[:1])
    assert diverge(recovery, 1000, there) == (700, 2, ladder[:2])
    assert diverge(recovery, 1000, there) == (600, 3, ladder[:3])
    assert diverge(recovery, 1000, there) == (500, 4, ladder[:4])
    assert diverge(recovery, 1000, there) == (500, 5, ladder[:4])
    assert [rollback.number for rollback in recovery.rollbacks] == [1, 2, 3, 4, 5]


def test_a_failure_long_after_the_last_begins_at_the_foot_again():
    recovery = Recovery(CONFIG)
    diverge(recovery, 1000, [800, 500])
    assert diverge(recovery, 1999, [1500, 800]) == (800, 2, CONFIG.recovery.ladder[:2])
    assert diverge(recovery, 4999, [4500, 4000]) == (4500, 1, CONFIG.recovery.ladder[:1])


@pytest.mark.parametrize(
    ("diverged_at", "checkpoints", "good"),
    [
        (1000, [900, 800, 700], [800, 700]),
        (1000, [801, 700], [700]),
        (150, [100, 0], [0]),
        (100, [100, 50, 0], [0]),
        (1000, [950, 900], []),
    ],
)
def test_a_checkpoint_is_good_if_the_run_stayed_healthy_after_it_and_the_first_always_is(
    diverged_at, checkpoints, good
):
    assert Recovery(CONFIG).good(diverged_at, checkpoints) == good


def test_where_none_is_surely_good_the_oldest_is_taken():
    assert diverge(Recovery(CONFIG), 1000, [950, 900])[0] == 900


def test_a_run_without_any_checkpoint_has_diverged():
    with pytest.raises(DivergedError, match=r"step 30: sick; there is no checkpoint to go back to"):
        Recovery(CONFIG).next(30, "sick", [])


def test_after_as_many_rollbacks_as_are_allowed_the_run_has_diverged_and_says_what_was_tried():
    recovery = Recovery(CONFIG)
    for _ in range(6):
        diverge(recovery, 1000, [700, 500])
    with pytest.raises(DivergedError) as error:
        recovery.next(1000, "energy gap 1e+06", [700, 500])
    message = str(error.value)
    assert "energy gap 1e+06; 6 rollbacks are made, recovery.max=6" in message
    assert message.count("back to 500") == 5
    assert "back to 500 with seed, optimizer.learning_rate*0.5, sgld.steps*2" in message
    assert "raise recovery.max to go on" in message


def test_no_rollbacks_allowed_is_said_as_that():
    with pytest.raises(DivergedError, match=r"nothing: recovery\.max=0"):
        Recovery(tiny("recovery.max=0")).next(5, "sick", [0])


def test_a_checkpoint_is_abandoned_by_later_rollbacks_to_before_it_alone():
    recovery = Recovery(CONFIG, [rollback(1, to=500), rollback(2, to=300)])
    table = {(step, made): recovery.abandoned(step, made) for step in (300, 400, 500, 600) for made in (0, 1, 2)}
    gone = {(400, 0), (500, 0), (600, 0), (400, 1), (500, 1), (600, 1)}
    assert {key for key, abandoned in table.items() if abandoned} == gone


def test_what_is_written_is_read_and_decides_the_same(tmp_path):
    root = Location.of(tmp_path)
    assert read_recovery(root, CONFIG).rollbacks == []
    recovery = Recovery(CONFIG)
    for at in (1000, 1200, 4000):
        diverge(recovery, at, [800, 600, 0])
        write_recovery(root, recovery)
    again = read_recovery(root, CONFIG)
    assert again.rollbacks == recovery.rollbacks
    for step in range(0, 5000, 250):
        assert again.settings(step) == recovery.settings(step)
    first, second = (replace(r.next(4100, "sick", [3000, 0]), time=0) for r in (again, recovery))
    assert first == second


DAMAGE = [
    "",
    "{",
    "[]",
    "{}",
    '{"rollbacks": [{}]}',
    '{"rollbacks": [{"remedies": [], "number": 1}]}',
    '{"rollbacks": 7}',
]


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_record_is_an_error_that_names_the_file_and_the_remedy(tmp_path, content):
    root = Location.of(tmp_path)
    (root / "recovery.json").write(content.encode())
    with pytest.raises(CheckpointError, match=r"recovery\.json: damaged .*remove it to go on"):
        read_recovery(root, CONFIG)


# Runs that diverge by themselves: the learning rate is 30 times what is good for them.

UNSTABLE = (
    *(HOOKED, "seed=2", "steps=60", "optimizer.learning_rate=0.3", "checkpoint.every=10", "evaluate.every=40"),
    *("recovery.every=5", "recovery.healthy_steps=15", "recovery.relax_steps=40", "recovery.max=30"),
    "recovery.ladder=[seed,optimizer.learning_rate*0.1,optimizer.learning_rate*0.01]",
)


def last_points(folder):
    """{(metric, step): value}, of a step that was run again the last."""
    points = {}
    for event in log_of(folder, "metrics"):
        points |= {(key, event["step"]): value for key, value in event["metrics"].items()}
    return {key: value for key, value in points.items() if key[0] != "train/images_per_s"}


def made(folder):
    """The rollbacks that are written down, but for when they were made."""
    entries = json.loads((folder / "recovery.json").read_text())["rollbacks"]
    return [{key: value for key, value in entry.items() if key != "time"} for entry in entries]


def same_run(one, other):
    assert state_of(one) == state_of(other)
    assert last_points(one) == last_points(other)
    assert steps_kept(one) == steps_kept(other)
    assert made(one) == made(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, outcome) of a run that was never disturbed from outside."""
    folder = tmp_path_factory.mktemp("whole")
    outcome = fit(folder, *UNSTABLE)
    assert made(folder), "these settings do not diverge any more: the tests below say nothing"
    return folder, outcome


def test_a_run_that_diverges_goes_back_by_itself_and_finishes(whole):
    folder, outcome = whole
    assert (outcome["status"], outcome["step"], outcome["message"]) == ("finished", 60, "")
    assert newest(folder).info["rollbacks"] == len(made(folder))
    for entry in made(folder):
        assert entry["to"] == 0 or entry["to"] + 15 <= entry["diverged_at"]
        assert entry["to"] % 10 == entry["diverged_at"] % 5 == 0
        assert len(entry["remedies"]) == min(3, entry["level"])


def test_the_log_tells_every_rollback_as_it_is_written_down(whole):
    folder, _ = whole
    told = [(e["number"], e["from_step"], e["step"], e["reason"], e["level"]) for e in log_of(folder, "rollback")]
    assert told == [tuple(e[key] for key in ("number", "diverged_at", "to", "reason", "level")) for e in made(folder)]
    assert [e["remedy"] for e in log_of(folder, "rollback")] == [", ".join(e["remedies"]) for e in made(folder)]


def test_two_runs_that_diverge_are_the_same_bit_for_bit(whole, tmp_path):
    fit(tmp_path, *UNSTABLE)
    same_run(tmp_path, whole[0])


def moments(entries):
    """Where to kill, by the rollbacks made and the passes since: (name, rollbacks made, steps done)."""
    for before, entry in enumerate(entries[:3]):
        yield before, entry["diverged_at"] - 2  # shortly before a rollback
        yield before + 1, entry["to"] + 1  # in the pass after it
        yield before + 1, entry["to"] + 7  # before the next checkpoint


def test_killed_before_between_and_right_after_rollbacks_it_ends_with_the_same_bits(whole, tmp_path):
    expected = made(whole[0])
    killed = 0
    for attempt, (rollbacks, step) in enumerate(moments(expected), start=1):
        # the passes from where this attempt goes on to that moment, the rollbacks on the way included
        done = made(tmp_path) if (tmp_path / "recovery.json").exists() else []
        at = newest(tmp_path).step if (tmp_path / "checkpoints").exists() else 0
        passes = 0
        for entry in expected[len(done) : rollbacks]:
            passes, at = passes + entry["diverged_at"] - at, entry["to"]
        passes += step - at
        if passes < 1:
            continue  # a checkpoint of later was committed
        with pytest.raises(Death):
            fit(tmp_path, *UNSTABLE, hooks={passes: die}, attempt=attempt)
        assert len(made(tmp_path) if rollbacks else []) == rollbacks, "it was not killed where it was to be"
        killed += 1
    assert killed >= 3
    assert fit(tmp_path, *UNSTABLE, attempt=99)["status"] == "finished"
    same_run(tmp_path, whole[0])


@pytest.mark.parametrize("where", ["before the rollback is written", "after it, before the checkpoints are removed"])
def test_a_death_in_the_middle_of_a_rollback_changes_nothing(whole, tmp_path, monkeypatch, where):
    """Of the first one that leaves checkpoints behind, if there is such."""
    wanted = next((e for e in made(whole[0]) if e["diverged_at"] - e["to"] > 10), made(whole[0])[0])["to"]
    before_writing = where.startswith("before")
    original, abandoned = Checkpoints.remove_after, []

    def dies(self, step):
        if step == wanted:
            abandoned.extend(s for s in self.steps() if s > step)
            raise Death
        original(self, step)

    def dies_first(root, recovery):
        if recovery.rollbacks[-1].to == wanted:
            raise Death
        write_recovery(root, recovery)

    with monkeypatch.context() as patch:
        if before_writing:
            patch.setattr("orchestrator.training.write_recovery", dies_first)
        else:
            patch.setattr(Checkpoints, "remove_after", dies)
        with pytest.raises(Death):
            fit(tmp_path, *UNSTABLE)
    if not before_writing:
        assert abandoned, "there was nothing to remove"
        assert set(abandoned) <= set(steps_kept(tmp_path))
    assert fit(tmp_path, *UNSTABLE, attempt=2)["status"] == "finished"
    same_run(tmp_path, whole[0])


def test_a_damaged_record_of_rollbacks_is_no_good_checkpoint_and_the_remedy_helps(tmp_path):
    fit(tmp_path, "steps=4")
    (tmp_path / "recovery.json").write_text('{"rollbacks": [{')
    outcome = fit(tmp_path)
    assert (outcome["status"], outcome["exit_code"]) == ("no good checkpoint", 3)
    assert "recovery.json: damaged" in outcome["message"]
    (tmp_path / "recovery.json").unlink()
    assert fit(tmp_path)["status"] == "finished"


def test_without_rollbacks_it_ends_diverged_at_its_newest_good_checkpoint_and_with_some_allowed_goes_on(
    whole, tmp_path
):
    first = made(whole[0])[0]
    outcome = fit(tmp_path, *UNSTABLE, "recovery.max=0")
    assert (outcome["status"], outcome["exit_code"]) == ("diverged", 4)
    good = max(s for s in steps_kept(tmp_path) if s == 0 or s + 15 <= first["diverged_at"])
    assert (outcome["step"], outcome["checkpoint"]) == (good, f"{tmp_path}/checkpoints/{good}")
    assert f"step {first['diverged_at']}" in outcome["message"]
    assert not (tmp_path / "recovery.json").exists()
    assert log_of(tmp_path, "rollback") == []
    again = fit(tmp_path, *UNSTABLE, "recovery.max=0", attempt=2)
    assert {k: again[k] for k in ("status", "step", "message")} == {
        k: outcome[k] for k in ("status", "step", "message")
    }
    assert fit(tmp_path, *UNSTABLE, attempt=3)["status"] == "finished"
    same_run(tmp_path, whole[0])


def heal(_network):
    Hooks.output = staticmethod(lambda out: out)


def sick_for_the_last_time(network):
    def output(out):
        heal(network)
        return out * math.nan

    Hooks.output = staticmethod(output)


def test_steps_after_a_rollback_are_the_same_data_with_other_chains(tmp_path):
    settings = (HOOKED, "steps=20", "tracking.every=1", "recovery.every=2", "recovery.healthy_steps=0")
    fit(tmp_path, *settings, "recovery.ladder=[seed]", hooks={11: poison, 12: sick_for_the_last_time})
    assert [(e["from_step"], e["step"]) for e in log_of(tmp_path, "rollback")] == [(12, 8)]
    first, again = (e["metrics"] for e in log_of(tmp_path, "metrics") if e["step"] == 9)
    assert again["train/energy_data"] == first["train/energy_data"]
    assert again["train/energy_samples"] != first["train/energy_samples"]


def test_a_run_that_stays_healthy_after_a_rollback_trains_with_its_own_settings_again(tmp_path):
    """Steps 5 and 6 are lost, it goes back to 4; from the 4th step after 6 on the remedy is taken back."""
    ladder = ("recovery.ladder=[optimizer.learning_rate*0.5]", "recovery.relax_steps=4")
    looks = ("recovery.every=2", "recovery.healthy_steps=2", "tracking.every=1", "evaluate.every=12")
    fit(tmp_path, HOOKED, "optimizer.warmup_steps=0", *ladder, *looks, hooks={5: poison, 7: heal})
    assert [(entry["diverged_at"], entry["to"]) for entry in made(tmp_path)] == [(6, 4)]
    rates = {step: value for (key, step), value in last_points(tmp_path).items() if key == "train/learning_rate"}
    assert rates == {step: 0.005 if 4 < step <= 10 else 0.01 for step in range(1, 13)}


def test_what_validation_finds_is_a_divergence_like_any_other(tmp_path):
    settings = (HOOKED, "recovery.every=100", "recovery.healthy_steps=0", "steps=20", "checkpoint.every=4")
    outcome = fit(tmp_path, *settings, "evaluate.every=5", hooks={10: poison, 11: heal})
    assert (outcome["status"], outcome["step"]) == ("finished", 20)
    [event] = log_of(tmp_path, "rollback")
    assert (event["from_step"], event["step"]) == (10, 8)
    assert "NaN" in event["reason"]


def test_a_checkpoint_that_has_rotted_is_passed_over_when_a_rollback_wants_it(tmp_path):
    """Divergence from outside, for two steps: where it is noticed does not depend on any threshold."""

    def rot(_network):
        deadline = time.monotonic() + 20  # checkpoints are written in the background
        while steps_kept(tmp_path) != [0, 4, 8] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert steps_kept(tmp_path) == [0, 4, 8]
        (tmp_path / "checkpoints" / "8" / "model.safetensors").write_bytes(b"x")

    sick = {11: poison, 12: rot, 13: heal}
    outcome = fit(tmp_path, HOOKED, "recovery.every=2", "recovery.healthy_steps=0", "steps=20", hooks=sick)
    assert (outcome["status"], outcome["step"]) == ("finished", 20)
    assert [(e["from_step"], e["step"]) for e in log_of(tmp_path, "rollback")] == [(12, 4)]
    assert [(e["diverged_at"], e["to"]) for e in made(tmp_path)] == [(12, 4)]
    assert steps_kept(tmp_path)[-1] == 20


# What MLflow is told.


def fed(folder):
    outbox = Outbox()
    return outbox, [item for event in log_of(folder) for item in outbox.feed(event)]


def rewritten(items):
    told = [item.tags["rewritten"] for item in items if isinstance(item, Tags) and "rewritten" in item.tags]
    return [tuple(map(int, stretch.split("-"))) for stretch in told[-1].split(",")] if told else []


def test_mlflow_gets_one_point_per_metric_and_step_and_every_other_value_is_marked_as_rewritten(whole):
    folder, _ = whole
    outbox, items = fed(folder)
    items += outbox.feed({"kind": "end", "time": 0, "status": "finished"})
    points = [item for item in items if isinstance(item, Point) and item.key != "train/images_per_s"]
    assert len({(p.key, p.step) for p in points}) == len(points)
    final = last_points(folder)
    assert {(p.key, p.step) for p in points} == set(final)
    other = {p.step for p in points if p.value != final[p.key, p.step]}
    stretches = rewritten(items)
    assert all(any(first <= step <= last for first, last in stretches) for step in other)


def test_mlflow_is_told_of_every_rollback(whole):
    folder, _ = whole
    _, items = fed(folder)
    told = [item.tags["recoveries"] for item in items if isinstance(item, Tags) and "recoveries" in item.tags]
    assert len(told) == len(made(folder))
    for entry in made(folder):
        assert (
            f"{entry['number']}: step {entry['diverged_at']} to {entry['to']}, {', '.join(entry['remedies'])}"
            in told[-1]
        )
        assert entry["reason"] in told[-1]
