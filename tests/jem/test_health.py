"""Runs that were recorded (traces/*.json: figures of a look every 25 steps), and looks made up around each bound."""

import json
import math
from pathlib import Path

import pytest

from jem.health import Health

TRACES = Path(__file__).parent / "traces"
WARM_UP = 8  # looks
WELL = {
    **{"energy_data": -5.0, "energy_samples": -5.3, "accuracy": 0.9},
    **{"chain_saturation": 0.0, "chain_contrast": 0.5, "data_contrast": 0.5},
    **{"lost_chains": 0.0, "skipped": 0.0, "steps": 25.0},
}


def recorded(name):
    trace = json.loads((TRACES / f"{name}.json").read_text())
    looks = [dict(zip(trace["columns"], map(float, row), strict=True)) for row in trace["looks"]]
    return [(int(look.pop("step")), look) for look in looks]


def first_sick(looks, health=None):
    health = health or Health(10, samples=True)
    for step, figures in looks:
        reason = health.judge(figures)
        if reason:
            return step, reason
    return None


def well(n=WARM_UP, samples=True, **changes):
    """The health of a run that was well for n looks."""
    health = Health(10, samples)
    for _look in range(n):
        assert health.judge(WELL | changes) is None
    return health


def looks_until_sick(figures, most=8, health=None):
    """How many looks like this it takes, and why."""
    health = health or well()
    for n in range(1, most + 1):
        reason = health.judge(WELL | figures)
        if reason:
            return n, reason
    return None


def gap(width):
    """A gap of `width` that comes from the samples' energy alone."""
    return {"energy_samples": WELL["energy_data"] - width}


# Recorded runs


@pytest.mark.parametrize("name", ["healthy_digits", "healthy_mnist5k"])
def test_no_look_at_a_healthy_run_is_even_odd(name):
    health = Health(10, samples=True)
    for _step, figures in recorded(name):
        assert health.judge(figures) is None
        assert health.odd == {}


@pytest.mark.parametrize(
    ("name", "last_well", "sick", "words"),
    [
        ("diverged_digits", 200, 250, "energy gap -2.68e+09"),
        ("diverged_late_digits", 1225, 1250, "energy gap -1.83e+06"),
        ("outrun_l2_digits", 1050, 1100, "energy gap -7.36, it was within [-1.89, 2.11]"),
        ("outrun_mnist5k", 75, 225, "energy gap -33.9, for 6 looks beyond +-5"),
    ],
)
def test_a_lost_run_is_noticed_within_150_steps_while_its_loss_is_finite(name, last_well, sick, words):
    looks = recorded(name)
    assert 0 < sick - last_well <= 150
    step, reason = first_sick(looks)
    assert step == sick
    assert words in reason
    before = dict(looks)[last_well]
    assert abs(before["energy_data"] - before["energy_samples"]) < 3
    assert all(map(math.isfinite, dict(looks)[sick].values()))


@pytest.mark.parametrize("name", ["diverged_digits", "outrun_mnist5k"])
def test_judgement_goes_on_from_json_as_if_never_interrupted(name):
    looks = recorded(name)
    straight = Health(10, samples=True)
    for at, (_step, figures) in enumerate(looks):
        state = json.loads(json.dumps(straight.state()))
        resumed = Health(10, samples=True)
        resumed.load(state)
        assert resumed.state() == straight.state() == state
        assert first_sick(looks[at:], resumed) == first_sick(looks[at:], loaded(straight))
        straight.judge(figures)


def loaded(health):
    copy = Health(10, samples=True)
    copy.load(health.state())
    return copy


def test_the_state_stays_small_however_long_the_run():
    health = Health(10, samples=True)
    for look in range(1000):
        health.judge(WELL | {"accuracy": 0.9 + math.sin(look) / 100, "energy_data": -5 + math.sin(look) / 7})
    assert len(health.state()["known"]) == 24
    assert len(json.dumps(health.state())) < 3000


def test_a_gap_is_no_sign_where_the_loss_is_that_of_a_detector_but_one_without_bounds_is():
    detector = Health(10, samples=True, detects=True)
    assert looks_until_sick(gap(-17), most=40, health=detector) is None
    n, reason = looks_until_sick(gap(-1001), health=detector)
    assert n == 1
    assert "energy gap -1e+03, beyond +-1000" in reason


# Each sign, on both sides of its bound


def test_figures_that_are_not_finite_are_sick_at_once_whatever_came_before():
    for key in ("energy_samples", "accuracy", "chain_contrast"):
        for value in (math.nan, math.inf):
            n, reason = looks_until_sick({key: value}, health=Health(10, samples=True))
            assert n == 1
            assert f"not finite: {key}" in reason


def test_skipped_updates_are_sick_at_once_if_most_of_a_window_and_in_two_looks_if_a_tenth():
    assert looks_until_sick({"skipped": 13.0})[0] == 1
    assert looks_until_sick({"skipped": 12.0})[0] == 2
    assert looks_until_sick({"skipped": 3.0000001})[0] == 2
    assert looks_until_sick({"skipped": 2.0}) is None
    assert "13 of 25 updates" in looks_until_sick({"skipped": 13.0})[1]
    nothing = dict.fromkeys(WELL, math.nan) | {"skipped": 25.0, "steps": 25.0, "lost_chains": 1600.0}
    assert looks_until_sick(nothing) == (1, "25 of 25 updates were not finite, and skipped")


def test_a_gap_far_from_what_it_was_is_sick_in_two_looks_once_eight_were_seen():
    """It was 0.3 throughout: bounds of +-2 around it."""
    assert looks_until_sick(gap(-1.6)) is looks_until_sick(gap(2.2)) is None
    assert looks_until_sick(gap(-1.8))[0] == looks_until_sick(gap(2.4))[0] == 2
    n, reason = looks_until_sick(gap(-4.0))
    assert n == 2
    assert "energy gap -4, it was within [-1.7, 2.3]" in reason
    assert looks_until_sick(gap(-4.0), most=2, health=well(WARM_UP - 1)) is None


def test_bounds_of_the_gap_are_twelve_deviations_where_it_always_varied():
    """Of gaps -2, -1, ..., 2 in turn the median is 0 and the deviation 1.4826, so that +-17.8 is within."""
    health = Health(10, samples=True)
    for look in range(20):
        health.judge(WELL | gap(look % 5 - 2.0))
    for width, sick in ((17.7, False), (17.9, True)):
        found = looks_until_sick(gap(width), most=2, health=loaded(health))
        assert (found is not None) == sick
    assert "energy gap 17.9, it was within [-17.8, 17.8]" in found[1]


def test_a_gap_beyond_5_is_sick_in_six_looks_and_beyond_1000_at_once_though_nothing_is_known():
    def fresh(width):
        return looks_until_sick(gap(width), health=Health(10, samples=True))

    assert fresh(4.9) is fresh(-4.9) is None
    assert (fresh(-5.1)[0], fresh(5.1)[0], fresh(-999.0)[0]) == (6, 6, 6)
    assert (fresh(-1001.0)[0], fresh(1001.0)[0]) == (1, 1)


def test_energies_may_drift_as_a_pair_but_not_leap_again_and_again():
    def run(by, n):
        health = well()
        return [health.judge(WELL | dict.fromkeys(("energy_data", "energy_samples"), by * i)) for i in range(1, n)]

    assert not any(run(-10.0, 300))
    words = run(-60.0, 4)
    assert words[0] is None
    assert "energy of data -120, a jump of -60" in words[1]


@pytest.mark.parametrize(("leap", "sick"), [(75.0, False), (85.0, True)])
def test_leaps_are_measured_by_twenty_of_the_usual_steps_where_energies_always_moved(leap, sick):
    health = Health(10, samples=True)
    energies = [4.0 * (look % 2) for look in range(20)] + [leap, 2 * leap]
    found = [health.judge(WELL | {"energy_data": e, "energy_samples": e - 0.3}) for i, e in enumerate(energies)]
    assert (found[-1] is not None) == sick
    assert not any(found[:-1])


def test_an_energy_that_leaps_once_and_stays_is_well():
    moved = {"energy_data": -300.0, "energy_samples": -300.3}
    assert looks_until_sick(moved) is None


@pytest.mark.parametrize(
    ("figures", "looks"),
    [
        ({"chain_saturation": 0.14}, None),
        ({"chain_saturation": 0.16}, 2),
        ({"chain_saturation": 0.51}, 1),
        ({"chain_saturation": -0.9}, None),
        ({"chain_contrast": 0.067}, None),  # the lower of 0.5 and the prior's 1/3, over 5
        ({"chain_contrast": 0.066}, 2),
        ({"chain_contrast": 0.0066}, 1),
        ({"chain_contrast": 2.4}, None),  # 0.5 times 5
        ({"chain_contrast": 2.6}, 2),
        ({"chain_contrast": 26.0}, 1),
        ({"chain_contrast": 1 / 3, "data_contrast": 0.01}, None),  # the prior's, of data that are nearly flat
        ({"accuracy": 0.51}, None),  # 0.1 + 0.8 / 2
        ({"accuracy": 0.49}, 2),
        ({"accuracy": 0.25}, 1),  # 0.1 + 0.8 / 5 = 0.26
    ],
)
def test_chains_and_accuracy_that_are_odd_take_two_looks_and_lost_ones_take_one(figures, looks):
    found = looks_until_sick(figures)
    assert (found and found[0]) == looks


def test_accuracy_says_nothing_before_it_has_left_chance_behind():
    assert looks_until_sick({"accuracy": 0.1}, health=well(accuracy=0.19)) is None
    assert looks_until_sick({"accuracy": 0.1}, health=well(accuracy=0.21))[0] == 1
    assert looks_until_sick({"accuracy": 0.1}, most=1, health=well(WARM_UP - 1)) is None


def test_one_odd_look_passes_and_is_not_learnt_from():
    health = well()
    before = health.state()["known"]
    assert health.judge(WELL | gap(-9.0)) is None
    assert health.state()["known"] == before
    assert health.judge(WELL) is None
    assert health.judge(WELL | gap(-9.0)) is None  # not the second in a row


def test_odd_looks_of_different_kinds_do_not_add_up():
    health = well()
    for _ in range(5):
        assert health.judge(WELL | gap(-9.0)) is None
        assert health.judge(WELL | {"chain_saturation": 0.2}) is None


def test_a_run_may_drift_away_from_where_it_was():
    health = well()
    for look in range(100):
        assert health.judge(WELL | gap(0.3 - 0.05 * look) | {"accuracy": 0.9 - 0.005 * look}) is None


def test_a_classifier_is_judged_by_its_accuracy_and_by_what_is_finite_alone():
    wild = gap(1e9) | {"energy_data": -1e6, "chain_saturation": 1.0, "chain_contrast": 0.0, "data_contrast": 0.0}
    assert looks_until_sick(wild, health=well(samples=False)) is None
    assert looks_until_sick({"accuracy": 0.1}, health=well(samples=False))[0] == 1
    assert looks_until_sick({"energy_data": math.nan}, health=well(samples=False))[0] == 1


def test_an_odd_last_look_is_sick_as_nothing_can_clear_it_any_more():
    assert well().judge(WELL | gap(-9.0)) is None
    assert "energy gap -9" in well().judge(WELL | gap(-9.0), last=True)
    assert well().judge(WELL, last=True) is None
