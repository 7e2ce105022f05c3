"""When do runs diverge, and when is it noticed? Trains a recipe for several seeds on one thread, without Ray.

    python benchmarks/divergence.py digits_unstable --seeds 0-9 --out docs/results/divergence_plain.json
    python benchmarks/divergence.py mnist5k_uniform sgld.clamp=1 --seeds 0 --steps 2000 --figures --out /tmp/mnist.json

Nothing is done about a run that is found sick: it goes on, so that its end says whether it was. `--figures` keeps
the figures of every look.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, seeds_of

from jem.config import EvaluateConfig
from jem.data.batches import BatchSource
from jem.data.sources import DataSet, load
from jem.evaluate.evaluate import validate
from jem.health import Health
from jem.meter import Meter
from jem.prior import fit_classes, make_prior
from jem.train import TrainState, frozen_logits, start, train
from jem.world import World
from orchestrator.config import RunConfig, load_run_config

HERE = torch.device("cpu")


def run(config: RunConfig, data: DataSet, figures_too: bool) -> dict[str, Any]:
    """Train one seed to its end, looking at it as a run does; what was seen, and what it came to."""
    fitted = fit_classes(config, data.train, data.n_classes)
    prior = make_prior(config, data.train, data.n_classes, fitted, HERE)
    state = start(config, data.image_shape, data.n_classes, prior=prior)
    batches = BatchSource(data.train, config.data, config.batch_size, config.seed)
    meter, health = Meter(HERE), Health.of(config.objective, data.n_classes)
    best, odd = 0.0, 0
    looks: list[dict[str, float]] = []
    sick: tuple[int, str] | None = None
    began = time.monotonic()
    for info in train(state, batches.at, config, config.steps):
        meter.add(info, World())
        if info.step % config.recovery.every == 0 or info.step == config.steps:
            figures = meter.read(World(), reader=1)
            looks.append({"step": info.step} | figures)
            if sick is None:
                reason = health.judge(figures)
                odd += bool(health.odd) and reason is None
                sick = (info.step, reason) if reason else None
        if info.step % 100 == 0:
            best = max(best, accuracy_of(state, config, data))
    last = accuracy_of(state, config, data)
    lost = lost_by(looks[-1], last, best, config.objective.samples_needed)
    return {
        "seed": config.seed,
        "steps": config.steps,
        "diverged": lost,
        "sick at": sick[0] if sick else None,
        "reason": sick[1] if sick else None,
        "odd looks that passed": odd,
        "val/accuracy": round(last, 4),
        "val/accuracy of the best": round(max(best, last), 4),
        "seconds": round(time.monotonic() - began),
        "at the end": rounded({k: looks[-1][k] for k in ("energy_data", "energy_samples", "chain_saturation")}),
    } | ({"looks": [rounded(look) for look in looks]} if figures_too else {})


def lost_by(last: dict[str, float], accuracy: float, best: float, samples: bool) -> str | None:
    """Whether a run has diverged, by its last look and validation alone, whatever `Health` said on the way."""
    if not all(map(math.isfinite, last.values())):
        return "figures that are not finite"
    if accuracy < best - 0.1:
        return "validation accuracy"
    if not samples:
        return None
    if abs(last["energy_data"] - last["energy_samples"]) > 30:
        return "energy gap beyond +-30"
    if not 0.1 < last["chain_contrast"] / last["data_contrast"] < 10:
        return "chains without contrast, or with ten times that of data"
    return None


def accuracy_of(state: TrainState, config: RunConfig, data: DataSet) -> float:
    logits = frozen_logits(state.network, config)
    return validate(logits, data.validation, EvaluateConfig(), World(), torch.zeros(()))["accuracy"]


def rounded(figures: dict[str, float]) -> dict[str, float | str]:
    """Six digits; JSON has no NaN or infinity."""
    return {k: float(f"{v:.6g}") if math.isfinite(v) else str(v) for k, v in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=seeds_of, default=range(1), help="as in 0-9")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--figures", action="store_true", help="keep the figures of every look")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    changes = arguments.changes + ([f"steps={arguments.steps}"] if arguments.steps else [])
    runs: list[dict[str, Any]] = []
    data = load(load_run_config(arguments.recipe, changes).data)
    for seed in arguments.seeds:
        runs.append(run(load_run_config(arguments.recipe, [*changes, f"seed={seed}"]), data, arguments.figures))
        told = {k: v for k, v in runs[-1].items() if k != "looks"}
        sys.stdout.write(f"{told}\n")
        summary = {
            "command": "python " + " ".join(sys.argv),
            "hardware": f"1 thread; {machine()}, torch {torch.__version__}",
            "diverged": f"{sum(r['diverged'] is not None for r in runs)} of {len(runs)}",
            "noticed": sum(r["diverged"] is not None and r["sick at"] is not None for r in runs),
            "false alarms": sum(r["diverged"] is None and r["sick at"] is not None for r in runs),
            "runs": runs,
        }
        if arguments.out:
            arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
