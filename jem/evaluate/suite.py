"""One trained network, all its figures: `evaluate` composes passes, scores and statistics into a report."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from jem.config import EvaluateConfig, JEMConfig
from jem.data.augment import to_float
from jem.data.sources import DataSet
from jem.errors import DataError
from jem.evaluate import others, passes
from jem.evaluate.extractors import extractor_for
from jem.evaluate.further import further
from jem.evaluate.measured import Measured, assemble
from jem.evaluate.passes import Pass, baselines_left_out, needed, run_pass
from jem.evaluate.report import figures
from jem.evaluate.robustness import counts
from jem.evaluate.sampled import fairly, n_samples
from jem.prior import fit_classes, make_prior, uniform
from jem.randomness import generator
from jem.train import ALONE
from jem.world import World

FAST_SETS = ("interp", "uniform")


@dataclass(frozen=True)
class Subjects:
    """All images of an evaluation, what their sets are, and what has to be computed of them."""

    images: dict[str, Tensor]  # float32 [n, c, h, w] on [-1, 1], or uint8
    how: dict[str, str]  # of each set of outliers
    passes: list[Pass]
    left_out: dict[str, str]
    labels: dict[str, Tensor] = field(default_factory=dict)  # [n], of the sets whose passes need them
    costs: dict[str, int] = field(default_factory=dict)  # of a pass over an image, in forward passes

    def cost(self, which: Pass) -> int:
        """In forward passes of an image."""
        return self.costs[which.what] * len(self.images[which.images])


Dealt = Callable[[Subjects], Mapping[Pass, Tensor]]
"""Computes all passes: here, on the ranks of a training, or spread over workers."""


def evaluate(
    network: nn.Module,
    data: DataSet,
    config: JEMConfig,
    settings: EvaluateConfig,
    compute: Dealt,
    buffer: Callable[[], Tensor] | None = None,
    world: World = ALONE,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any], Measured]:
    """The suite `settings.suite` of a network: the report (see report.py) and the outputs it was made from.

    The test split is in-distribution; images are clean unless `settings.noise_std`. Temperature and threshold are
    fitted on the validation split. `buffer`: reads the chains [n, c, h, w] of the replay buffer, where there is one.
    `world`: the ranks that call this with the same arguments, and compute together. `device`: where the features of
    samples are computed.
    Raises DivergedError if an output is not finite, DataError if the ranks do not have the same sets.
    """
    began = time.monotonic()
    sizes = {name: len(split) for name, split in data.splits.items()}
    digest, data = data.digest, replace(data, train=world.together(data.train.part))  # streamed, it is read here
    subjects = world.together(lambda: prepare(network, data, config, settings))
    told = world.gather(subjects.passes)
    if any(listed != told[0] for listed in told):
        raise DataError(_unequal(told))
    labels = {"validation": data.validation.labels, "test": data.test.labels}
    found = compute(subjects)
    measured = assemble(found, labels, network, subjects.left_out, data.train.labels)
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
    if settings.complete:
        sections, measured = further(found, subjects, measured, data, config, settings, buffer, device)
        report |= sections | {key: report[key] | sections[key] for key in ("metrics", "conventions")}
    return report | {"seconds": time.monotonic() - began}, measured


def _unequal(told: list[list[Pass]]) -> str:
    names = [{name for which in listed for name in which} for listed in told]
    some = sorted(set[str].union(*names) - set[str].intersection(*names))
    what = f"not all workers' machines have {', '.join(some)}"
    return f"evaluate.sets: {what}: bring it to all (the data, pytorch-ood, foolbox), or name the sets that all have"


def prepare(network: nn.Module, data: DataSet, config: JEMConfig, settings: EvaluateConfig) -> Subjects:
    """Load and adapt all sets. Raises ConfigError or DataError for one that was asked for and cannot be had."""
    test = to_float(data.test.images, torch.float32)
    images = {"validation": to_float(data.validation.images, torch.float32), "test": test}
    how: dict[str, str] = {}
    left_out: dict[str, str] = {}
    labels: dict[str, Tensor] = {}
    more: list[Pass] = []
    names = settings.sets or FAST_SETS
    if settings.complete:
        left_out = baselines_left_out(network, data.train)
        if config.data.labels_per_class is not None:
            reason = f"it needs the labels of all training images; the run had {config.data.labels_per_class} a class"
            left_out.setdefault("mahalanobis", reason)
        images["train"] = data.train.images
        if not settings.sets:
            names, absent = others.default_sets(config.data, data.image_shape)
            left_out |= absent
        if settings.generate.inception is not None and config.objective.samples_needed:
            extractor_for(config.data, data.image_shape, settings.generate.inception)  # now, not after all attacks
        more, without = _attacks_and_samples(config, settings)
        left_out |= without
        rows = fairly(data.test.labels, counts(settings).images)
        labels = {"attacked": data.test.labels[rows], "noise": torch.arange(len(data.classes))}
        images |= {"attacked": test[rows], "noise": uniform((len(data.classes), *data.image_shape), _stream("distal"))}
        if config.objective.samples_needed:
            starts = _starts(config, settings, data)
            images |= starts
            if config.sgld.conditional:
                labels |= {name: torch.arange(len(x)) % data.n_classes for name, x in starts.items()}
    for key, name in others.check_sets(names, config.data).items():
        images[key], how[key] = others.load_outliers(name, test, config.data, settings.max_images)
    todo = [*needed(settings.complete, tuple(how), left_out), *more]
    costs = {which.what: passes.cost(which.what, config, settings) for which in todo}
    return Subjects(images, how, todo, left_out, labels, costs)


def _starts(config: JEMConfig, settings: EvaluateConfig, data: DataSet) -> dict[str, Tensor]:
    """Where chains begin, those that are scored and those that are watched: at no training image."""
    fitted = fit_classes(config, data.train, data.n_classes)
    prior = make_prior(config, data.train, data.n_classes, fitted, "cpu").without_images()
    n_of = {"fresh": n_samples(settings), "chains": settings.generate.chains}
    names = {"fresh": "fresh starts", "chains": "chain starts"}
    return {names[key]: prior.sample(torch.arange(n) % data.n_classes, _stream(key)) for key, n in n_of.items()}


def _attacks_and_samples(config: JEMConfig, settings: EvaluateConfig) -> tuple[list[Pass], dict[str, str]]:
    """Their passes, and what is left out with the reason."""
    found, left_out = [], {}
    if importlib.util.find_spec("foolbox") is None:
        left_out["robust"] = "foolbox, which has the minimum-norm attacks, is not installed: pip install foolbox"
    else:
        found += passes.of_attacks(config, settings)
    if not config.objective.samples_needed:
        left_out |= dict.fromkeys(("gen", "chains"), "it was trained without chains")
        left_out["robust_k"] = "it refines no image: it was trained without chains"
    elif importlib.util.find_spec("torch_fidelity") is None:
        left_out["gen"] = "torch-fidelity, which has FID and its kin, is not installed: pip install torch-fidelity"
    return found + passes.of_samples(config), left_out


def _stream(name: str) -> torch.Generator:
    """The same for every model."""
    return generator("cpu", "evaluate", name, "starts")


def compute_here(
    network: nn.Module,
    config: JEMConfig,
    settings: EvaluateConfig,
    world: World,
    like: Tensor,
    on_part: Callable[[Pass, float], None] = lambda *_: None,
) -> Dealt:
    """Compute with this network: alone, or as a rank of a `world` that gets everything on all ranks."""

    def compute(subjects: Subjects) -> dict[Pass, Tensor]:
        def run(which: Pass) -> Tensor:
            images = subjects.images[which.images]
            labels = subjects.labels.get(which.images)
            return run_pass(network, which, images, config, settings, world, like, lambda n: on_part(which, n), labels)

        return {which: run(which) for which in subjects.passes}

    return compute
