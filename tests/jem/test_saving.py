"""Checkpoints written while training goes on: when they count, and what is left where they could not be written."""

import errno
import hashlib
import itertools
import os
import shutil
import threading
import time

import pytest
import torch
from spawn import run_ranks
from toys import labelled_batch, small

from jem.checkpoint import MANIFEST, committed, newest_good, read_manifest, restore
from jem.errors import CheckpointError, DivergedError
from jem.files import Location
from jem.optim import optimizer_tensors
from jem.saving import Saved, Writer, save
from jem.train import start, train
from jem.world import World

SHAPE, CLASSES, HERE = (1, 4, 4), 3, torch.device("cpu")
CONFIG = small(model__name="small_conv", model__channels=[3], model__norm="batch", optimizer__ema_decay=0.9)
PATIENCE_S = 20


def begin(world=World()):  # noqa: B008
    return start(CONFIG, SHAPE, CLASSES, world, HERE)


def go_on(state, steps, world=World()):  # noqa: B008
    def batch_at(step):
        images = torch.randn(CONFIG.batch_size, *SHAPE, generator=torch.Generator().manual_seed(step))
        return labelled_batch(images, torch.arange(CONFIG.batch_size) % CLASSES, world.share(CONFIG.batch_size))

    for _ in train(state, batch_at, CONFIG, steps, world):
        pass
    return state


def everything(state):
    """All that a run's future depends on."""
    found = {f"network {k}": v for k, v in state.network.state_dict().items()}
    found |= {f"average {k}": v for k, v in state.average.state_dict().items()}
    found |= {f"optimizer {k}": v for k, v in optimizer_tensors(state.network, state.optimizer).items()}
    found |= {"chains": state.replay.chains, "generator": state.generator.get_state()}
    return {key: value.clone() for key, value in found.items()} | {"step": torch.tensor(state.step)}


def differing(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def restored(directory):
    restore(read_manifest(directory), state := begin(), World(), seed=0)
    return state


def held(directory):
    return everything(restored(directory))


def tree(root):
    """{path: digest} of all files below, temporary ones too."""
    files = (path for path in root.local.rglob("*") if path.is_file())
    return {str(path.relative_to(root.local)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def root(tmp_path):
    return Location.of(tmp_path / "checkpoints")


@pytest.fixture
def writer():
    return Writer(World(), HERE)


def write_by(monkeypatch, function):
    """Every Location.write becomes `function(original, path, data)`."""
    original = Location.write
    monkeypatch.setattr(Location, "write", lambda path, data: function(original, path, data))


@pytest.fixture
def held_back(monkeypatch):
    """A disk on which no write of a checkpoint ends before the event is set."""
    release = threading.Event()

    def slow(original, path, data):
        assert release.wait(PATIENCE_S), "training waited for the disk"
        original(path, data)

    write_by(monkeypatch, slow)
    yield release
    release.set()


def test_training_goes_on_meanwhile_and_the_checkpoint_holds_what_was_when_it_began(root, writer, held_back):
    state = go_on(begin(), 2)
    sums, best = {"meter": torch.arange(3.0)}, {"w": torch.ones(2)}
    info = {"metrics": {"loss": 1.0}}
    then = everything(state)
    writer.begin(root / 2, state, info, sums, best)
    go_on(state, 4)
    sums["meter"].zero_()
    best["w"].zero_()
    info["metrics"]["loss"] = 9.0
    assert writer.poll() is None
    assert committed(root) == []
    now = everything(state)
    assert len(differing(now, then)) > 10
    assert {"chains", "generator", "step"} <= set(differing(now, then))

    held_back.set()
    saved = writer.finish()
    assert (saved.step, saved.directory, saved.fault) == (2, root / 2, None)
    assert writer.poll() is None, "it was told twice"
    manifest = read_manifest(root / 2)
    manifest.verify()
    assert differing(held(root / 2), then) == []
    assert manifest.info == {"metrics": {"loss": 1.0}}
    assert manifest.tensors("rank-00000-of-00001.safetensors")["meter"].tolist() == [0, 1, 2]
    assert manifest.tensors("best.safetensors")["w"].tolist() == [1, 1]
    assert differing(everything(state), now) == [], "writing changed the run"


def test_one_writer_writes_one_state_after_the_other_and_mixes_none_of_them(root, writer):
    """It keeps memory for the copies from one time to the next."""
    state, states = begin(), {}
    for step in (1, 2, 3):
        states[step] = everything(go_on(state, step))
        writer.begin(
            root / step,
            state,
            {},
            {"meter": torch.full((step,), float(step))},
            {"w": torch.ones(1)} if step == 2 else None,
        )
        go_on(state, step + 1)
        assert writer.finish().fault is None
        state = restored(root / step)
    for step, then in states.items():
        read_manifest(root / step).verify()
        assert differing(held(root / step), then) == []
        assert read_manifest(root / step).tensors("rank-00000-of-00001.safetensors")["meter"].tolist() == [step] * step
        assert ("best.safetensors" in read_manifest(root / step).files) == (step == 2)


def test_numbers_whose_sum_overflows_are_finite(root, writer):
    state = begin()
    state.replay.chains[:2] = 3e38
    writer.begin(root / 0, state, {}, {})
    assert writer.finish().fault is None
    state.replay.chains[1] = -torch.inf
    state.replay.chains[0] = torch.inf
    with pytest.raises(DivergedError, match="the replay buffer is not finite"):
        writer.begin(root / 1, state, {}, {})


def test_poll_tells_of_the_checkpoint_without_being_waited_for(root, writer, held_back):
    writer.begin(root / 0, begin(), {}, {})
    assert [writer.poll() for _ in range(3)] == [None] * 3
    held_back.set()
    told, deadline = None, time.monotonic() + PATIENCE_S
    while told is None and time.monotonic() < deadline:
        told = writer.poll()
    assert told is not None
    assert told.fault is None


def test_one_checkpoint_at_a_time(root, writer, held_back):
    writer.begin(root / 0, begin(), {}, {})
    with pytest.raises(AssertionError, match="one checkpoint at a time"):
        writer.begin(root / 1, begin(), {}, {})
    held_back.set()
    assert writer.finish().step == 0


def test_the_manifest_comes_last_and_lists_what_is_then_there(root, monkeypatch):
    order, there = [], []

    def watched(original, path, data):
        order.append(path.name)
        if path.name == MANIFEST:
            there.extend(child.name for child in path.parent.children() if not child.name.startswith("part-"))
        original(path, data)

    write_by(monkeypatch, watched)
    save(root / 2, begin(), World(), {}, {"meter": torch.zeros(1)}, events=b"{}\n")
    assert order[-2:] == ["part-00000-of-00001.json", MANIFEST]
    assert sorted(there) == sorted(order[:-2]) == sorted(read_manifest(root / 2).files)
    assert sorted(path.name for path in (root / 2).children()) == sorted([*there, MANIFEST])


class Snapshots:
    """A copy of the folder at every moment that a death could catch: before and after each change on the disk.

    A change is a file made, renamed or removed. What a power cut makes of unsynced data is another matter.
    """

    def __init__(self, root, to, monkeypatch):
        self.root, self.to, self.taken = root, to, []
        for owner, name in ((os, "fsync"), (os, "replace"), (Location, "remove"), (Location, "mkdir")):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))

    def around(self, function):
        def wrapped(*arguments):
            self.take()
            if function.__name__ == "remove" and arguments[0].is_dir():  # one file after the other, in any order
                for child in reversed(arguments[0].children()):
                    child.local.unlink()
                    self.take()
            result = function(*arguments)
            self.take()
            return result

        return wrapped

    def take(self):
        target = self.to / str(len(self.taken))
        shutil.copytree(self.root.local, target)
        self.taken.append(Location.of(target))


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_death_at_any_moment_of_writing_leaves_whole_checkpoints_or_none(root, tmp_path, monkeypatch, again):
    """No file that is half there is ever taken for a checkpoint, nor called a damaged one."""
    state = go_on(begin(), 2)
    save(root / 2, state, World(), {}, {})
    before = everything(state)
    first = everything(other := go_on(begin(), 4))
    if again:
        save(root / 4, other, World(), {"first": True}, {"meter": torch.zeros(5)})
    go_on(state, 4)
    after = everything(state)
    with monkeypatch.context() as patch:
        snapshots = Snapshots(root, tmp_path / "snapshots", patch)
        save(root / 4, state, World(), {"first": False}, {}, events=b"{}\n")
    assert len(snapshots.taken) > 30
    steps = []
    for folder in snapshots.taken:
        manifest, faults = newest_good(committed(folder))
        assert faults == []
        steps.append(manifest.step)
        expected = before if manifest.step == 2 else first if manifest.info["first"] else after
        assert differing(held(manifest.directory), expected) == []
    seen = [step for step, _ in itertools.groupby(steps)]
    assert seen == ([4, 2, 4] if again else [2, 4]), "it counts from one moment on, and stays"
    assert read_manifest(root / 4).info == {"first": False}


@pytest.mark.parametrize("k", range(8))
def test_a_disk_that_is_full_at_the_kth_write_costs_that_checkpoint_alone(root, writer, monkeypatch, k):
    state = go_on(begin(), 2)
    save(root / 2, state, World(), {}, {})
    kept = tree(root)
    go_on(state, 4)
    count = iter(range(99))
    with monkeypatch.context() as patch:

        def full(original, path, data):
            if next(count) >= k:
                raise OSError(errno.ENOSPC, "No space left on device", path.path)
            original(path, data)

        write_by(patch, full)
        called = []
        writer.begin(root / 4, state, {}, {}, events=b"{}\n", after_commit=lambda: called.append(1))
        saved = writer.finish()
        assert next(count) > k, "there are fewer writes"
    assert (saved.step, saved.directory) == (4, root / 4)
    assert "OSError: [Errno 28] No space left on device" in saved.fault
    assert called == []
    assert tree(root) == kept, "something half-written is left, or the one before was touched"
    writer.begin(root / 4, state, {}, {})
    assert writer.finish().fault is None
    assert newest_good(committed(root))[0].step == 4


def test_a_folder_that_cannot_be_made_is_a_fault_like_any_other(root, writer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Location, "mkdir", lambda _: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
        writer.begin(root / 2, begin(), {}, {})
        assert "Read-only" in writer.finish().fault
    writer.begin(root / 2, begin(), {}, {})
    assert writer.finish().fault is None


def test_parts_that_cannot_be_removed_count_for_nothing(root, writer, monkeypatch):
    state = begin()
    save(root / 0, state, World(), {}, {})
    go_on(state, 2)
    with monkeypatch.context() as patch:

        def read_only_from_now_on(original, path, data):
            if path.name == MANIFEST:
                patch.setattr(Location, "remove", lambda _: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
                raise OSError(errno.EROFS, "Read-only")
            original(path, data)

        write_by(patch, read_only_from_now_on)
        writer.begin(root / 2, state, {}, {})
        assert "Read-only" in writer.finish().fault
    assert (root / 2).exists()
    assert newest_good(committed(root))[0].step == 0
    writer.begin(root / 2, state, {}, {})
    assert writer.finish().fault is None
    assert newest_good(committed(root))[0].step == 2


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3)])
def test_what_is_no_fault_of_the_storage_is_raised(root, writer, monkeypatch, error):
    def broken(original, path, data):
        if path.name.startswith("chains"):
            raise error
        original(path, data)

    with monkeypatch.context() as patch:
        write_by(patch, broken)
        writer.begin(root / 2, begin(), {}, {})
        with pytest.raises(type(error)):
            writer.finish()
    assert committed(root) == []


@pytest.mark.parametrize("error", [OSError("the run's folder is away"), RuntimeError("superseded")])
def test_what_is_called_before_each_file_can_keep_the_checkpoint_from_being_made(root, writer, error):
    seen = []

    def refuse():
        seen.append(len((root / 2).children()))
        if len(seen) == 6:
            raise error

    writer.begin(root / 2, begin(), {}, {}, before_write=refuse, after_commit=lambda: seen.append("after"))
    if isinstance(error, OSError):
        assert "the run's folder is away" in writer.finish().fault
    else:
        with pytest.raises(RuntimeError, match="superseded"):
            writer.finish()
    assert len(seen) == 6, "five files, and then the manifest"
    assert seen == sorted(seen)
    assert committed(root) == []


def test_a_writer_that_is_not_to_commit_leaves_alone_what_another_has_committed_there(root, writer):
    """Its place may long be somebody else's: it was stopped in the middle, and taken for dead."""
    other = {}

    def superseded():
        if len((root / 2).children()) < 5:
            return
        save(root / 2, go_on(begin(), 2), World(), {"by": "another"}, {}, events=b"{}\n")
        other.update(tree(root))
        raise RuntimeError("superseded")

    writer.begin(root / 2, begin(), {}, {}, before_write=superseded)
    with pytest.raises(RuntimeError, match="superseded"):
        writer.finish()
    assert tree(root) == other
    assert newest_good(committed(root))[0].info == {"by": "another"}


def test_what_fails_after_the_commit_makes_no_failure_of_it(root, writer, caplog):
    def fail():
        raise OSError("the store is away")

    writer.begin(root / 0, begin(), {}, {}, after_commit=fail)
    assert writer.finish().fault is None
    assert newest_good(committed(root))[0].step == 0
    assert "the store is away" in caplog.text


def test_what_is_called_after_the_commit_finds_it_committed(root, writer):
    seen = []
    writer.begin(root / 2, begin(), {}, {}, after_commit=lambda: seen.extend(committed(root)))
    assert writer.finish().fault is None
    assert seen == [root / 2]


def test_saving_at_once_raises_what_a_writer_tells(root, monkeypatch):
    def full(original, path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_by(monkeypatch, full)
    with pytest.raises(CheckpointError, match=r"checkpoints/2: cannot be written \(OSError: .*No space left"):
        save(root / 2, begin(), World(), {}, {})


# Two ranks, one of whose disks fails.

DISKS = {
    "rank 1's parts": (1, "chains-00001-of-00002.safetensors"),
    "rank 1's record": (1, "part-00001-of-00002.json"),
    "rank 0's weights": (0, "model.safetensors"),
    "rank 0's manifest": (0, MANIFEST),
}


def with_failing_disks(world, folder):
    """On each rank: what came of one checkpoint for every disk, with what was on it before and after."""
    root, told, original = Location.of(folder), {}, Location.write
    writer, state = Writer(world, HERE), begin(world)
    save(root / 0, state, world, {}, {})
    for step, (disk, (rank, name)) in enumerate(DISKS.items(), start=1):
        go_on(state, step, world)

        def failing(path, data, rank=rank, name=name):
            if (world.rank, path.name) == (rank, name):
                raise OSError(errno.EIO, f"the disk of rank {rank} is broken")
            original(path, data)

        world.barrier()
        before = tree(root)
        Location.write = failing
        writer.begin(root / step, state, {}, {})
        saved = writer.finish()
        Location.write = original
        world.barrier()
        told[disk] = {"saved": (saved.step, saved.fault), "before": before, "after": tree(root)}
        world.barrier()
    writer.begin(root / state.step, state, {}, {"meter": torch.ones(1)})
    told["next"] = writer.finish().fault
    world.barrier()
    told["late"] = late_record(world, root / 9, go_on(state, 9, world))
    return told


def late_record(world, directory, state):
    """Rank 1's disk is slow: is there a manifest before its files are there?"""
    original, seen = Location.write, []
    if world.rank == 1:

        def slow(path, data):
            time.sleep(0.3)
            seen.append((directory / MANIFEST).exists())
            original(path, data)

        Location.write = slow
    writer = Writer(world, HERE)
    writer.begin(directory, state, {}, {})
    fault = writer.finish().fault
    Location.write = original
    return seen, fault


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return Location.of(folder / "run"), run_ranks(with_failing_disks, (2,), folder / "meet", str(folder / "run"))[2]


@pytest.mark.parametrize("disk", DISKS)
def test_a_disk_that_fails_on_any_rank_is_the_same_fault_on_all_and_leaves_all_as_it_was(two_ranks, disk):
    first, second = (rank[disk] for rank in two_ranks[1])
    rank, _ = DISKS[disk]
    step = list(DISKS).index(disk) + 1
    assert first["saved"] == second["saved"]
    said = f"rank {rank}: OSError: [Errno 5] the disk of rank {rank} is broken"
    assert first["saved"] == (step, said)
    assert first["before"].keys() == first["after"].keys(), "something half-written is left"
    assert first["after"] == first["before"] != {}


def test_the_next_checkpoint_of_two_ranks_succeeds_once_the_disk_is_well(two_ranks):
    root, told = two_ranks
    assert [rank["next"] for rank in told] == [None, None]
    manifest, faults = newest_good([root / len(DISKS)])
    assert (manifest.world_size, faults) == (2, [])


def test_the_manifest_waits_for_the_slowest_rank(two_ranks):
    root, told = two_ranks
    seen, fault = told[1]["late"]
    assert fault is None
    assert len(seen) == 3
    assert not any(seen)
    read_manifest(root / 9).verify()


def test_what_any_rank_has_written_is_a_sign_of_life():
    """While rank 0 uploads the network the others, whose shards are there, wait for minutes."""

    class Two(World):
        written = iter([1, 1, 2, 2, 2, 3])

        def sum(self, values):
            return torch.tensor([0, 2 * (len(seen) == 2), next(self.written)]) if len(values) == 3 else values

    seen = []
    writer = Writer(Two(1, 2), HERE)
    writer.pending, writer._committed = Saved(9, Location.of("/nowhere/9"), None), True
    assert writer.finish(lambda: seen.append(len(seen))).step == 9
    assert len(seen) == 2, "the third came with the end"
