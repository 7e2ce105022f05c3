"""Kill -9 at random times, and the same final bits each time:  python benchmarks/soak.py [--kills 20] [--out FILE.json]

One undisturbed run gives the hash. Then each run is disturbed once, at a time drawn uniformly over its training: a
worker is killed (Ray replaces it) or the driver (the same command is given again). `make soak` runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import machine

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("steps=600", "checkpoint.every=50", "tracking.every=25", "evaluate.every=200", "tracking.images_every=400")
VICTIMS = ("worker 0", "worker 1", "driver")


class Run:
    """`python jobs/train.py digits_uniform ...` in a process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.run = folder, folder / "runs" / name
        self.command = [sys.executable, str(ROOT / "jobs" / "train.py"), "digits_uniform", *SETTINGS, f"name={name}"]

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=log, stderr=log)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def wait_for(self, kind: str, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not self.events(kind):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no {kind}: see {self.folder / 'log'}")
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "TrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda p: p.create_time())

    def digest(self) -> str:
        """Weights, moments, chains and generators of the last checkpoint, and the metrics but for the clock's."""
        manifests = sorted(self.run.glob("checkpoints/*/manifest.json"), key=lambda p: int(p.parent.name))
        files = json.loads(manifests[-1].read_text())["files"]
        state = {name: entry["sha256"] for name, entry in files.items() if name != "events.jsonl"}
        trace = {
            (key, event["step"]): value
            for event in self.events("metrics")
            for key, value in event["metrics"].items()
            if key != "train/images_per_s"
        }
        text = json.dumps([sorted(state.items()), sorted(trace.items())])
        return hashlib.sha256(text.encode()).hexdigest()


def disturbed(folder: Path, name: str, victim: str, fraction: float, duration: float) -> dict[str, Any]:
    """A run that loses `victim` after that fraction of its training."""
    run = Run(folder, name)
    run.start()
    run.wait_for("attempt")
    time.sleep(fraction * duration)
    at = max((event["step"] for event in run.events("metrics")), default=0)
    killed = time.time()
    if victim == "driver":
        run.process.kill()
        run.process.wait()
        run.start()
    else:
        workers = run.workers()
        if len(workers) == 2:
            workers[int(victim[-1])].kill()
    code = run.process.wait(600)
    attempts = [event["step"] for event in run.events("attempt")]
    back = run.events("attempt")[-1]["time"] / 1000 - killed
    return {
        "victim": victim,
        "at": round(fraction, 3),
        "last_point": at,
        "attempts_from_step": attempts,
        "back_after_s": round(back, 1) if len(attempts) > 1 else None,
        "exit": code,
        "hash": run.digest() if code == 0 else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    chance = random.Random(arguments.seed)
    whole = Run(folder, "whole")
    whole.start()
    if whole.process.wait(300) != 0:
        raise SystemExit(f"the undisturbed run failed: see {folder / 'log'}")
    duration = (whole.events("metrics")[-1]["time"] - whole.events("attempt")[0]["time"]) / 1000
    expected = whole.digest()
    print(f"undisturbed: {duration:.0f} s of training, {expected[:16]}", flush=True)
    kills: list[dict[str, Any]] = []
    while len(kills) < arguments.kills:
        number = len(kills)
        told = disturbed(folder, f"kill-{number}", VICTIMS[number % 3], chance.random(), duration)
        told["same"] = told["hash"] == expected
        kills.append(told)
        print(json.dumps(told), flush=True)
    same = sum(kill["same"] for kill in kills)
    result = {
        "command": "make soak",
        "settings": ["digits_uniform", *SETTINGS],
        "seed": arguments.seed,
        "hardware": machine(),
        "same_final_hash": f"{same} of {len(kills)}",
        "hash": expected,
        "kills": kills,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if same == len(kills):
        shutil.rmtree(folder)
    else:
        print(f"what is left: {folder}")
    print(f"{same} of {len(kills)} ended with the same hash")
    return 0 if same == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
