"""What the suites full and paper add to a report: attacks, distal adversarials, samples and chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jem.config import EvaluateConfig, JEMConfig
from jem.data.splits import DataSet
from jem.energy import energy, joint_energy
from jem.errors import ConfigError
from jem.evaluate import generation, robustness, sampled
from jem.evaluate.extractors import to_bytes
from jem.evaluate.measured import Measured
from jem.evaluate.passes import Pass
from jem.evaluate.robust_figures import robust_figures, robust_metrics

if TYPE_CHECKING:
    from jem.evaluate.suite import Subjects

START = {"uniform": "uniform noise"} | dict.fromkeys(("gaussian", "data"), "the Gaussian prior")
"""Of chains that are scored, by `replay.prior`: none begins at a training image."""

CONVENTIONS = {
    "eps, norms of attacks": "on the [0, 1] pixel scale",
    "robust accuracy": "share of the attacked images without an adversarial of norm eps or less found; images that "
    "are wrong from the start count; Wilson's 95 % interval",
    "worst": "the nearest adversarial that any attack found, image by image",
    "JEM-k": "k SGLD steps before it classifies, logits averaged over noisy copies; attacked through these steps, "
    "with new noise in every gradient; what counts is the answer under noise that no attack saw",
    "fid, kid, is, precision, recall": "of images with 256 levels, against the training split, by the extractor named; "
    "they depend on the number of images: compare equal numbers",
}


def further(
    found: Mapping[Pass, Tensor],
    subjects: Subjects,
    measured: Measured,
    data: DataSet,
    config: JEMConfig,
    settings: EvaluateConfig,
    buffer: Callable[[], Tensor] | None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any], Measured]:
    """Sections of the report with their metrics, and the outputs that they were made from."""
    rows = {which.what: value.cpu() for which, value in found.items() if which.images not in measured.scores}
    left_out = dict(measured.left_out)
    report: dict[str, Any] = {"grids": {}, "metrics": {}}
    attacked: dict[str, Tensor] = {}
    pixels = data.test.images[0].numel()
    ks = {int(what.removeprefix("attack/")): what for what in rows if what.startswith("attack/")}
    if ks:
        parts = {k: robustness.split(rows[what], settings, k, pixels) for k, what in ks.items()}
        report["robust"] = robust_figures(parts, settings, config)
        report["metrics"] |= dict(robust_metrics(report["robust"]))
        attacked = {"images": (subjects.images["attacked"] + 1) / 2, "labels": subjects.labels["attacked"]}
        attacked |= {f"{k}/{name}": value for k, of_k in parts.items() for name, value in of_k.items()}
        report["grids"] |= dict(_adversarials(attacked, min(parts), data))
    if "distal" in rows:
        section, report["grids"]["distal"] = _distal(rows["distal"], data)
        report["distal"] = section
    samplers = dict(_samplers(rows, config, settings, buffer, left_out))
    if samplers:
        report["grids"] |= sampled.grids(samplers, data.train.images)
        try:
            if "gen" not in left_out:
                report["gen"] = sampled.gen_section(samplers, data, config, settings, device)
                report["metrics"] |= dict(sampled.gen_metrics(report["gen"]))
        except (ConfigError, ValueError) as error:  # no extractor, or too few images for neighbours
            left_out["gen"] = " ".join(str(error).split())
    if "chains" in rows:
        marks = sampled.lengths(config, settings)[1]
        of_test = measured.logits["test"]
        classes = measured.labels["test"] if config.sgld.conditional else None  # what the chains follow
        data_energy = energy(of_test) if classes is None else joint_energy(of_test, classes)
        report["chains"] = sampled.chains_section(rows["chains"], marks, config, data_energy, settings.generate.lengths)
        report["metrics"] |= dict(sampled.chain_metrics(report["chains"]))
    report |= {"left_out": left_out, "conventions": CONVENTIONS}
    samples = {name: to_bytes(images) for name, (images, _) in samplers.items()}
    return report, replace(measured, left_out=left_out, attacked=attacked, samples=samples)


def _samplers(
    rows: Mapping[str, Tensor],
    config: JEMConfig,
    settings: EvaluateConfig,
    buffer: Callable[[], Tensor] | None,
    left_out: dict[str, str],
) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """(name, (images, what is said of them)); those that are not there are in `left_out`."""
    if "fresh" not in rows:
        return
    images = rows["fresh"]
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        left_out["gen/fresh"] = f"{bad} of {len(images)} chains left every range"
    else:
        length = sampled.lengths(config, settings)[0]
        start = START[config.replay.prior]
        yield "fresh", (images, f"chains of {length:,} SGLD steps from {start}, {len(images):,} of them")
    if buffer is None:
        left_out["gen/buffer"] = "the model came without a replay buffer; a run's folder or checkpoint has one"
        return
    chains = buffer()
    finite = chains.isfinite().flatten(1).all(dim=1)
    if not finite.any():
        left_out["gen/buffer"] = f"none of the {len(chains):,} chains of the replay buffer is a number"
        return
    lost = f"; {int((~finite).sum()):,} are no numbers" if not finite.all() else ""
    kept = chains[finite][generation.at_random(int(finite.sum()), sampled.n_samples(settings))].float()
    yield "buffer", (kept, f"the training's replay buffer, {len(kept):,} of its {len(chains):,} chains{lost}")


def _adversarials(attacked: Mapping[str, Tensor], k: int, data: DataSet) -> Iterator[tuple[str, dict[str, Any]]]:
    """Images that were right, above the nearest that are wrong: the largest change bounded, and its length."""
    right = (attacked[f"{k}/wrong"] == 0).nonzero()[: sampled.COLUMNS, 0]
    if not len(right):
        return
    rows = [attacked["images"][right]]
    rows += [attacked[f"{k}/{norm}/adversarial"][right].view(-1, *data.image_shape) for norm in ("linf", "l2")]
    caption = f"JEM-{k}: test images, and below each the nearest adversarial found, in Linf and in L2"
    yield "adversarials", sampled.picture(2 * torch.cat(rows).float() - 1, caption, len(right))


def _distal(rows: Tensor, data: DataSet, target: float = 0.9) -> tuple[dict[str, Any], dict[str, Any]]:
    p, steps, images = rows[:, 0], rows[:, 1], rows[:, 2:].view(-1, *data.image_shape)
    reached = (p > target).tolist()
    section = {"reached": reached, "steps": steps.int().tolist(), "p": p.tolist(), "target": target}
    caption = f"from noise to p(y|x) > {target:g}, a class each: {sum(reached)} of {len(reached)} got there"
    return section, sampled.picture(images[: sampled.SHOWN].float(), caption)
