"""One trained network, all its figures: `evaluate` composes passes, scores and statistics into a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jem.config import EvaluateConfig, JEMConfig
from jem.data.augment import to_float
from jem.data.sources import DataSet
from jem.evaluate import others
from jem.evaluate.measured import Measured, assemble
from jem.evaluate.passes import FORWARDS, Pass, baselines_left_out, needed, run_pass
from jem.evaluate.report import figures
from jem.world import World

FAST_SETS = ("interp", "uniform")


@dataclass(frozen=True)
class Subjects:
    """All images of an evaluation, what their sets are, and what has to be computed of them."""

    images: dict[str, Tensor]  # float32 [n, c, h, w] on [-1, 1]; uint8 for the training split
    how: dict[str, str]  # of each set of outliers
    passes: list[Pass]
    left_out: dict[str, str]

    def of(self, name: str) -> Tensor:
        return (
            to_float(self.images[name], torch.float32) if self.images[name].dtype == torch.uint8 else self.images[name]
        )

    def cost(self, which: Pass) -> int:
        """In forward passes of an image."""
        return FORWARDS[which.what] * len(self.images[which.images])


Dealt = Callable[[Subjects], Mapping[Pass, Tensor]]
"""Computes all passes: here, on the ranks of a training, or spread over workers."""


def evaluate(
    network: nn.Module, data: DataSet, config: JEMConfig, settings: EvaluateConfig, compute: Dealt
) -> tuple[dict[str, Any], Measured]:
    """The suite `settings.suite` of a network: the report (see report.py) and the outputs it was made from.

    The test split is in-distribution; images are clean unless `settings.noise_std`. Temperature and threshold are
    fitted on the validation split. Raises DivergedError if an output is not finite.
    """
    began = time.monotonic()
    sizes = {name: len(split) for name, split in data.splits.items()}
    digest, data = data.digest, replace(data, train=data.train.part())
    subjects = prepare(network, data, config, settings)
    labels = {"validation": data.validation.labels, "test": data.test.labels}
    measured = assemble(compute(subjects), labels, network, subjects.left_out, data.train.labels)
    report = figures(measured, subjects.how, settings.suite)
    about = {"name": data.name, "digest": digest, "image_shape": list(data.image_shape)}
    report["data"] = about | {"classes": list(data.classes), "sizes": sizes}
    report["settings"] = {
        "suite": settings.suite,
        "noise_std": settings.noise_std,
        "max_images": settings.max_images,
        "sets": list(measured.outliers),
    }
    report["model"] = {"parameters": sum(p.numel() for p in network.parameters())}
    return report | {"seconds": time.monotonic() - began}, measured


def prepare(network: nn.Module, data: DataSet, config: JEMConfig, settings: EvaluateConfig) -> Subjects:
    """Load and adapt all sets. Raises ConfigError or DataError for one that was asked for and cannot be had."""
    test = to_float(data.test.images, torch.float32)
    images = {"validation": to_float(data.validation.images, torch.float32), "test": test}
    how, left_out = {}, {}
    names: tuple[str, ...] = FAST_SETS
    if settings.suite == "full":
        left_out = baselines_left_out(network, data.train)
        images["train"] = data.train.images
        names = settings.sets
        if not names:
            names, absent = others.default_sets(config.data, data.image_shape)
            left_out |= absent
    for key, name in others.check_sets(names, config.data).items():
        images[key], how[key] = others.load_outliers(name, test, config.data, settings.max_images)
    return Subjects(images, how, needed(settings.suite, tuple(how), left_out), left_out)


def compute_here(
    network: nn.Module,
    config: JEMConfig,
    settings: EvaluateConfig,
    world: World,
    like: Tensor,
    on_batch: Callable[[Pass, int], None] = lambda *_: None,
) -> Dealt:
    """Compute with this network: alone, or as a rank of a `world` that gets everything on all ranks."""

    def compute(subjects: Subjects) -> dict[Pass, Tensor]:
        def run(which: Pass) -> Tensor:
            images = subjects.of(which.images)
            return run_pass(network, which, images, config, settings, world, like, lambda n: on_batch(which, n))

        return {which: run(which) for which in subjects.passes}

    return compute
