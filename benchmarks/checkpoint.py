"""What a checkpoint costs the training loop:  python benchmarks/checkpoint.py [--out FILE.json]

The loop waits for the copy to the host; packing, hashing and writing go on in a thread beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import machine

from jem.config import JEMConfig
from jem.files import Location
from jem.saving import Writer
from jem.settings import override
from jem.train import start
from jem.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = override(JEMConfig(seed=0), {"model.depth": 28, "model.width": arguments.width})
    state = start(config, (3, 32, 32), 10, device=device)
    for parameter in state.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    waits, wholes = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Location.of(folder)
        for step in range(arguments.repeats):
            state.step = step
            writer = Writer(World(), device)
            begin = time.perf_counter()
            writer.begin(root / step, state, {}, {})
            waits.append(time.perf_counter() - begin)
            writer.finish()
            wholes.append(time.perf_counter() - begin)
        size = sum(path.stat().st_size for path in (root / 0).local.iterdir())
    result = {
        "command": "python benchmarks/checkpoint.py",
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else machine(),
        "torch": torch.__version__,
        "megabytes": round(size / 1e6, 1),
        "loop_waits_ms": round(1000 * statistics.median(waits), 1),
        "written_after_ms": round(1000 * statistics.median(wholes), 1),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
