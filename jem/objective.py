"""The loss: -log p(y|x), and the contrastive estimates of -log p(x) and -log p(x, y)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from jem.config import ObjectiveConfig
from jem.energy import energy, joint_energy


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
) -> Loss:
    """The weighted sum of three terms, a penalty and a correction (Grathwohl et al., 2020, eq. 7 and 9):

        p_y_given_x_weight * CE(x, y)
      + p_x_weight         * (mean E(x_data) - mean E(x_samples))
      + p_x_y_weight       * (mean E(x_labelled, y) - mean E(x_samples, y_samples))
      + energy_l2          * (mean E(x_data)^2 + mean E(x_samples)^2)       (Du & Mordatch, 2019)
      + kl_weight          * mean E_sg(theta)(x_samples(theta))             (Du et al., 2021)

    The gradient of an energy gap is the contrastive estimate of that of -log p, provided the samples
    are held fixed. Means are over the global batch: a rank contributes its own sum over `counts`, and a
    rank that holds none of a kind contributes 0.

    `logits_joint`: of the images of p(x, y), where the labelled rows of cross-entropy are augmented and theirs are not.
    `energy_kl`: what `kl_energies` gives of some of the samples.
    """
    energy_data, energy_samples = energy(logits_data), energy(logits_samples)
    cross_entropy = F.cross_entropy(logits_labelled, labels, reduction="sum") / max(counts.labelled, 1)
    mean_data = energy_data.sum() / max(counts.data, 1)
    mean_samples = energy_samples.sum() / max(counts.samples, 1)
    total = config.p_y_given_x_weight * cross_entropy
    if config.p_x_weight:
        total = total + config.p_x_weight * (mean_data - mean_samples)
    if config.p_x_y_weight:
        logits_joint = logits_labelled if logits_joint is None else logits_joint
        joint_data = joint_energy(logits_joint, labels).sum() / max(counts.labelled, 1)
        joint_samples = joint_energy(logits_samples, sample_labels).sum() / max(counts.samples, 1)
        total = total + config.p_x_y_weight * (joint_data - joint_samples)
    if config.energy_l2:
        squares = energy_data.square().sum() / max(counts.data, 1)
        squares = squares + energy_samples.square().sum() / max(counts.samples, 1)
        total = total + config.energy_l2 * squares
    mean_kl = torch.zeros_like(mean_data) if energy_kl is None else energy_kl.sum() / counts.kl
    if config.kl_weight:
        total = total + config.kl_weight * mean_kl
    with torch.no_grad():
        hits = (logits_labelled.argmax(dim=1) == labels).sum() / max(counts.labelled, 1)
    parts = (cross_entropy, mean_data, mean_samples, hits.to(total.dtype), mean_kl)
    return Loss(total, *(part.detach() for part in parts))
