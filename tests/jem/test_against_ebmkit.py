"""ebmkit (which imports as `ebm`) on the same arrays: another's energies, loss, calibration, temperature and AUROC."""

import ebm.eval.calibration as theirs
import pytest
import torch
from ebm.eval.diagnostics import ood_auroc
from ebm.jem import ClassifierEnergy, JEMLoss
from ebm.losses.cd import ContrastiveDivergence
from torch import nn

from jem.config import ObjectiveConfig
from jem.energy import energy, joint_energy
from jem.evaluate import ood, scores
from jem.evaluate.calibration import confidence_bins, ece, reliability
from jem.evaluate.temperature import fit_temperature
from jem.objective import Counts, jem_loss


class Fixed:
    """A sampler of theirs that has its samples already."""

    def __init__(self, samples):
        self.samples = samples

    def sample(self, _energy, _start):
        return self.samples


def logits_of(n, generator, scale, shift=0.0):
    return scale * torch.randn(n, 5, generator=generator, dtype=torch.float64) + shift


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 5)).double()


def test_energies_are_theirs(net, generator):
    x, y = torch.randn(9, 6, generator=generator, dtype=torch.float64), torch.arange(9) % 5
    theirs = ClassifierEnergy(net)
    torch.testing.assert_close(energy(net(x)), theirs(x))
    torch.testing.assert_close(joint_energy(net(x), y), theirs.conditional(x, y))


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_and_its_gradient_are_theirs_on_the_same_samples(net, generator, weight):
    x, samples = torch.randn(2, 12, 6, generator=generator, dtype=torch.float64)
    y = torch.arange(12) % 5
    other = JEMLoss(ContrastiveDivergence(Fixed(samples), energy_reg=0.1), cd_weight=weight)
    out = other(ClassifierEnergy(net), x, y)
    wanted = torch.autograd.grad(out.loss, list(net.parameters()))
    config = ObjectiveConfig(p_x_weight=weight, energy_l2=0.1 * weight)  # theirs weighs the penalty with the rest
    logits = net(x)
    loss = jem_loss(logits, net(samples), logits, y, y, config, Counts(12, 12, 12))
    torch.testing.assert_close(loss.total, out.loss)
    for mine, his in zip(torch.autograd.grad(loss.total, list(net.parameters())), wanted, strict=True):
        torch.testing.assert_close(mine, his)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("n", [1, 3, 500])
def test_ece_and_the_reliability_diagram_are_theirs_in_tiny_sets_and_at_confidence_one(generator, n, scale):
    logits = logits_of(n, generator, scale)
    labels = torch.randint(5, (n,), generator=generator)
    p = logits.softmax(dim=1)
    bins = confidence_bins(logits, labels)
    # they sum ECE in float32 where we use float64
    assert ece(bins) == pytest.approx(theirs.expected_calibration_error(p, labels, 20), abs=1e-6)
    confidence, accuracy, counts = theirs.reliability_curve(p, labels, 20)
    mine = reliability(bins)
    used = counts > 0
    assert torch.equal(mine.counts, counts[used].double())
    torch.testing.assert_close(mine.confidence, confidence[used])
    torch.testing.assert_close(mine.accuracy, accuracy[used].double())


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_temperature_is_theirs(generator, scale):
    logits = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()  # so that the truth is T = scale
    fitted = fit_temperature(scale * logits, labels)
    his = theirs.temperature_scale(scale * logits, labels, lr=1.0).item()
    assert fitted.value == pytest.approx(his, rel=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("tied", [False, True])
def test_auroc_of_the_density_is_theirs_with_ties_tiny_sets_and_scores_far_from_zero(generator, tied, offset):
    for n, m in ((1, 1), (2, 7), (150, 90)):
        inside, outside = logits_of(n, generator, 1.0, offset + 0.5), logits_of(m, generator, 1.0, offset)
        if tied:
            inside, outside = inside.round(), outside.round()
        his = ood_auroc(lambda x: -scores.log_px(x), inside, outside)
        assert ood.auroc(scores.log_px(inside), scores.log_px(outside)) == pytest.approx(his, abs=1e-12)
