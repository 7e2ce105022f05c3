"""What a sweep found: its finalists, whether any of them beats the base over seeds, and the winner as a recipe.

The best of many trials of one seed each is partly the luckiest. So the best are trained again with several seeds,
beside the base, and are compared with it seed by seed: the interval of the paired difference decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from orchestrator.outbox import EVALUATED
from orchestrator.sweep.table import BASE, OUT_OF_TIME, Row, fronts, measured, objectives
from orchestrator.sweep.verdict import verdict

if TYPE_CHECKING:
    from orchestrator.sweep.config import Sweep

MEASURED = ("val/", *EVALUATED)
"""What metrics begin with that tell how good a model is, rather than how training went."""


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean and 95 % t-interval (None with one seed), and what each seed gave."""

    mean: float
    low: float | None
    high: float | None
    values: dict[int, float]

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Candidate:
    """A point as it was trained again: `metrics` on validation over the seeds that finished.

    `against_base`: the first objective less the base's, over the seeds that both finished. `beats_base`: all seeds
    finished, and that interval excludes 0 on the good side.
    """

    name: str
    point: dict[str, Any]
    seeds: list[int]
    finished: int
    diverged: int
    failed: int
    metrics: dict[str, Spread] = field(default_factory=dict)
    against_base: Spread | None = None
    beats_base: bool = False

    @property
    def complete(self) -> bool:
        return bool(self.finished) and self.finished == len(self.seeds)


@dataclass(frozen=True)
class Decision:
    """`stage`: finalists, or search where none was trained to the end. `winner`: a candidate's name, if any."""

    sweep: str
    objective: list[str]
    stage: str
    candidates: list[Candidate]
    winner: str | None
    verdict: str
    cut: list[int] = field(default_factory=list)  # seeds that time did not suffice for, and that count for nobody

    def of(self, name: str) -> Candidate | None:
        return next((candidate for candidate in self.candidates if candidate.name == name), None)

    def json(self) -> str:
        told = {key: value for key, value in asdict(self).items() if key != "cut" or value}
        return json.dumps(told, indent=1) + "\n"


def ranking(rows: Iterable[Row], sweep: Sweep) -> list[Row]:
    """The search's finished trials, the base among them, best first: by front, then by the first objective."""
    return [row for front in fronts(measured(rows, sweep), objectives(sweep)) for row in front]


def finalists(rows: Iterable[Row], sweep: Sweep) -> list[tuple[str, dict[str, Any]]]:
    """What to train again: the base and the best `finalists` others, as (candidate, point).

    A point that gives the run of a better one, or the base's, does not count. Empty where there is nothing to compare.
    """
    from orchestrator.sweep.config import trial_config

    seen = {trial_config(sweep, {}).digest}
    chosen: list[tuple[str, dict[str, Any]]] = []
    for row in ranking(rows, sweep):
        if len(chosen) >= sweep.config.finalists:
            break
        digest = trial_config(sweep, row.point).digest
        if not row.is_base and digest not in seen:
            seen.add(digest)
            chosen.append((row.candidate, row.point))
    return [(BASE, {}), *chosen] if chosen else []


def over_seeds(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Each measured metric of the finished runs of one candidate: mean, low, high and values by seed."""
    return {key: asdict(found) for key, found in _spreads(rows, MEASURED).items()}


def decide(rows: Sequence[Row], sweep: Sweep) -> Decision:
    """The decision from the trials that are there, which may be called at any time."""
    again = [row for row in rows if row.stage == "finalists"]
    cut = sorted({row.seed for row in again if row.status == OUT_OF_TIME})
    trained = [row for row in again if row.seed not in cut]  # whoever has one seed more would be compared by luck
    stage = "finalists" if trained else "search"
    key = sweep.config.objective[0]
    if trained:
        groups: dict[str, list[Row]] = {BASE: []}
        for row in trained:
            groups.setdefault(row.candidate, []).append(row)
        order = list(groups)
    else:
        groups = {row.candidate: [row] for row in rows if row.stage == "search"}
        order = list(dict.fromkeys([BASE, *(row.candidate for row in ranking(rows, sweep))]))
    sign = 1.0 if objectives(sweep)[0].mode == "min" else -1.0
    made = [_candidate(name, groups.get(name, []), groups.get(BASE, []), key, sign) for name in order]
    candidates = [candidate for candidate in made if candidate.seeds]
    winner = _winner(candidates, key, sign)
    decision = Decision(sweep.name, list(sweep.config.objective), stage, candidates, winner, "", cut)
    return replace(decision, verdict=verdict(decision, sign))


def winner_recipe(sweep: Sweep, decision: Decision, forks: Sequence[str] = ()) -> str:
    """The winner as a recipe that jobs/train.py takes: all of its settings, evaluated and registered as the base is.

    `forks`: what it went on from in the search, of which the recipe knows nothing. Raises ValueError if there is
    no winner.
    """
    import yaml

    from jem.settings import override
    from orchestrator.config import to_yaml
    from orchestrator.sweep.config import trial_config
    from orchestrator.sweep.space import words

    winner = decision.of(decision.winner or "")
    if winner is None:
        raise ValueError(f"sweep {sweep.name}: no trial finished, so that there is no winner to write as a recipe")
    settings = yaml.safe_load(to_yaml(override(trial_config(sweep, winner.point), sweep.final)))
    for key in ("name", "storage_path", "tracking"):  # of the trial, not of what it trained
        del settings[key]
    head = [
        f"The winner of the sweep {sweep.name}: {winner.name}, from the recipe {sweep.config.base}.",
        *(f"{key} {words(value)}" for key, value in winner.point.items()),
        decision.verdict,
        *(f"In the search it went on from {fork}, with other settings before." for fork in forks[-1:]),
        "python jobs/train.py recipe.yaml",
    ]
    comment = "".join(f"# {' '.join(line.split())}\n" for line in head)
    return comment + str(yaml.safe_dump(settings, sort_keys=False))


def spread(values: Mapping[int, float]) -> Spread:
    """Mean and 95 % t-interval of what the seeds gave (at least one)."""
    from scipy import stats

    n, size = len(values), max(map(abs, values.values()))
    mean = math.fsum(values.values()) / n
    if n < 2:
        return Spread(mean, None, None, dict(values))
    if max(values.values()) - min(values.values()) <= 1e-12 * size:  # equal, but for the rounding of a difference
        return Spread(mean, mean, mean, dict(values))
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values.values()) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Spread(mean, mean - half, mean + half, dict(values))


def _candidate(name: str, rows: Sequence[Row], base: Sequence[Row], key: str, sign: float) -> Candidate:
    statuses = [row.status for row in rows]
    metrics = _spreads(rows, ("val/",))
    reference = _spreads(base, ("val/",))
    paired = None
    if name != BASE and key in metrics and key in reference:
        ours, theirs = metrics[key].values, reference[key].values
        both = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
        paired = spread(both) if both else None
    finished = len(metrics[key].values) if key in metrics else 0
    ends = [] if paired is None or paired.low is None or paired.high is None else [paired.low, paired.high]
    return Candidate(
        name=name,
        point=rows[0].point if rows else {},
        seeds=[row.seed for row in rows],
        finished=finished,
        diverged=statuses.count("diverged"),
        failed=statuses.count("failed"),
        metrics=metrics,
        against_base=paired,
        # equal differences have an interval without width, which is no certainty: accuracies are multiples of 1/n
        beats_base=len(set(ends)) > 1 and all(sign * end < 0 for end in ends) and finished == len(rows),
    )


def _spreads(rows: Iterable[Row], prefixes: tuple[str, ...]) -> dict[str, Spread]:
    seen: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, found in row.metrics.items():
            if row.status == "finished" and key.startswith(prefixes):
                seen.setdefault(key, {})[row.seed] = found
    return {key: spread(seen[key]) for key in sorted(seen)}


def _winner(candidates: Sequence[Candidate], key: str, sign: float) -> str | None:
    """The best mean among those whose seeds all finished, or else among those with the most that did."""
    able = [candidate for candidate in candidates if key in candidate.metrics]
    most = max((candidate.finished for candidate in able), default=0)
    pool = [c for c in able if c.complete and c.finished == most] or [c for c in able if c.finished == most]
    return min(pool, key=lambda candidate: sign * candidate.metrics[key].mean).name if pool else None
