"""Curves of the sick and of the healthy:  python benchmarks/symptoms.py SWEEP_FOLDER --out FILE.json

SWEEP_FOLDER: of `python jobs/sweep.py symptoms_digits`. Writes each trial's curves of what tells its illness, and
docs/images/symptoms.png, a panel a symptom, of the first seed. docs/training.md shows the file as a table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import machine, save

from orchestrator.sweep.space import words
from orchestrator.sweep.summary import table

ROOT = Path(__file__).resolve().parents[1]
KEYS = (
    *("train/energy_gap", "train/chain_saturation", "train/chain_contrast", "train/data_contrast"),
    *("val/accuracy", "val/nll"),
)
PANELS = (
    ("energies blow up", "train/energy_gap", ("healthy", "blows_up", "lower_rate", "longer_chains", "nearer_start")),
    ("SGLD steps too large", "train/energy_gap", ("healthy", "large_steps")),
    ("accuracy sags", "val/accuracy", ("healthy", "sags")),
)
PICTURE = ROOT / "docs" / "images" / "symptoms.png"


def curves(trial: Path) -> dict[str, list[list[float]]]:
    """Of each key [[step, value], ...]."""
    found: dict[str, list[list[float]]] = {key: [] for key in KEYS}
    for line in (trial / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        for key in KEYS:
            if event["kind"] == "metrics" and key in event["metrics"]:
                found[key].append([event["step"], float(f"{event['metrics'][key]:.4g}")])
    return found


def end(trial: dict[str, Any], key: str) -> list[list[float]]:
    """The energy gap at which a trial was given up: of that look there is no point of a curve."""
    told = re.match(r"step (\d+): .*?energy gap (-?[\d.e+]+)", trial["reason"] or "")
    return [[int(told[1]), float(told[2])]] if told and key == "train/energy_gap" else []


def draw(trials: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = {t["arm"]: t for t in reversed(trials)}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4), layout="constrained")
    for axis, (title, key, arms) in zip(axes, PANELS, strict=True):
        for arm in arms:
            steps, values = zip(*first[arm]["curves"][key], *end(first[arm], key), strict=True)
            axis.plot(steps, values, label=arm + (" (diverged)" if first[arm]["status"] == "diverged" else ""))
        if key == "train/energy_gap":
            axis.set_yscale("symlog", linthresh=1)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(key)
        axis.legend(fontsize=7)
    figure.savefig(PICTURE, dpi=90)


def ends(path: Path) -> str:
    """Every arm of the first seed: its last figures, and where it was given up."""
    trials = json.loads(path.read_text())["trials"]
    first = {trial["arm"]: trial for trial in reversed(trials)}
    lines = []
    for arm, trial in sorted(first.items(), key=lambda found: (found[0] != "healthy", found[0])):
        last = {key: points[-1][1] for key, points in trial["curves"].items()}
        given_up = end(trial, "train/energy_gap")
        status = f"given up at step {given_up[0][0]}, gap {given_up[0][1]:.2g}" if given_up else trial["status"]
        contrast = f"{last['train/chain_contrast']:.2f} of {last['train/data_contrast']:.2f}"
        settings = ", ".join(f"{key}={words(value)}" for key, value in trial["settings"].items()) or "as they are"
        figures = (
            f"{last['train/energy_gap']:.2f}",
            f"{last['train/chain_saturation']:.4f}",
            contrast,
            f"{last['val/accuracy']:.3f}",
            f"{last['val/nll']:.2f}",
        )
        lines.append([f"`{arm}`", settings, status, *figures])
    head = ("run", "settings", "end", "last gap before", "saturated", "chains' contrast", "val accuracy", "val NLL")
    return table(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    trials = []
    for file in sorted((arguments.folder / "arms").glob("*.json")):
        told = json.loads(file.read_text())
        trial = arguments.folder / "trials" / file.stem
        trials.append(
            {key: told[key] for key in ("arm", "seed", "settings", "status", "reason", "steps")}
            | {"curves": curves(trial)}
        )
    trials.sort(key=lambda t: (t["seed"], t["arm"]))
    command = "python jobs/sweep.py symptoms_digits seeds=1"
    save({"command": command, "hardware": machine(), "trials": trials}, arguments.out)
    draw(trials)
    return 0


if __name__ == "__main__":
    sys.exit(main())
