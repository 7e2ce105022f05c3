import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jem.randomness import derive_seed, generator
from jem.world import World

PARTS = st.lists(
    st.integers(-(2**40), 2**40) | st.text(st.characters(exclude_characters="\x1f"), max_size=5), max_size=4
)


def test_seeds_stay_those_they_were_so_that_a_run_can_be_continued_by_a_later_version():
    assert derive_seed(0, "weights") == 5_808_594_629_991_019_556
    assert derive_seed(7, "chains", 1, 4, 0) == 5_749_199_840_789_939_303


@given(PARTS, PARTS)
def test_other_parts_give_another_seed_and_the_same_the_same(a, b):
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
    assert 0 <= derive_seed(*a) < 2**63


@pytest.mark.parametrize(
    ("a", "b"), [((1, 23), (12, 3)), ((1,), ("1",)), (("a", "b"), ("ab",)), ((), ("",)), ((0, 1), (1, 0))]
)
def test_parts_are_kept_apart_by_type_and_place(a, b):
    assert derive_seed(*a) != derive_seed(*b)


def test_a_generator_starts_at_the_beginning_of_its_stream():
    first, again, other = (
        torch.rand(4, generator=generator("cpu", *parts)) for parts in ((1, "x"), (1, "x"), (2, "x"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_shares_are_disjoint_cover_all_and_differ_by_one_row_at_most(n, size):
    shares = [World(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(n))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1
