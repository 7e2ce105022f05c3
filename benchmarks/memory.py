"""What the chains cost in memory:  python benchmarks/memory.py [--repeats 3] [--steps-of-sgld 1 20 80] [--out FILE]

The peak of the sampling phase (our `sample`; the released code's `samples`, paper_step.py) above what was held before
it, for several K: it should not depend on K. And the bytes that a replay buffer takes, by how it is stored. Every
figure is of a process of its own, repetitions alternate. Needs torch and jem/ alone; on a CPU, Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine
from paper_step import PaperStep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jem.config import JEMConfig, ReplayConfig
from jem.models import make_network
from jem.prior import Prior
from jem.replay import ReplayBuffer
from jem.settings import override
from jem.train import sample, start
from jem.world import World

SHAPE, CHAINS, MIB = (3, 32, 32), 10_000, 2**20
STORED = ("float32", "float16", "uint8")
LOOK_EVERY_S = 0.001


def config_of(steps: int, cuda: bool) -> JEMConfig:
    """WRN-16-2, batch 32; on a GPU the paper's WRN-28-10, batch 64."""
    depth, width, batch = (28, 10, 64) if cuda else (16, 2, 32)
    network = {"model.depth": depth, "model.width": width, "batch_size": batch}
    return override(JEMConfig(seed=0), {**network, "sgld.steps": steps, "replay.capacity": 10 * batch})


def ours(steps: int, device: torch.device) -> Callable[[], Any]:
    config = config_of(steps, device.type == "cuda")
    state = start(config, SHAPE, 10, World(), device)
    like = torch.zeros(config.batch_size, *SHAPE, device=device)
    return lambda: sample(state, config, like, config.batch_size)


def paper(steps: int, device: torch.device) -> Callable[[], Any]:
    config = config_of(steps, device.type == "cuda")
    network = make_network(config.model, SHAPE, 10).to(memory_format=torch.contiguous_format)
    step = PaperStep(network, SHAPE, device, steps=steps, capacity=10 * config.batch_size)
    return lambda: step.samples(config.batch_size)


KINDS = {"ours": ours, "released code": paper}


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_above(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes held at most while `function` runs, above those held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = highest = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(LOOK_EVERY_S):
            highest = max(highest, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    highest = max(highest, anonymous())
    done.set()
    watcher.join()
    return highest - before


def sampling(kind: str, steps: int) -> int:
    """The first time, which nothing has made room for: an allocator keeps what it was given."""
    device = here()
    return peak_above(KINDS[kind](steps, device), device)


def storage(dtype: str, _: int) -> int:
    """Of a shard of all chains, as allocated."""
    prior = Prior(ReplayConfig(capacity=CHAINS, dtype=dtype), SHAPE)
    shard = ReplayBuffer.start(prior, 10, World(), torch.Generator(here()), clamp=1.0)
    return shard.chains.untyped_storage().nbytes()


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def alone(function: Callable[[str, int], int], kind: str, steps: int) -> int:
    """What `function` returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (kind, steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps-of-sgld", type=int, nargs="+", default=[1, 20, 80], metavar="K")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seen: dict[str, dict[int, list[int]]] = {kind: {k: [] for k in arguments.steps_of_sgld} for kind in KINDS}
    for _ in range(arguments.repeats):
        for k in arguments.steps_of_sgld:
            for kind in KINDS:
                seen[kind][k].append(alone(sampling, kind, k))
                print(f"{kind}, K={k}: {seen[kind][k][-1] / MIB:.1f} MiB", file=sys.stderr, flush=True)
    peaks = {
        kind: {
            k: {"median_mib": round(statistics.median(of_k) / MIB, 2), "mib": [round(b / MIB, 2) for b in of_k]}
            for k, of_k in by_k.items()
        }
        for kind, by_k in seen.items()
    }
    config = config_of(1, here().type == "cuda")
    network = f"wrn-{config.model.depth}-{config.model.width}, batch {config.batch_size}, {config.precision}"
    result = {
        "command": " ".join(["python benchmarks/memory.py", *sys.argv[1:]]),
        "hardware": machine(),
        "device": torch.cuda.get_device_name() if here().type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "network": network,
        "sampling_peak": peaks,
        "buffer": {
            "chains": CHAINS,
            "shape": SHAPE,
            "bytes": {dtype: alone(storage, dtype, 0) for dtype in STORED},
        },
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
