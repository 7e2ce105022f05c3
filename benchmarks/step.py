"""How fast a training step is:  python benchmarks/step.py [--pairs 7] [--cases NAME ...] [--modes MODE ...]

Ours against three others in alternating pairs, each in a process of its own: the released code's step (paper_step.py)
and a plain classifier's, of the same network, batch, K and images, and a large matrix product in the same precision,
which is what the hardware can do. Ratios are medians over the pairs. Needs torch and jem/ alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, save
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


SMALL = {"model.name": "small_conv", "model.channels": (16, 32, 64, 64), "model.activation": "silu"}

CPU = {
    "wrn-16-2, batch 32, K=20": Case((3, 32, 32), 32, 20, wide(16, 2)),
    "wrn-16-2, batch 32, K=10": Case((3, 32, 32), 32, 10, wide(16, 2)),
    "wrn-16-2, batch 32, K=5": Case((3, 32, 32), 32, 5, wide(16, 2)),
    "digits, batch 64, K=20": Case((1, 8, 8), 64, 20, SMALL),
    "digits, batch 64, K=10": Case((1, 8, 8), 64, 10, SMALL),
    "digits, batch 64, K=5": Case((1, 8, 8), 64, 5, SMALL),
    "fashion_mnist, batch 64, K=20": Case((1, 28, 28), 64, 20, SMALL),
    "fashion_mnist, batch 64, K=10": Case((1, 28, 28), 64, 10, SMALL),
}
GPU = {
    "wrn-28-10, batch 64, K=20": Case((3, 32, 32), 64, 20, wide(28, 10)),
    "wrn-28-10, batch 64, K=10": Case((3, 32, 32), 64, 10, wide(28, 10)),
    "wrn-28-10, batch 64, K=5": Case((3, 32, 32), 64, 5, wide(28, 10)),
    "wrn-28-10, batch 256, K=20": Case((3, 32, 32), 256, 20, wide(28, 10)),
}
MODES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "float32": {"precision": "float32"},
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


def timed(function: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Seconds a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def batch_of(case: Case, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.batch, *case.shape, generator=generator) * 2 - 1
    labels = torch.randint(0, 10, (case.batch,), generator=generator)
    return Batch(images.to(device), labels.to(device), None, None, case.batch, case.batch)


def ours(case: Case, device: torch.device, **changes: Any) -> Callable[[], Any]:
    config = case.config(**changes)
    state, batch = start(config, case.shape, 10, World(), device), batch_of(case, device)
    return lambda: train_step(state, batch, config, World())


def classifier(case: Case, device: torch.device, **changes: Any) -> Callable[[], Any]:
    return ours(case, device, **changes, **{"objective.p_x_weight": 0.0})


def paper(case: Case, device: torch.device, **_: Any) -> Callable[[], Any]:
    batch, config = batch_of(case, device), case.config()
    network = make_network(config.model, case.shape, 10).to(memory_format=torch.contiguous_format)
    step = PaperStep(network, case.shape, device, steps=case.steps, capacity=10 * case.batch)
    assert batch.labels is not None
    images, labels = batch.images.cpu(), batch.labels.cpu()
    return lambda: step.step(images, labels)


def product(_: Case, device: torch.device, precision: str, **__: Any) -> Callable[[], Any]:
    """A large matrix product: what the hardware can do, in float32 with TF32 where convolutions have it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    n = side(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def side(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 2048


KINDS: dict[str, Callable[..., Callable[[], Any]]] = {
    "ours": ours,
    "classifier": classifier,
    "paper": paper,
    "product": product,
}


class Runner:
    """A process of its own that holds one kind of step and times it when told: none lives on another's memory."""

    def __init__(self, kind: str, case: Case, device: torch.device, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, kind, case, device, settings), daemon=True)
        self.process.start()
        theirs.close()

    def seconds(self, times: int) -> float:
        """What a step takes, over `times` of them."""
        self.pipe.send(times)
        return float(self.pipe.recv())

    def close(self) -> None:
        self.pipe.send(0)
        self.process.join()


def serve(pipe: Any, kind: str, case: Case, device: torch.device, settings: dict[str, Any]) -> None:
    step = KINDS[kind](case, device, **settings)
    while times := pipe.recv():
        pipe.send(timed(step, device, times))


def pairs(one: Runner, other: Runner, n: int, each: float) -> dict[str, Any]:
    """Medians of both in seconds, and of their ratio pair by pair with its range. `each`: seconds that a time lasts."""
    runners = (one, other)
    for runner in runners:
        runner.seconds(3)  # what is set up, or compiled, on first use
    times = [max(1, round(each / runner.seconds(3))) for runner in runners]
    rows = []
    for i in range(n):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        found = {k: runners[k].seconds(times[k]) for k in order}
        rows.append((found[0], found[1]))
    ratios = [a / b for a, b in rows]
    return {
        "seconds": [round(statistics.median(column), 5) for column in zip(*rows, strict=True)],
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": n,
    }


def measure(case: Case, device: torch.device, n: int, mode: str, each: float) -> dict[str, Any]:
    settings = MODES[mode]
    flop, passes = forward_flop(case), 2 * case.steps + 6
    step = Runner("ours", case, device, settings)

    def against(kind: str) -> dict[str, Any]:
        other = Runner(kind, case, device, settings)
        try:
            return pairs(other, step, n, each)
        finally:
            other.close()

    peak = against("product")
    work = passes * flop / (2.0 * side(device) ** 3)  # of a step, in products
    peak |= {"ratio": round(work * peak["ratio"], 3), "range": [round(work * x, 3) for x in peak["range"]]}
    found = {
        "precision": settings["precision"],
        "forward_gflop": round(flop / 1e9, 3),
        "passes": passes,
        "against_product": peak,
        "against_paper": against("paper"),
        "against_classifier": against("classifier"),
    }
    step.close()
    theirs = found["against_classifier"]
    inverse = {"ratio": round(1 / theirs["ratio"], 2), "range": [round(1 / x, 2) for x in reversed(theirs["range"])]}
    found["against_classifier"] = theirs | inverse | {"arithmetic": round(passes / 3, 2)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.6, help="that each time lasts, or a step")
    parser.add_argument("--cases", nargs="*", help="names, of those of the device")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="what --out has of other cases stays")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU if device.type == "cuda" else CPU
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "hardware": machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cases": {},
    }
    if arguments.add and arguments.out and arguments.out.exists():
        earlier = json.loads(arguments.out.read_text())
        if any(earlier[key] != result[key] for key in ("hardware", "device", "torch", "threads")):
            parser.error(f"--add: {arguments.out} was measured elsewhere ({earlier['hardware']}, {earlier['device']})")
        result |= {"command": f"{earlier['command']}; {result['command']}", "cases": earlier["cases"]}
    for name in arguments.cases or cases:
        result["cases"][name] = {}
        for mode in arguments.modes:
            found = measure(cases[name], device, arguments.pairs, mode, arguments.seconds)
            result["cases"][name][mode] = found
            print(f"{name}, {mode}: {json.dumps(found)}", flush=True)
    save(result, arguments.out)
    print(json.dumps({key: value for key, value in result.items() if key != "cases"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
