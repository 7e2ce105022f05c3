import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jem.config import JEMConfig, ReplayConfig
from jem.errors import ConfigError
from jem.prior import Prior
from jem.replay import ReplayBuffer, Stored, class_counts, dequantise, quantise
from jem.settings import override
from jem.world import World

SHAPE = (1, 2, 2)


def buffer(capacity, generator, n_classes=3, world=World(), move=torch.float32, clamp=None, **settings):  # noqa: B008
    config = ReplayConfig(capacity=capacity, **settings)
    return ReplayBuffer.start(Prior(config, SHAPE), n_classes, world, generator, move, clamp)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 12))
def test_shards_are_disjoint_cover_all_differ_by_one_at_most_and_chain_i_keeps_class_i_mod_c(capacity, size, classes):
    random = torch.Generator().manual_seed(0)
    shards = [buffer(capacity, random, classes, World(r, size)) for r in range(size)]
    assert [i for s in shards for i in range(s.first, s.first + len(s.chains))] == list(range(capacity))
    sizes = [len(s.chains) for s in shards]
    assert max(sizes) - min(sizes) <= 1
    labels = [s.labels(torch.arange(len(s.chains))).tolist() for s in shards]
    whole = [i % classes for i in range(capacity)]
    assert [label for shard in labels for label in shard] == whole
    assert class_counts(capacity, classes).tolist() == [whole.count(c) for c in range(classes)]
    for shard in labels:
        counts = [shard.count(c) for c in range(classes)]
        assert max(counts) - min(counts) <= 1


def test_slots_of_a_draw_are_distinct_and_labels_are_the_slots(generator):
    shard = buffer(100, generator, 7, World(1, 3))
    for n in (1, 5, 33):
        drawn = shard.draw(n, generator)
        assert len(set(drawn.slots.tolist())) == n
        assert drawn.labels.tolist() == [(33 + slot) % 7 for slot in drawn.slots.tolist()]


def test_every_slot_is_drawn_equally_often(generator):
    """A count over T draws of n of N is binomial of T n / N; two slots meet with chance n (n - 1) / N / (N - 1)."""
    shard, draws, n, capacity = buffer(20, generator), 4000, 5, 20
    hits = torch.zeros(capacity)
    together = 0
    for _ in range(draws):
        slots = shard.draw(n, generator).slots
        hits[slots] += 1
        together += {0, 1} <= set(slots.tolist())
    share = n / capacity
    assert (hits - draws * share).abs().max() < 4 * math.sqrt(draws * share * (1 - share))
    pair = n * (n - 1) / capacity / (capacity - 1)
    assert abs(together - draws * pair) < 4 * math.sqrt(draws * pair * (1 - pair))


def test_chains_restart_with_reinit_prob_and_the_others_stand_where_they_stood(generator):
    shard, p, draws, n = buffer(500, generator, reinit_prob=0.05), 0.05, 100, 400
    shard.chains += 10
    restarted = torch.zeros(())
    for _ in range(draws):
        drawn = shard.draw(n, generator)
        moved = (drawn.x != shard.chains[drawn.slots]).flatten(1)
        assert torch.equal(moved.all(dim=1), drawn.restarted)
        assert torch.equal(moved.any(dim=1), drawn.restarted)
        restarted += drawn.restarted.sum()
    assert abs(restarted / draws / n - p) < 4 * math.sqrt(p * (1 - p) / draws / n)


@pytest.mark.parametrize("when", ["start", "restart"])
def test_fresh_chains_are_uniform_on_minus_one_to_one(when, generator):
    """Mean 0, variance 1/3, fourth moment 1/5; the standard error of x^k is that of its variance."""
    shard = buffer(4000, generator, reinit_prob=1.0)
    x = shard.chains if when == "start" else shard.draw(4000, generator).x
    assert x.abs().max() <= 1
    assert x.abs().max() > 0.999
    for k, moment, square in ((1, 0, 1 / 3), (2, 1 / 3, 1 / 5), (4, 1 / 5, 1 / 9)):
        error = math.sqrt((square - moment**2) / x.numel())
        assert abs((x**k).mean() - moment) < 4 * error


def test_drawing_alone_changes_no_chain_and_the_generator_determines_it():
    shard = buffer(50, torch.Generator().manual_seed(0))
    before = shard.chains.clone()
    first, second, other = (shard.draw(20, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(shard.chains, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.slots, other.slots)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_chain_with_one_bad_pixel_is_counted_and_its_slot_keeps_its_position_while_others_are_written(bad, generator):
    shard = buffer(10, generator)
    before, x = shard.chains.clone(), torch.full((4, *SHAPE), 0.5)
    x[2, 0, 1, 1] = bad
    slots = torch.tensor([7, 0, 3, 9])
    assert shard.write(slots, x, generator) == 1
    assert torch.equal(shard.chains[3], before[3])
    assert (shard.chains[[7, 0, 9]] == 0.5).all()
    untouched = [1, 2, 4, 5, 6, 8]
    assert torch.equal(shard.chains[untouched], before[untouched])


def test_a_shard_can_be_drawn_whole_but_not_beyond(generator):
    shard = buffer(10, generator)
    assert sorted(shard.draw(10, generator).slots.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="11 distinct chains from a shard of 10"):
        shard.draw(11, generator)


STORED = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}


def stored(dtype, generator, capacity=12, clamp=1.0, move=torch.float32):
    return buffer(capacity, generator, clamp=clamp, dtype=dtype, move=move)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2), ("uint8", 1)])
def test_chains_take_the_documented_bytes_and_come_out_as_they_move(dtype, width, generator):
    for move in (torch.float32, torch.float64):
        shard = stored(dtype, generator, move=move)
        wide = 8 if (dtype, move) == ("float32", torch.float64) else width
        assert shard.chains.nbytes == 12 * 4 * wide
        drawn = shard.draw(5, generator)
        assert drawn.x.dtype == shard.positions().dtype == move
        shard.write(drawn.slots, drawn.x, generator)
        assert shard.chains.nbytes == 12 * 4 * wide


@pytest.mark.parametrize("bound", [1.0, 0.3, 1.5])
def test_levels_are_256_evenly_spaced_and_the_ends_are_exact_whatever_is_drawn(bound, generator):
    for dtype in (torch.float32, torch.float64):
        places = dequantise(torch.arange(256, dtype=torch.uint8), bound, dtype)
        bound_here = torch.tensor(bound, dtype=dtype)
        assert (places[0], places[-1]) == (-bound_here, bound_here)
        assert torch.equal(places, -places.flip(0))
        torch.testing.assert_close(places.diff(), torch.full((255,), 2 * bound / 255, dtype=dtype), rtol=1e-3, atol=0)
        ends = torch.tensor([-bound, bound, -9, 9, -math.inf, math.inf], dtype=dtype).expand(1000, 6)
        assert torch.equal(quantise(ends, bound, generator), torch.tensor([0, 255] * 3).expand(1000, 6).to(torch.uint8))


def test_a_level_keeps_itself(generator):
    """But for the rounding of float64: that of float32 moves one in ten thousand."""
    levels = torch.arange(256, dtype=torch.uint8).repeat(100)
    assert torch.equal(quantise(dequantise(levels, 0.7, torch.float64), 0.7, generator), levels)


@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.9])
def test_stored_levels_have_the_position_for_expectation_and_the_variance_of_a_coin(share, generator):
    """A position a share f of the way up is rounded up with probability f: mean f, variance f (1 - f), in levels.

    Standard errors of n coins: sqrt(f (1 - f) / n), and for the variance |1 - 2 f| times that, at second order 1 / n.
    """
    n, level, bound = 200_000, 2 / 255, 1.0
    below = dequantise(torch.tensor(100, dtype=torch.uint8), bound, torch.float64)
    x = (below + share * level).float().expand(n)
    off = (dequantise(quantise(x, bound, generator), bound, torch.float64) - below) / level
    error = math.sqrt(share * (1 - share) / n)
    assert abs(off.mean() - share) < 4 * error + 1e-4  # float32 knows the place to 1e-5 levels
    assert abs(off.var() - share * (1 - share)) < 4 * abs(1 - 2 * share) * error + 10 / n + 1e-4
    assert ((off.round() - off).abs() < 1e-6).all()
    assert set(off.round().tolist()) == {0, 1}


def test_a_drift_far_below_a_level_is_kept_on_average(generator):
    """A hundred visits of a twentieth of a level: five levels, of which rounding to the nearest would keep none."""
    shard, level, n = stored("uint8", generator, capacity=2000), 2 / 255, 8000
    slots = torch.arange(2000)
    shard.write(slots, torch.full((2000, *SHAPE), 1 / 255), generator)  # level 128
    for _ in range(100):
        shard.write(slots, shard.positions() + level / 20, generator)
    moved = (shard.positions().double() - 1 / 255) / level
    assert abs(moved.mean() - 5) < 4 * math.sqrt(100 * 0.05 * 0.95 / n) + 0.01


def test_float16_is_the_nearest_and_on_data_range_within_a_fortieth_of_the_noise(generator):
    shard = stored("float16", generator)
    x = torch.rand(12, *SHAPE, generator=generator) * 2 - 1
    assert shard.write(torch.arange(12), x, generator) == 0
    assert torch.equal(shard.positions(), x.half().float())
    assert (shard.positions() - x).abs().max() <= 2**-12


@pytest.mark.parametrize(("dtype", "bad"), [("float16", 7e4), ("float16", math.nan), ("uint8", math.nan)])
def test_a_chain_that_its_storage_cannot_hold_is_lost_and_its_slot_stays(dtype, bad, generator):
    shard = stored(dtype, generator)
    before, x = shard.chains.clone(), torch.zeros(3, *SHAPE)
    x[1, 0, 0, 1] = bad
    assert shard.write(torch.tensor([4, 5, 6]), x, generator) == 1
    assert torch.equal(shard.chains[5], before[5])
    assert shard.positions(torch.tensor([4, 6])).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("dtype", STORED)
def test_only_levels_draw_when_chains_are_written(dtype):
    generator = torch.Generator().manual_seed(0)
    shard = stored(dtype, generator)
    before = generator.get_state()
    shard.write(torch.arange(3), torch.zeros(3, *SHAPE), generator)
    assert torch.equal(generator.get_state(), before) == (dtype != "uint8")


@pytest.mark.parametrize("old", STORED)
@pytest.mark.parametrize("new", STORED)
def test_chains_of_another_storage_are_taken_over_within_a_level(old, new, generator):
    source, target = stored(old, generator), stored(new, generator, clamp=1.5)
    target.take_over(Stored(source.chains.clone(), source.bound), generator)
    assert target.chains.dtype == STORED[new]
    apart = (target.positions() - source.positions()).abs().max()
    assert apart <= {"float32": 0, "float16": 2**-12, "uint8": 3 / 255 + 1e-6}[new]
    same = stored(old, generator)
    same.take_over(Stored(source.chains.clone(), source.bound), generator)
    assert torch.equal(same.chains, source.chains)


@pytest.mark.parametrize("dtype", STORED)
def test_fresh_chains_stand_at_the_prior_whatever_their_storage(dtype, generator):
    """Mean 0, variance 1/3, to which rounding a uniform place at random adds level^2 / 6."""
    x = stored(dtype, generator, capacity=4000).positions()
    assert x.abs().max() <= 1
    assert abs(x.mean()) < 4 * math.sqrt(1 / 3 / x.numel())
    extra = (2 / 255) ** 2 / 6 if dtype == "uint8" else 0
    assert abs((x**2).mean() - 1 / 3 - extra) < 4 * math.sqrt((1 / 5 - 1 / 9) / x.numel())


def test_levels_without_a_clamp_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"replay\.dtype: is uint8.*sgld\.clamp=1"):
        override(JEMConfig(seed=0), {"replay.dtype": "uint8"})
    assert override(JEMConfig(seed=0), {"replay.dtype": "uint8", "sgld.clamp": 1.0}).replay.dtype == "uint8"
    assert override(JEMConfig(seed=0), {"replay.dtype": "uint8", "objective.p_x_weight": 0.0})  # a classifier has none
