"""What a sweep costs beside training:  python benchmarks/sweep.py [--trials 16 --seconds 30 --calls 200] [--out FILE]

useful  jobs/sweep.py on digits_uniform, as users call it: the time that trials spend between their first and last event
        of training, against the wall clock of the whole command times the cores.
calls   so many trials of one step in this process, without Ray: what of a trial's time is not the worker
        function's own, and what the driver adds for it: drawing its point, looking at it, sending it to MLflow.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from common import machine, save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SWEEP = """
base: digits_uniform
searcher: random
budget: {{trials: {trials}, steps: {steps}}}
finalists: 0
settings: {{workers: 1, recovery.max: 0}}
space:
  sgld.step_size: {{loguniform: [0.5, 2]}}
  optimizer.learning_rate: {{loguniform: [0.0003, 0.002]}}
"""

RATE_STEPS = 400
"""Of the short sweep that tells how many steps are so many seconds."""


def swept(folder: Path, trials: int, steps: int) -> tuple[float, list[float]]:
    """Wall seconds of the command, and what each trial trained."""
    folder.mkdir()
    (folder / "bench.yaml").write_text(SWEEP.format(trials=trials, steps=steps))
    command = [sys.executable, ROOT / "jobs" / "sweep.py", "bench.yaml", "storage_path=runs"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    wall = time.monotonic() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return wall, [trained(log) for log in sorted(folder.glob("runs/*/trials/t*/events.jsonl"))]


def trained(log: Path) -> float:
    """Seconds between the first and the last event of each attempt's training; the crowning is none."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    spans: list[list[int]] = []
    for event in events:
        if event["kind"] == "attempt":
            spans.append([event["time"], event["time"]])
        elif event["kind"] in ("metrics", "checkpoint") and spans:
            spans[-1][1] = event["time"]
    return (spans[0][1] - spans[0][0]) / 1000


def useful(folder: Path, trials: int, seconds: float) -> dict[str, Any]:
    folder.mkdir()
    cores = os.cpu_count() or 1
    _, short = swept(folder / "rate", cores, RATE_STEPS)
    steps = round(RATE_STEPS * seconds / (sum(short) / len(short)))
    wall, times = swept(folder / "useful", trials, steps)
    return {
        "trials": trials,
        "steps": steps,
        "seconds_a_trial": round(sum(times) / len(times), 1),
        "wall_s": round(wall, 1),
        "cores": cores,
        "useful_share": round(sum(times) / (wall * cores), 3),
    }


class Clock:
    """Wraps functions, and sums up the time that is spent in them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begin

        return call


def calls(folder: Path, trials: int) -> dict[str, Any]:
    """Each trial is worked on by trial.Work, looked at by the overseer as it would be in a second, and sent."""
    from mlflow import MlflowClient

    from jem.files import Location
    from orchestrator.mlflow_run import RunSpec
    from orchestrator.ray_cluster import Cluster
    from orchestrator.runs import read_record
    from orchestrator.sweep import trial as trial_module
    from orchestrator.sweep.axes import valid
    from orchestrator.sweep.config import load_sweep
    from orchestrator.sweep.overseer import Overseer
    from orchestrator.sweep.space import points
    from orchestrator.sweep.trial import TRIALS, Setting, Work, search_trial
    from orchestrator.sweep.upload import Uploads
    from orchestrator.tracking import default_uri

    folder.mkdir()
    (folder / "bench.yaml").write_text(SWEEP.format(trials=trials, steps=1))
    sweep = load_sweep(str(folder / "bench.yaml"), [f"storage_path={folder}", "sgld.steps=1", "replay.capacity=64"])
    root = Location.of(folder) / sweep.name
    root.mkdir()
    clock = Clock()
    trial_module.train_here = clock.timed("train", trial_module.train_here)
    uri, artifacts = default_uri(Location.of(folder), sweep.run.tracking.uri)

    def spec(name: str) -> RunSpec | None:
        record = read_record(root / TRIALS / name)
        params = {key: str(value) for key, value in record.science.items()} if record else {}
        return RunSpec(uri, "bench", name, artifacts, params, {}) if record else None

    parent = RunSpec(uri, "bench", sweep.name, artifacts, {}, {})
    uploads = Uploads(parent, root.local / "events.jsonl", root.local)
    MlflowClient(uri).search_experiments()  # makes the store, once for all sweeps
    begin = time.perf_counter()
    drawn = points(sweep.space, "random", trials - 1, 0, lambda point: valid(sweep.run, point))
    clock.spent["draw"] = time.perf_counter() - begin
    setting = Setting(sweep, root, Cluster(True, 1, 0), 1.0)
    watch = Overseer(sweep, root, uploads, spec, "search", trials, 1)
    work = 0.0
    with redirect_stderr(StringIO()):
        for number, point in enumerate([{}, *drawn]):
            begin = time.perf_counter()
            one = Work(setting, search_trial(sweep, number, point))
            while not one.next()["done"]:
                pass
            work += time.perf_counter() - begin
            clock.timed("look", watch.look)(0.0, 0)
        uploads.start()
        clock.timed("send", uploads.finish)("finished", 600)
    own = {key: seconds for key, seconds in clock.spent.items() if key != "train"}
    own["write"] = work - clock.spent["train"]  # files, and that the end is looked for every 0.1 s
    return {
        "trials": trials,
        "ms_a_trial": {key: round(1000 * seconds / trials, 1) for key, seconds in sorted(own.items())},
        "own_s_a_trial": round(sum(own.values()) / trials, 3),
        "worker_function_s_a_trial": round(clock.spent["train"] / trials, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0, help="that a trial trains")
    parser.add_argument("--calls", type=int, default=200, help="trials of the second part")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    result: dict[str, Any] = {"command": " ".join(["python benchmarks/sweep.py", *sys.argv[1:]]), "hardware": machine()}
    if arguments.trials:
        result["useful"] = useful(folder / "a", arguments.trials, arguments.seconds)
    if arguments.calls:
        result["calls"] = calls(folder / "b", arguments.calls)
    print(json.dumps(result, indent=1))
    save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
