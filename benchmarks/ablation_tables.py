"""Tables of an ablation, from the files that it keeps of its trials: docs/results/ablation_NAME/ARM-sSEED.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.sweep.decide import Spread, spread
from orchestrator.sweep.space import words
from orchestrator.sweep.summary import interval, mean, table

BASELINE, CLASSIFIER = "baseline", "classifier"

FIGURES = {
    "accuracy": "test/accuracy",
    "NLL": "test/nll",
    "ECE": "test/ece",
    "ECE at temperature": "test_scaled/ece",
    "AUROC log p(x), midpoints": "ood/interp/log_px/auroc",
    "uniform noise": "ood/uniform/log_px/auroc",
    "mnist5k": "ood/mnist5k/log_px/auroc",
    "Fashion-MNIST": "ood/fashion_mnist/log_px/auroc",
    "digits": "ood/digits/log_px/auroc",
    "robust, Linf 0.1": "robust/linf/0.1/worst/accuracy",
    "robust, L2 0.5": "robust/l2/0.5/worst/accuracy",
    "FID, fresh chains": "gen/fresh/fid_lenet",
    "FID, buffer": "gen/buffer/fid_lenet",
}
"""Heads of columns, and the metric of each."""

FEWEST = 3
"""Seeds from which on an interval is called sure: figures of few images are often the same in two."""

AUROC = re.compile(r"ood/([^/]+)/([^/]+)/auroc")

Trials = dict[str, dict[int, dict[str, Any]]]
"""By arm and seed."""


def figures(folder: Path) -> str:
    """Every arm: what it came to over its seeds, and what a step of it costs in steps of the classifier."""
    trials = read(folder)
    heads = _heads(trials)
    cheap = _seconds_a_step(trials[CLASSIFIER]) if CLASSIFIER in trials else None
    lines = []
    for arm, seeds in trials.items():
        diverged = sum(trial["status"] == "diverged" for trial in seeds.values())
        a_step = _seconds_a_step(seeds)
        cost = f"{a_step / cheap:.1f}" if a_step and cheap else ""
        steps = max(trial["steps"] for trial in seeds.values())
        whole = f"{a_step * steps:.0f} s" if a_step else ""
        cells = [mean(_spread(seeds, FIGURES[head])) for head in heads]
        lines.append([arm, f"{steps:,}", whole, cost, *cells, f"{diverged} of {len(seeds)}"])
    return table(("arm", "steps", "in", "cost of a step", *heads, "diverged"), lines)


def differences(folder: Path) -> str:
    """Every arm less the baseline, paired by seed: bold where the 95 % t-interval of 3 seeds or more excludes 0."""
    trials = read(folder)
    heads = _heads(trials)
    base = trials[BASELINE]
    lines = [
        [arm, *(_difference(seeds, base, head) for head in heads)] for arm, seeds in trials.items() if arm != BASELINE
    ]
    return table(("arm", *heads), lines)


def scores(shown: Sequence[str], folder: Path) -> str:
    """AUROC of every score against every set, for the arms `shown`."""
    trials = read(folder)
    arms = {arm: trials[arm] for arm in shown if arm in trials}
    matched = {key: AUROC.fullmatch(key) for key in sorted(_keys(arms))}
    rows = [
        [match[1], match[2], *(mean(_spread(seeds, key)) for seeds in arms.values())]
        for key, match in matched.items()
        if match
    ]
    return table(("set", "score", *arms), rows)


def recoveries(folder: Path) -> str:
    """Arms trained with recovery: how many got to their end, after how many rollbacks, and how good they are there."""
    rows = []
    for arm, seeds in _trials(folder).items():
        ends = [trial["status"] for trial in seeds.values()]
        told = ", ".join(str(trial["rollbacks"]) for _, trial in sorted(seeds.items()))
        figures_of = [mean(_spread(seeds, key)) for key in ("val/accuracy", "val/nll")]
        rows.append([arm, f"{ends.count('finished')} of {len(ends)}", told, *figures_of])
    return table(("arm", "finished", "rollbacks, by seed", "validation accuracy", "validation NLL"), rows)


def settings(folder: Path) -> str:
    """What each arm changes of the base."""
    found = {arm: next(iter(seeds.values()))["settings"] for arm, seeds in read(folder).items()}
    return table(("arm", "settings"), [(arm, _told(changes)) for arm, changes in found.items()])


def tuning(path: Path) -> str:
    """NLL of the validation split by learning rate, one run each; bold: the best."""
    arms = json.loads(path.read_text())["arms"]
    rates = sorted({rate for tried in arms.values() for rate in tried}, key=float)
    order = sorted(arms, key=lambda arm: (arm != BASELINE, arm == CLASSIFIER, arm))
    rows = []
    for arm in order:
        finished = {rate: run["val/nll"] for rate, run in arms[arm].items() if run["status"] == "finished"}
        best = min(finished, key=lambda rate: finished[rate], default=None)
        rows.append([arm, *(_tried(arms[arm].get(rate), rate == best) for rate in rates)])
    return table(("arm", *rates), rows)


ONE_BY_ONE = {
    "accuracy": "test/accuracy",
    "NLL": "test/nll",
    "ECE": "test/ece",
    "robust, Linf 0.1": "robust/linf/0.1/worst/accuracy",
    "robust, L2 0.5": "robust/l2/0.5/worst/accuracy",
    "FID, fresh chains": "gen/fresh/fid_lenet",
    "validation NLL": "val/nll",
    "AUROC log p(x), validation midpoints": "val/ood/interp/log_px/auroc",
    "energy gap": "train/energy_gap",
}


def one_by_one(path: Path) -> str:
    """Single runs, each with something changed."""
    runs = json.loads(path.read_text())["runs"]
    rows = []
    for run in runs:
        found = (run["metrics"].get(key) for key in ONE_BY_ONE.values())
        rows.append([run["run"], f"{run['steps']:,}", *("" if value is None else f"{value:.3f}" for value in found)])
    return table(("run", "steps", *ONE_BY_ONE), rows)


def read(folder: Path) -> Trials:
    """The arms, baseline first and classifier last."""
    found = _trials(folder)
    if BASELINE not in found:
        raise ValueError(f"{folder} holds no trial of {BASELINE}")
    return dict(sorted(found.items(), key=lambda item: (item[0] != BASELINE, item[0] == CLASSIFIER, item[0])))


def _trials(folder: Path) -> Trials:
    found: Trials = {}
    for path in sorted(folder.glob("*.json")):
        trial = json.loads(path.read_text())
        found.setdefault(trial["arm"], {})[trial["seed"]] = trial
    return found


def _heads(trials: Trials) -> list[str]:
    """Those that any trial has."""
    there = _keys(trials)
    return [head for head, key in FIGURES.items() if key in there]


def _keys(trials: Trials) -> set[str]:
    return {key for seeds in trials.values() for trial in seeds.values() for key in trial["metrics"]}


def _values(seeds: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, float]:
    finished = {seed: trial["metrics"] for seed, trial in seeds.items() if trial["status"] == "finished"}
    return {seed: metrics[key] for seed, metrics in finished.items() if key in metrics}


def _spread(seeds: Mapping[int, Mapping[str, Any]], key: str) -> Spread | None:
    values = _values(seeds, key)
    return spread(values) if values else None


def _difference(seeds: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], head: str) -> str:
    key = FIGURES[head]
    mine, theirs = _values(seeds, key), _values(base, key)
    both = {seed: mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()}
    if not both:
        return ""
    found = spread(both)
    sure = (
        len(both) >= FEWEST and found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
    )
    return f"**{interval(found)}**" if sure else interval(found)


def _seconds_a_step(seeds: Mapping[int, Mapping[str, Any]]) -> float | None:
    """The median over finished trials that were measured: another process may have disturbed one.

    Those that count divergence alone (evaluate.suite=none) are left out: nobody saw to it that nothing ran beside them.
    """
    finished = [trial for trial in seeds.values() if trial["status"] == "finished"]
    measured = [trial for trial in finished if any(key.startswith("test/") for key in trial["metrics"])]
    found: Sequence[float] = sorted(trial["seconds"] / trial["steps"] for trial in measured)
    return found[len(found) // 2] if found else None


def _tried(run: Mapping[str, Any] | None, best: bool) -> str:
    if run is None:
        return ""
    if run["status"] != "finished":
        return f"{run['status']}, step {run['steps']:,}"
    return f"**{run['val/nll']:.4f}**" if best else f"{run['val/nll']:.4f}"


def _told(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {words(value)}" for key, value in changes.items()) or "the base"
