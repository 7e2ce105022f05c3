"""What the network computes for an evaluation: passes over sets of images, which any number of workers can share.

A pass is cut into batches that are fixed (`over_random_batches`), so its result is the same whoever computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jem.config import EvaluateConfig, JEMConfig
from jem.data.augment import to_float
from jem.data.splits import Split
from jem.energy import energy_fn
from jem.errors import ConfigError
from jem.evaluate import baselines, robustness, scores
from jem.evaluate.evaluate import BATCH, over_random_batches
from jem.evaluate.generation import DIAGNOSTICS, chain_diagnostics, fresh, whole_float32
from jem.evaluate.sampled import lengths
from jem.train import autocast, frozen_logits
from jem.world import T, World

FORWARDS = {"logits": 1, "features": 1, "approx_mass": 3, "odin": 4, "refinement": 2 * scores.RELEASED.steps + 2}
"""What a pass over an image costs, in forward passes."""

Function = Callable[..., Tensor]
"""From a batch [n, c, h, w] on [-1, 1], a stream of randomness, and the labels [n] of a set that has them here, to a
row an image."""


class Pass(NamedTuple):
    """`what` of every image of the set `images`.

    Sets: validation, test, train, a set of outliers; attacked (test images), noise, and starts of chains.
    What: a key of `FORWARDS`; attack/K, distal, fresh, chains.
    """

    images: str
    what: str


class Part(World):
    """A part of an evaluation whose results are added up by whoever dealt it out: no process group is needed."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: T) -> list[T]:
        return [value]


def needed(complete: bool, outliers: tuple[str, ...], left_out: Mapping[str, str]) -> list[Pass]:
    """The passes over images that are scored. `left_out`: baselines that cannot be had (see `baselines_left_out`)."""
    compared = ("test", *outliers)
    whats = ["logits", "approx_mass"]
    if complete:
        whats.append("refinement")
        whats += ["odin"] if "odin" not in left_out else []
        whats += ["features"] if "vim" not in left_out else []
    passes = [Pass("validation", "logits"), *(Pass(images, what) for images in compared for what in whats)]
    return [*passes, Pass("train", "features")] if "features" in whats else passes


def of_attacks(config: JEMConfig, settings: EvaluateConfig) -> list[Pass]:
    """A classifier refines nothing: its chains were never trained."""
    ks = settings.attack.refine if config.objective.samples_needed else (0,)
    return [*(Pass("attacked", f"attack/{k}") for k in ks), Pass("noise", "distal")]


def of_samples(config: JEMConfig) -> list[Pass]:
    """Chains from the prior, those that are scored and those that are watched."""
    return [Pass("fresh starts", "fresh"), Pass("chain starts", "chains")] if config.objective.samples_needed else []


def cost(what: str, config: JEMConfig, settings: EvaluateConfig) -> int:
    """What a pass over an image costs, in forward passes."""
    if what.startswith("attack/"):
        return robustness.cost(settings, int(what.removeprefix("attack/")))
    length, marks = lengths(config, settings)
    return (FORWARDS | {"distal": 3 * 200, "fresh": 3 * length, "chains": 3 * marks[-1]})[what]


def run_pass(
    network: nn.Module,
    which: Pass,
    images: Tensor,
    config: JEMConfig,
    settings: EvaluateConfig,
    world: World,
    like: Tensor,
    on_part: robustness.OnPart = lambda _: None,
    labels: Tensor | None = None,
) -> Tensor:
    """The pass' rows [n, ...] for images [n, c, h, w], uint8 or float; `on_part`: told how many each part was worth."""
    function = functions(network, config, settings)[which.what]

    def counted(x: Tensor, generator: torch.Generator, *labels: Tensor) -> Tensor:
        if which.what.startswith("attack/"):  # takes minutes
            return function(x, generator, *labels, lambda share: on_part(share * len(x)))
        value = function(x, generator, *labels)
        on_part(len(x))
        return value

    size, key = BATCH, which.images
    if which.what not in FORWARDS:  # neither noise on their images, nor one stream for all
        settings, key = replace(settings, noise_std=0.0), f"{which.images}: {which.what}"
        size = robustness.BATCH if which.images == "attacked" else BATCH
    return over_random_batches(counted, images, settings, world, like, key, labels, size)


def functions(network: nn.Module, config: JEMConfig, settings: EvaluateConfig) -> dict[str, Function]:
    """Each pass as a function of a batch, for a network in eval mode, in the precision it was trained in.

    Attacks compute in float32: rounding to bf16 must not hide a gradient. So does the acceptance of a chain's
    moves, which divides differences of energies by a temperature of 5e-5. Chains that keep classes get them as labels.
    """
    logits = frozen_logits(network, config)
    exact = frozen_logits(network, replace(config, precision="float32") if config.precision == "bf16" else config)
    length, marks = lengths(config, settings)

    def features(x: Tensor, _: torch.Generator) -> Tensor:
        with autocast(config, x.device):
            found = baselines.features(network)(x)
        return found if found.dtype == torch.float64 else found.float()

    def odin(x: Tensor, _: torch.Generator) -> Tensor:
        with torch.enable_grad():
            return baselines.odin(logits, x)

    thrifty = False

    def attack(k: int, x: Tensor, generator: torch.Generator, labels: Tensor, on_part: robustness.OnPart) -> Tensor:
        nonlocal thrifty
        arguments, before, left = (exact, x, labels, k, config, settings, generator), generator.get_state(), 1.0

        def counted(part: float) -> None:
            nonlocal left
            left -= part
            on_part(part)

        with whole_float32():
            if not thrifty:
                with suppress(torch.OutOfMemoryError):
                    return robustness.attack(*arguments, counted)
                thrifty = True
                torch.cuda.empty_cache()
                generator.set_state(before)
            rest = left
            return robustness.attack(*arguments, lambda part: on_part(rest * part), thrifty=True)

    def distal(x: Tensor, _: torch.Generator, labels: Tensor) -> Tensor:
        with whole_float32():
            return robustness.distal(exact, x, labels)

    def chains(x: Tensor, generator: torch.Generator, *classes: Tensor) -> Tensor:
        energies = energy_fn(logits, *classes), energy_fn(exact, *classes)
        found = chain_diagnostics(energies[0], x, marks, config.sgld, generator, exact=energies[1])
        return torch.stack([found[key] for key in DIAGNOSTICS], dim=2)

    return {
        **{f"attack/{k}": partial(attack, k) for k in (0, *settings.attack.refine)},
        "distal": distal,
        "fresh": lambda x, generator, *classes: fresh(logits, x, length, config.sgld, generator, *classes),
        "chains": chains,
        "logits": lambda x, _: logits(x),
        "features": features,
        "approx_mass": lambda x, _: scores.approx_mass(logits, x),
        "odin": odin,
        "refinement": lambda x, generator: scores.refinement(logits, x, generator),
    }


def baselines_left_out(network: nn.Module, train: Split) -> dict[str, str]:
    """Post-hoc baselines that this model cannot be compared with, and why."""
    try:
        baselines.detectors()
    except ConfigError as error:
        return dict.fromkeys(baselines.NAMES, str(error))
    weight = next(network.parameters())
    image = to_float(train.images[:1], weight.dtype).to(weight.device)
    try:
        with torch.no_grad():
            logits = baselines.features(network.eval())(image) @ baselines.head(network).weight.T
    except ConfigError as error:
        return dict.fromkeys(baselines.OF_FEATURES, str(error))
    left_out = {}
    missing = set(range(logits.shape[1])) - set(train.labels.tolist())
    if missing:
        left_out["mahalanobis"] = (
            f"no training image of class {', '.join(map(str, sorted(missing)))}; it needs one of each"
        )
    if len(train) < baselines.NEIGHBOURS:
        left_out["knn"] = f"{len(train)} training images; it needs {baselines.NEIGHBOURS} neighbours"
    return left_out
