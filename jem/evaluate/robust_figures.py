"""Accuracy under attack, from the smallest norms that were found: what a report says of them, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jem.config import EvaluateConfig, JEMConfig
from jem.evaluate.robustness import UNBOUNDED, attacks_of, counts, eps_of


def wilson(hits: int, n: int) -> list[float]:
    """[share, low, high]: 95 % interval of a share (Wilson, 1927), which has a width at 0 and at 1 too."""
    z = 1.959964
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))]  # rounding at 0 and 1


def accuracy_at(found: Float[Tensor, " n"], eps: float) -> list[float]:
    """The share of images without an adversarial within eps, with its interval; of norms that were `_rounded`."""
    return wilson(int(beyond(found, eps).sum()), len(found))


def beyond(found: Float[Tensor, " n"], eps: float) -> Bool[Tensor, " n"]:
    """Where no adversarial was found within eps, which like 1/255 may have more digits than are kept of the norms."""
    return found > eps * (1 + 1e-5)


BLACK_BOX = 0.05
"""The share of images that random search alone may break before gradients are suspect."""


def robust_figures(found: Mapping[int, Mapping[str, Tensor]], settings: EvaluateConfig, config: JEMConfig) -> Any:
    """The report's section: of each k what `split` has."""
    n = len(next(iter(found.values()))["wrong"])
    attack = settings.attack
    return {
        "n": n,
        "counts": counts(settings)._asdict() | {"copies": attack.copies},
        "refine": {
            "step_size": config.sgld.step_size,
            "noise_scale": config.sgld.noise_scale,
            "copy_noise": attack.copy_noise,
        },
        "k": {str(k): _of_k(k, parts, settings) for k, parts in found.items()},
    }


def _of_k(k: int, parts: Mapping[str, Tensor], settings: EvaluateConfig) -> dict[str, Any]:
    wrong = parts["wrong"] > 0
    norms, black_box, largest = {}, {}, 0.0
    for norm, grid in eps_of(settings).items():
        names = attacks_of(norm, k, settings.suite)
        by_attack = {name: _rounded(parts[f"{norm}/{name}"]) for name in names}
        by_attack["worst"] = torch.stack(list(by_attack.values())).amin(dim=0)
        searched = grid if k == 0 else (grid[len(grid) // 2],)
        norms[norm] = {
            "eps": list(grid),
            "accuracy": {  # null: not attacked at this eps
                name: [accuracy_at(found, eps) if name != "square" or eps in searched else None for eps in grid]
                for name, found in by_attack.items()
            },
            "found": {
                name: [v if math.isfinite(v) else None for v in found.tolist()] for name, found in by_attack.items()
            },
        }
        others = torch.stack([found for name, found in by_attack.items() if name not in ("square", "worst")])
        alone = [int((~beyond(by_attack["square"], eps) & beyond(others.amin(dim=0), eps)).sum()) for eps in searched]
        black_box[norm] = {"by_square_alone": max(alone), "n": len(wrong), "ok": max(alone) <= BLACK_BOX * len(wrong)}
        if norm == "linf":
            largest = norms[norm]["accuracy"]["worst"][-1][0]  # type: ignore[index]
    unbounded = 1 - (parts["unbounded"] > 0).double().mean().item()
    budget = {"eps": UNBOUNDED, "accuracy": unbounded, "worst": largest, "ok": unbounded == 0}
    return {
        "clean": wilson(int((~wrong).sum()), len(wrong)),
        "norms": norms,
        "masking": {"larger_budget": budget, "black_box": black_box},
    }


def _rounded(found: Tensor) -> Tensor:
    """To 6 digits, float64: the float32 next to an eps of 0.2 is beyond it."""
    return torch.tensor([float(f"{norm:.6g}") for norm in found.tolist()], dtype=torch.float64)


def robust_metrics(section: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`robust/<norm>/<eps>/<attack>/accuracy`; JEM-k: `robust_k<k>/...`, and `clean/accuracy` of each."""
    for k, of_k in section["k"].items():
        prefix = "robust" if k == "0" else f"robust_k{k}"
        yield f"{prefix}/clean/accuracy", of_k["clean"][0]
        for norm, found in of_k["norms"].items():
            for name, values in found["accuracy"].items():
                for eps, value in zip(found["eps"], values, strict=True):
                    if value is not None:
                        yield f"{prefix}/{norm}/{eps:g}/{name}/accuracy", value[0]
