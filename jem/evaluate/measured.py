"""What an evaluation is computed from: the logits and the scores of every image, kept beside the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jem.errors import DivergedError
from jem.evaluate import baselines, scores
from jem.evaluate.passes import Pass


@dataclass(frozen=True)
class Measured:
    """One model's outputs on the images of one data set and on sets of others; on the CPU."""

    logits: dict[str, Tensor]  # of validation and test, [n, C]
    labels: dict[str, Tensor]  # of the same, [n]
    scores: dict[str, dict[str, Tensor]]  # of test and of each set of outliers: score to [n], float64
    left_out: dict[str, str] = field(default_factory=dict)  # scores and sets that are not there, and why
    attacked: dict[str, Tensor] = field(default_factory=dict)  # images on [0, 1], labels, K/... (see robustness.py)
    samples: dict[str, Tensor] = field(default_factory=dict)  # of each sampler, uint8 [n, c, h, w]

    @property
    def outliers(self) -> tuple[str, ...]:
        return tuple(name for name in self.scores if name != "test")

    def save(self, path: Path) -> None:
        tensors = {f"logits/{name}": value for name, value in self.logits.items()}
        tensors |= {f"labels/{name}": value for name, value in self.labels.items()}
        tensors |= {f"scores/{images}/{k}": v for images, found in self.scores.items() for k, v in found.items()}
        tensors |= {f"attacked/{name}": value for name, value in self.attacked.items()}
        tensors |= {f"samples/{name}": value for name, value in self.samples.items()}
        content = {key: value.contiguous() for key, value in tensors.items()}
        save_file(content, path, metadata={"order": json.dumps(list(content))})

    @classmethod
    def load(cls, path: Path) -> Measured:
        """What `save` wrote, without `left_out`."""
        made = cls({}, {}, {})
        with safe_open(path, "pt") as file:
            for key in json.loads(file.metadata()["order"]):
                kind, _, name = key.partition("/")
                if kind == "scores":
                    images, _, score = name.partition("/")
                    made.scores.setdefault(images, {})[score] = file.get_tensor(key)
                else:
                    getattr(made, kind)[name] = file.get_tensor(key)
        return made


def assemble(
    found: Mapping[Pass, Tensor],
    labels: dict[str, Tensor],
    network: nn.Module,
    left_out: dict[str, str],
    train_labels: Tensor,
) -> Measured:
    """Scores of what the passes `found`; `labels` are those of validation and test.

    Raises DivergedError if a logit is not finite.
    """
    rows = {which: value.cpu() for which, value in found.items()}
    for which, logits in rows.items():
        if which.what == "logits" and not logits.isfinite().all():
            bad = int((~logits.isfinite()).any(dim=1).sum())
            said = f"the model's logits are not finite for {bad} of {len(logits)} images of {which.images}"
            raise DivergedError(f"{said}; it diverged, use an earlier checkpoint")
    train = rows.get(Pass("train", "features"))
    of_features: dict[str, baselines.OfFeatures] = {}
    if train is not None:
        of_features["vim"] = baselines.vim(train, baselines.head(network))
        if "mahalanobis" not in left_out:
            of_features["mahalanobis"] = baselines.mahalanobis(train, train_labels)
        if "knn" not in left_out:
            of_features["knn"] = baselines.knn(train)

    def scored(images: str) -> dict[str, Tensor]:
        logits = rows[Pass(images, "logits")]
        out = {"log_px": scores.log_px(logits), "max_py": scores.max_py(logits)}
        out["approx_mass"] = rows[Pass(images, "approx_mass")]
        if Pass(images, "refinement") in rows:
            out |= dict(zip(scores.REFINEMENT, rows[Pass(images, "refinement")].unbind(dim=1), strict=True))
            if "msp" not in left_out:
                out |= {"msp": baselines.msp(logits), "energy": baselines.energy(logits)}
        if Pass(images, "odin") in rows:
            out["odin"] = rows[Pass(images, "odin")]
        for name in ("mahalanobis", "vim", "knn"):
            if name in of_features:
                out[name] = of_features[name](rows[Pass(images, "features")])
        return {name: value.double() for name, value in out.items()}

    compared = dict.fromkeys(which.images for which in rows if which.what == "approx_mass")
    found_scores = {images: scored(images) for images in compared}
    dropped = _not_finite(found_scores)
    kept = {
        images: {k: v for k, v in by_score.items() if k not in dropped} for images, by_score in found_scores.items()
    }
    splits = {name: rows[Pass(name, "logits")] for name in ("validation", "test")}
    return Measured(splits, labels, kept, left_out | dropped)


def _not_finite(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Scores that some image has no number of, and why they are left out; the logits' own would be the model's fault.

    Twenty SGLD steps may carry an image out of every range, at gradients that a classifier never had to keep small.
    """
    faults: dict[str, str] = {}
    for images, by_score in found.items():
        for score, values in by_score.items():
            bad = int((~values.isfinite()).sum())
            if bad and score not in ("log_px", "max_py"):
                faults.setdefault(score, f"not finite for {bad} of {len(values)} images of {images}")
    return faults
