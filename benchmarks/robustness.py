"""Attacks on and samples of a JEM, and its classifier twin:  python benchmarks/robustness.py RECIPE [--seeds 0-2]

For each seed: `jobs/train.py RECIPE`, `jobs/train.py RECIPE_classifier`, `jobs/evaluate.py A --against B`, suite full;
and the samples of the JEM's earlier checkpoints, to see whether FID falls as training goes on. Runs and evaluations
that are there in storage_path (./runs) are read, not made again. `key=value` goes to every command that knows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from claims import ROOT, command
from common import machine, save, seeds_of

SETS = "evaluate.sets=[interp]"
SAMPLES_ALONE = ("evaluate.attack.images=1", "evaluate.attack.refine=[0]", "evaluate.generate.lengths=[1]", SETS)


def pair(recipe: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """One seed: what the reports of the two models say of attacks and samples."""
    train, evaluate = (str(ROOT / "jobs" / f"{name}.py") for name in ("train", "evaluate"))
    measured = [s for s in settings if s.startswith(("storage_path=", "tracking.", "evaluate.", "workers="))]
    trained = [s for s in settings if not s.startswith(("evaluate.", "workers="))]
    runs = [command(train, name, f"seed={seed}", *trained) for name in (recipe, f"{recipe}_classifier")]
    folders = [Path(run["checkpoint"]).parents[1] for run in runs]
    compared = command(evaluate, str(folders[0]), "--against", str(folders[1]), SETS, *measured)
    reports = [json.loads(Path(compared["report"]).read_text())]
    reports.append(json.loads(_report_of(evaluate, folders[1], measured).read_text()))
    against = json.loads(Path(compared["against"]).read_text())
    found = {model: _figures(report) for model, report in zip(("jem", "classifier"), reports, strict=True)}
    by_step = {}
    for checkpoint in sorted((folders[0] / "checkpoints").iterdir(), key=lambda path: int(path.name)):
        alone = command(evaluate, str(checkpoint), *measured, *SAMPLES_ALONE)
        by_step[checkpoint.name] = {k: v for k, v in alone["metrics"].items() if k.startswith("gen/fresh/")}
    names = [folder.name for folder in folders]
    return {"seed": seed, "runs": names, **found, "transfer": against.get("transfer"), "samples_by_step": by_step}


def _report_of(evaluate: str, folder: Path, settings: list[str]) -> Path:
    """The report that the comparison has made, read again by the same command."""
    return Path(command(evaluate, str(folder), SETS, *settings)["report"])


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """What the report says, without what it says of every image."""
    found: dict[str, Any] = {key: report[key] for key in ("gen", "chains", "distal", "seconds") if key in report}
    robust = report["robust"]
    for of_k in robust["k"].values():
        for of_norm in of_k["norms"].values():
            del of_norm["found"]
    return found | {"robust": robust, "accuracy": report["test"]["accuracy"][0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", default="0-2", help="such as 0-2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    told = [a for a in sys.argv[1:] if not a.startswith("storage_path=")]
    result: dict[str, Any] = {"command": " ".join(["python benchmarks/robustness.py", *told]), "hardware": machine()}
    result["seeds"] = []
    for seed in seeds_of(arguments.seeds):
        result["seeds"].append(pair(arguments.recipe, seed, arguments.settings))
        print(f"seed {seed}: {' and '.join(result['seeds'][-1]['runs'])}", file=sys.stderr, flush=True)
        save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
