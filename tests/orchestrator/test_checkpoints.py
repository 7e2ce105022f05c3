"""A run's checkpoints: which stay, which is found again, and whose they are."""

from __future__ import annotations

import errno
import json
import shutil
import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from worker_runs import CPU, HOOKED, Death, die, fit, log_of, prepared, state_of, steps_kept, tiny

from jem import checkpoint
from jem.checkpoint import MANIFEST, read_manifest
from jem.errors import CheckpointError, JEMError, StorageError
from jem.files import Location
from jem.saving import save
from jem.train import start
from jem.world import World
from orchestrator.checkpoints import Checkpoints, Superseded, find, find_for_rollback, kept
from orchestrator.config import CheckpointConfig
from orchestrator.recovery import Recovery, Rollback

configs = st.builds(
    CheckpointConfig,
    every=st.sampled_from([1, 4, 10, 500]),
    keep=st.integers(1, 5),
    spaced=st.integers(0, 3),
)


@given(configs, st.lists(st.integers(0, 3000), unique=True), st.integers(0, 3000), st.sets(st.integers(0, 3000)))
def test_the_newest_stay_and_no_more_than_is_said(config, steps, newest, between):
    stay = kept(steps, newest, config, between)
    before = sorted(step for step in steps if step <= newest)
    assert stay <= set(before), "what is newer than the newest good one was found damaged"
    assert set(before[-1:]) <= stay
    assert set([step for step in before if step not in between][-config.keep :]) <= stay
    assert len(stay) <= 1 + config.keep + 2 * config.spaced
    assert kept(list(stay), newest, config, between) == stay


@given(configs, st.integers(1, 600), st.randoms(use_true_random=False))
@example(CheckpointConfig(every=1, keep=1, spaced=2), 600, None)
def test_over_a_long_run_one_is_always_old_enough_to_walk_back_to(config, length, random):
    """However far back a divergence began, up to 4^spaced intervals, there is a checkpoint from before it.

    Checkpoints of requests to stop come in between, and pruning twice or from another order is as pruning once.
    """
    there: set[int] = set()
    odds: set[int] = set()
    far = config.every * 4**config.spaced if config.spaced else 0
    for number in range(length + 1):
        step = number * config.every
        there.add(step)
        there = kept(sorted(there, reverse=True), step, config, odds)
        assert kept(list(there), step, config, odds) == there
        assert step in there
        assert len(there) <= config.keep + 2 * config.spaced
        if step >= far:
            assert min(there) <= step - far
        if random is not None and config.every > 1 and random.random() < 0.1:
            odd = step + random.randrange(1, config.every)
            odds.add(odd)
            before, there = there, kept([*there, odd], odd, config, odds)
            assert there == before | {odd}, "it takes nobody's place"


def test_the_defaults_keep_what_the_readme_of_a_long_run_would_say():
    """By hand: every 500 steps, the newest three, two of every 2000 and two of every 8000."""
    there: set[int] = set()
    for step in range(0, 19_501, 500):
        there = kept([*there, step], step, CheckpointConfig())
    assert sorted(there) == [8000, 16_000, 18_000, 18_500, 19_000, 19_500]


@given(configs, st.integers(0, 80), st.integers(0, 1000))
def test_there_is_always_a_newest_good_one_as_if_none_had_been_removed(config, number, healthy_steps):
    """Whatever is kept, a rollback goes to where it would go if all checkpoints were there."""
    there: set[int] = set()
    for step in range(0, number * config.every + 1, config.every):
        there = kept([*there, step], step, config, healthy_steps=healthy_steps)
        for diverged_at in (step, step + config.every - 1):
            good = [s for s in range(0, step + 1, config.every) if s == 0 or s + healthy_steps <= diverged_at]
            assert max(good) in there


def test_a_stop_does_not_change_where_a_rollback_may_go(root):
    straight, stopped = group(root / "straight", every=4), group(root / "stopped", every=4)
    made(root / "straight", 0, 4, 8, 12)
    made(root / "stopped", 0, 4, 8, 10, 12, between=(10,))
    for newest, stop in ((8, 10), (12, 12)):
        straight.newest, stopped.newest = straight.folder / newest, stopped.folder / stop
        assert stopped.staying() == straight.staying() == [s for s in (12, 8, 4, 0) if s <= newest]
    stopped.prune(12)
    assert stopped.steps() == [12, 8, 4, 0]
    only = group(root / "only")
    made(root / "only", 7, between=(7,))
    only.newest = only.folder / 7
    assert only.staying() == [7], "better than nothing"


def made(root, *steps, config=None, rollbacks=0, seed=0, between=()):
    """Checkpoints without training, as a run of `config` writes them."""
    config = config or tiny()
    state = start(config, (1, 8, 8), 10)
    state.generator.manual_seed(seed)
    for step in steps:
        state.step = step
        info = {"config": json.loads(json.dumps(config.science)), "rollbacks": rollbacks}
        info["regular"] = step not in between
        save(root / "checkpoints" / step, state, World(), info, {})


@pytest.fixture
def root(tmp_path):
    return Location.of(tmp_path)


def found(root, config=None, *rollbacks):
    config = config or tiny()
    manifest, faults = find(root, config, Recovery(config, rollbacks))
    return manifest and manifest.step, faults


def names(root):
    return sorted(path.name for path in (root / "checkpoints").children())


def test_a_new_run_has_none(root):
    assert found(root) == (None, [])
    (root / "checkpoints").mkdir()
    assert found(root) == (None, [])


def test_what_a_death_in_the_middle_of_writing_has_left_is_removed_and_nothing_else(root):
    made(root, 4, 8)
    folder = root / "checkpoints"
    (folder / 12 / "model.safetensors").write(b"half")
    (folder / 12 / "part-00000-of-00001.json").write(b"{}")
    (folder / 8 / "part-00000-of-00001.json").write(b"{}")
    (folder / 8 / ".model.safetensors.1234abcd.tmp").write(b"half")
    (folder / ".manifest.json.1234abcd.tmp").write(b"half")
    (folder / "notes" / "mine.txt").write(b"somebody's own")
    files = sorted(path.name for path in (folder / 4).children())
    assert found(root) == (8, [f"{folder.uri}/12: has no manifest, its writing was interrupted"])
    assert names(root) == ["4", "8", "notes"]
    assert sorted(path.name for path in (folder / 8).children()) == files


def test_a_run_whose_first_checkpoint_was_never_committed_is_a_new_one(root):
    (root / "checkpoints" / 0 / "model.safetensors").write(b"half")
    assert found(root) == (None, [])
    assert names(root) == []


def test_damaged_ones_are_named_and_passed_over(root):
    made(root, 4, 8, 12)
    (root / "checkpoints" / 12 / "model.safetensors").write(b"x")
    (root / "checkpoints" / 8 / "optimizer.safetensors").remove()
    step, faults = found(root)
    assert step == 4
    assert [name in fault for name, fault in zip(("12/model", "8/optimizer"), faults, strict=True)] == [True, True]
    assert names(root) == ["12", "4", "8"], "they are evidence until the next one is committed"


def test_a_foreign_file_is_named(root):
    made(root, 4, 8)
    (root / "checkpoints" / 8 / "chains-00001-of-00002.safetensors").write(b"of other ranks")
    step, faults = found(root)
    assert step == 4
    assert "8/chains-00001-of-00002.safetensors: does not belong" in faults[0]


def test_where_none_is_good_that_is_an_error_with_every_fault_and_nothing_is_removed(root):
    made(root, 4, 8)
    for step in (4, 8):
        (root / "checkpoints" / step / "model.safetensors").write(b"x")
    (root / "checkpoints" / 12 / "model.safetensors").write(b"half")
    with pytest.raises(CheckpointError, match=r"(?s)8/model.*4/model.*--fresh"):
        found(root)
    assert names(root) == ["12", "4", "8"]


@pytest.mark.parametrize("what", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        ("s3", OSError("When reading information for key: AWS Error NETWORK_CONNECTION")),
        ("", OSError(errno.ESTALE, "")),
    ],
)
def test_a_store_that_is_away_makes_no_checkpoint_damaged(root, monkeypatch, what, scheme, error):
    """Who went back to an older one would remove the newer ones with the next that is committed."""
    made(root, 4, 8)
    read = Location.read

    def away(path):
        if path.name == what and path.parent.name == "8":
            raise error
        return read(path)

    def of_a_store():
        return Location(root.fs, root.path, scheme)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "read", away)
        with pytest.raises(StorageError, match=rf"checkpoints/8/{what}: cannot be read at present"):
            found(of_a_store())
        with pytest.raises(StorageError):
            find_for_rollback(of_a_store() / "checkpoints", [8, 4], 8)
        checkpoints = group(of_a_store(), keep=1, spaced=0)
        checkpoints.prune(8)
        assert names(root) == ["8"], "one that is known to be newer takes the older one's place all the same"
    assert found(root) == (8, [])


def test_a_store_that_is_away_ends_no_run_but_has_the_workers_replaced(tmp_path, monkeypatch):
    fit(tmp_path, HOOKED, until=4)
    read = Location.read

    def away(path):
        if path.name == "model.safetensors":
            raise OSError(errno.ETIMEDOUT, "the server does not answer")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "read", away)
        with pytest.raises(StorageError, match="does not answer"):
            fit(tmp_path, HOOKED)
    assert "does not answer" in (tmp_path / "failure.txt").read_text()
    assert fit(tmp_path, HOOKED)["status"] == "finished"


def test_a_bad_sector_is_damage(root, monkeypatch):
    made(root, 4, 8)
    read = Location.read

    def bad(path):
        if path.name == "model.safetensors" and path.parent.name == "8":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Location, "read", bad)
    step, faults = found(root)
    assert step == 4
    assert "8/model.safetensors: cannot be read" in faults[0]


def test_one_that_was_copied_from_a_run_of_other_settings_is_named_and_passed_over(root, tmp_path):
    made(root, 4)
    other = Location.of(tmp_path / "other")
    made(other, 8, config=tiny("sgld.step_size=0.25"))
    shutil.copytree(other.local / "checkpoints" / "8", root.local / "checkpoints" / "8")
    step, faults = found(root)
    assert step == 4
    assert faults == [f"{root.uri}/checkpoints/8: belongs to another run: its sgld.step_size is 0.25, 1.0 here"]


def test_where_a_run_runs_does_not_make_a_checkpoint_another_runs(root):
    made(root, 4, config=tiny("steps=8", "workers=2", "checkpoint.every=2", "tracking.every=1"))
    assert found(root, tiny("steps=20")) == (4, [])


def test_one_that_was_renamed_to_another_step_is_found_out(root):
    made(root, 4)
    (root / "checkpoints" / 4).move_to(root / "checkpoints" / 400)
    made(root, 8)
    step, faults = found(root)
    assert step == 8
    assert faults == [f"{root.uri}/checkpoints/400: its manifest is that of a checkpoint of step 4"]


def rollback(number, diverged_at, to):
    return Rollback(number, diverged_at, to, "sick", number, ("seed",), 0)


def test_what_a_rollback_gave_up_is_removed_and_what_came_after_it_stays(root):
    """It was written down in recovery.json and then interrupted."""
    made(root, 4, 8, 12, rollbacks=0)
    assert found(root, None, rollback(1, 14, 4)) == (4, [])
    assert names(root) == ["4"]
    made(root, 8, 12, rollbacks=1)
    assert found(root, None, rollback(1, 14, 4)) == (12, [])
    assert found(root, None, rollback(1, 14, 4), rollback(2, 14, 8)) == (8, [])
    assert names(root) == ["4", "8"]


def test_a_rollback_takes_the_newest_good_one_at_or_before_the_step_it_wants(root):
    made(root, 0, 4, 8, 12)
    folder = root / "checkpoints"
    assert find_for_rollback(folder, [12, 8, 4, 0], 8).step == 8
    (folder / 8 / "model.safetensors").write(b"x")
    assert find_for_rollback(folder, [12, 8, 4, 0], 8).step == 4
    for step in (0, 4):
        (folder / step / MANIFEST).remove()
    with pytest.raises(CheckpointError, match=r"(?s)nothing to go back to: .*8/model"):
        find_for_rollback(folder, [12, 8, 4, 0], 8)


def state_at(step):
    state = start(tiny(), (1, 8, 8), 10)
    state.step = step
    return state


def group(root, **config):
    return Checkpoints(World(), root, CheckpointConfig(**{"every": 4} | config), CPU)


def write(checkpoints, step):
    info = {"config": json.loads(json.dumps(tiny().science)), "rollbacks": 0}
    checkpoints.begin(state_at(step), info, {"meter": torch.zeros(2)}, None, b"")
    return checkpoints.finish()


def test_the_group_that_claimed_a_run_last_and_no_earlier_one_commits_its_checkpoints(root):
    first, second = group(root), group(root)
    first.claim()
    assert write(first, 4).fault is None
    second.claim()
    assert write(second, 8).fault is None
    files = {path.name: path.read() for path in (root / "checkpoints" / 8).children()}
    for step in (4, 8, 12):  # one it wrote itself, the second's, and a new one
        with pytest.raises(Superseded, match="another group of workers has taken this run over"):
            write(first, step)
    assert second.steps() == [8, 4]
    assert {path.name: path.read() for path in (root / "checkpoints" / 8).children()} == files
    assert write(second, 12).fault is None
    assert found(root) == (12, [])


def test_a_group_that_is_superseded_in_the_middle_of_writing_does_not_commit(root, monkeypatch):
    """It was stopped (SIGSTOP) while it wrote, and continued after another had taken over and come past that step."""
    first, second = group(root), group(root)
    first.claim()
    write(first, 4)
    original = Location.write

    def stopped_before_the_record(path, data):
        if path.name.startswith("part-"):
            monkeypatch.setattr(Location, "write", original)
            (root / "checkpoints" / 8).remove()  # as an orphan
            second.claim()
            write(second, 8)
        original(path, data)

    first.begin(state_at(8), {"rollbacks": 0}, {}, None, b"")
    first.finish()
    monkeypatch.setattr(Location, "write", stopped_before_the_record)
    first.begin(state_at(8), {"rollbacks": 0}, {}, None, b"")
    with pytest.raises(Superseded):
        first.finish()
    assert second.steps() == [8, 4]
    manifest = read_manifest(root / "checkpoints" / 8)
    manifest.verify()
    assert "meter" in manifest.tensors("rank-00000-of-00001.safetensors"), "it is not the second's"


def test_a_group_that_is_superseded_between_commit_and_pruning_removes_nothing(root, monkeypatch):
    """It was stopped right after its commit, and continued after another had taken over and committed more."""
    first, second = group(root, keep=1, spaced=0), group(root, keep=3, spaced=0)
    first.claim()
    first.starts = 2  # it is not the first group, so that it would write whose the run is
    committed = first._committed

    def stopped_before(step):
        second.claim()
        write(second, 8)
        write(second, 12)
        committed(step)

    monkeypatch.setattr(first, "_committed", stopped_before)
    assert write(first, 4).fault is None
    assert second.steps() == [12, 8, 4]
    assert write(second, 16).fault is None, "the run is still its own"
    with pytest.raises(Superseded):
        first.check_claim()


def test_on_an_object_store_a_group_learns_between_two_steps_that_it_is_superseded(root):
    store = Location(root.fs, root.path, "s3")
    first, second = group(store), group(store)
    first.claim()
    first.watch_claim()
    first.look.thread.join()
    first.watch_claim()
    first.look.thread.join()
    second.claim()
    first.look()
    first.look.thread.join()
    with pytest.raises(Superseded):
        first.watch_claim()


def test_a_run_that_is_taken_over_ends_and_the_one_that_took_it_goes_on(tmp_path, monkeypatch):
    """The first notices at its next look, and neither prunes nor rolls back after that."""
    monkeypatch.setattr("orchestrator.control.LOOK_EVERY_S", 0)
    fit(tmp_path / "alone", HOOKED)

    def take_over(_network):
        deadline = time.monotonic() + 20
        while steps_kept(tmp_path / "run") != [0, 4, 8] and time.monotonic() < deadline:
            time.sleep(0.01)
        prepared(tmp_path / "run", HOOKED)

    with pytest.raises(Superseded):
        fit(tmp_path / "run", HOOKED, hooks={10: take_over})
    assert steps_kept(tmp_path / "run") == [0, 4, 8]
    assert fit(tmp_path / "run", HOOKED)["status"] == "finished"
    assert state_of(tmp_path / "run") == state_of(tmp_path / "alone")


def test_failures_are_counted_in_a_row_and_too_many_end_the_run_with_the_remedy(root, monkeypatch):
    checkpoints = group(root, max_failures=2)
    checkpoints.claim()
    write(checkpoints, 0)

    def full(path, data):
        raise OSError(28, "No space left on device")

    def fail(step):
        with monkeypatch.context() as patch:
            patch.setattr(Location, "write", full)
            assert "No space left" in write(checkpoints, step).fault

    fail(4)
    checkpoints.give_up_if_hopeless()
    assert write(checkpoints, 8).fault is None
    fail(12)
    checkpoints.give_up_if_hopeless()
    fail(16)
    with pytest.raises(Exception, match=r"2 checkpoints in a row could not .*newest is .*/checkpoints/8; make room"):
        checkpoints.give_up_if_hopeless()


def test_what_a_death_between_a_commit_and_its_pruning_has_left_is_not_chosen_from(root):
    """A run that was killed there goes back to where one goes back to that was not."""
    checkpoints = group(root, keep=2, spaced=1, every=4)
    checkpoints.claim()
    made(root, *range(0, 25, 4))
    assert checkpoints.staying() == []
    checkpoints.newest = root / "checkpoints" / 20  # 24 is damaged
    assert checkpoints.staying() == [20, 16, 0]
    checkpoints.newest = root / "checkpoints" / 24
    assert checkpoints.staying() == [24, 20, 16, 0]
    assert checkpoints.steps() == [24, 20, 16, 12, 8, 4, 0]
    checkpoints.prune(24)
    assert checkpoints.steps() == checkpoints.staying() == [24, 20, 16, 0]


def test_a_checkpoint_that_cannot_be_pruned_costs_nothing(root, monkeypatch):
    checkpoints = group(root, keep=1, spaced=0)
    checkpoints.claim()
    write(checkpoints, 4)
    original = Location.remove

    def kept_by_the_disk(path):
        if path.name == "4":
            raise OSError("busy")
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "remove", kept_by_the_disk)
        assert write(checkpoints, 8).fault is None
    assert checkpoints.steps() == [8], "what is left of the other is no checkpoint"
    assert write(checkpoints, 12).fault is None
    assert names(root) == ["12"], "the next one takes the rest away"
    assert found(root) == (12, [])
    assert names(root) == ["12"], "the next start has removed it"


def test_a_lost_manifest_of_the_only_checkpoint_is_no_fresh_start(root):
    made(root, 8)
    (root / "checkpoints" / 8 / "manifest.json").remove()
    with pytest.raises(CheckpointError, match=r"checkpoints/8: has no manifest"):
        found(root)
    assert names(root) == ["8"], "nothing was removed"


def test_an_unreadable_manifest_after_a_rollback_is_named_and_not_removed(root):
    made(root, 4, 12, rollbacks=1)
    (root / "checkpoints" / 12 / "manifest.json").write(b"{")
    step, faults = found(root, None, Rollback(1, 9, 4, "lost", 1, ("seed",), 0))
    assert step == 4
    assert "checkpoints/12/manifest.json: damaged" in faults[0]
    (root / "checkpoints" / 4).remove()
    with pytest.raises(CheckpointError, match=r"12/manifest\.json: damaged"):
        found(root, None, Rollback(1, 9, 4, "lost", 1, ("seed",), 0))
    assert names(root) == ["12"]


def test_workers_that_die_without_a_new_checkpoint_are_not_replaced_for_ever(root):
    for _ in range(3):
        group(root).claim(attempt=1, max_failures=2)
    with pytest.raises(JEMError, match="died 3 times without a new checkpoint; the last time without a word"):
        group(root).claim(attempt=1, max_failures=2)
    (root / "failure.txt").write(b"rank 0 of 1\nTraceback\nValueError: odd\n")
    with pytest.raises(JEMError, match=r"with ValueError: odd \(.*failure.txt\)"):
        group(root).claim(attempt=1, max_failures=2)
    again = group(root)
    again.claim(attempt=2, max_failures=2)  # the same command, once more
    assert write(again, 4).fault is None
    for _ in range(2):
        group(root).claim(attempt=2, max_failures=2)
    with pytest.raises(JEMError, match="died 3 times without a new checkpoint"):  # as many as before there was one
        group(root).claim(attempt=2, max_failures=2)


def test_a_reason_that_others_died_of_is_not_given_for_a_later_death(root):
    group(root).claim(attempt=1, max_failures=0)
    (root / "failure.txt").write(b"rank 0 of 1\nTraceback\nValueError: mended long ago\n")
    group(root).claim(attempt=2, max_failures=0)
    with pytest.raises(JEMError, match=r"killed \(out of memory\?\), or .*recovery\.hang_timeout=7 s: raise that"):
        group(root).claim(attempt=2, max_failures=0, hang_timeout=7.0)


def test_half_a_note_of_workers_that_were_killed_while_they_wrote_it_goes_with_the_next_group(root):
    group(root).claim(attempt=1)
    for half in (".failure.txt.0123abcd.tmp", ".owner.0123abcd.tmp", ".run.json.0123abcd.tmp"):
        (root / half).write(b"half")
    group(root).claim(attempt=1)
    left = [file.name for file in root.children() if file.name.endswith(".tmp")]
    assert left == [".run.json.0123abcd.tmp"]  # the driver's own, which may be writing it


def test_a_driver_that_is_out_of_date_does_not_take_the_run_back(root):
    group(root).claim(attempt=3)
    with pytest.raises(JEMError, match=r"another driver has taken this run over \(attempt 3\)"):
        group(root).claim(attempt=2)


def test_a_request_to_stop_in_a_step_that_has_a_checkpoint_writes_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.control.LOOK_EVERY_S", 0)
    (tmp_path / "stop").write_bytes(b"1")
    outcome = fit(tmp_path, "checkpoint.every=1")
    assert (outcome["status"], outcome["step"]) == ("stopped", 1)
    assert [event["step"] for event in log_of(tmp_path, "checkpoint")] == [0, 1]


def test_a_run_that_failed_to_write_one_goes_on_and_says_so_in_its_log(tmp_path, monkeypatch):
    original, fit_alone = Location.write, fit(tmp_path / "alone")

    def full(path, data):
        if "/run/checkpoints/4/" in path.path:
            raise OSError(28, "No space left on device")
        original(path, data)

    monkeypatch.setattr(Location, "write", full)
    outcome = fit(tmp_path / "run")
    assert outcome["status"] == fit_alone["status"] == "finished"
    events = log_of(tmp_path / "run", "failed_checkpoint")
    assert [(e["step"], e["newest"]) for e in events] == [(4, f"{tmp_path}/run/checkpoints/0")]
    assert "No space left on device" in events[0]["reason"]
    assert steps_kept(tmp_path / "run") == [0, 8, 12]
    assert state_of(tmp_path / "run") == state_of(tmp_path / "alone")


def test_events_of_a_checkpoint_that_failed_are_carried_by_the_next(tmp_path, monkeypatch):
    original = Location.write

    def full(path, data):
        if "/checkpoints/4/" in path.path:
            raise OSError(28, "No space left on device")
        original(path, data)

    monkeypatch.setattr(Location, "write", full)
    fit(tmp_path)
    carried = b"".join(
        checkpoint.read_manifest(Location.of(tmp_path) / "checkpoints" / step).read("events.jsonl")
        for step in steps_kept(tmp_path)
    )
    log = (tmp_path / "events.jsonl").read_bytes()
    assert log.startswith(carried)
    assert {e["step"] for e in map(json.loads, carried.splitlines()) if e["kind"] == "metrics"} == {3, 5, 6, 9, 10, 12}


def test_a_killed_runs_half_written_checkpoint_is_gone_when_it_goes_on(tmp_path, monkeypatch):
    original = Location.write

    def killed(path, data):
        if "/checkpoints/8/part-" in path.path:
            raise Death
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "write", killed)
        with pytest.raises(Death):
            fit(tmp_path, HOOKED, hooks={12: die})
    assert (tmp_path / "checkpoints" / "8" / "model.safetensors").exists(), "there was nothing to clean up"
    assert fit(tmp_path, HOOKED, attempt=2)["status"] == "finished"
    assert [event["step"] for event in log_of(tmp_path, "attempt")] == [0, 4]
    assert steps_kept(tmp_path) == [0, 4, 8, 12]
