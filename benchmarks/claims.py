"""The paper's claims on a recipe and its classifier twin:  python benchmarks/claims.py RECIPE --seeds 0-4 [--out FILE]

For each seed: `jobs/train.py RECIPE`, `jobs/train.py RECIPE_classifier`, `jobs/evaluate.py A --against B`, suite full
but for attacks and samples.
A figure is the mean over seeds with its 95 % t-interval, and so is the difference, JEM less classifier, seed by seed:
they tell of the training's randomness, where a report's intervals tell of the finite test set. Runs and evaluations
that are there in storage_path (./runs) are read, not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, seeds_of
from scipy import stats

from orchestrator.sweep.summary import table as markdown

ROOT = Path(__file__).resolve().parents[1]

FIGURES = {
    "accuracy": "test/accuracy",
    "NLL": "test/nll",
    "ECE": "test/ece",
    "ECE at temperature": "test_scaled/ece",
    "NLL at temperature": "test_scaled/nll",
}
WITHOUT = ("evaluate.attack.images=1", "evaluate.attack.refine=[0]", "evaluate.generate.samples=10")
"""No figure here is of attacks or samples, most of a full evaluation's time: benchmarks/robustness.py has those."""

OWN_SCORES = ("log_px", "max_py", "approx_mass")


def command(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *arguments], cwd=Path.cwd(), stdout=subprocess.PIPE, text=True, check=False)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {result['message']}")
    return result


def pair(recipe: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """One seed: the metrics of the JEM and of the classifier, from their reports."""
    train, evaluate = (str(ROOT / "jobs" / f"{name}.py") for name in ("train", "evaluate"))
    places = [s for s in settings if s.startswith(("storage_path=", "tracking."))]
    runs = [command(train, name, f"seed={seed}", *settings) for name in (recipe, f"{recipe}_classifier")]
    first, second = (str(Path(run["checkpoint"]).parents[1]) for run in runs)
    compared = command(evaluate, first, "--against", second, *WITHOUT, *places)
    rows = json.loads(Path(compared["against"]).read_text())["rows"]
    seen = {}
    for side, model in enumerate(("jem", "classifier")):
        of_set = {row["metric"]: row["values"][side][0] for row in rows if row["group"] == "ood"}
        test = {
            f"test/{r['metric']}": r["values"][side][0] for r in rows if r["group"] in ("classification", "calibration")
        }
        scaled = {f"test_scaled/{r['metric']}": r["values"][side][0] for r in rows if r["group"] == "after temperature"}
        seen[model] = {**test, **scaled, **of_set}
    return {"seed": seed, "runs": [Path(first).name, Path(second).name], **seen}


def interval(values: list[float]) -> list[float]:
    """Mean and 95 % t-interval over seeds."""
    x = np.asarray(values)
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else float("nan")
    return [float(x.mean()), float(x.mean() - half), float(x.mean() + half)]


def summary(seeds: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    keys = [key for key in seeds[0]["jem"] if key in seeds[0]["classifier"]]
    found = {}
    for key in keys:
        jem, classifier = ([seed[model][key] for seed in seeds] for model in ("jem", "classifier"))
        difference = [a - b for a, b in zip(jem, classifier, strict=True)]
        found[key] = {"jem": interval(jem), "classifier": interval(classifier), "difference": interval(difference)}
    return found


def table(found: dict[str, dict[str, list[float]]], sets: list[str]) -> str:
    """Markdown: a row a figure."""
    rows = dict(FIGURES)
    rows |= {
        f"AUROC {name}: {score}": f"ood/{name}/{score}/auroc" for name in sets for score in (*OWN_SCORES, "refine")
    }
    rows |= {f"AUROC {name}: {score}": f"ood/{name}/{score}/auroc" for name in sets for score in ("mahalanobis", "vim")}
    lines = []
    for label, key in rows.items():
        if key in found:
            cells = [
                shown(found[key][part], signed=part == "difference") for part in ("jem", "classifier", "difference")
            ]
            lines.append([label, *cells])
    return markdown(("figure", "JEM", "classifier", "JEM less classifier"), lines)


def shown(values: list[float], signed: bool = False) -> str:
    """A figure; `signed`: a difference, bold where its interval excludes 0."""
    mean, low, high = values
    if signed:
        text = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"**{text}**" if low > 0 or high < 0 else text
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", default="0-4", help="such as 0-4")
    parser.add_argument("--sets", nargs="+", default=["interp", "uniform", "rot90", "textures"], help="of the table")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    seeds = []
    for seed in seeds_of(arguments.seeds):
        seeds.append(pair(arguments.recipe, seed, arguments.settings))
        print(f"seed {seed}: {' and '.join(seeds[-1]['runs'])}", file=sys.stderr, flush=True)
    told = [a for a in sys.argv[1:] if not a.startswith("storage_path=")]
    result: dict[str, Any] = {"command": " ".join(["python benchmarks/claims.py", *told]), "hardware": machine()}
    found = summary(seeds)
    result |= {"intervals": "mean and 95 % t-interval over seeds", "summary": found, "seeds": seeds}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(found, arguments.sets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
