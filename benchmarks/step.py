"""How fast a training step is:  python benchmarks/step.py [--pairs 7] [--cases NAME ...] [--out FILE]

Pairs of steps, one after the other, with the same network, batch, K and images: the released code's step
(paper_step.py) against ours, and ours against a plain classifier's. Ratios are medians over the pairs. Utilisation is
arithmetic (24 K + ... see docs/performance.md) over what a matrix product of this machine reaches in that precision.
Needs torch and jem/ alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine
from paper_step import PaperStep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jem.config import JEMConfig
from jem.data.batches import Batch
from jem.models import make_network
from jem.settings import override
from jem.train import start, train_step
from jem.world import World

ADAM = {"optimizer.name": "adam", "optimizer.learning_rate": 1e-4}


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on; `steps` is K."""

    shape: tuple[int, int, int]
    batch: int
    steps: int
    settings: dict[str, Any]

    def config(self, **changes: Any) -> JEMConfig:
        size = {"batch_size": self.batch, "sgld.steps": self.steps, "replay.capacity": 10 * self.batch}
        return override(JEMConfig(seed=0), {**ADAM, **size, **self.settings, **changes})


def wide(depth: int, width: int) -> dict[str, Any]:
    return {"model.name": "wide_resnet", "model.depth": depth, "model.width": width, "model.activation": "leaky_relu"}


DIGITS = {"model.name": "small_conv", "model.channels": (16, 32, 64, 64), "model.activation": "silu"}

CPU = {
    "wrn-16-2, batch 32, K=10": Case((3, 32, 32), 32, 10, wide(16, 2)),
    "digits, batch 64, K=20": Case((1, 8, 8), 64, 20, DIGITS),
    "digits, batch 64, K=10": Case((1, 8, 8), 64, 10, DIGITS),
}
GPU = {
    "wrn-28-10, batch 64, K=20": Case((3, 32, 32), 64, 20, wide(28, 10)),
    "wrn-28-10, batch 256, K=20": Case((3, 32, 32), 256, 20, wide(28, 10)),
}


def forward_flop(case: Case) -> float:
    """Of the batch: two for each multiplication in a convolution or a linear layer."""
    total = 0.0

    def count(module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += 2.0 * out.numel() * weight.numel() / weight.shape[0]

    with torch.device("meta"):
        network = make_network(case.config().model, case.shape, 10)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(count)
        network(torch.zeros(case.batch, *case.shape))
    return total


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, device) for _ in range(12))
    return 2.0 * n**3 / best


def timed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def pairs(one: Callable[[], Any], other: Callable[[], Any], n: int, device: torch.device, each: int) -> dict[str, Any]:
    """Medians of both in seconds, and of their ratio pair by pair with its range. `each`: steps that make one time."""

    def several(step: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [step() for _ in range(each)] and None

    for function in (one, other):
        for _ in range(2):
            several(function)()
    times = []
    for i in range(n):
        order = [one, other] if i % 2 == 0 else [other, one]
        found = {id(f): timed(several(f), device) / each for f in order}
        times.append((found[id(one)], found[id(other)]))
    ratios = [a / b for a, b in times]
    return {
        "seconds": [round(statistics.median(column), 5) for column in zip(*times, strict=True)],
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": n,
    }


def batch_of(case: Case, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch, *case.shape, generator=generator) * 2 - 1
    labels = torch.randint(0, 10, (case.batch,), generator=generator)
    return Batch(images.to(device), labels.to(device), None, None, case.batch, case.batch)


def ours(case: Case, device: torch.device, **changes: Any) -> Callable[[], Any]:
    config = case.config(**changes)
    state, batch = start(config, case.shape, 10, World(), device), batch_of(case, device)
    return lambda: train_step(state, batch, config, World())


def paper(case: Case, device: torch.device) -> Callable[[], Any]:
    batch, config = batch_of(case, device), case.config()
    network = make_network(config.model, case.shape, 10).to(memory_format=torch.contiguous_format)
    step = PaperStep(network, case.shape, device, steps=case.steps, capacity=10 * case.batch)
    assert batch.labels is not None
    images, labels = batch.images.cpu(), batch.labels.cpu()
    return lambda: step.step(images, labels)


def measure(case: Case, device: torch.device, n: int, precision: str, peaks: dict[str, float]) -> dict[str, Any]:
    flop = forward_flop(case)
    each = 1 if flop > 1e9 else 10
    against_paper = pairs(paper(case, device), ours(case, device, precision=precision), n, device, each)
    passes = 2 * case.steps + 6
    seconds = against_paper["seconds"][1]
    result = {
        "precision": precision,
        "forward_gflop": round(flop / 1e9, 3),
        "against_paper": against_paper,
        "passes": passes,
        "utilisation": round(passes * flop / seconds / peaks[precision], 3),
    }
    classifier = {"objective.p_x_weight": 0.0, "precision": precision}
    against = pairs(ours(case, device, precision=precision), ours(case, device, **classifier), n, device, each)
    return result | {"against_classifier": against | {"arithmetic": round(passes / 3, 2)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cases", nargs="*", help="names, of those of the device")
    parser.add_argument("--precision", nargs="*", default=["bf16", "float32"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU if device.type == "cuda" else CPU
    dtypes = {"bf16": torch.bfloat16, "float32": torch.float32}
    peaks = {name: peak(device, dtypes[name]) for name in arguments.precision}
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]]),
        "hardware": machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak_gflops": {name: round(found / 1e9) for name, found in peaks.items()},
        "cases": {},
    }
    for name in arguments.cases or cases:
        result["cases"][name] = {}
        for precision in arguments.precision:
            found = measure(cases[name], device, arguments.pairs, precision, peaks)
            result["cases"][name][precision] = found
            print(f"{name}, {precision}: {json.dumps(found)}", flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "cases"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
