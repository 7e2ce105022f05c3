"""What the network computes for an evaluation: passes over sets of images, which any number of workers can share.

A pass is cut into batches that are fixed (`over_random_batches`), so its result is the same whoever computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jem.config import EvaluateConfig, JEMConfig
from jem.data.augment import to_float
from jem.data.splits import Split
from jem.errors import ConfigError
from jem.evaluate import baselines, scores
from jem.evaluate.evaluate import over_random_batches
from jem.train import autocast, frozen_logits
from jem.world import World

FORWARDS = {"logits": 1, "features": 1, "approx_mass": 3, "odin": 4, "refinement": 2 * scores.RELEASED.steps + 2}
"""What a pass over an image costs, in forward passes."""

Function = Callable[[Tensor, torch.Generator], Tensor]
"""From a batch [n, c, h, w] on [-1, 1] and a stream of randomness to a row an image."""


class Pass(NamedTuple):
    """`what`, a key of `FORWARDS`, of every image of the set `images`: validation, test, train or a set of outliers."""

    images: str
    what: str


class Part(World):
    """A part of an evaluation whose results are added up by whoever dealt it out: no process group is needed."""

    def sum(self, values: Tensor) -> Tensor:
        return values


def needed(suite: str, outliers: tuple[str, ...], left_out: Mapping[str, str]) -> list[Pass]:
    """The passes of a suite. `left_out`: baselines that cannot be computed (see `baselines_left_out`)."""
    compared = ("test", *outliers)
    whats = ["logits", "approx_mass"]
    if suite == "full":
        whats.append("refinement")
        whats += ["odin"] if "odin" not in left_out else []
        whats += ["features"] if "vim" not in left_out else []
    passes = [Pass("validation", "logits"), *(Pass(images, what) for images in compared for what in whats)]
    return [*passes, Pass("train", "features")] if "features" in whats else passes


def run_pass(
    network: nn.Module,
    which: Pass,
    images: Tensor,
    config: JEMConfig,
    settings: EvaluateConfig,
    world: World,
    like: Tensor,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """The pass' rows [n, ...] for float images [n, c, h, w]; `on_batch` is told how many images each batch had."""
    function = functions(network, config)[which.what]

    def counted(x: Tensor, generator: torch.Generator) -> Tensor:
        value = function(x, generator)
        on_batch(len(x))
        return value

    return over_random_batches(counted, images, settings, world, like, which.images)


def functions(network: nn.Module, config: JEMConfig) -> dict[str, Function]:
    """Each pass as a function of a batch, for a network in eval mode, in the precision it was trained in."""
    logits = frozen_logits(network, config)

    def features(x: Tensor, _: torch.Generator) -> Tensor:
        with autocast(config, x.device):
            found = baselines.features(network)(x)
        return found if found.dtype == torch.float64 else found.float()

    def odin(x: Tensor, _: torch.Generator) -> Tensor:
        with torch.enable_grad():
            return baselines.odin(logits, x)

    return {
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
