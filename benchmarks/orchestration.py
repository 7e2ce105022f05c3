"""What Ray, MLflow and checkpoints cost a run:  python benchmarks/orchestration.py [--recipe NAME] [--threads N]

Pairs of `python jobs/train.py RECIPE workers=1`, with tracking, health and checkpoints at their default intervals, and
of the bare loop of jem/ on the same work: the same steps, and the same validation at the same steps. Start-up is left
out: what counts is the time from step 100 to the last. One worker of one thread, as Ray's own processes share the
cores: on two cores they have the other one. `--threads 2`: they have none. `--add`: the pairs that --out has
count, too, as each is a ratio in itself, so that a machine need not be idle for an hour at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, save, steps_logged

from jem.data.batches import BatchSource
from jem.data.sources import load
from jem.evaluate.evaluate import validate
from jem.train import frozen_logits, start, train
from jem.world import World
from orchestrator.config import RunConfig, load_run_config

ROOT = Path(__file__).resolve().parents[1]
FROM = 100
"""The step from which on time counts."""


def settings_of(arguments: argparse.Namespace) -> list[str]:
    return [f"steps={arguments.steps}", "workers=1", "device=cpu", "seed=0", "evaluate.suite=none", *arguments.settings]


def bare(config: RunConfig) -> dict[str, float]:
    """The loop that somebody would write around jem/."""
    data = load(config.data)
    batches = BatchSource(data.train, config.data, config.batch_size, config.seed)
    state = start(config, data.image_shape, data.n_classes)
    begin, accuracy = 0.0, 0.0
    for info in train(state, batches.at, config, config.steps):
        if info.step == FROM:
            begin = time.monotonic()
        if info.step % config.evaluate.every == 0 and info.step < config.steps:
            like = torch.zeros(())
            logits = frozen_logits(state.network, config)
            accuracy = validate(logits, data.validation, config.evaluate, World(), like)["accuracy"]
    return {"seconds": time.monotonic() - begin, "accuracy": accuracy}


def orchestrated(arguments: argparse.Namespace) -> dict[str, float]:
    """A whole run, and what its log says of the time it took."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*settings_of(arguments), f"storage_path={folder}"]
        command = [sys.executable, str(ROOT / "jobs/train.py"), arguments.recipe, *settings]
        begin = time.time()
        done = subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        whole = time.time() - begin
        (log,) = Path(folder).glob("*/events.jsonl")
        events = [json.loads(line) for line in log.read_text().splitlines()]
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "finished"
    kinds = [event["kind"] for event in events]
    assert "rollback" not in kinds, "it went back: not the same work"
    trained = steps_logged(events)
    last = trained[arguments.steps]
    seconds = last - trained[FROM]
    return {"seconds": seconds, "outside": whole - seconds, "checkpoints": kinds.count("checkpoint")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mnist5k_uniform")
    parser.add_argument("--steps", type=int, default=1_600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help="the bare loop alone, in this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="to the pairs of --out, whose seconds are not kept")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the processes that are started
    torch.set_num_threads(arguments.threads)  # of this one: --bare may be asked for by hand
    if arguments.bare:
        print(json.dumps(bare(load_run_config(arguments.recipe, settings_of(arguments)))))
        return 0
    same = {"hardware": machine(), "recipe": arguments.recipe, "threads": arguments.threads}
    same |= {"steps": arguments.steps, "settings": arguments.settings}
    before = json.loads(arguments.out.read_text()) if arguments.add else same | {"ratios": []}
    if any(before[key] != same[key] for key in same):
        raise SystemExit(f"{arguments.out} is of other settings, hardware or threads; leave out --add")
    rows: list[dict[str, Any]] = []
    for i in range(arguments.pairs):
        found: dict[str, Any] = {}
        for kind in ("bare", "orchestrated") if i % 2 == 0 else ("orchestrated", "bare"):
            if kind == "orchestrated":
                found[kind] = orchestrated(arguments)
            else:
                command = [sys.executable, __file__, *sys.argv[1:], "--bare"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[kind] = json.loads(done.stdout.splitlines()[-1])
        rows.append(found | {"ratio": found["orchestrated"]["seconds"] / found["bare"]["seconds"]})
        print(json.dumps(rows[-1]), flush=True)
    ratios = [*before["ratios"], *(round(row["ratio"], 4) for row in rows)]
    result = {
        "command": " ".join(["python benchmarks/orchestration.py", *sys.argv[1:]]),
        **same,
        "ratio": round(statistics.median(ratios), 4),
        "range": [round(min(ratios), 4), round(max(ratios), 4)],
        "bare_s": round(statistics.median(row["bare"]["seconds"] for row in rows), 1),
        "orchestrated_s": round(statistics.median(row["orchestrated"]["seconds"] for row in rows), 1),
        "outside_s": round(statistics.median(row["orchestrated"]["outside"] for row in rows), 1),
        "checkpoints": rows[0]["orchestrated"]["checkpoints"],
        "ratios": ratios,
    }
    print(json.dumps(result, indent=1))
    save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
