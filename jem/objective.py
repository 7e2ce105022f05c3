"""The loss: -log p(y|x), and the contrastive estimates of -log p(x) and -log p(x, y)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from jem.config import ObjectiveConfig
from jem.energy import EnergyFn, energy, joint_energy
from jem.world import World


class Loss(NamedTuple):
    """A rank's part of the loss: over all ranks each field sums to the mean over the global batch."""

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    energy_data: Float[Tensor, ""]
    energy_samples: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    kl: Float[Tensor, ""]  # 0 where it is no term


class Counts(NamedTuple):
    """How many rows the global batch holds of each kind, over all ranks."""

    data: int
    samples: int
    labelled: int
    kl: int = 0


class ClassPool(NamedTuple):
    """Of the labelled images of all ranks: log sum_x exp f(x)[y] of each class, and how many have that label."""

    log_sum: Float[Tensor, " c"]
    labelled: Float[Tensor, " c"]


def jem_loss(
    logits_data: Float[Tensor, "data c"],
    logits_samples: Float[Tensor, "samples c"],
    logits_labelled: Float[Tensor, "labelled c"],
    labels: Int[Tensor, " labelled"],
    sample_labels: Int[Tensor, " samples"],
    config: ObjectiveConfig,
    counts: Counts,
    logits_joint: Float[Tensor, "labelled c"] | None = None,
    energy_kl: Float[Tensor, " kl"] | None = None,
    mass: Float[Tensor, " data"] | None = None,
    pool: ClassPool | None = None,
    class_weights: Float[Tensor, " c"] | None = None,
) -> Loss:
    """The weighted sum of three terms, a penalty and a correction (Grathwohl et al., 2020, eq. 7 and 9):

        p_y_given_x_weight * CE(x, y)
      + p_x_weight         * (mean E(x_data) - mean w[y] E(x_samples)), or `detection`
      + p_x_y_weight       * (mean E(x_labelled, y) - mean w[y] E(x_samples, y_samples))
      + energy_l2          * (mean E(x_data)^2 + mean E(x_samples)^2)       (Du & Mordatch, 2019)
      + kl_weight          * mean E_sg(theta)(x_samples(theta))             (Du et al., 2021)
      + p_x_given_y_weight * contrastive_loss(x_labelled, y)                (Liu & Abbeel, 2020)
      + mass_weight        * mean ||d log p(x_data)/dx||                    (Piland et al., 2023)

    The gradient of an energy gap is the contrastive estimate of that of -log p, provided the samples
    are held fixed. Means are over the global batch: a rank contributes its own sum over `counts`, and a
    rank that holds none of a kind contributes 0.

    Samples that keep a class each are as many of one as of the other. `class_weights` w say how frequent a class is
    among the images, over how frequent among the samples (none: all 1): weighted so, they stand for
    sum_y p(y) p(x|y) with the data's p(y). Else the classes' frequencies would be learnt wrongly, and p(y|x) with them.

    `logits_joint`: of the images of p(x, y), where the labelled rows of cross-entropy are augmented and theirs are not.
    `energy_kl`: what `kl_energies` gives of some of the samples; `mass`: what `gradient_norms` gives of the data;
    `pool`: what `class_pool` gives of the labelled rows.
    """
    energy_data, energy_samples = energy(logits_data), energy(logits_samples)
    cross_entropy = F.cross_entropy(logits_labelled, labels, reduction="sum") / max(counts.labelled, 1)
    mean_data = energy_data.sum() / max(counts.data, 1)
    weights = 1.0 if class_weights is None else class_weights[sample_labels]
    mean_samples = (weights * energy_samples).sum() / max(counts.samples, 1)
    total = config.p_y_given_x_weight * cross_entropy
    if config.p_x_weight and config.p_x_loss == "bce":
        of_data, of_samples = detection(energy_data, energy_samples)
        bce = of_data.sum() / max(counts.data, 1) + (weights * of_samples).sum() / max(counts.samples, 1)
        total = total + config.p_x_weight * bce
    elif config.p_x_weight:
        total = total + config.p_x_weight * (mean_data - mean_samples)
    if config.p_x_y_weight:
        logits_joint = logits_labelled if logits_joint is None else logits_joint
        joint_data = joint_energy(logits_joint, labels).sum() / max(counts.labelled, 1)
        of_samples = weights * joint_energy(logits_samples, sample_labels)
        joint_samples = of_samples.sum() / max(counts.samples, 1)
        total = total + config.p_x_y_weight * (joint_data - joint_samples)
    if config.energy_l2:
        squares = energy_data.square().sum() / max(counts.data, 1)
        squares = squares + energy_samples.square().sum() / max(counts.samples, 1)
        total = total + config.energy_l2 * squares
    mean_kl = torch.zeros_like(mean_data) if energy_kl is None else energy_kl.sum() / counts.kl
    if config.kl_weight:
        total = total + config.kl_weight * mean_kl
    if pool is not None:
        total = total + config.p_x_given_y_weight * contrastive_loss(logits_labelled, labels, pool)
    if mass is not None:
        total = total + config.mass_weight * mass.sum() / max(counts.data, 1)
    with torch.no_grad():
        hits = (logits_labelled.argmax(dim=1) == labels).sum() / max(counts.labelled, 1)
    parts = (cross_entropy, mean_data, mean_samples, hits.to(total.dtype), mean_kl)
    return Loss(total, *(part.detach() for part in parts))


def detection(
    energy_data: Float[Tensor, " data"], energy_samples: Float[Tensor, " samples"]
) -> tuple[Float[Tensor, " data"], Float[Tensor, " samples"]]:
    """-log sigmoid(-E(x)) of data and -log sigmoid(E(x)) of samples, in nats: the loss of DAT (Yin et al., 2026).

    It trains E as the logit of a detector that tells samples from data. The least is at E = log q(x) - log p(x), with q
    the density that the chains leave behind: no density's own energy, and a constant once they sample p. No image's
    weight in the gradient is beyond 1, and that of an image that is told apart goes to 0: nothing drives energies
    without end.
    """
    return F.softplus(energy_data), F.softplus(-energy_samples)


def _counted(labels: Int[Tensor, " n"], n_classes: int) -> Float[Tensor, " c"]:
    """How often each label comes. (`bincount` waits for a GPU: its result's length is the largest label's.)"""
    ones = torch.ones(len(labels), device=labels.device)
    return torch.zeros(n_classes, device=labels.device).index_add(0, labels, ones)


def class_pool(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], world: World) -> ClassPool:
    """The sums over all ranks' rows that `contrastive_loss` needs; held fixed, the same on every rank."""
    with torch.no_grad():
        told = logits.new_zeros(2, world.size, logits.shape[1])  # each rank fills its row; one without images: log 0
        told[0, world.rank] = logits.logsumexp(dim=0)
        told[1, world.rank] = _counted(labels, logits.shape[1])
        log_sums, counts = world.sum(told)
        return ClassPool(log_sums.logsumexp(dim=0), counts.sum(dim=0))


def contrastive_loss(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], pool: ClassPool) -> Float[Tensor, ""]:
    """This rank's part of -mean log p(x|y), as if the step's images were all there are: a softmax over x of f(x)[y].

    HDGE (Hybrid Discriminative-Generative Training via Contrastive Learning, Liu & Abbeel, 2020): no chains. Its
    normaliser is over data, so that it tells classes' images apart and says nothing of images that are none: no
    p(x). The paper's pool is larger, a memory of earlier batches; ours is one batch.

    Its value is of the rows given, and its gradient that of the mean over all ranks: a row is in the normaliser of
    every class, whosever the images that have that label.
    """
    n = pool.labelled.sum()
    value = (pool.log_sum[labels] - logits.gather(1, labels[:, None])[:, 0]).sum() / n
    in_sums = (pool.labelled / n * (logits - pool.log_sum).exp()).sum()
    return value + in_sums - in_sums.detach()


def gradient_norms(energy: EnergyFn, x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """||d log p(x)/dx|| over each image, in nats a unit of pixels, differentiable in the weights.

    The approximate mass (Grathwohl et al., 2020, section 5.3) is minus this. As a loss (Non-Generative Energy Based
    Models, Piland et al., 2023) it makes log p(x) flat around data, and needs no chains: it knows nothing of images
    elsewhere, so that exp(-E(x)) is no density, and nothing can be sampled.
    """
    position = x.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(energy(position).sum(), position, create_graph=True)
    norms: Tensor = gradient.flatten(1).norm(dim=1)
    return norms
