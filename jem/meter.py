"""Averages of what steps saw, kept on the device and summed over the ranks only when somebody asks."""

from __future__ import annotations

import torch

from jem.config import ObjectiveConfig
from jem.train import StepInfo
from jem.world import World

FIELDS = (
    *("loss", "cross_entropy", "energy_data", "energy_samples", "accuracy"),
    *("chain_grad_norm", "reinit_share", "lost_chains", "grad_norm", "skipped", "steps"),
)
OF_SAMPLES = ("energy_samples", "energy_gap", "chain_grad_norm", "reinit_share", "lost_chains")


class Meter:
    """This rank's sums since the last reading, float64 [len(FIELDS)]; they add up over ranks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)

    def add(self, info: StepInfo, world: World) -> None:
        """Count a step. One whose update was skipped counts as that alone: its figures are not numbers."""
        one = torch.ones_like(info.grad_norm) / world.size
        figures = [*info.loss, info.chain_grad_norm, info.reinit_share, info.lost_chains, info.grad_norm]
        values = torch.stack([*figures, one * info.skipped, one]).double()
        values[:7] = torch.where(info.skipped, 0.0, values[:7])
        values[8] = torch.where(info.skipped, 0.0, values[8])
        self.sums += values

    def read(self, world: World) -> dict[str, float]:
        """Means over the steps since the last reading whose updates were made, over all ranks; starts anew.

        `lost_chains`, `skipped` and `steps` are numbers, not means. Raises nothing: if every update was
        skipped, the means are NaN.
        """
        total = dict(zip(FIELDS, world.sum(self.sums).tolist(), strict=True))
        self.sums.zero_()
        counted = total["steps"] - total["skipped"]
        numbers = ("lost_chains", "skipped", "steps")
        return {k: v if k in numbers else v / counted if counted > 0.5 else float("nan") for k, v in total.items()}


def named(figures: dict[str, float], objective: ObjectiveConfig, learning_rate: float) -> dict[str, float]:
    """A reading under the names it is tracked by; a classifier has no figures of samples."""
    metrics = dict(figures) | {"learning_rate": learning_rate}
    del metrics["steps"]
    metrics["energy_gap"] = metrics["energy_data"] - metrics["energy_samples"]
    metrics["skipped_updates"] = round(metrics.pop("skipped"))
    metrics["lost_chains"] = round(metrics["lost_chains"])
    dropped = () if objective.samples_needed else OF_SAMPLES
    return {f"train/{key}": value for key, value in metrics.items() if key not in dropped}
