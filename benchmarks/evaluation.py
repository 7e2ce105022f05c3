"""How well an evaluation uses the hardware:  python benchmarks/evaluation.py [--pairs 7] [--out FILE]

FLOP a second of a whole evaluation, its statistics and figures included, over those of the training step, in
alternating pairs: WRN-16-2 in bf16 on generated images (on a GPU, WRN-28-10). FLOP are those that torch counts of
both (torch.utils.flop_counter), not an assumption of ours. Needs torch, scikit-learn and jem/ alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import machine, save
from step import Case, batch_of, timed, wide
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jem.config import EvaluateConfig
from jem.data.splits import DataSet, Split
from jem.evaluate.passes import FORWARDS
from jem.evaluate.suite import compute_here, evaluate
from jem.train import start, train_step
from jem.world import World

SHAPE, CLASSES = (3, 32, 32), 10
SUITES = {
    "fast": (1000, EvaluateConfig(suite="fast")),
    "full": (100, EvaluateConfig(suite="full", sets=("interp", "uniform", "rot90"))),
}
"""Images of each split, and settings."""


def generated(n: int) -> DataSet:
    """Blobs of one colour a class, with noise: images that a network can tell apart."""
    random = torch.Generator().manual_seed(0)
    colours = torch.rand(CLASSES, 3, 1, 1, generator=random) * 255

    def split() -> Split:
        labels = torch.arange(n) % CLASSES
        images = colours[labels] + 40 * torch.randn(n, *SHAPE, generator=random)
        return Split(images.clamp(0, 255).to(torch.uint8), labels)

    return DataSet("generated", split(), split(), split(), tuple(map(str, range(CLASSES))))


class FLOPCounter(TorchDispatchMode):
    """Adds up what torch's registry says of each operation; its own counter cannot follow autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def flop_of(function: Callable[[], Any]) -> int:
    with FLOPCounter() as counter:  # type: ignore[no-untyped-call]
        function()
    return int(counter.total)


def measure(suite: str, case: Case, device: torch.device, pairs: int) -> dict[str, Any]:
    config = case.config(precision="bf16")
    state, batch = start(config, case.shape, CLASSES, World(), device), batch_of(case, device)
    n, settings = SUITES[suite]
    data, like = generated(n), torch.zeros((), device=device)
    passes_s: list[float] = []

    def step() -> None:
        train_step(state, batch, config, World())

    def evaluation() -> None:
        compute = compute_here(state.network, config, settings, World(), like)

        def timed_passes(subjects: Any) -> Any:
            found: list[Any] = []
            subjects = replace(subjects, passes=[which for which in subjects.passes if which.what in FORWARDS])
            passes_s.append(timed(lambda: found.append(compute(subjects)), device))
            return found[0]

        evaluate(state.network, data, config, settings, timed_passes)

    flop = {evaluation: flop_of(evaluation), step: flop_of(step)}
    for _ in range(10):
        step()
    evaluation()
    passes_s.clear()
    times = max(1, round(timed(evaluation, device) / timed(step, device)))
    rows = []
    for i in range(pairs):
        found = {}
        for function in (evaluation, step) if i % 2 == 0 else (step, evaluation):
            found[function] = timed(function, device, 1 if function is evaluation else times)
        rows.append((found[evaluation], found[step]))
    ratios = [(flop[evaluation] / one) / (flop[step] / other) for one, other in rows]
    seconds = statistics.median(one for one, _ in rows)
    return {
        "images": n,
        "gflop": round(flop[evaluation] / 1e9),
        "seconds": round(seconds, 2),
        "of_the_network": round(statistics.median(passes_s) / seconds, 3),
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "pairs": pairs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--suites", nargs="*", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    case = Case(SHAPE, 64, 20, wide(28, 10)) if cuda else Case(SHAPE, 32, 10, wide(16, 2))
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/evaluation.py", *sys.argv[1:]]),
        "hardware": machine(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "suites": {},
    }
    for suite in arguments.suites:
        found = measure(suite, case, torch.device("cuda" if cuda else "cpu"), arguments.pairs)
        result["suites"][suite] = found
        print(f"{suite}: {json.dumps(found)}", flush=True)
    save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
