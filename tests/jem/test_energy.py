import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from jem.energy import energy, energy_fn, joint_energy

LOGITS = torch.tensor([[1.0, 3.0], [2.0, 2.0], [7.0, 1.0]], dtype=torch.float64).log()
LABELS = torch.tensor([1, 0, 1])


def test_energy_is_minus_the_log_of_the_sum_of_exponentials():
    torch.testing.assert_close(energy(LOGITS), -torch.tensor([4.0, 4.0, 8.0]).double().log())


def test_joint_energy_is_minus_the_logit_of_the_label():
    torch.testing.assert_close(joint_energy(LOGITS, LABELS), -torch.tensor([3.0, 2.0, 1.0]).double().log())


def test_difference_of_the_energies_is_log_p_of_the_label():
    """log p(y|x) = E(x) - E(x, y)."""
    log_p = energy(LOGITS) - joint_energy(LOGITS, LABELS)
    torch.testing.assert_close(log_p.exp(), torch.tensor([3 / 4, 1 / 2, 1 / 8], dtype=torch.float64))


def test_summing_p_of_x_and_y_over_the_classes_gives_p_of_x():
    every = [joint_energy(LOGITS, torch.full((3,), y)) for y in range(2)]
    torch.testing.assert_close(sum((-e).exp() for e in every), (-energy(LOGITS)).exp())


@given(st.floats(-1e6, 1e6), st.integers(1, 20))
def test_energy_of_equal_logits_is_exact_where_an_exponential_would_overflow(value, classes):
    (got,) = energy(torch.full((1, classes), value, dtype=torch.float64)).tolist()
    assert math.isclose(got, -(value + math.log(classes)), rel_tol=1e-12, abs_tol=1e-12)


def test_a_constant_added_to_the_logits_moves_the_energy_by_it_and_leaves_p_of_y_alone():
    moved = LOGITS + 1000
    torch.testing.assert_close(energy(moved), energy(LOGITS) - 1000)
    both = [energy(f) - joint_energy(f, LABELS) for f in (LOGITS, moved)]
    torch.testing.assert_close(*both, atol=1e-9, rtol=0)


def test_chains_without_a_class_follow_e_of_x_and_those_with_one_e_of_x_and_y():
    x = LOGITS.exp()
    torch.testing.assert_close(energy_fn(torch.log)(x), energy(LOGITS))
    torch.testing.assert_close(energy_fn(torch.log, LABELS)(x), joint_energy(LOGITS, LABELS))


def test_energies_of_a_network_in_bf16_are_computed_in_float32():
    """1000 + log 2 is 1000 in bf16."""
    out = energy_fn(lambda x: x.bfloat16())(torch.full((1, 2), 1000.0))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.tensor([-(1000 + math.log(2))]))
    assert energy_fn(lambda x: x)(LOGITS).dtype == torch.float64
