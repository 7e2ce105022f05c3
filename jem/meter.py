"""Averages of what steps saw, kept on the device and summed over the ranks only when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from jem.config import ObjectiveConfig
from jem.train import StepInfo
from jem.world import World

OF_CHAINS = ("chain_grad_norm", "reinit_share", "chain_saturation", "chain_contrast", "data_contrast")

NUMBERS = ("lost_chains", "skipped", "steps")
"""Counted at every step and added up; all others are means over the steps whose updates were made."""

FIELDS = (
    *("loss", "cross_entropy", "energy_data", "energy_samples", "accuracy", "kl"),
    *(*OF_CHAINS, "grad_norm", *NUMBERS),
)
OF_SAMPLES = ("energy_samples", "energy_gap", "lost_chains", *OF_CHAINS)
"""What a classifier has none of."""


class Meter:
    """This rank's sums, float64 [readers, len(FIELDS)]; they add up over ranks.

    Each reader has sums of its own, since its own last reading: 0 tracks, 1 looks after health.
    """

    def __init__(self, device: torch.device, readers: int = 2) -> None:
        self.sums = torch.zeros(readers, len(FIELDS), dtype=torch.float64, device=device)
        self.means = torch.tensor([field not in NUMBERS for field in FIELDS], device=device)

    def load(self, sums: Tensor) -> None:
        """Go on from these sums. Those of a version that had other fields are left: means begin anew."""
        if sums.shape == self.sums.shape:
            self.sums.copy_(sums)

    def add(self, info: StepInfo, world: World) -> None:
        """Count a step. One whose update was skipped counts as that alone: its figures are not numbers."""
        one = torch.ones_like(info.grad_norm) / world.size
        chains = [getattr(info, field) for field in OF_CHAINS]
        values = torch.stack([*info.loss, *chains, info.grad_norm, info.lost_chains, one * info.skipped, one]).double()
        self.sums += torch.where(info.skipped & self.means, 0.0, values)

    def read(self, world: World, reader: int = 0) -> dict[str, float]:
        """Means over the steps since this reader's last reading whose updates were made, over all ranks.

        `lost_chains`, `skipped` and `steps` are numbers, not means. Raises nothing: if every update was
        skipped, the means are NaN. The reader starts anew, the others are left as they are.
        """
        total = dict(zip(FIELDS, world.sum(self.sums[reader]).tolist(), strict=True))
        self.sums[reader].zero_()
        counted = total["steps"] - total["skipped"]
        return {k: v if k in NUMBERS else v / counted if counted > 0.5 else float("nan") for k, v in total.items()}


def named(figures: dict[str, float], objective: ObjectiveConfig, learning_rate: float) -> dict[str, float]:
    """A reading under the names it is tracked by; a classifier has no figures of samples."""
    metrics = dict(figures) | {"learning_rate": learning_rate}
    del metrics["steps"]
    metrics["energy_gap"] = metrics["energy_data"] - metrics["energy_samples"]
    metrics["skipped_updates"] = round(metrics.pop("skipped"))
    metrics["lost_chains"] = round(metrics["lost_chains"])
    dropped = set() if objective.samples_needed else set(OF_SAMPLES)
    dropped |= set() if objective.kl_weight else {"kl"}  # which few objectives have
    return {f"train/{key}": value for key, value in metrics.items() if key not in dropped}
