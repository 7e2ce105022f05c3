"""Runs of a recipe that need nobody:  python benchmarks/unattended.py RECIPE [key=value ...] --seeds 0-9 [--out FILE]

Each seed is one `python jobs/train.py RECIPE seed=N`, with all that a user gets: two workers, rollbacks, the ladder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, seeds_of

ROOT = Path(__file__).resolve().parents[1]


def unattended(folder: Path, recipe: str, settings: list[str], seed: int) -> dict[str, Any]:
    """One run: what it ended with, and what it went through."""
    name = f"seed-{seed}"
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), recipe, *settings, f"seed={seed}", f"name={name}"]
    begin = time.monotonic()
    with open(folder / f"{name}.log", "w") as log:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    lines = (folder / "runs" / name / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    rollbacks = [
        {key: event[key] for key in ("from_step", "step", "reason", "remedy")}
        for event in events
        if event["kind"] == "rollback"
    ]
    kept = ("val/accuracy", "test/accuracy", "train/chain_saturation", "train/chain_contrast", "train/energy_gap")
    return {
        "seed": seed,
        "exit": done.returncode,
        "status": result["status"],
        "step": result["step"],
        "seconds": round(time.monotonic() - begin, 1),
        "metrics": {key: result["metrics"].get(key) for key in kept},
        "rollbacks": rollbacks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", default="0-9", help="such as 0-9 or 3")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    folder = Path(tempfile.mkdtemp(prefix="unattended-"))
    runs = []
    for seed in seeds_of(arguments.seeds):
        runs.append(unattended(folder, arguments.recipe, arguments.settings, seed))
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "command": "python benchmarks/unattended.py " + " ".join(sys.argv[1:]),
        "hardware": machine(),
        "finished": f"{sum(run['status'] == 'finished' for run in runs)} of {len(runs)}",
        "runs": runs,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['finished']} finished; logs in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
