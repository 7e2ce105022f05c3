"""How good samples are, whether they are copies, and how the chains that make them move.

Figures compare features of samples with features of data (see extractors.py) and are torch-fidelity's. The others are
functions of one batch of chains or samples, so that any number of workers can share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from jem.config import SGLDConfig
from jem.data.augment import to_float
from jem.energy import EnergyFn, Logits, energy_fn
from jem.errors import ConfigError
from jem.randomness import generator as stream
from jem.sgld import along, bounded, differentiate, sgld_step
from jem.train import WIDE

FIGURES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "is": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}
"""The keys of `figures`, and what torch-fidelity calls them."""

DIAGNOSTICS = ("energy", "grad_norm", "saturation", "acceptance_own", "acceptance_one")
"""The keys of `chain_diagnostics`."""

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
NEIGHBOURHOOD = 3
"""Of precision and recall: a ball reaches to the third nearest neighbour."""

BALLS, BALLS_AT_ONCE = 10_000, 500
"""Reference features that have one at most, and those whose distances to all others are held at once."""

PROPOSALS = 8
"""Moves that the acceptance at one position is averaged over."""

CHUNK = 2**22
"""Numbers of training images, or of distances, held at once in float64: 32 MiB."""


def figures(
    samples: Float[Tensor, "n d"],
    logits: Float[Tensor, "n classes"],
    reference: Float[Tensor, "m d"],
    kid_subsets: int = KID_SUBSETS,
    kid_subset_size: int = KID_SUBSET_SIZE,
) -> dict[str, float]:
    """FID, KID, IS, precision and recall of samples' features and logits beside a reference's features, in float64.

    fid        |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2))                                    (Heusel et al., 2017)
    kid        unbiased MMD^2 with the kernel (x.y / d + 1)^3, mean over `kid_subsets` pairs of random subsets, each of
               `kid_subset_size` or as many as the smaller set has; it may be below 0        (Binkowski et al., 2018)
    kid_std    standard deviation over those pairs, which overlap: of a subset's KID, no standard error of the mean
    is         exp(mean KL(p(y|x) || p(y))) over all samples at once, in one split              (Salimans et al., 2016)
    precision  share of samples within the ball of some reference feature, that reaches to its third neighbour
    recall     share of the reference within such a ball of some sample                     (Kynkäänniemi et al., 2019)
               both of `BALLS` of the reference at most, drawn at random: the time grows with their square

    FID falls with the number of samples: compare equal numbers. Raises ValueError for fewer than 4 of either,
    or numbers that are not finite; ConfigError, with the command that installs it, where torch-fidelity is missing.
    """
    _check("samples", samples, logits)
    _check("the reference", reference)
    of_fid, of_kid, of_isc, of_prc = _torch_fidelity()
    x, y = samples.detach().cpu().double(), reference.detach().cpu().double()
    statistics = [of_fid.fid_features_to_statistics(features) for features in (x, y)]
    size = min(kid_subset_size, len(x), len(y))
    subsets = {"kid_subsets": kid_subsets, "kid_subset_size": size, "rng_seed": KID_SEED}
    balls = {"prc_neighborhood": NEIGHBOURHOOD, "prc_batch_size": BALLS_AT_ONCE, "save_cpu_ram": True}
    drawn = at_random(len(y), BALLS)
    found = (
        of_fid.fid_statistics_to_metric(*statistics, verbose=False)
        | of_kid.kid_features_to_metric(x, y, **subsets, verbose=False)
        | of_isc.isc_features_to_metric(_within_reach(logits.detach().cpu()), splits=1, shuffle=False)
        | of_prc.prc_features_to_metric(x, y[drawn], **balls, verbose=False)
    )
    return {name: found[key] for name, key in FIGURES.items()}


def at_random(total: int, most: int) -> Tensor:
    """Rows [min(total, most)], rising, always the same ones.

    For chains, whose classes come in turns: of evenly spaced ones a class could be missing.
    """
    return torch.randperm(total, generator=stream("cpu", "chains of", total))[:most].sort().values


def nearest(
    samples: Float[Tensor, "n c h w"], train: Shaped[Tensor, "m c h w"], k: int = 3
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The `k` training images nearest to each sample: L2 distances on the [0, 1] pixel scale (float64), and their rows.

    Nearest first. Samples are on [-1, 1], and what is beyond is cut off; training images are that or uint8. Memory is
    bounded, whatever the number of either. Raises ValueError if there are fewer than k, or a sample is not finite.
    """
    if len(train) < k:
        raise ValueError(f"{len(train)} training images have no {k} that are nearest")
    if not samples.isfinite().all():
        raise ValueError("samples hold numbers that are not finite: a chain that diverged is no sample")
    found = [_nearest(part, train, k) for part in torch.split(samples, _rows((k + 1) * samples[:1].numel()))]
    distances, rows = (torch.cat(column) for column in zip(*found, strict=True))
    return distances, rows


def fresh(
    logits: Logits,
    start: Float[Tensor, "n c h w"],
    steps: int,
    sgld: SGLDConfig,
    generator: torch.Generator,
    labels: Int[Tensor, " n"] | None = None,
    on_step: Callable[[int, Tensor], None] = lambda *_: None,
) -> Float[Tensor, "n c h w"]:
    """Where chains from `start` stand after `steps` SGLD steps down E(x), or E(x, y) with `labels`.

    A schedule goes on with each of PYLD's outer steps, as in training. `on_step` is told the number of each step, from
    1, and the positions after it: for progress, or an animation.
    """
    energy, x = energy_fn(logits, labels), start
    for step in range(1, steps + 1):
        x, _ = sgld_step(energy, x, along(sgld, (step - 1) // sgld.inner_steps), generator)
        on_step(step, x)
    return x.detach()


def chain_diagnostics(
    energy: EnergyFn,
    start: Float[Tensor, "n ..."],
    marks: Sequence[int],
    sgld: SGLDConfig,
    generator: torch.Generator,
    on_step: Callable[[int], None] = lambda _: None,
    exact: EnergyFn | None = None,
) -> dict[str, Float[Tensor, "n marks"]]:
    """Chains from `start` looked at after each number of steps in `marks`, which rise; by the names `DIAGNOSTICS`.

    Energy, the norm of its gradient, saturation (the share of pixels with |x| >= the clamp, or 2 where there is none,
    as in `jem.train.looks`, but of each chain and without the data's share), and the chance that Metropolis and
    Hastings would take the next move, at the chains' own temperature noise_scale^2 / (2 step_size) and at 1 (see
    `acceptance`). Nothing that is looked at changes a chain: the proposals' noise is a stream of its own, named by
    the generator's seed. `on_step` is told the number of each step, from 1. `exact`: the energy without
    rounding to bf16, for the acceptance alone, where differences of energies are divided by a small temperature.
    """
    if not marks or list(marks) != sorted(set(marks)) or marks[0] < 0:
        raise ValueError(f"marks are {list(marks)}, must be numbers of steps that rise")
    probe = stream(generator.device, generator.initial_seed(), "acceptance")
    seen: dict[str, list[Tensor]] = {name: [] for name in DIAGNOSTICS}
    x = start
    for step in range(marks[-1] + 1):
        now = along(sgld, step // sgld.inner_steps)
        if step in marks:
            for name, value in _look(energy, exact or energy, x, now, probe).items():
                seen[name].append(value)
        if step < marks[-1]:
            x, _ = sgld_step(energy, x, now, generator)
            on_step(step + 1)
    return {name: torch.stack(values, dim=1) for name, values in seen.items()}


def acceptance(
    energy: EnergyFn,
    x: Float[Tensor, "n ..."],
    temperatures: Sequence[float],
    sgld: SGLDConfig,
    generator: torch.Generator,
    proposals: int = PROPOSALS,
) -> list[Float[Tensor, " n"]]:
    """The mean chance that an SGLD move from each position would be taken, at each temperature T; float64.

    min(1, exp(-(E(x') - E(x)) / T) q(x | x') / q(x' | x)),  x' ~ q(. | x) = N(x - step_size g(x), noise_scale^2 I)

    (Hastings, 1970), g the gradient as `bounded`. Near 1 where SGLD samples exp(-E / T) truly; it falls with
    the step. At T = noise_scale^2 / (2 step_size) it is MALA's (Roberts & Tweedie, 1996). `sgld.clamp` is left out: a
    clamped move has no density. NaN without noise, as no move can then be undone.
    """
    inverse = [1 / t for t in temperatures] if sgld.noise_scale else []
    before, drift = _drift(energy, x, sgld)
    totals = [before.new_zeros(len(x), dtype=torch.float64) for _ in inverse]
    for _ in range(proposals if inverse else 0):
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        proposed = (x.double() - drift + sgld.noise_scale * noise.double()).to(x.dtype)
        after, back = _drift(energy, proposed, sgld)
        moved = proposed.double() - x.double()  # as it was rounded
        log_q = ((moved + drift).square() - (back - moved).square()).flatten(1).sum(dim=1) / (2 * sgld.noise_scale**2)
        for total, factor in zip(totals, inverse, strict=True):
            total += (log_q - factor * (after - before)).clamp(max=0).exp()
    if not inverse:
        return [before.new_full((len(x),), float("nan"), dtype=torch.float64) for _ in temperatures]
    return [total / proposals for total in totals]


def log_marks(length: int, times: Sequence[int] = (1, 10, 100), per_decade: Sequence[int] = (1, 2, 5)) -> list[int]:
    """Numbers of steps to look at: 0, 1, 2, 5, 10, 20, ... to the longest of `length` x `times`, and each of those."""
    lengths = [length * factor for factor in times]
    longest = max(lengths)
    steps = {digit * 10**power for power in range(len(str(longest))) for digit in per_decade}
    return sorted({0, *lengths} | {step for step in steps if step <= longest})


@contextmanager
def whole_float32() -> Iterator[None]:
    """Convolutions of float32 without TF32's rounding to 10 bits, which is PyTorch's default on a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _look(energy: EnergyFn, exact: EnergyFn, x: Tensor, sgld: SGLDConfig, probe: torch.Generator) -> dict[str, Tensor]:
    value, gradient = differentiate(energy, x)
    own = sgld.noise_scale**2 / (2 * sgld.step_size)
    with whole_float32():
        taken_own, taken_one = acceptance(exact, x, (own, 1.0), sgld, probe)
    if sgld.normalize_gradient:  # steps that do not get shorter where it is flat have no temperature of their own
        taken_own = torch.full_like(taken_own, float("nan"))
    saturated = (x.abs() >= (sgld.clamp or WIDE)).flatten(1).double().mean(dim=1)
    shares = {"saturation": saturated, "acceptance_own": taken_own, "acceptance_one": taken_one}
    return {"energy": value.double(), "grad_norm": gradient.flatten(1).norm(dim=1).double()} | shares


def _drift(energy: EnergyFn, x: Tensor, sgld: SGLDConfig) -> tuple[Tensor, Tensor]:
    """Energies, and how far a step without noise moves down; float64, as what matters are differences."""
    value, gradient = differentiate(energy, x)
    return value.double(), sgld.step_size * bounded(gradient, sgld).double()


def _nearest(samples: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Candidates by |a|^2 - 2 a.b + |b|^2; their distances anew, as differences: those of a copy are exactly 0."""
    a = _pixels(samples)
    best, rows = a.new_full((len(a), 0), 0.0), torch.zeros(len(a), 0, dtype=torch.int64, device=a.device)
    size = _rows(max(len(a), a.shape[1]))
    for begin in range(0, len(train), size):
        b = _pixels(train[begin : begin + size].to(a.device))
        squares = a.square().sum(dim=1, keepdim=True) - 2 * a @ b.T + b.square().sum(dim=1)
        near, at = squares.topk(min(k, len(b)), dim=1, largest=False)
        best, order = torch.cat([best, near], dim=1).sort(dim=1, stable=True)
        rows = torch.cat([rows, at + begin], dim=1).gather(1, order)[:, :k]
        best = best[:, :k]
    copies = train[rows.flatten().to(train.device)].to(a.device)
    distances = (a[:, None] - _pixels(copies).reshape(*rows.shape, -1)).norm(dim=2)
    distances, order = distances.sort(dim=1, stable=True)
    return distances, rows.gather(1, order)


def _pixels(images: Tensor) -> Tensor:
    """Rows of pixels on [0, 1], float64."""
    x = to_float(images, torch.float32) if images.dtype == torch.uint8 else images.detach()
    return (x.double().clamp(-1, 1).flatten(1) + 1) / 2


def _rows(width: int) -> int:
    return max(1, CHUNK // max(1, width))


def _check(what: str, features: Tensor, *others: Tensor) -> None:
    if len(features) <= NEIGHBOURHOOD:
        needed = f"at least {NEIGHBOURHOOD + 1} to have {NEIGHBOURHOOD} neighbours"
        raise ValueError(f"{what}: {len(features)} features, must be {needed}")
    for values in (features, *others):
        if not values.isfinite().all():
            raise ValueError(f"{what}: features or logits are not finite")


def _within_reach(logits: Tensor) -> Tensor:
    """At most 500 below the highest: a class whose p(y|x) rounds to 0 throughout would make the score NaN."""
    return logits.double().maximum(logits.double().amax(dim=1, keepdim=True) - 500)


def _torch_fidelity() -> tuple[Any, ...]:
    """Its modules of metrics. Raises ConfigError, with the command that installs it, where it is missing."""
    try:
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    except ImportError as error:
        needs = "FID, KID, IS, precision and recall need torch-fidelity"
        raise ConfigError(f"{needs}: pip install torch-fidelity") from error
    return metric_fid, metric_kid, metric_isc, metric_prc
