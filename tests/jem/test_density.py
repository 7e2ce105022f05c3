"""Where the plane can be summed over, a JEM can be held against the truth: log Z on a grid."""

import math

import pytest
import torch

from jem.config import ObjectiveConfig
from jem.data.batches import Batch
from jem.energy import energy, joint_energy
from jem.models import make_network
from jem.objective import Counts, jem_loss
from jem.randomness import generator as named_generator
from jem.train import start, train
from jem.world import World
from toys import small

SHAPE = (2, 1, 1)
MEANS = torch.tensor([[1.2, 0.0], [-0.6, 1.0], [-0.6, -1.0]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
STD = 0.5


def grid(side, points):
    axis = torch.linspace(-side, side, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)[:, :, None, None]


def mixture(n, random):
    """Images [n, 2, 1, 1] and labels: a Gaussian for each class."""
    labels = torch.multinomial(WEIGHTS, n, replacement=True, generator=random)
    return (MEANS[labels] + STD * torch.randn(n, 2, generator=random))[:, :, None, None], labels


def log_true(x):
    """log p(x, y) of the mixture [n, 3], in nats."""
    squares = (x.flatten(1)[:, None] - MEANS.double()).square().sum(dim=2)
    return WEIGHTS.double().log() - squares / (2 * STD**2) - math.log(2 * math.pi * STD**2)


@torch.no_grad()
def against_the_truth(network):
    """(KL(truth || model) in nats, mean |p(y|x) - Bayes' rule| over truth and classes)."""
    points, side = 161, 4.0
    x = grid(side, points)
    cell = (2 * side / (points - 1)) ** 2
    logits = network(x.float()).double()
    log_z = (-energy(logits)).logsumexp(0) + math.log(cell)
    log_px = -energy(logits) - log_z
    truth = log_true(x)
    mass = truth.logsumexp(dim=1).exp() * cell
    assert abs(mass.sum() - 1) < 1e-3  # the grid holds the truth
    kl = (mass * (truth.logsumexp(dim=1) - log_px)).sum()
    apart = (logits.softmax(dim=1) - truth.softmax(dim=1)).abs().mean(dim=1)
    return kl.item(), (mass * apart).sum().item()


def trained(steps, **changes):
    settings = {
        "seed": 0,
        "batch_size": 256,
        "model__name": "toys:confined",
        "sgld__steps": 10,
        "sgld__step_size": 0.05,
        "sgld__noise_scale": math.sqrt(2 * 0.05),
        "replay__capacity": 1024,
        "replay__reinit_prob": 0.0,
        "optimizer__learning_rate": 1e-2,
        "optimizer__decay_steps": [int(steps * f) for f in (0.4, 0.6, 0.8)] if steps else [],
        "optimizer__ema_decay": 0.98,
    }
    config = small(**settings | changes)
    state = start(config, SHAPE, 3, World(), torch.device("cpu"))

    def batch_at(step):
        images, labels = mixture(config.batch_size, named_generator("cpu", "mixture", step))
        return Batch(images, labels, None, None, config.batch_size, config.batch_size)

    for _ in train(state, batch_at, config, steps):
        pass
    return state
