"""What two workers reach of twice one:  python benchmarks/scaling.py [--pairs 7] [--seconds 10] [--out FILE]

Two processes of one thread each, at the same time: in turns they train as the two workers of one run, which average
their gradients, and as two runs that know nothing of each other, with the same work each. And what of the averaging
is not hidden behind the backward pass: the same two workers with and without it. Needs torch and jem/ alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import machine, save
from step import ADAM, SMALL, wide

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jem.config import JEMConfig
from jem.data.batches import Batch
from jem.settings import override
from jem.train import data_parallel, start, train
from jem.world import World

SIZE = 2
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "wrn-16-2, bf16, batch 16 a worker, K=10": (
        (3, 32, 32),
        {**wide(16, 2), "precision": "bf16", "batch_size": 16, "sgld.steps": 10},
    ),
    "digits, batch 32 a worker, K=20": ((1, 8, 8), {**SMALL, "batch_size": 32, "sgld.steps": 20}),
}
"""`batch_size` is a worker's part."""

Steps = Callable[[int], float]
"""Trains so many steps; their seconds."""


def training(case: str, world: World, averaging: bool = True) -> Steps:
    shape, settings = CASES[case]
    n = settings["batch_size"]
    sizes = {"batch_size": n * world.size, "replay.capacity": 10 * n * world.size}
    config = override(JEMConfig(seed=world.rank), {**ADAM, **settings, **sizes})
    random = torch.Generator().manual_seed(world.rank)
    images = torch.rand(n, *shape, generator=random) * 2 - 1
    labels = torch.randint(0, 10, (n,), generator=random)
    batch = Batch(images, labels, None, None, n * world.size, n * world.size)
    state = start(config, shape, 10, world)
    wrapped = data_parallel(state.network, images, world)

    def several(steps: int) -> float:
        quiet = contextlib.nullcontext() if averaging or wrapped is None else wrapped.no_sync()
        begin = time.perf_counter()
        with quiet:
            for _ in train(state, lambda _: batch, config, state.step + steps, world, wrapped):
                pass
        return time.perf_counter() - begin

    return several


def rank_of_two(rank: int, folder: str, case: str, pairs: int, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=SIZE)
    world = World(rank, SIZE)
    kinds = {
        "together": training(case, world),
        "alone": training(case, World()),
        "not averaging": training(case, world, averaging=False),
    }
    for steps in kinds.values():
        steps(3)
    each = torch.tensor([seconds / (kinds["together"](3) / 3)])
    dist.broadcast(each, 0)
    n = max(3, round(float(each)))
    rows = []
    for i in range(pairs):
        order = list(kinds) if i % 2 == 0 else list(reversed(kinds))
        row = {}
        for kind in order:
            dist.barrier()
            row[kind] = kinds[kind](n)
        rows.append(row)
    Path(folder, f"{rank}.json").write_text(json.dumps({"steps": n, "rows": rows}))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: str, pairs: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of_two, (folder, case, pairs, seconds), nprocs=SIZE)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(SIZE)]
    images = CASES[case][1]["batch_size"] * ranks[0]["steps"]
    rates: dict[str, list[float]] = {}
    for kind in ("together", "alone", "not averaging"):
        each = [[images / row[kind] for row in rank["rows"]] for rank in ranks]
        if kind == "alone":  # nobody waits for anybody: their rates add up
            rates[kind] = [sum(both) for both in zip(*each, strict=True)]
        else:
            rates[kind] = [SIZE * min(both) for both in zip(*each, strict=True)]
    ratios = [one / two for one, two in zip(rates["together"], rates["alone"], strict=True)]
    hidden = [1 - one / two for one, two in zip(rates["together"], rates["not averaging"], strict=True)]
    return {
        "images_per_s": {kind: round(statistics.median(values), 1) for kind, values in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "not_hidden": round(statistics.median(hidden), 3),
        "pairs": pairs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10, help="that each time lasts")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/scaling.py", *sys.argv[1:]]),
        "hardware": machine(),
        "torch": torch.__version__,
        "cases": {},
    }
    for case in arguments.cases:
        result["cases"][case] = measure(case, arguments.pairs, arguments.seconds)
        print(f"{case}: {json.dumps(result['cases'][case])}", flush=True)
    save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
