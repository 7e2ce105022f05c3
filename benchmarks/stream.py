"""Training from more data than memory holds:  python benchmarks/stream.py --folder DIR [--gigabytes 10] [--out FILE]

Writes generated images to DIR (kept, and used again), then in a process whose private memory is capped at what
importing torch takes and 2 GB more (RLIMIT_DATA): reads all of them once in the order of training, and trains
WRN-16-2 in pairs from the disk and from memory, while the next window is being read and in between. Linux; needs jem/
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, save
from step import ADAM, wide

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jem.config import DataConfig, JEMConfig
from jem.data import parquet
from jem.data.batches import Batch, BatchSource
from jem.data.sources import load
from jem.data.splits import DataSet, Split, Undecoded
from jem.data.stream import WINDOW_BYTES, Streamed
from jem.files import Location
from jem.settings import override
from jem.train import start, train

SHAPE, CLASSES, GB = (3, 32, 32), 10, 10**9
CAP = 2 * GB
BATCH, STEPS = 32, 24
"""Of the timed training: a time is that many steps."""


def write(folder: Path, gigabytes: float) -> None:
    n = round(gigabytes * GB / torch.Size(SHAPE).numel())

    def noise(rows: slice) -> torch.Tensor:
        random = torch.Generator().manual_seed(rows.start)
        return torch.randint(0, 256, (rows.stop - rows.start, *SHAPE), dtype=torch.uint8, generator=random)

    empty = torch.empty(0, *SHAPE, dtype=torch.uint8)
    train_split = Undecoded(empty, torch.arange(n) % CLASSES, noise)
    small = Split(noise(slice(0, 100)), torch.arange(100) % CLASSES)
    data = DataSet("generated", train_split, small, small, tuple(map(str, range(CLASSES))))
    parquet.write(data, Location.of(folder), progress=lambda text: print(text, file=sys.stderr, flush=True))


def status(key: str) -> int:
    """Bytes that /proc/self/status tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def capped(folder: Path, pairs: int) -> dict[str, Any]:
    """All that is measured, in a process whose memory is capped from its beginning."""
    base = status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (base + CAP, base + CAP))
    config = override(
        JEMConfig(seed=0), {**ADAM, **wide(16, 2), "precision": "bf16", "batch_size": BATCH, "sgld.steps": 10}
    )
    plain = DataConfig(name="parquet", root=str(folder), stream=True)
    data = load(plain, ("train",)).train
    assert isinstance(data, Streamed)
    highest, seen, big = 0, 0, 4096
    began = time.perf_counter()
    everything = BatchSource(data, plain, big, 0)
    for step in range(len(data) // big):
        seen += len(everything.at(step).images)
        highest = max(highest, status("RssAnon"))
    drained = time.perf_counter() - began
    del everything

    streamed, memory = BatchSource(data, plain, BATCH, 0), BatchSource(data.part(), plain, BATCH, 0)
    state = start(config, SHAPE, CLASSES)

    def trained(at: Callable[[int], Batch], first: int = 0) -> float:
        """Seconds a step, of steps that get the batches from `first` on."""
        so_far, begin = state.step, time.perf_counter()
        for _ in train(state, lambda step: at(first + step - so_far), config, so_far + STEPS):
            pass
        return (time.perf_counter() - begin) / STEPS

    window = -(-WINDOW_BYTES // torch.Size(SHAPE).numel()) // BATCH  # its steps
    found: dict[str, dict[str, Any]] = {}
    trained(memory.at)
    for kind, wait_s in (("while reading", 0.0), ("in between", 20.0)):
        rows = []
        for i in range(pairs):
            first = (2 * i + 1) * 2 * window + 40  # where nobody has been: the window after it is read now
            times = {}
            for one in ("disk", "memory") if i % 2 == 0 else ("memory", "disk"):
                if one == "disk":
                    streamed.at(first)
                    time.sleep(wait_s)
                times[one] = trained(streamed.at, first) if one == "disk" else trained(memory.at)
                highest = max(highest, status("RssAnon"))
            rows.append(times)
        ratios = [row["disk"] / row["memory"] for row in rows]
        found[kind] = {
            "seconds": round(statistics.median(row["disk"] for row in rows), 4),
            "ratio": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    rate = seen / drained
    return {
        "images": len(data),
        "gigabytes": round(len(data) * torch.Size(SHAPE).numel() / GB, 2),
        "cap_gb": CAP / GB,
        "importing_gb": round(base / GB, 2),
        "peak_anonymous_gb": round(highest / GB, 2),
        "images_per_s_read": round(rate),
        "window_read_s": round(window * BATCH / rate, 1),
        "window_lasts_s": round(window * found["in between"]["seconds"]),
        "pairs": pairs,
        "training": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--capped", action="store_true", help="measure what is in DIR, in this process")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.capped:
        print(json.dumps(capped(arguments.folder, arguments.pairs)))
        return 0
    if not arguments.folder.exists():
        write(arguments.folder, arguments.gigabytes)
    command = [sys.executable, __file__, "--capped", "--folder", str(arguments.folder), "--pairs", str(arguments.pairs)]
    # pyarrow's own allocator reserves address space by the GiB, which the limit counts although it is not used
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    said = f"python benchmarks/stream.py --folder DIR --gigabytes {arguments.gigabytes:g} --pairs {arguments.pairs}"
    result = {"command": said, "hardware": machine(), **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(result, indent=1))
    save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
