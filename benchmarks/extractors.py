"""Train the feature extractors that are shipped:  python benchmarks/extractors.py [SET ...] [--settings key=value ...]

Each SET (digits, mnist5k, fashion_mnist; none: all) is one `jobs/train.py SET_lenet`, a plain classifier of two minutes
on one core. The final weights go to jem/evaluate/weights/lenet_SET.safetensors, and what they are to lenet.json beside
them. Other weights are other extractors: figures measured before no longer compare, so there is hardly a reason to run
this again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import save
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from jem import checkpoint
from jem.data.augment import to_float
from jem.data.sources import load
from jem.evaluate import baselines
from jem.evaluate.extractors import WEIGHTS, Extractor, extractor_for, lenet
from jem.files import Location
from orchestrator.config import load_run_config

ROOT = Path(__file__).resolve().parents[1]
SETS = ("digits", "mnist5k", "fashion_mnist")
FIXED = ("workers=1", "device=cpu", "evaluate.register=false", "evaluate.suite=none")
"""What a training for its weights alone needs not."""


def trained(recipe: str, settings: list[str]) -> dict[str, Any]:
    """The result of a run of `jobs/train.py`, in a folder of its own."""
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), recipe, *FIXED, *settings]
    storage = tempfile.mkdtemp(prefix="extractors-")
    done = subprocess.run([*command, f"storage_path={storage}"], stdout=subprocess.PIPE, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{recipe}: {result['message']}")
    return result


def export(name: str, settings: list[str], facts: dict[str, Any]) -> None:
    """Train, and write the weights and what is known of them."""
    recipe = f"{name}_lenet"
    config = load_run_config(recipe, settings)
    result = trained(recipe, settings)
    tensors = checkpoint.read_manifest(Location.of(result["checkpoint"])).tensors(f"{result['weights']}.safetensors")
    data = load(config.data)
    network = lenet(config.model, data.image_shape, data.n_classes)
    network.load_state_dict(tensors)
    file = to_bytes({key: value.contiguous() for key, value in scaled(network, data.train.images).state_dict().items()})
    WEIGHTS.mkdir(exist_ok=True)
    (WEIGHTS / f"lenet_{name}.safetensors").write_bytes(file)
    facts[name] = {
        "sha256": hashlib.sha256(file).hexdigest(),
        "recipe": recipe,
        "command": " ".join(
            ["python benchmarks/extractors.py", name, *(["--settings", *settings] if settings else [])]
        ),
        "training": " ".join(["python jobs/train.py", recipe, *FIXED, *settings]),
        "features": "mean square 1 over the training images",
        "seed": config.seed,
        "steps": result["step"],
        "torch": torch.__version__,
        "parameters": sum(value.numel() for value in tensors.values()),
        "image_shape": list(data.image_shape),
        "n_classes": data.n_classes,
        "data_digest": data.digest,
    }
    save(facts, WEIGHTS / "lenet.json")
    facts[name]["test_accuracy"] = accuracy(extractor_for(config.data, data.image_shape), data.test)
    save(facts, WEIGHTS / "lenet.json")


def scaled(network: nn.Module, images: Tensor) -> nn.Module:
    """The same logits from features whose mean square over `images` is 1: KID's kernel (x.y / d + 1)^3 is then near 1.

    ReLU lets a factor through, and the last layer takes it back.
    """
    before, after = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        found = torch.cat([baselines.features(network)(to_float(part)) for part in torch.split(images, 1000)])
        factor = float(found.square().mean().rsqrt())
        for value in (before.weight, before.bias):
            value.mul_(factor)
        after.weight.div_(factor)
    return network


def accuracy(extractor: Extractor, split: Any) -> float:
    """Of the file as it will be read."""
    _, logits = extractor.features(to_float(split.images))
    return round(float((logits.argmax(dim=1) == split.labels).double().mean()), 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=", ".join(SETS))
    parser.add_argument("--settings", nargs="*", default=[], metavar="key=value", help="of the trainings")
    arguments = parser.parse_args()
    if wrong := set(arguments.sets) - set(SETS):
        parser.error(f"no such set: {', '.join(sorted(wrong))}; there are {', '.join(SETS)}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    known = WEIGHTS / "lenet.json"
    facts: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    for name in arguments.sets or SETS:
        export(name, arguments.settings, facts)
        print(json.dumps({name: facts[name]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
