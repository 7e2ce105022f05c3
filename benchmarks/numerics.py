"""What fewer bits cost:  python benchmarks/numerics.py [--seeds 0-4] [--steps N] --out FILE

Trains digits_uniform in one process, without Ray, with bf16 arithmetic in the network and with chains stored in
uint8, and compares the figures on the test split and of the chains seed by seed: means, and differences, with 95 %
t-intervals over seeds. One thing changes at a time. uint8 needs a clamp, hence the settings with one. Runs that
FILE has of the same steps are kept: an interrupted benchmark goes on. About a minute a run on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from claims import interval
from common import machine, seeds_of
from torch import Tensor

from jem.config import EvaluateConfig
from jem.data.augment import to_float
from jem.data.batches import BatchSource
from jem.data.sources import DataSet, load
from jem.energy import Logits, energy
from jem.evaluate import ood
from jem.evaluate.evaluate import classification_metrics, over_batches
from jem.evaluate.scores import log_px
from jem.evaluate.suite import FAST_SETS, prepare
from jem.train import WIDE, TrainState, frozen_logits, start, train
from jem.world import World
from orchestrator.config import RunConfig, load_run_config

CLAMP, BF16 = "sgld.clamp=1", "precision=bf16"
SETTINGS = {
    "float32": ["precision=float32"],
    "bf16": [BF16],
    "float32, clamp": ["precision=float32", CLAMP],
    "bf16, clamp": [BF16, CLAMP],
    "bf16, clamp, uint8": [BF16, CLAMP, "replay.dtype=uint8"],
}
AGAINST = (
    ("bf16", "float32"),
    ("float32, clamp", "float32"),
    ("bf16, clamp", "float32, clamp"),
    ("bf16, clamp, uint8", "bf16, clamp"),
)
"""Each pair differs in one thing."""

LIKE = torch.zeros(())


def run(config: RunConfig, data: DataSet) -> dict[str, float]:
    """Train one seed to its end; its figures on the test split and of its chains."""
    state = start(config, data.image_shape, data.n_classes)
    batches = BatchSource(data.train, config.data, config.batch_size, config.seed)
    lost = skipped = 0.0
    for info in train(state, batches.at, config, config.steps):
        lost, skipped = lost + float(info.lost_chains), skipped + float(info.skipped)
    return on_test(state, config, data) | of_chains(state, config, data) | {"lost chains": lost, "skipped": skipped}


def on_test(state: TrainState, config: RunConfig, data: DataSet) -> dict[str, float]:
    logits = frozen_logits(state.network, config)
    images = prepare(state.network, data, config, EvaluateConfig(suite="fast")).images
    found = {name: logits_of(logits, images[name]) for name in ("test", *FAST_SETS)}
    aurocs = {f"AUROC {name}": ood.auroc(log_px(found["test"]), log_px(found[name])) for name in FAST_SETS}
    return classification_metrics(found["test"], data.test.labels) | aurocs


def logits_of(logits: Logits, images: Tensor) -> Tensor:
    return over_batches(logits, images, EvaluateConfig(), World(), LIKE, "")


def of_chains(state: TrainState, config: RunConfig, data: DataSet) -> dict[str, float]:
    """All chains as they stand; contrast as `looks` has it (jem/train.py), saturation of the chains alone."""
    assert state.replay is not None
    x, images = state.replay.positions(), to_float(data.test.images, torch.float32)
    logits = frozen_logits(state.network, config)
    samples, tests = (energy(logits_of(logits, each)).mean() for each in (x, images))
    return {
        "chains' mean": float(x.mean()),
        "chains' contrast": float(x.flatten(1).var(dim=1, correction=0).mean()),
        "chains' saturation": float((x.abs() >= (config.sgld.clamp or WIDE)).float().mean()),
        "energy gap": float(tests - samples),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure: mean and interval by setting, and of each pair the difference, of the seeds that both have."""
    by = {name: {r["seed"]: r["figures"] for r in runs if r["setting"] == name} for name in SETTINGS}
    keys = list(runs[0]["figures"])
    means = {
        name: {key: interval([f[key] for f in of.values()]) for key in keys} for name, of in by.items() if len(of) > 1
    }
    differences = {}
    for one, other in AGAINST:
        seeds = sorted(by[one].keys() & by[other].keys())
        if len(seeds) > 1:
            differences[f"{one} - {other}"] = {
                key: interval([by[one][s][key] - by[other][s][key] for s in seeds]) for key in keys
            }
    return {"means": means, "differences": differences}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=range(5), help="as in 0-4")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    changes = [f"steps={arguments.steps}"] if arguments.steps else []
    first = load_run_config("digits_uniform", changes)
    data = load(first.data)
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    runs = [one for one in runs if one["steps"] == first.steps]
    for seed in arguments.seeds:
        for name in arguments.settings:
            if any((one["setting"], one["seed"]) == (name, seed) for one in runs):
                continue
            began = time.monotonic()
            figures = run(load_run_config("digits_uniform", [*changes, *SETTINGS[name], f"seed={seed}"]), data)
            took = round(time.monotonic() - began, 1)
            runs.append({"setting": name, "seed": seed, "steps": first.steps, "seconds": took, "figures": figures})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            result = {
                "command": " ".join(["python benchmarks/numerics.py", *sys.argv[1:]]),
                "hardware": f"{torch.get_num_threads()} threads; {machine()}, torch {torch.__version__}",
                "settings": SETTINGS,
                "intervals": "mean and 95 % t-interval over seeds; over one seed there is none: two are needed",
                "summary": summary(runs),
                "runs": runs,
            }
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
