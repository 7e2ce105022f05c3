"""Disks that are full, or suddenly read-only: a real tmpfs that the worker loop writes its checkpoints to."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "orchestrator"))
from worker_runs import HOOKED, fit, log_of, state_of, steps_kept, trace

from jem.checkpoint import committed, newest_good
from jem.files import Location

pytestmark = pytest.mark.faults

SIZE, STEPS, LAST_GOOD = 4 << 20, 28, 8
RUN = (
    *(HOOKED, f"steps={STEPS}", "replay.capacity=400", "checkpoint.every=4", "checkpoint.keep=100"),
    *("checkpoint.max_failures=3", "tracking.images_every=6"),
)
"""A checkpoint is some 150 kB, of which 100 are chains."""


class Disk:
    """A small filesystem of its own."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        mounting = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        done = subprocess.run(mounting, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"NOT TESTED: no disk can be filled without the right to mount one ({done.stderr.strip()})")

    def fill(self, leave=0):
        """Up to the last byte, or but for `leave` of them."""
        with open(self.folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        if leave:
            with open(self.folder / "filler", "r+b") as file:
                file.truncate((self.folder / "filler").stat().st_size - leave)

    def make_room(self):
        (self.folder / "filler").unlink()

    def remount(self, how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)

    def read_only(self):
        self.remount("ro")

    def writable(self):
        self.remount("rw")

    def close(self):
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert fit(folder, *RUN)["status"] == "finished"
    return folder


def settled():
    """Wait until no checkpoint is being written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def contents(run, steps=None):
    """{path: digest} of the committed checkpoints, of `steps` alone where given."""
    files = (p for d in committed(Location.of(run) / "checkpoints") for p in d.local.iterdir())
    found = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return {k: v for k, v in found.items() if steps is None or int(k.split("/")[1]) in steps}


def whole(run):
    """All committed checkpoints are as they were written."""
    return [newest_good([directory])[1] for directory in committed(Location.of(run) / "checkpoints")]


FAULTS = {
    "full in the middle of a checkpoint": (lambda disk: disk.fill(leave=64 << 10), Disk.make_room, "No space left"),
    "full to the last byte": (Disk.fill, Disk.make_room, "No space left"),
    "read-only": (Disk.read_only, Disk.writable, "Read-only file system"),
}


@pytest.fixture(params=FAULTS)
def fault(request):
    return FAULTS[request.param]


def log_path(disk, run, words):
    """Beside the checkpoints, but for a disk that is made read-only, which the kernel refuses while a log is open."""
    return run / "events.jsonl" if words != "Read-only file system" else disk.folder.parent / "events.jsonl"


def test_training_goes_on_while_the_disk_is_away_and_writes_again_once_it_is_back(disk, fault, undisturbed):
    begin, end, words = fault
    run, kept, meanwhile = disk.folder / "run", {}, []
    log = log_path(disk, run, words)

    def break_it(_network):
        settled()
        kept.update(contents(run))
        begin(disk)

    def mend_it(_network):
        settled()
        meanwhile.append(steps_kept(run))
        assert contents(run) == kept, "an old checkpoint was touched"
        end(disk)

    outcome = fit(run, *RUN, hooks={9: break_it, 18: mend_it}, log_path=log)
    assert (outcome["status"], outcome["step"]) == ("finished", STEPS)
    assert meanwhile == [[0, 4, LAST_GOOD]]
    assert len(kept) == 3 * 6
    failed = log_of(log.parent, "failed_checkpoint")
    assert [event["step"] for event in failed] == [12, 16]
    assert all(words in event["reason"] for event in failed)
    assert {event["newest"] for event in failed} == {f"{run}/checkpoints/8"}
    assert [event["step"] for event in log_of(log.parent, "checkpoint")] == [0, 4, 8, 20, 24, 28]
    assert steps_kept(run) == [0, 4, 8, 20, 24, 28]
    assert contents(run, (0, 4, 8)) == kept
    assert not any(whole(run))
    assert trace(log.parent) == trace(undisturbed), "events were lost, or training was not the same"
    assert state_of(run) == state_of(undisturbed)


@pytest.mark.parametrize("at", [9, 27], ids=["in the middle", "before the last step"])
def test_a_disk_that_stays_away_ends_the_run_cleanly_and_the_same_command_goes_on_exactly(disk, fault, undisturbed, at):
    begin, end, words = fault
    run, kept = disk.folder / "run", {}
    log = log_path(disk, run, words)

    def break_it(_network):
        settled()
        kept.update(contents(run))
        begin(disk)

    outcome = fit(run, *RUN, hooks={at: break_it}, log_path=log)
    newest = max(steps_kept(run))
    assert newest == (LAST_GOOD if at == 9 else 24)
    assert (outcome["status"], outcome["exit_code"]) == ("failed", 1)
    assert f"{run}/checkpoints: 3 checkpoints in a row could not be written" in outcome["message"]
    assert f"the newest is {run}/checkpoints/{newest}" in outcome["message"]
    assert "make room or make it writable, then give the same command again" in outcome["message"]
    if words != "No space left" or begin is not Disk.fill:  # there the log waited in memory, and ended with it
        failed = log_of(log.parent, "failed_checkpoint")
        assert [event["step"] for event in failed] == ([12, 16, 20] if at == 9 else [28, 28, 28])
        assert all(words in event["reason"] for event in failed)
    assert contents(run) == kept
    assert not any(whole(run))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(map(str, steps_kept(run)))

    if begin is not FAULTS["full in the middle of a checkpoint"][0]:  # there is room for a word
        too_early = fit(run, *RUN, attempt=2, log_path=log)
        assert (too_early["status"], too_early["exit_code"]) == ("failed", 1)
        assert words in too_early["message"]
        assert "make room or make it writable, then give the same command again" in too_early["message"]
        assert contents(run) == kept

    end(disk)
    outcome = fit(run, *RUN, attempt=3, log_path=log)
    assert (outcome["status"], outcome["step"]) == ("finished", STEPS)
    assert log_of(log.parent, "attempt")[-1]["step"] == newest
    assert state_of(run) == state_of(undisturbed)
    assert trace(log.parent) == trace(undisturbed)
    assert not any(whole(run))


def test_a_disk_that_is_full_from_the_first_step_on_is_told_as_that(disk):
    run = disk.folder / "run"
    run.mkdir()
    disk.fill(leave=64 << 10)
    outcome = fit(run, *RUN)
    assert (outcome["status"], outcome["exit_code"]) == ("failed", 1)
    assert "3 checkpoints in a row could not be written, there is none; make room" in outcome["message"]
    assert len(log_of(run, "failed_checkpoint")) == 3
    disk.make_room()
    assert fit(run, *RUN, attempt=2)["status"] == "finished"
