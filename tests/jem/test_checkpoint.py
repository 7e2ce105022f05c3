import copy
import itertools
import math

import pytest
import torch
from spawn import run_ranks
from torch.nn.parallel import DistributedDataParallel
from toys import labelled_batch, small

from jem.checkpoint import committed, newest_good, read_manifest, restore
from jem.config import OptimizerConfig
from jem.errors import CheckpointError, DivergedError
from jem.files import Location
from jem.meter import Meter
from jem.optim import optimizer_tensors
from jem.saving import save
from jem.settings import override
from jem.train import data_parallel, start, train
from jem.world import World

SHAPE, CLASSES, HERE = (1, 4, 4), 3, torch.device("cpu")
CONFIG = small(
    model__name="small_conv", model__channels=[3], model__norm="batch", optimizer__ema_decay=0.9, replay__capacity=23
)
SIZES = (2, 3)


def batch_at(step, world=World()):  # noqa: B008
    random = torch.Generator().manual_seed(step)
    images = torch.randn(CONFIG.batch_size, *SHAPE, generator=random)
    return labelled_batch(images, torch.arange(CONFIG.batch_size) % CLASSES, world.share(CONFIG.batch_size))


def begin(config=CONFIG, world=World()):  # noqa: B008
    return start(config, SHAPE, CLASSES, world, HERE)


def go_on(state, steps, config=CONFIG, world=World(), meter=None, wrapped=None):  # noqa: B008
    meter = meter or Meter(HERE)
    for info in train(state, lambda step: batch_at(step, world), config, steps, world, wrapped):
        meter.add(info, world)
    return meter


def everything(state):
    """All that a run's future depends on."""
    found = {f"network {k}": v for k, v in state.network.state_dict().items()}
    found |= {f"average {k}": v for k, v in state.average.state_dict().items()}
    found |= {f"optimizer {k}": v for k, v in optimizer_tensors(state.network, state.optimizer).items()}
    found |= {"chains": state.replay.chains, "generator": state.generator.get_state()}
    found |= {"step": torch.tensor(state.step), "world_epoch": torch.tensor(state.world_epoch)}
    found |= {} if state.chain_length is None else {"chain_length": state.chain_length}
    return {key: value.clone() for key, value in found.items()}


def same(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.fixture
def root(tmp_path):
    return Location.of(tmp_path / "checkpoints")


def saved(root, steps, state=None):
    state = state or begin()
    meter = go_on(state, steps)
    save(root / steps, state, World(), {"note": "é"}, {"meter": meter.sums}, events=b"{}\n")
    return state


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_restored_run_goes_on_bit_for_bit_as_one_never_stopped(root, name, at):
    config = CONFIG.__class__(
        **{**vars(CONFIG), "optimizer": OptimizerConfig(name=name, ema_decay=0.9, warmup_steps=2, decay_steps=(4,))}
    )
    straight = begin(config)
    meter = go_on(straight, at, config)
    save(root / at, straight, World(), {}, {"meter": meter.sums})
    at_save = everything(straight)
    meter = go_on(straight, at + 4, config, meter=meter)

    other = begin(config)
    go_on(other, 2, config)  # whatever it has been through
    sums = restore(read_manifest(root / at), other, World(), seed=0)
    assert same(everything(other), at_save)
    resumed = Meter(HERE)
    resumed.sums.copy_(sums["meter"])
    go_on(other, at + 4, config, meter=resumed)
    assert same(everything(other), everything(straight))
    assert torch.equal(resumed.sums, meter.sums)
    assert not torch.equal(everything(other)["chains"], at_save["chains"])


def test_chains_that_adapt_their_length_go_on_with_the_length_they_had(root):
    config = override(CONFIG, {"sgld.steps": 20, "sgld.max_steps": 40})
    straight = begin(config)
    straight.chain_length.fill_(37)
    go_on(straight, 4, config)
    save(root / 4, straight, World(), {}, {})
    assert straight.chain_length > 21
    go_on(straight, 8, config)
    for world in (World(), World(1, 2)):
        other = begin(config, world)
        restore(read_manifest(root / 4), other, world, seed=0)
        assert other.chain_length > 21
    other = begin(config)
    restore(read_manifest(root / 4), other, World(), seed=0)
    go_on(other, 8, config)
    assert same(everything(other), everything(straight))


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_chains_in_fewer_bytes_go_on_bit_for_bit_and_are_sliced_as_they_are_stored(root, dtype):
    config = override(CONFIG, {"replay.dtype": dtype, "sgld.clamp": 1.0})
    straight = begin(config)
    go_on(straight, 3, config)
    save(root / 3, straight, World(), {}, {})
    held = straight.replay.chains.clone()
    assert held.dtype == (torch.float16 if dtype == "float16" else torch.uint8)
    go_on(straight, 6, config)
    other = begin(config)
    manifest = read_manifest(root / 3)
    restore(manifest, other, World(), seed=0)
    assert torch.equal(other.replay.chains, held)
    go_on(other, 6, config)
    assert same(everything(other), everything(straight))
    shards = [begin(config, World(rank, 3)) for rank in range(3)]
    for rank, shard in enumerate(shards):
        restore(manifest, shard, World(rank, 3), seed=0)
    assert torch.equal(torch.cat([shard.replay.chains for shard in shards]), held)


def test_levels_of_another_clamp_or_storage_are_restored_as_the_same_positions(root):
    config = override(CONFIG, {"replay.dtype": "uint8", "sgld.clamp": 1.0})
    state = begin(config)
    save(root / 0, state, World(), {}, {})
    for changes, apart in (({"sgld.clamp": 1.5}, 3 / 255), ({"replay.dtype": "float32"}, 0)):
        twins = [begin(override(config, changes)) for _ in range(2)]
        for twin in twins:
            restore(read_manifest(root / 0), twin, World(), seed=0)
        assert (twins[0].replay.positions() - state.replay.positions()).abs().max() <= apart + 1e-6
        assert same(everything(twins[0]), everything(twins[1]))
        assert torch.equal(twins[0].generator.get_state(), state.generator.get_state())


def wrap(state, world):
    return data_parallel(state.network, batch_at(0, world).images, world)


def on_rank(world, folder):
    """A run of several ranks saves, and goes on; one that restores goes on as well."""
    root = Location.of(folder) / f"of-{world.size}"

    straight = begin(world=world)
    wrapped = wrap(straight, world)
    meter = go_on(straight, 2, world=world, wrapped=wrapped)
    save(root / 2, straight, world, {"by": world.size}, {"meter": meter.sums})
    held = straight.replay.chains.clone()
    go_on(straight, 4, world=world, wrapped=wrapped)
    other = begin(world=world)
    sums = restore(read_manifest(root / 2), other, world, seed=0)
    sums_equal = torch.equal(sums["meter"], meter.sums)
    go_on(other, 4, world=world, wrapped=wrap(other, world))
    bare = begin(world=world)
    restore(read_manifest(root / 2), bare, world, seed=0)
    unspent = DistributedDataParallel(bare.network, broadcast_buffers=False, gradient_as_bucket_view=True)
    go_on(bare, 4, world=world, wrapped=unspent)
    bare_same = same(everything(bare), everything(straight))

    refusal = ""
    if world.rank == world.size - 1:
        straight.replay.chains[0, 0, 0, 0] = math.nan
    try:
        save(root / 4, straight, world, {}, {"meter": meter.sums})
    except DivergedError as error:
        refusal = str(error)
    return {
        "same": same(everything(other), everything(straight)) if world.rank < world.size - 1 else None,
        "bare_same": bare_same,
        "sums_equal": sums_equal,
        "sums": meter.sums,
        "chains": held,
        "refusal": refusal,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return Location.of(folder / "runs"), run_ranks(on_rank, SIZES, folder, str(folder / "runs"))


@pytest.mark.parametrize("size", SIZES)
def test_several_ranks_go_on_bit_for_bit_each_with_its_chains_generator_and_sums(ranks, size):
    assert [rank["same"] for rank in ranks[1][size]] == [*[True] * (size - 1), None]  # the last was poisoned
    assert all(rank["sums_equal"] for rank in ranks[1][size])


def test_without_the_pass_that_lays_out_the_buckets_three_ranks_would_not_go_on_bit_for_bit(ranks):
    """The layout is the order of the sums, and shows in the last bits: the test above sees it."""
    assert [rank["bare_same"] for rank in ranks[1][3]] == [False] * 3


@pytest.mark.parametrize("size", SIZES)
def test_a_chain_that_is_not_finite_on_one_rank_is_refused_on_all_and_nothing_is_written(ranks, size):
    refusals = [rank["refusal"] for rank in ranks[1][size]]
    assert all("is not finite" in refusal for refusal in refusals)
    assert "the replay buffer" in refusals[-1]
    assert "another rank" in refusals[0]
    assert not (ranks[0] / f"of-{size}" / 4).exists()


@pytest.mark.parametrize("new", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("old", SIZES)
def test_another_number_of_ranks_slices_the_same_chains_in_order_none_lost_none_twice(ranks, old, new):
    manifest = read_manifest(ranks[0] / f"of-{old}" / 2)
    whole = torch.cat([rank["chains"] for rank in ranks[1][old]])
    assert len(whole) == CONFIG.replay.capacity
    states = [begin(world=World(rank, new)) for rank in range(new)]
    sums = [restore(manifest, state, World(rank, new), seed=0) for rank, state in enumerate(states)]
    assert torch.equal(torch.cat([state.replay.chains for state in states]), whole)
    firsts = [state.replay.first for state in states]
    assert firsts == [World(rank, new).share(len(whole)).start for rank in range(new)]
    labels = [state.replay.labels(torch.arange(len(state.replay.chains))) for state in states]
    assert torch.cat(labels).tolist() == [i % CLASSES for i in range(len(whole))]
    torch.testing.assert_close(sum(s["meter"] for s in sums), sum(rank["sums"] for rank in ranks[1][old]))
    epochs = {state.world_epoch for state in states}
    assert epochs == {0 if new == old else 1}
    generators = [state.generator.get_state() for state in states]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(generators, 2))


def test_every_change_of_the_world_starts_streams_that_none_had_before(ranks, tmp_path):
    """2 ranks, then 1, then 1 of another change at the same step: no generator is seen again."""
    seen = []
    manifest = read_manifest(ranks[0] / "of-2" / 2)
    state = begin()
    seen.append(state.generator.get_state())
    restore(manifest, state, World(), seed=0)
    seen.append(state.generator.get_state())
    restore(copy.copy(manifest), other := begin(), World(), seed=1)
    seen.append(other.generator.get_state())
    later = Location.of(tmp_path) / 2
    save(later, state, World(), {}, {})
    elsewhere = begin(world=World(0, 2))
    seen.append(elsewhere.generator.get_state())
    restore(read_manifest(later), elsewhere, World(0, 2), seed=0)
    seen.append(elsewhere.generator.get_state())
    assert elsewhere.world_epoch == 2
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def damages(path):
    """Each way to damage a file: (name, what to do)."""
    data = path.read_bytes()
    yield "removed", path.unlink
    yield "empty", lambda: path.write_bytes(b"")
    yield "cut short", lambda: path.write_bytes(data[:-1])
    yield "longer", lambda: path.write_bytes(data + b"\0")
    for place in range(0, len(data), max(1, len(data) // 12)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        yield f"bit {place % 8} of byte {place} flipped", lambda flipped=flipped: path.write_bytes(flipped)


def test_any_damaged_file_is_found_by_name_and_the_newest_good_checkpoint_is_taken(root):
    state = saved(root, 2)
    saved(root, 4, state)
    (root / 10).mkdir()  # saving was interrupted: no manifest
    folder = (root / 4).local
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        *("chains-00000-of-00001.safetensors", "ema.safetensors", "events.jsonl", "manifest.json"),
        *("model.safetensors", "optimizer.safetensors", "rank-00000-of-00001.safetensors"),
    ]
    assert newest_good(committed(root))[0].step == 4
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for how, damage in damages(path):
            damage()
            found, faults = newest_good(committed(root))
            assert found.step == 2, (path.name, how)
            if (path.name, how) != ("manifest.json", "removed"):
                assert len(faults) == 1
                assert str(path) in faults[0], how
            path.write_bytes(original)
    assert newest_good(committed(root))[0].step == 4


def test_every_bit_of_the_manifest_counts(root):
    """Nothing else vouches for the step, the world size and the caller's information in it."""
    saved(root, 1)
    path = (root / 1 / "manifest.json").local
    original = path.read_bytes()
    for place in range(len(original)):
        flipped = bytearray(original)
        flipped[place] ^= 1 << (place % 7)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(root / 1)
    path.write_bytes(original)
    assert read_manifest(root / 1).info == {"note": "é"}


def test_a_directory_without_a_manifest_is_no_checkpoint(root):
    saved(root, 1)
    (root / 1 / "manifest.json").remove()
    (root / "notes").mkdir()
    assert committed(root) == []
    assert newest_good(committed(root)) == (None, [])
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_manifest(root / 1)


def test_checkpoints_are_ordered_by_step_not_by_text_and_all_faults_are_told(root):
    state = begin()
    for steps in (2, 9, 10):
        saved(root, steps, state)
    assert [d.name for d in committed(root)] == ["10", "9", "2"]
    for steps in (10, 9, 2):
        (root / steps / "model.safetensors").write(b"nothing")
    found, faults = newest_good(committed(root))
    assert found is None
    assert [str(root / steps / "model.safetensors") in fault for steps, fault in zip((10, 9, 2), faults, strict=True)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weights", "running statistics", "chains", "average"])
def test_what_is_not_finite_is_refused_and_the_checkpoint_that_is_there_stays(root, bad, where):
    state = saved(root, 2)
    tensor = {
        "weights": state.network[0].weight,
        "running statistics": state.network[1].running_var,
        "chains": state.replay.chains,
        "average": state.average[0].weight,
    }[where]
    with torch.no_grad():
        tensor.view(-1)[-1] = bad
    for step in (2, 3):
        with pytest.raises(DivergedError, match="is not finite"):
            save(root / step, state, World(), {}, {})
    assert not (root / 3).exists()
    assert newest_good(committed(root))[0].step == 2


def test_saving_again_over_other_ranks_files_leaves_one_whole_checkpoint(ranks, tmp_path):
    """The step is reached again with another number of workers."""
    place = Location.of(tmp_path) / 2
    manifest = read_manifest(ranks[0] / "of-3" / 2)
    for name in manifest.files:
        (place / name).write(manifest.read(name))
    state = begin()
    restore(manifest, state, World(), seed=0)
    save(place, state, World(), {}, {"meter": torch.zeros(1)})
    again = read_manifest(place)
    again.verify()
    assert again.world_size == 1
    assert sum("chains" in name for name in again.files) == 1


def test_what_does_not_fit_is_named(root):
    saved(root, 2)
    manifest = read_manifest(root / 2)
    wider = small(model__name="small_conv", model__channels=[5], model__norm="batch", replay__capacity=23)
    with pytest.raises(CheckpointError, match=r"0.weight has shape \[3, 1, 3, 3\], \[5, 1, 3, 3\] was expected"):
        restore(manifest, begin(wider), World(), seed=0)
    larger = copy.copy(CONFIG.replay)
    object.__setattr__(larger, "capacity", 30)
    state = begin()
    state.replay.config = larger
    with pytest.raises(CheckpointError, match=r"holds 23 chains, replay\.capacity=30 makes it 30"):
        restore(manifest, state, World(), seed=0)
