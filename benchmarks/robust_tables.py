"""The tables of docs/robustness.md and docs/samples.md, from what benchmarks/robustness.py measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from claims import interval

from orchestrator.sweep.summary import table as markdown

Seed = dict[str, Any]
NORMS = {"linf": "Linf", "l2": "L2"}


def worst(path: Path) -> str:
    """Accuracy under the strongest attack at each eps: JEM-k, the classifier, and JEM-0 on the classifier's attacks."""
    seeds = _seeds(path)
    ks = list(seeds[0]["jem"]["robust"]["k"])
    head = ("", "eps", *(f"JEM-{k}" for k in ks), "classifier", "JEM-0, attacks made on the classifier")

    def at(model: str, k: str, norm: str, i: int) -> Callable[[Seed], float]:
        return lambda seed: seed[model]["robust"]["k"][k]["norms"][norm]["accuracy"]["worst"][i][0]

    clean = [_mean(seeds, lambda seed, k=k: seed["jem"]["robust"]["k"][k]["clean"][0]) for k in ks]
    rows = [["none", "", *clean, _mean(seeds, lambda seed: seed["classifier"]["robust"]["k"]["0"]["clean"][0]), ""]]
    for norm, label in NORMS.items():
        for i, eps in enumerate(seeds[0]["jem"]["robust"]["k"]["0"]["norms"][norm]["eps"]):
            cells = [_mean(seeds, at("jem", k, norm, i)) for k in ks]
            twin = _mean(seeds, at("classifier", "0", norm, i))
            transferred = _mean(seeds, lambda seed, norm=norm, i=i: seed["transfer"][norm]["b_on_a"][i][0])
            rows.append([label, f"{eps:g}", *cells, twin, transferred])
    return markdown(head, rows)


def attacks(path: Path) -> str:
    """What each attack alone leaves of the JEM, at every eps of JEM-0, and at the middle one of JEM-k."""
    seeds = _seeds(path)
    rows = []
    for k, of_k in seeds[0]["jem"]["robust"]["k"].items():
        for norm, label in NORMS.items():
            for i, eps in enumerate(of_k["norms"][norm]["eps"]):
                if k != "0" and i != len(of_k["norms"][norm]["eps"]) // 2:
                    continue
                found = {
                    name: _mean(
                        seeds,
                        lambda s, k=k, norm=norm, name=name, i=i: s["jem"]["robust"]["k"][k]["norms"][norm]["accuracy"][
                            name
                        ][i][0],
                    )
                    for name in of_k["norms"][norm]["accuracy"]
                }
                order = ("pgd", "fmn" if norm == "linf" else "ddn", "cw", "square", "worst")
                rows.append([f"JEM-{k}", label, f"{eps:g}", *(found.get(name, "") for name in order)])
    return markdown(("", "", "eps", "PGD", "FMN or DDN", "CW", "square", "worst"), rows)


def masking(path: Path) -> str:
    """The checks of hidden gradients, summed over seeds."""
    seeds = _seeds(path)
    rows = []
    for model in ("jem", "classifier"):
        for k in seeds[0][model]["robust"]["k"]:
            found = [seed[model]["robust"]["k"][k]["masking"] for seed in seeds]
            standing = max(one["larger_budget"]["accuracy"] for one in found)
            alone = [
                f"{sum(one['black_box'][norm]['by_square_alone'] for one in found)} of "
                f"{sum(one['black_box'][norm]['n'] for one in found)}"
                for norm in NORMS
            ]
            name = f"JEM-{k}" if model == "jem" else "classifier"
            rows.append([name, f"{standing:.0%}", *alone])
    head = ("", "withstand PGD without a bound", "broken by random search and no gradient: Linf", "L2")
    return markdown(head, rows)


def generation(path: Path) -> str:
    """FID and its kin of each sampler."""
    seeds = _seeds(path)
    rows = []
    for name, first in seeds[0]["jem"]["gen"]["samplers"].items():
        figures = [
            _mean(seeds, lambda seed, name=name, key=key: seed["jem"]["gen"]["samplers"][name]["figures"][key], 3)
            for key in ("fid", "kid", "is", "precision", "recall")
        ]
        near = _mean(seeds, lambda seed, name=name: seed["jem"]["gen"]["samplers"][name]["nearest"]["median"], 3)
        rows.append([name, f"{first['n']:,}", *figures, near])
    return markdown(("samples", "n", "FID", "KID", "IS", "precision", "recall", "distance to the nearest"), rows)


def by_step(path: Path) -> str:
    """Fresh chains of a run's checkpoints, of the seeds of which these were measured."""
    seeds = [seed for seed in _seeds(path) if seed["samples_by_step"]]
    rows = []
    for step in seeds[0]["samples_by_step"]:
        cells = [
            _mean(seeds, lambda seed, step=step, key=key: _ending(seed["samples_by_step"][step], f"fresh/{key}_"), 3)
            for key in ("fid", "kid", "is", "precision", "recall")
        ]
        rows.append([f"{int(step):,}", *cells])
    return markdown(("step", "FID", "KID", "IS", "precision", "recall"), rows)


def chains(path: Path) -> str:
    """Chains at 1, 10 and 100 times the training length, as far as they were followed."""
    seeds = _seeds(path)
    first = seeds[0]["jem"]["chains"]
    rows = []
    for times in (1, 10, 100):
        if times * first["length"] not in first["steps"]:
            continue
        at = first["steps"].index(times * first["length"])
        cells = [
            _mean(seeds, lambda seed, name=name, at=at: seed["jem"]["chains"][name][at][0], 3)
            for name in ("energy", "grad_norm", "saturation")
        ]
        cells += [
            _mean(seeds, lambda seed, which=which, at=at: seed["jem"]["chains"]["acceptance"][which][at], 3)
            for which in ("own", "one")
        ]
        rows.append([f"{times * first['length']:,}", *cells])
    head = ("steps", "energy", "norm of its gradient", "saturation", "acceptance at T = 5e-5", "at T = 1")
    return markdown(head, rows)


def _seeds(path: Path) -> list[Seed]:
    found: list[Seed] = json.loads(path.read_text())["seeds"]
    return found


def _ending(metrics: dict[str, float], part: str) -> float:
    """The metric of an extractor of any name."""
    return next(value for key, value in metrics.items() if f"/{part}" in key and "_std" not in key)


def _mean(seeds: list[Seed], value: Callable[[Seed], float], digits: int = 2) -> str:
    mean, low, high = interval([value(seed) for seed in seeds])
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"
