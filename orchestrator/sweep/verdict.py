"""A sweep's decision in a few sentences of plain English."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from orchestrator.sweep.table import BASE

if TYPE_CHECKING:
    from orchestrator.sweep.decide import Candidate, Decision


def verdict(decision: Decision, sign: float) -> str:
    """Whether a candidate beats the base, with the figures; `sign` is 1 where less of the first objective is better."""
    return " ".join(_sentences(decision, sign))


def figures(*values: float | None) -> list[str]:
    """Figures that stand together, to one number of decimals."""
    digits = decimals_for(value for value in values if value is not None)
    return ["-" if value is None else f"{value:.{digits}f}" for value in values]


def decimals_for(values: Iterable[float]) -> int:
    """Three, or as many as show two digits of the largest, at most seven."""
    size = max(map(abs, values), default=0.0)
    return min(max(3, 1 - math.floor(math.log10(size))), 7) if size else 3


def _sentences(decision: Decision, sign: float) -> Iterator[str]:
    key = decision.objective[0]
    winner, base = decision.of(decision.winner or ""), decision.of(BASE)
    if winner is None:
        yield f"Nothing can be decided: no trial finished with a {key}."
    elif decision.stage == "search":
        yield from _of_search(key, winner, base, bool(decision.cut))
    elif base is None or key not in base.metrics:
        seeds = f"{base.finished if base else 0} of its {_count(len(base.seeds) if base else 0, 'seed')}"
        best = f"the best {key} is that of {winner.name}, {figures(winner.metrics[key].mean)[0]}"
        yield f"No candidate can be compared with the base, which finished {seeds}: {best}."
    else:
        yield from _of_finalists(decision, key, winner, base, sign)
    if decision.cut:
        seeds = f"{_count(len(decision.cut), 'seed')} ({', '.join(map(str, decision.cut))})"
        yield f"budget.minutes did not suffice for {seeds} of all finalists: what was trained of them counts for none."
    incomplete = [candidate for candidate in decision.candidates if not candidate.complete]
    if decision.stage == "finalists" and incomplete:
        yield f"Not all seeds finished: {', '.join(map(_incomplete, incomplete))}; one that finished all is preferred."


def _of_search(key: str, winner: Candidate, base: Candidate | None, cut: bool) -> Iterator[str]:
    there = base is not None and key in base.metrics
    ours, theirs = figures(winner.metrics[key].mean, base.metrics[key].mean if base and there else None)
    if winner.name == BASE:
        yield f"The base has the best {key} of the search, {ours}."
    else:
        yield f"{winner.name} has the best {key} of the search, {ours}" + (
            f" against the base's {theirs}." if there else "; the base did not finish."
        )
    none = "no finalists were trained" + (" to the end" if cut else "")
    yield f"That is one seed each, without an interval, and the best of many is partly luck: {none}."


def _of_finalists(decision: Decision, key: str, winner: Candidate, base: Candidate, sign: float) -> Iterator[str]:
    others = [c for c in decision.candidates if c.against_base is not None]
    others.sort(key=lambda candidate: sign * candidate.metrics[key].mean)
    beating = [c for c in others if c.beats_base]
    if beating:
        first = winner if winner in beating else beating[0]
        yield f"{first.name} beats the base: {_compared(key, first, base)}."
        if winner is not first:
            how = "is the base's" if winner is base else f"is that of {winner.name}, but no certain gain over the base"
            yield f"The best mean {how}."
    elif not others:
        yield "No candidate beats the base: none finished a seed that the base finished too."
    else:
        best = winner if winner in others else others[0]
        yield f"No candidate beats the base: {best.name} has {_compared(key, best, base)}."
        yield "The base stays." if winner is base else f"{winner.name} is the winner by its mean alone."


def _compared(key: str, candidate: Candidate, base: Candidate) -> str:
    paired = candidate.against_base
    assert paired is not None
    digits = decimals_for(x for x in (paired.mean, paired.low, paired.high) if x is not None)
    means = (candidate.metrics[key].mean, base.metrics[key].mean, paired.mean)
    ours, theirs, difference = (f"{x:.{digits}f}" for x in means)
    interval = "without an interval"
    if paired.low is not None and paired.high is not None:
        interval = f"[{paired.low:.{digits}f}, {paired.high:.{digits}f}]"
    seeds = _count(len(paired.values), "seed")
    return f"{key} {ours} against {theirs}, difference {difference} {interval} over {seeds}"


def _incomplete(candidate: Candidate) -> str:
    counts = ((candidate.diverged, "diverged"), (candidate.failed, "failed"))
    what = [f"{n} {word}" for n, word in counts if n]
    left = len(candidate.seeds) - candidate.finished - candidate.diverged - candidate.failed
    what += [f"{left} did not end"] if left else []
    return f"{candidate.name} {candidate.finished} of {len(candidate.seeds)} ({', '.join(what)})"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
