"""Where chains start: uniform noise, a Gaussian fitted to each class, or training images with noise.

What a new chain starts from decides how far it has to go. Uniform noise is the paper's. A Gaussian of each class has
the mean and covariance of its training images (JEM++, Yang & Ji, 2021), so that chains begin near the data and a few
steps are enough; it holds no training image. Training images with noise are nearer still, and what comes of them may
be copies: samples that are scored never start there (`without_images`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from jem.config import JEMConfig, ReplayConfig
from jem.data.augment import to_float
from jem.data.splits import Split

EXACT = 256
"""Numbers in an image up to which `prior_rank` is all of them, where it is not set; 64 beyond."""

AT_ONCE = 2**25
"""Numbers of the factors, d x r an image, that are multiplied at once: 128 MiB."""

FITTED = 2**26
"""Numbers of a class's images that its Gaussian is fitted to, at most: half a gigabyte in float64."""

FEWEST = 10
"""Images that a class needs for a Gaussian of its own: draws from that of two are nearly copies of one of them."""

DIRECT = 1024
"""Numbers in an image up to which the whole covariance is decomposed; beyond, its first directions are looked for."""


class Gaussian(NamedTuple):
    """Of each of C classes, over images of d numbers: x = mean + factor z + rest e, with z ~ N(0, I_r), e ~ N(0, I_d).

    The covariance factor factor^T + rest^2 I is the maximum-likelihood one of rank r and white noise (Tipping &
    Bishop, Probabilistic principal component analysis, 1999, eq. 7 and 8): with r = d the sample covariance itself.
    """

    mean: Float[Tensor, "C d"]
    factor: Float[Tensor, "C d r"]
    rest: Float[Tensor, " C"]


@dataclass(frozen=True, eq=False)
class Prior:
    """What new chains are drawn from: `config.prior`, or uniform noise for a share `config.uniform_share` of them."""

    config: ReplayConfig
    shape: tuple[int, int, int]  # of an image
    gaussian: Gaussian | None = None  # where the prior is not uniform
    images: Images | None = None  # where the prior is data

    def sample(self, labels: Int[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        """A new chain of each class, float32 on [-1, 1]."""
        shape = (len(labels), *self.shape)
        if self.config.prior == "uniform":
            return uniform(shape, generator)
        if self.images is not None:
            start = self.images.near(labels, self.config.prior_noise, generator)
        else:
            assert self.gaussian is not None, "make_prior gives one"
            start = draw_gaussian(self.gaussian, labels, generator).view(shape)
        if self.config.uniform_share:
            apart = torch.rand(len(labels), generator=generator, device=generator.device) < self.config.uniform_share
            start = torch.where(apart[:, None, None, None], uniform(shape, generator), start)
        return start

    def without_images(self) -> Prior:
        """The same, but the classes' Gaussians in place of training images."""
        return replace(self, images=None)

    def to(self, device: torch.device | str) -> Prior:
        """The same on `device`, but for images."""
        if self.gaussian is None:
            return self
        return replace(self, gaussian=Gaussian(*(tensor.to(device) for tensor in self.gaussian)))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint or a model holds of it; training images are not among them."""
        return {} if self.gaussian is None else dict(self.gaussian._asdict())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Prior:
        """With the Gaussians that `tensors` gave, in the place of those that are there, if any are needed."""
        if self.config.prior == "uniform":
            return self
        there = replace(self, gaussian=Gaussian(*(tensors[name] for name in Gaussian._fields)))
        return there if self.gaussian is None else there.to(self.gaussian.mean.device)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Each pixel uniform on [-1, 1]."""
    return torch.rand(shape, generator=generator, device=generator.device) * 2 - 1


def draw_gaussian(gaussian: Gaussian, labels: Int[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """One of each class, cut off at +-1, where images end."""
    n, (_, d, r) = len(labels), gaussian.factor.shape
    at_once = max(1, AT_ONCE // (d * r))
    z = torch.randn(n, r, 1, generator=generator, device=generator.device)
    e = torch.randn(n, d, generator=generator, device=generator.device)
    x = gaussian.mean[labels] + gaussian.rest[labels, None] * e
    parts = zip(*(torch.split(tensor, at_once) for tensor in (x, labels, z)), strict=True)
    x = torch.cat([part + (gaussian.factor[c] @ zs).squeeze(2) for part, c, zs in parts])
    return x.clamp(-1, 1)


def fit_gaussian(
    images: UInt8[Tensor, "n c h w"], labels: Int64[Tensor, " n"], n_classes: int, rank: int | None
) -> Gaussian:
    """The Gaussian of each class's images, on the [-1, 1] scale, with `rank` directions of its covariance.

    Fewer images than directions leave the others to white noise. A class with few images gets the Gaussian of all.
    """
    d = images[0].numel()
    rank = min(rank or (d if d <= EXACT else 64), d)
    of_class = [labels == c for c in range(n_classes)]
    parts = [_fitted(images[these], rank) if int(these.sum()) >= FEWEST else None for these in of_class]
    of_all = None if None not in parts else _fitted(images, rank)
    return Gaussian(*(torch.stack(column) for column in zip(*(part or of_all for part in parts), strict=True)))


def _fitted(images: UInt8[Tensor, "n c h w"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    most = max(1, FITTED // images[0].numel())
    if len(images) > most:
        images = images[torch.arange(most, device=images.device) * len(images) // most]
    x = to_float(images, torch.float64).flatten(1)
    (n, d), mean = x.shape, x.mean(dim=0)
    x -= mean
    if d <= DIRECT:
        values, vectors = torch.linalg.eigh(x.T @ x / n)
        values, vectors = values.flip(0)[:rank].clamp(min=0), vectors.flip(1)[:, :rank]
    else:  # randomised: the largest directions to many digits, at a small part of the price (Halko et al., 2011)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, s, v = torch.svd_lowrank(x.float(), q=min(rank + 16, n, d), niter=4)
        values, vectors = (s[:rank].double().square() / n), v[:, :rank].double()
        missing = rank - len(values)
        values = torch.cat([values, values.new_zeros(missing)])
        vectors = torch.cat([vectors, vectors.new_zeros(d, missing)], dim=1)
    total = x.square().sum() / n
    rest = ((total - values.sum()) / (d - rank)).clamp(min=0) if rank < d else total.new_zeros(())
    factor = vectors * (values - rest).clamp(min=0).sqrt()
    return mean.float(), factor.float(), rest.sqrt().float()


@dataclass(frozen=True, eq=False)
class Images:
    """Training images by class: those of class c are `rows[begin[c] : end[c]]`."""

    images: UInt8[Tensor, "n c h w"]
    rows: Int64[Tensor, " n"]
    begin: Int64[Tensor, " C"]
    end: Int64[Tensor, " C"]

    def near(self, labels: Int[Tensor, " n"], noise: float, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        """A random image of each class, with Gaussian noise, cut off at +-1."""
        device = generator.device
        begin, end = self.begin[labels], self.end[labels]
        at = torch.rand(len(labels), generator=generator, device=device, dtype=torch.float64)
        x = to_float(self.images[self.rows[begin + (at * (end - begin)).long()]])
        return (x + noise * torch.randn(x.shape, generator=generator, device=device)).clamp(-1, 1)


def by_class(images: UInt8[Tensor, "n c h w"], labels: Int64[Tensor, " n"], n_classes: int) -> Images:
    """The images by their labels. A class without images has all."""
    counts = torch.bincount(labels, minlength=n_classes)[:n_classes]
    end = counts.cumsum(0)
    begin = torch.where(counts > 0, end - counts, 0)
    return Images(images, labels.argsort(stable=True), begin, torch.where(counts > 0, end, len(labels)))


def fit_classes(config: JEMConfig, train: Split, n_classes: int) -> Gaussian | None:
    """The Gaussians that the prior of `config` needs; none for a uniform one, or where no chains are run.

    Semi-supervised, the labels of most images are not known: every class then starts like all images. Of images that
    are streamed, a part is taken that is spread over all.
    """
    if config.replay.prior == "uniform" or not config.objective.samples_needed:
        return None
    part = train.part()
    return fit_gaussian(part.images, _known_labels(config, part, n_classes), n_classes, config.replay.prior_rank)


def make_prior(
    config: JEMConfig, train: Split, n_classes: int, gaussian: Gaussian | None, device: torch.device | str
) -> Prior:
    """The prior of `config` on `device`; `gaussian`: what `fit_classes` gave, on one rank for all."""
    c, h, w = train.images.shape[1:]
    prior = Prior(config.replay, (c, h, w))
    if gaussian is None:
        return prior
    prior = replace(prior, gaussian=gaussian).to(device)
    if config.replay.prior == "data":
        labels = _known_labels(config, train, n_classes)
        prior = replace(prior, images=by_class(train.images.to(device), labels.to(device), n_classes))
    return prior


def _known_labels(config: JEMConfig, split: Split, n_classes: int) -> Int64[Tensor, " n"]:
    """Semi-supervised, all are of no class."""
    return split.labels if config.data.labels_per_class is None else split.labels.new_full((len(split),), n_classes)
