"""Workers that gloo connects, killed for real (SIGKILL), and checkpoints damaged in every way; without Ray."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "orchestrator"))
from spawn import run_ranks
from worker_runs import HOOKED, fit, log_of, newest, prepared, state_of, steps_kept, tiny, trace

from jem.checkpoint import MANIFEST, newest_good, read_chains, read_manifest, restore
from jem.config import JEMConfig
from jem.files import Location
from jem.saving import save
from jem.settings import override
from jem.train import start
from jem.world import World
from orchestrator.checkpoints import find
from orchestrator.recovery import Recovery

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

RANKS = (HOOKED, "workers=2", "batch_size=7", "replay.capacity=25", "optimizer.ema_decay=0.9", "evaluate.final=best")
KILLED_AT = (2, 4, 5, 9, 12)
"""Passes: before step 4, which has a checkpoint, in it and in the one after it; likewise of step 8; in the last one."""


def kill(_network):
    os.kill(os.getpid(), signal.SIGKILL)


def disturbed(rank, folder, at, file):
    """A rank of a run that ends by SIGKILL: in pass `at`, or in the middle of writing `file`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if file is not None:
        original = Location.write

        def write(path, data):
            if path.path.endswith(file):
                (path.parent / f".{path.name}.0123abcd.tmp").local.write_bytes(data[: len(data) // 2])
                kill(None)
            original(path, data)

        Location.write = write
    hooks = {at: kill} if at is not None else {12: lambda _: time.sleep(60)}
    fit(Path(folder) / "run", *RANKS, world=World.current(), hooks=hooks)


def killed(folder, at=None, file=None):
    """Run two ranks until SIGKILL; the run's folder."""
    folder.mkdir()
    ranks = mp.spawn(disturbed, (str(folder), at, file), nprocs=2, join=False)
    with contextlib.suppress(mp.ProcessExitedException, mp.ProcessRaisedException):  # whichever is seen first
        while not ranks.join():
            pass
    assert -signal.SIGKILL in [process.exitcode for process in ranks.processes]
    return folder / "run"


WRITING = {
    "a rank's chains": "checkpoints/8/chains-00001-of-00002.safetensors",
    "the manifest": f"checkpoints/8/{MANIFEST}",
}


def go_on(world, folder):
    """The undisturbed run, and every killed one to its end."""
    told = {"whole": fit(Path(folder) / "whole", *RANKS, world=world)}
    for name in (*map(str, KILLED_AT), *WRITING):
        told[name] = fit(Path(folder) / name / "run", *RANKS, world=world, attempt=2)
    return told


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what each rank told, {name: checkpoints right after the kill})."""
    folder = tmp_path_factory.mktemp("killed")
    left = {str(at): steps_kept(killed(folder / str(at), at)) for at in KILLED_AT}
    left |= {name: steps_kept(killed(folder / name, file=file)) for name, file in WRITING.items()}
    return folder, run_ranks(go_on, (2,), folder / "meet", str(folder))[2], left


@pytest.mark.parametrize("name", [*map(str, KILLED_AT), *WRITING])
def test_two_ranks_that_were_killed_end_with_the_same_bits_as_two_that_were_not(runs, name):
    folder, told, left = runs
    assert [rank[name]["status"] for rank in told] == ["finished", "finished"]
    assert state_of(folder / name / "run") == state_of(folder / "whole")
    assert trace(folder / name / "run") == trace(folder / "whole")
    assert steps_kept(folder / name / "run") == steps_kept(folder / "whole")
    attempts = [event["step"] for event in log_of(folder / name / "run", "attempt")]
    assert attempts == [0, max(left[name], default=0)]
    assert attempts[1] < (12 if name in WRITING else int(name))


@pytest.mark.parametrize("name", WRITING)
def test_a_kill_in_the_middle_of_writing_a_checkpoint_leaves_none_and_nothing_of_it(runs, name):
    folder, _, left = runs
    assert 8 not in left[name]
    assert max(left[name]) == 4
    files = [path for path in (folder / name).rglob("*") if path.name.endswith(".tmp") or path.name.startswith("part-")]
    assert files == []


# Damage to the newest of two checkpoints that two ranks wrote.


@dataclass
class Stored:
    """A run's folder, its configuration, and how it ended."""

    folder: Path
    config: object
    before: int
    after: int

    @property
    def newest(self):
        return self.folder / "checkpoints" / str(self.after)

    def found(self):
        manifest, faults = find(Location.of(self.folder), self.config, Recovery(self.config))
        return manifest.step, faults


@pytest.fixture
def stored(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs[0] / "whole", folder)
    stored = Stored(folder, tiny(*RANKS), 8, 12)
    assert stored.found() == (12, [])
    return stored


def test_a_hundred_flipped_bits_are_a_hundred_found_each_by_its_files_name(stored):
    choose = random.Random(0)
    files = sorted(path for path in stored.newest.iterdir())
    assert len(files) == 10
    lengths = [path.stat().st_size for path in files]
    places = [files[i % len(files)] for i in range(50)]  # every file five times,
    places += choose.choices(files, lengths, k=50)  # and every bit as likely as any other
    for path in places:
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        step, faults = stored.found()
        assert (step, len(faults)) == (stored.before, 1), path.name
        assert str(path) in faults[0]
        path.write_bytes(data)
    assert stored.found() == (stored.after, [])


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * share), len(data) - 1)])


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_found_by_its_name(stored, share):
    for path in sorted(stored.newest.iterdir()):
        data = path.read_bytes()
        cut(path, share)
        step, faults = stored.found()
        assert (step, len(faults)) == (stored.before, 1), path.name
        assert str(path) in faults[0]
        path.write_bytes(data)


def test_a_missing_file_is_found_by_its_name_and_without_its_manifest_it_is_no_checkpoint(stored):
    for path in sorted(stored.newest.iterdir()):
        if path.name == MANIFEST:
            continue
        data = path.read_bytes()
        path.unlink()
        step, faults = stored.found()
        assert (step, len(faults)) == (stored.before, 1), path.name
        assert str(path) in faults[0]
        path.write_bytes(data)
    (stored.newest / MANIFEST).unlink()
    step, faults = stored.found()
    assert step == stored.before
    assert faults == [f"{stored.newest}: has no manifest, its writing was interrupted"]
    assert not stored.newest.exists()


def test_a_whole_file_of_another_checkpoint_is_found_by_its_name(stored):
    """It is no damage that reading it would show: sizes and format are right."""
    earlier = stored.folder / "checkpoints" / str(stored.before)
    for path in sorted(stored.newest.iterdir()):
        data, other = path.read_bytes(), (earlier / path.name).read_bytes()
        if data == other:  # the best weights so far
            continue
        path.write_bytes(other)
        step, faults = stored.found()
        assert (step, len(faults)) == (stored.before, 1), path.name
        assert str(path if path.name != MANIFEST else stored.newest) in faults[0]
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["chains-00002-of-00003.safetensors", "notes.txt", "folder"])
def test_a_file_that_does_not_belong_there_is_found_by_its_name(stored, name):
    if name == "folder":
        (stored.newest / name).mkdir()
    else:
        (stored.newest / name).write_bytes(b"x")
    step, faults = stored.found()
    assert step == stored.before
    assert f"{stored.newest}/{name}: does not belong to this checkpoint" in faults[0]


def test_damage_to_several_checkpoints_is_walked_back_through(stored):
    (stored.newest / "model.safetensors").write_bytes(b"")
    cut(stored.folder / "checkpoints" / "8" / "ema.safetensors", 0.5)
    cut(stored.folder / "checkpoints" / "4" / MANIFEST, 0.5)
    step, faults = stored.found()
    assert step == 0
    named = ("12/model.safetensors", "8/ema.safetensors", "4/manifest.json")
    assert [name in fault for name, fault in zip(named, faults, strict=True)] == [True] * 3


FILES = (
    *("model.safetensors", "optimizer.safetensors", "ema.safetensors", "best.safetensors", "events.jsonl"),
    *("chains-00000-of-00001.safetensors", "rank-00000-of-00001.safetensors", MANIFEST),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fit(folder, *RANKS, "workers=1")
    assert sorted(FILES) == sorted(path.name for path in (folder / "checkpoints" / "12").iterdir())
    return folder, state_of(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_run_whose_newest_checkpoint_is_damaged_says_so_and_trains_from_the_one_before_to_the_same_end(
    alone, tmp_path, file
):
    shutil.copytree(alone[0], tmp_path / "run")
    cut(tmp_path / "run" / "checkpoints" / "12" / file, 0.999)
    outcome = fit(tmp_path / "run", *RANKS, "workers=1", attempt=2)
    assert (outcome["status"], outcome["step"]) == ("finished", 12)
    last = log_of(tmp_path / "run", "attempt")[-1]
    assert last["step"] == 8
    assert f"checkpoints/12/{file}" in last["why"]
    assert state_of(tmp_path / "run") == alone[1]
    assert newest_good([Location.of(tmp_path / "run" / "checkpoints" / "12")])[1] == []


# Other numbers of workers.


@dataclass
class Group:
    """Ranks that are threads: what they agree on goes through here instead of gloo."""

    size: int
    told: list = field(default_factory=list)

    def __post_init__(self):
        self.told = [None] * self.size
        self.meet = threading.Barrier(self.size, timeout=60)


@dataclass(frozen=True)
class Thread(World):
    group: Group = None

    def sum(self, values):
        self.group.told[self.rank] = values
        self.group.meet.wait()
        total = torch.stack(self.group.told).sum(dim=0)
        self.group.meet.wait()
        return total


SHAPE = (1, 1, 1)
SMALL = {"model.name": "small_conv", "model.channels": [1], "batch_size": 1, "optimizer.warmup_steps": 0}


def state_for(world, capacity, n_classes):
    config = override(JEMConfig(seed=0), SMALL | {"replay.capacity": capacity})
    return start(config, SHAPE, n_classes, world)


def written_by(size, folder, capacity, n_classes):
    """A checkpoint of `size` ranks, chain i of which holds the value i, and the sum of rank r holds 2^r."""
    group, directory = Group(size), Location.of(folder) / 3
    worlds = [Thread(rank, size, group) for rank in range(size)]
    states = [state_for(world, capacity, n_classes) for world in worlds]
    for world, state in zip(worlds, states, strict=True):
        rows = world.share(capacity)
        state.step = 3
        state.replay.chains = torch.arange(rows.start, rows.stop).float().reshape(-1, *SHAPE)
    errors = []

    def write(world, state):
        try:
            save(directory, state, world, {}, {"meter": torch.tensor([2.0**world.rank])})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in zip(worlds, states, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    manifest = read_manifest(directory)
    manifest.verify()
    assert sum("chains" in name for name in manifest.files) == size
    return manifest


@settings(max_examples=6)
@given(capacity=st.integers(8, 70), n_classes=st.integers(1, 10))
@pytest.mark.parametrize("old", range(1, 9))
def test_any_number_of_workers_up_to_8_goes_on_with_the_chains_of_any_other_none_lost_none_twice(
    tmp_path_factory, old, capacity, n_classes
):
    folder = tmp_path_factory.mktemp("shards")
    manifest = written_by(old, folder, capacity, n_classes)
    for new in range(1, 9):
        states = [state_for(World(rank, new), capacity, n_classes) for rank in range(new)]
        sums = [restore(manifest, state, World(r, new), seed=0)["meter"] for r, state in enumerate(states)]
        shards = [state.replay.chains.flatten().long() for state in states]
        assert torch.cat(shards).tolist() == list(range(capacity))
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        for state, shard in zip(states, shards, strict=True):
            assert torch.equal(state.replay.labels(torch.arange(len(shard))), shard % n_classes)
        assert sum(sums).item() == 2**old - 1, "sums of metrics are lost, or counted twice"
        generators = {bytes(state.generator.get_state().numpy()) for state in states}
        assert len(generators) == new, "two ranks would draw the same noise"
        assert {state.world_epoch for state in states} == {int(old != new)}
    shutil.rmtree(folder)


def change_the_world(world, folder):
    """One worker takes the run to step 4, three go on to 8, two to 12."""
    folder, to = Path(folder) / "run", {1: 4, 3: 8, 2: 12}[world.size]
    settings = (*RANKS, f"workers={world.size}", f"steps={to}")
    chains = prepared(folder, *settings, world=world).state.replay.chains.clone()
    world.barrier()
    return chains, fit(folder, *settings, world=world), newest(folder).world_size


def test_real_workers_in_other_numbers_take_the_chains_over_and_train_on(tmp_path):
    told = run_ranks(change_the_world, (1, 3, 2), tmp_path / "meet", str(tmp_path))
    folder = tmp_path / "run"
    for size, step, before in ((3, 4, 1), (2, 8, 3)):
        kept = read_manifest(Location.of(folder) / "checkpoints" / step)
        assert kept.world_size == before
        assert torch.equal(torch.cat([chains for chains, _, _ in told[size]]), read_chains(kept, World(), 25).chains)
    for size, step in ((1, 4), (3, 8), (2, 12)):
        assert [(outcome["status"], outcome["step"]) for _, outcome, _ in told[size]] == [("finished", step)] * size
        assert {wrote for _, _, wrote in told[size]} == {size}
    attempts = [(event["step"], event["workers"]) for event in log_of(folder, "attempt")]
    assert attempts == [(0, 1), (4, 3), (8, 2)]
    assert "3 workers wrote it, 2 go on" in log_of(folder, "attempt")[-1]["why"]
    last, first = (read_manifest(Location.of(folder) / "checkpoints" / step) for step in (12, 4))
    assert last.world_epoch == 2
    assert not torch.equal(read_chains(last, World(), 25).chains, read_chains(first, World(), 25).chains)
    assert {step for key, step in trace(folder) if key == "train/loss"} >= {3, 6, 9, 12}
