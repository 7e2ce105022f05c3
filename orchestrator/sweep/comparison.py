"""Arms beside each other: the figures of each over its seeds, and what they are less the first arm's, seed by seed.

The intervals are 95 % t-intervals, each of one figure alone: of many comparisons some exclude 0 by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.sweep.arms import Arm
from orchestrator.sweep.decide import Spread, over_seeds, spread
from orchestrator.sweep.space import words
from orchestrator.sweep.summary import counts_text, interval, mean, reasons, shown_figures, table
from orchestrator.sweep.table import Row
from orchestrator.sweep.trial_report import TrialReport

Comparison = dict[str, dict[str, Any]]
"""What arms.json holds, by arm."""


def compare(rows: Sequence[Row], reports: Mapping[str, TrialReport], arms: Sequence[Arm]) -> Comparison:
    """Each arm's counts, seconds and figures, and `difference`: its figures less the first arm's, paired by seed.

    `reports`: by the names of trials. `seconds`: the mean over trials that finished; `rollbacks`: of all trials.
    """
    found: Comparison = {}
    baseline: dict[str, dict[str, Any]] = {}
    for arm in arms:
        own = [row for row in rows if row.candidate == arm.name]
        statuses = [row.status for row in own]
        seconds = [reports[row.name].seconds for row in own if row.status == "finished"]
        figures = over_seeds(own)
        found[arm.name] = {
            "settings": arm.point,
            "seeds": len(own),
            **{status: statuses.count(status) for status in ("finished", "diverged", "failed")},
            "rollbacks": sum(reports[row.name].rollbacks for row in own),
            "seconds": math.fsum(seconds) / len(seconds) if seconds else None,
            "figures": {key: _told(Spread(**one)) for key, one in figures.items()},
        }
        if arm is arms[0]:
            baseline = figures
        else:
            found[arm.name]["difference"] = dict(_differences(figures, baseline))
    return found


def certain(difference: Mapping[str, Any]) -> bool:
    """Whether the interval excludes 0; one without width, of equal differences, says nothing."""
    low, high = difference["low"], difference["high"]
    return low is not None and low < high and (low > 0 or high < 0)


def verdict_of(found: Comparison, rows: Sequence[Row]) -> str:
    """In a sentence or two: which arms differ from the first in the figures that are shown, as far as that is sure."""
    late = sum(row.status == "out of time" for row in rows)
    (first, base), *others = found.items()
    keys = shown_figures(base["figures"])
    sure = []
    for name, arm in others:
        differs = {key: arm["difference"][key] for key in keys if key in arm["difference"]}
        told = [f"{key} {interval(_spread(one))}" for key, one in differs.items() if certain(one)]
        sure += [f"{name}: {', '.join(told)}"] if told else []
    finished, n = (sum(arm[key] for arm in found.values()) for key in ("finished", "seeds"))
    ended = f"{finished} of {n} trials finished" + (f" ({late} out of time)" if late else "")
    if not others:
        return f"{ended}."
    if not base["finished"]:
        return f"{ended}. {first} finished no seed, so that there is nothing to compare with."
    pairs = [one["n"] for _, arm in others for one in arm["difference"].values()]
    if pairs and max(pairs) < 2:
        return f"{ended}. Differences from {first} are of one seed at most, and have no interval."
    return f"{ended}. Differs from {first}, paired by seed: {'; '.join(sure) or 'no arm with certainty'}."


def summary_of(found: Comparison, rows: Sequence[Row], name: str, base: str) -> str:
    """summary.md: the verdict, the arms' figures, their differences to the first arm, why trials came to nothing."""
    first = next(iter(found))
    scope = f"Ablation `{name}` of the recipe `{base}`: {len(rows)} trials ({counts_text(rows)})."
    blocks = [verdict_of(found, rows), scope, "## Arms", _figures(found)]
    blocks.append(
        "Mean ± half of the 95 % t-interval over the seeds that finished. Seconds: of training steps alone, a trial; "
        "diverged: trials that were given up; recoveries: rollbacks after divergence, of all trials."
    )
    if len(found) > 1:
        blocks += [f"## Less {first}", _table_of_differences(found)]
        blocks.append(
            "Paired by seed: mean [95 % t-interval] over the seeds that both finished; **bold** where it excludes 0. "
            "Each interval is of one comparison, not of all together."
        )
    blocks += ["## Settings", table(("arm", "settings"), [(arm, _settings(one)) for arm, one in found.items()])]
    return "\n\n".join([*blocks, *reasons(rows)]) + "\n"


def _differences(
    ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in ours.keys() & theirs.keys():
        mine, base = ours[key]["values"], theirs[key]["values"]
        both = {seed: mine[seed] - base[seed] for seed in sorted(mine.keys() & base.keys())}
        if both:
            yield key, _told(spread(both))


def _told(found: Spread) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": len(found.values)}


def _spread(told: Mapping[str, Any]) -> Spread:
    return Spread(told["mean"], told["low"], told["high"], {})


def _shown(found: Comparison) -> list[str]:
    return shown_figures(dict.fromkeys(key for arm in found.values() for key in arm["figures"]))


def _figures(found: Comparison) -> str:
    keys = _shown(found)
    lines = []
    for name, arm in found.items():
        cells = [mean(_spread(arm["figures"][key])) if key in arm["figures"] else "" for key in keys]
        seconds = "" if arm["seconds"] is None else f"{arm['seconds']:.1f}"
        ended = [f"{arm['finished']} of {arm['seeds']}", *cells, str(arm["diverged"]), str(arm["rollbacks"]), seconds]
        lines.append([name, *ended])
    return table(("arm", "seeds finished", *keys, "diverged", "recoveries", "seconds"), lines)


def _table_of_differences(found: Comparison) -> str:
    keys = _shown(found)
    lines = []
    for name, arm in list(found.items())[1:]:
        differences = [arm["difference"].get(key) for key in keys]
        lines.append([name, *("" if one is None else _difference(one) for one in differences)])
    return table(("arm", *keys), lines)


def _difference(told: Mapping[str, Any]) -> str:
    text = interval(_spread(told))
    return f"**{text}**" if certain(told) else text


def _settings(arm: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {words(value)}" for key, value in arm["settings"].items()) or "the base"
