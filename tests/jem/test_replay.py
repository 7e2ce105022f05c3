import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jem.config import ReplayConfig
from jem.replay import ReplayBuffer
from jem.world import World

SHAPE = (1, 2, 2)


def buffer(capacity, generator, n_classes=3, world=World(), **settings):  # noqa: B008
    return ReplayBuffer.start(ReplayConfig(capacity=capacity, **settings), SHAPE, n_classes, world, generator)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 12))
def test_shards_are_disjoint_cover_all_differ_by_one_at_most_and_chain_i_keeps_class_i_mod_c(capacity, size, classes):
    random = torch.Generator().manual_seed(0)
    shards = [buffer(capacity, random, classes, World(r, size)) for r in range(size)]
    assert [i for s in shards for i in range(s.first, s.first + len(s.chains))] == list(range(capacity))
    sizes = [len(s.chains) for s in shards]
    assert max(sizes) - min(sizes) <= 1
    labels = [s.labels(torch.arange(len(s.chains))).tolist() for s in shards]
    assert [label for shard in labels for label in shard] == [i % classes for i in range(capacity)]
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
    assert shard.write(slots, x) == 1
    assert torch.equal(shard.chains[3], before[3])
    assert (shard.chains[[7, 0, 9]] == 0.5).all()
    untouched = [1, 2, 4, 5, 6, 8]
    assert torch.equal(shard.chains[untouched], before[untouched])


def test_a_shard_can_be_drawn_whole_but_not_beyond(generator):
    shard = buffer(10, generator)
    assert sorted(shard.draw(10, generator).slots.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="11 distinct chains from a shard of 10"):
        shard.draw(11, generator)
