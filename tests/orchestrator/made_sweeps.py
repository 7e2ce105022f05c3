"""Sweeps as their folders, made without training."""

import json
import math
import random
from dataclasses import asdict

from jem.files import Location
from orchestrator.events import EventLog
from orchestrator.result import Result
from orchestrator.runs import RunRecord
from orchestrator.sweep.config import load_sweep, trial_config
from orchestrator.sweep.space import points

SWEEP = """
base: digits
budget: {trials: 16, steps: 300}
finalists: 2
seeds: 5
space:
  sgld.step_size: {loguniform: [0.05, 5]}
  sgld.noise_scale: {loguniform: [0.001, 0.1]}
  sgld.steps: {logint: [2, 20]}
  objective.energy_l2: {choice: [0, 0.001, 0.01, 0.1]}
  model.activation: {choice: [silu, leaky_relu]}
"""

BEGUN = 1_700_000_000.0


def sweep_of(folder, text=SWEEP, *arguments):
    """The sweep that a file of this text is."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return load_sweep(str(path), arguments)


def made_trial(root, name, point=None, status="finished", metrics=None, **changes):
    """One trial's folder as a driver leaves it: trial.json, run.json and the log. `root` is the sweep's folder.

    `changes`: stage, number, candidate and seed of trial.json; step, message, seconds and started.
    """
    folder = (root if isinstance(root, Location) else Location.of(root)) / "trials" / name
    number = int(name[1:]) if name[1:].isdigit() else 0
    known = {"stage": "search", "number": number, "candidate": "base" if name == "t000" else name, "seed": 0}
    trial = known | {key: value for key, value in changes.items() if key in known}
    trial |= {"sweep": folder.parent.parent.name, "name": name, "point": point or {}}
    (folder / "trial.json").write(json.dumps(trial).encode())
    step, seconds = changes.get("step", 300), changes.get("seconds", 30.0)
    started = changes.get("started", BEGUN + 40 * trial["number"])
    record = RunRecord(name, {}, "0" * 8, status)
    record.mlflow = {"uri": "sqlite:///none", "run_id": f"id-{name}", "complete": True}
    record.attempts = [{"number": 1, "host": "here", "pid": 7, "started": started}]
    if status not in ("running", "new"):
        record.attempts[0] |= {"ended": started + seconds, "status": status, "step": step}
        message = changes.get("message", "")
        record.result = asdict(Result(name=name, step=step, metrics=metrics or {}, status=status, message=message))
    record.save(folder)
    log = EventLog(folder.local / "events.jsonl")
    if metrics:
        log.append("metrics", step=step, metrics=metrics)
    log.close()
    return folder


def figures_of(sweep, point, seed=0):
    """What a trial would have measured: a smooth function of its settings, and noise of its seed."""
    config, noise = trial_config(sweep, point), random.Random(f"{sorted(point.items())} {seed}")
    far = abs(math.log10(config.sgld.step_size)) + abs(math.log10(config.sgld.noise_scale / 0.01)) / 2
    nll = 0.07 + 0.05 * far**2 + config.objective.energy_l2 / 3 + abs(noise.gauss(0, 0.006))
    auroc = 0.97 - 0.12 * abs(math.log2(config.sgld.steps / 10)) / 3 - abs(noise.gauss(0, 0.01))
    return {
        "val/nll": nll,
        "val/accuracy": 0.99 - nll / 6 + noise.gauss(0, 0.004),
        "val/ece": 0.01 + 0.1 * max(0.0, 1 - auroc) + abs(noise.gauss(0, 0.004)),
        "val/ood/interp/log_px/auroc": auroc,
        "train/loss": nll / 2,
    }


def made_search(root, sweep, n=16, seed=0):
    """A search of n trials, the base first: some diverge, one fails, some are pruned, the others finish."""
    made_trial(root, "t000", {}, metrics=figures_of(sweep, {}))
    for number, point in enumerate(points(sweep.space, "random", n - 1, seed, lambda _: True), 1):
        config, metrics = trial_config(sweep, point), figures_of(sweep, point)
        if config.sgld.step_size > 2.5:
            message = "energy gap 1.2e+06 at step 140"
            made_trial(root, f"t{number:03}", point, "diverged", {"val/nll": 3.2}, step=140, message=message)
        elif number == 5:
            made_trial(root, f"t{number:03}", point, "failed", step=20, message="RuntimeError: out of memory")
        elif number % 6 == 4:
            early = metrics | {"val/nll": 1.4 * metrics["val/nll"], "val/accuracy": metrics["val/accuracy"] - 0.03}
            made_trial(root, f"t{number:03}", point, "pruned", early, step=75)
        else:
            made_trial(root, f"t{number:03}", point, metrics=metrics)


def made_finalist(root, candidate, seed, point=None, status="finished", metrics=None, number=0, **changes):
    """One seed of a finalist."""
    own = {"stage": "finalists", "number": number, "candidate": candidate, "seed": seed}
    return made_trial(root, f"f-{candidate}-s{seed}", point, status, metrics, **own, **changes)
