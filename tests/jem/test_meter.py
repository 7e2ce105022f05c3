import math

import pytest
import torch

from jem.config import ObjectiveConfig
from jem.meter import FIELDS, OF_CHAINS, Meter, named
from jem.objective import Loss
from jem.train import StepInfo
from jem.world import World

HERE = torch.device("cpu")


def info(loss=0.0, grad_norm=0.0, lost=0.0, skipped=False, **fields):
    values = {"cross_entropy": 0.0, "energy_data": 0.0, "energy_samples": 0.0, "accuracy": 0.0, "kl": 0.0} | fields
    parts = Loss(torch.tensor(loss), **{k: torch.tensor(v) for k, v in values.items() if k in Loss._fields})
    others = [torch.tensor(fields.get(k, 0.0)) for k in OF_CHAINS]
    return StepInfo(parts, *others, torch.tensor(lost), torch.tensor(grad_norm), torch.tensor(skipped), 1, 0.1)


class Both(World):
    """A world of two whose sum adds what the other rank has."""

    other = None

    def sum(self, values):
        return values + self.other


def test_figures_are_means_over_steps_of_sums_over_ranks():
    """Loss: step 1 has 1 + 2, step 2 has 4 + 8, so 7.5. Gradient norm, the same on both: 0.5 + 0.5 and 1 + 1."""
    meters = [Meter(HERE), Meter(HERE)]
    for rank, losses in enumerate(((1.0, 4.0), (2.0, 8.0))):
        for loss, norm in zip(losses, (0.5, 1.0), strict=True):
            chains = {"chain_grad_norm": 0.25, "reinit_share": 0.1, "chain_saturation": 0.2, "chain_contrast": 0.3}
            step = info(loss, norm, lost=float(rank), energy_data=3.0 + rank, **chains)
            meters[rank].add(step, World(rank, 2))
    Both.other = meters[1].sums[0]
    figures = meters[0].read(Both(0, 2))
    expected = {"loss": 7.5, "energy_data": 7.0, "grad_norm": 1.5, "chain_grad_norm": 0.5, "reinit_share": 0.2}
    expected |= {"chain_saturation": 0.4, "chain_contrast": 0.6}
    expected |= {"lost_chains": 2, "skipped": 0, "steps": 2}  # numbers, not means
    assert {k: figures[k] for k in expected} == pytest.approx(expected)


def test_a_skipped_step_counts_as_that_alone_and_its_chains_as_lost():
    meter, nan = Meter(HERE), math.nan
    meter.add(info(1.0, 2.0, accuracy=0.5), World())
    figures = {"energy_data": nan, "energy_samples": math.inf, **dict.fromkeys(OF_CHAINS, nan)}
    meter.add(info(nan, nan, 3.0, True, accuracy=0.25, **figures), World())
    meter.add(info(3.0, 4.0, accuracy=1.0), World())
    figures = meter.read(World())
    expected = {"loss": 2.0, "grad_norm": 3.0, "accuracy": 0.75, "lost_chains": 3, "skipped": 1, "steps": 3}
    assert {k: figures[k] for k in expected} == pytest.approx(expected)
    assert all(math.isfinite(v) for v in figures.values())


def test_reading_starts_anew_and_nothing_counted_gives_nan():
    meter = Meter(HERE)
    meter.add(info(1.0), World())
    meter.read(World())
    meter.add(info(5.0), World())
    assert meter.read(World())["loss"] == 5.0
    meter.add(info(math.nan, skipped=True), World())
    figures = meter.read(World())
    assert math.isnan(figures["loss"])
    assert (figures["skipped"], figures["steps"]) == (1, 1)


def test_readers_count_the_same_steps_and_each_starts_anew_by_its_own_reading_alone():
    meter = Meter(HERE, readers=2)
    for loss in (1.0, 3.0):
        meter.add(info(loss, lost=1.0), World())
    assert meter.read(World(), reader=1)["loss"] == 2.0
    meter.add(info(8.0), World())
    first, second = meter.read(World()), meter.read(World(), reader=1)
    assert (first["loss"], first["steps"], first["lost_chains"]) == (4.0, 3, 2)
    assert (second["loss"], second["steps"], second["lost_chains"]) == (8.0, 1, 0)
    assert meter.sums.shape == (2, len(FIELDS))
    assert not meter.sums.any()


def test_figures_are_tracked_by_name_with_the_energy_gap_and_no_samples_for_a_classifier():
    figures = dict.fromkeys(FIELDS, 0.0) | {"energy_data": -5.0, "energy_samples": -3.0, "skipped": 1.0000001}
    metrics = named(figures, ObjectiveConfig(), 0.3)
    assert metrics["train/energy_gap"] == -2.0
    assert metrics["train/learning_rate"] == 0.3
    assert metrics["train/skipped_updates"] == 1
    assert "train/steps" not in metrics
    classifier = named(figures, ObjectiveConfig(p_x_weight=0.0), 0.3)
    of_samples = {"energy_samples", "energy_gap", "lost_chains", *OF_CHAINS}
    assert {"chain_grad_norm", "reinit_share", "chain_saturation", "chain_contrast"} <= set(OF_CHAINS)
    assert set(metrics) - set(classifier) == {f"train/{name}" for name in of_samples}
    assert set(named(figures, ObjectiveConfig(kl_weight=0.3), 0.3)) - set(metrics) == {"train/kl"}


def test_sums_of_a_checkpoint_whose_version_had_other_fields_begin_anew():
    meter, again = Meter(HERE), Meter(HERE)
    meter.add(info(1.0), World())
    again.load(meter.sums)
    assert torch.equal(again.sums, meter.sums)
    again.load(meter.sums[:, :-1])
    assert torch.equal(again.sums, meter.sums), "what cannot be taken over is left"
