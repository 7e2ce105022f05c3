"""Post-hoc out-of-distribution scores of any classifier, most by pytorch-ood: what a JEM has to beat.

All rise with in-distribution, the opposite of pytorch-ood's. What they read, logits [n, C] or features [n, d] of
the last linear layer, is computed by the caller, once for all of them; settings are the papers' and are not tuned.
pytorch-ood is imported when a score is made: without it everything else works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jem.energy import Logits
from jem.errors import ConfigError, DataError

NAMES = ("msp", "energy", "odin", "mahalanobis", "vim", "knn")
OF_FEATURES = ("mahalanobis", "vim", "knn")
NEIGHBOURS = 50
"""Of `knn`, as its paper has for CIFAR-10."""
SEARCHED = 10_000
"""Training features that `knn` searches at most, evenly spaced: each image is compared with all of them."""

AT_ONCE = 4096
"""Training features in float64 at once."""

OfLogits = Callable[[Tensor], Tensor]
OfFeatures = Callable[[Tensor], Tensor]
"""Scores [n] of logits [n, C] or of features [n, d], as float64 on the CPU."""


def detectors() -> Any:
    """The module `pytorch_ood.detector`. Raises ConfigError, with the command that installs it, where it is missing."""
    try:
        from pytorch_ood import detector
    except ImportError as error:
        scores = "msp, energy, odin, mahalanobis, vim and knn"
        raise ConfigError(f"the scores {scores} need pytorch-ood: pip install pytorch-ood") from error
    return detector


def msp(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """max_y p(y|x) (Hendrycks & Gimpel, 2017): the order of `scores.max_py`, but for ties where p rounds to 1."""
    score: Tensor = -detectors().MaxSoftmax(None).predict_logits(_exact(logits))
    return score


def energy(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """-E(x) at temperature 1 (Liu et al., 2020): `scores.log_px` by another name."""
    score: Tensor = -detectors().EnergyBased(None).predict_logits(_exact(logits))
    return score


def odin(network: Logits, x: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """max_y p(y|x') at temperature 1000, x' a step from x towards its class (Liang et al., 2018).

    x' = x - 0.0014 / 0.5 * sign(grad_x -log p(y*|x)): the paper's 0.0014 is on pixels in [0, 1], ours span 2.
    """

    def precise(images: Tensor) -> Tensor:
        return network(images).double()  # at temperature 1000 all p are near 1 / C: float32 would round to ties

    score: Tensor = -detectors().ODIN(precise, eps=0.0014, temperature=1000.0, norm_std=[0.5] * x.shape[1]).predict(x)
    return score.detach().cpu()


def mahalanobis(train: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> OfFeatures:
    """-1/2 the squared Mahalanobis distance to the nearest class mean of the training features (Lee et al., 2018).

    One covariance for all classes; of the last layer alone, and without the paper's perturbation of the input. Ours:
    pytorch-ood inverts in float32 what may be all but singular, and multiplies by it once a class, which with 3,136
    features took longer than the rest of a suite. Here features are whitened once, in float64, with a ridge of 1e-6 of
    the mean variance. Raises DataError if a class up to the highest label has no image.
    """
    missing = (torch.bincount(labels.cpu()) == 0).nonzero().flatten().tolist()
    if missing:
        raise DataError(f"mahalanobis: no training image of class {', '.join(map(str, missing))}; each class needs one")
    y, d = labels.cpu(), train.shape[1]
    parts = [slice(begin, begin + AT_ONCE) for begin in range(0, len(train), AT_ONCE)]
    means, covariance = torch.zeros(int(y.max()) + 1, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for part in parts:
        means.index_add_(0, y[part], _exact(train[part]))
    means /= torch.bincount(y)[:, None]
    for part in parts:
        centred = _exact(train[part]) - means[y[part]]
        covariance.addmm_(centred.T, centred, alpha=1 / len(train))
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean() + 1e-12)
    root = torch.linalg.cholesky(covariance)
    whiten = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=torch.float64), upper=False).T
    whitened = means @ whiten

    def score(features: Tensor) -> Tensor:
        exactly = "donot_use_mm_for_euclid_dist"  # not by |a|^2 - 2 a.b + |b|^2, which loses digits
        distances = torch.cdist(_exact(features) @ whiten, whitened, compute_mode=exactly)
        return -0.5 * distances.amin(dim=1).square()

    return score


def vim(train: Float[Tensor, "n d"], head: nn.Linear) -> OfFeatures:
    """Logsumexp of the logits less the virtual logit: how far the features leave the training features' main subspace.

    Wang et al. (2022). The subspace has d / 2 dimensions, `head` is the layer from features to logits. Ours: of the
    logits less their mean over the classes, which have the same p(y|x). ViM scales by the mean largest logit, and a
    JEM's have a level of their own, log p(x): where it lies below 0 the scale does too, and outliers look familiar.
    """
    weight = head.weight.detach().cpu()
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().cpu()
    weight, bias = weight - weight.mean(dim=0), bias - bias.mean()
    detector = detectors().ViM(None, d=train.shape[1] // 2, w=weight, b=bias)
    detector.fit_features(train.detach().cpu(), torch.zeros(len(train), dtype=torch.int64))  # in float32

    def score(features: Tensor) -> Tensor:
        found: Tensor = detector.predict_features(features.detach().cpu())
        return -found.double()

    return score


def knn(train: Float[Tensor, "n d"], k: int = NEIGHBOURS, most: int = SEARCHED) -> OfFeatures:
    """-distance to the k-th nearest training feature, features scaled to length 1 (Sun et al., 2022; their CIFAR-10 k).

    Of more than `most` training features only so many are searched, and k falls in proportion, as in the paper: the
    1000th of all of ImageNet, the 10th of one in a hundred. Raises DataError if there are fewer than k.
    """
    if len(train) < k:
        raise DataError(f"knn: {len(train)} training images, k = {k} neighbours need as many")
    if len(train) > most:
        k = max(1, round(k * most / len(train)))
        train = train[torch.arange(most, device=train.device) * len(train) // most]
    detector = detectors().KNN(None, k=k)
    detector.knn.set_params(n_jobs=1)
    detector.fit_features(_exact(train), torch.zeros(len(train), dtype=torch.int64))

    def score(features: Tensor) -> Tensor:
        found: Tensor = detector.predict_features(_exact(features))
        return -found.double()

    return score


def features(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """From images to the features [n, d] that `head(network)` makes into logits."""
    layer = head(network)

    def extract(x: Tensor) -> Tensor:
        seen: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        try:
            logits = network(x)
        finally:
            hook.remove()
        same = len(seen) == 1 and (seen[0][1].shape, seen[0][1].dtype) == (logits.shape, logits.dtype)
        if not same or seen[0][0].ndim != 2 or not torch.allclose(seen[0][1], logits, rtol=0, atol=0, equal_nan=True):
            raise ConfigError("the network's logits are not what its last linear layer makes of features [n, d]")
        return seen[0][0]

    return extract


def head(network: nn.Module) -> nn.Linear:
    """The network's last linear layer. Raises ConfigError if it has none."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError("the scores mahalanobis, vim and knn need a network that ends in a linear layer")
    return layers[-1]


def _exact(values: Tensor) -> Tensor:
    return values.detach().cpu().double()
