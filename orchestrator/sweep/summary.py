"""What a sweep found, in Markdown: summary.md, and the description of its run in MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from orchestrator.sweep.decide import Candidate, Decision, Spread, over_seeds, ranking
from orchestrator.sweep.drawing import base_value
from orchestrator.sweep.space import words
from orchestrator.sweep.table import BASE, STATUSES, Row, best, counts, objectives
from orchestrator.sweep.verdict import decimals_for

if TYPE_CHECKING:
    from orchestrator.sweep.config import Sweep

SHOWN = 10
"""Trials of the search in the table, and reasons in the list."""

FIGURES = ("accuracy", "nll", "ece")
"""Those of a split that a short table has, beside AUROCs."""

LENGTH = 160
"""Of a reason, in characters."""


def summary(rows: Sequence[Row], sweep: Sweep, decision: Decision | None) -> str:
    """The verdict, then the tables it rests on; without a decision the sweep is still going on."""
    searched = [row for row in rows if row.stage == "search"]
    blocks = [decision.verdict if decision else "The sweep goes on: nothing is decided yet.", *_scope(rows, sweep)]
    if decision and decision.stage == "finalists":
        blocks += ["## Finalists", *_finalists(decision)]
    blocks += _front(searched, sweep)
    blocks += _best(searched, sweep)
    blocks += reasons(rows)
    return "\n\n".join(blocks) + "\n"


def seeds_summary(rows: Sequence[Row], name: str) -> str:
    """One configuration trained with several seeds: each measured figure with its interval."""
    found = over_seeds(rows)
    finished = [row for row in rows if row.status == "finished"]
    told = f"{name}: {len(finished)} of {len(rows)} seeds finished ({counts_text(rows)})."
    blocks = [told, *reasons(rows)]
    if found:
        head = ("figure", "mean and 95 % t-interval", *(f"seed {row.seed}" for row in finished))
        first = sorted(found, key=lambda key: (not key.startswith("test/"), not key.startswith("val/"), key))
        lines = [(key, *_over(Spread(**found[key]), [row.seed for row in finished])) for key in first]
        blocks.insert(1, table(head, lines))
    return "\n\n".join(blocks) + "\n"


def shown_figures(metrics: Iterable[str]) -> list[str]:
    """What a short table has: of test data where they were measured, the AUROC of log p(x) included."""
    keys = list(metrics)
    split = "test" if any(key.startswith("test/") for key in keys) else "val"
    sets = [key for key in keys if key.endswith("/log_px/auroc") and key.startswith("val/") == (split == "val")]
    return [key for key in (f"{split}/{name}" for name in FIGURES) if key in keys] + sets


def counts_text(rows: Iterable[Row]) -> str:
    """Such as `12 finished, 3 pruned`."""
    return ", ".join(f"{n} {status}" for status, n in counts(rows).items()) or "none"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _scope(rows: Sequence[Row], sweep: Sweep) -> Iterator[str]:
    searched = [row for row in rows if row.stage == "search"]
    again = [row for row in rows if row.stage == "finalists"]
    wanted = " and ".join(f"{o.key} ({'lower' if o.mode == 'min' else 'higher'} is better)" for o in objectives(sweep))
    text = f"Sweep `{sweep.name}` from the recipe `{sweep.config.base}`, for {wanted}; "
    text += f"searcher {sweep.config.searcher}, scheduler {sweep.config.scheduler.name}, seed {sweep.config.seed}. "
    text += f"Search: {len(searched)} trials ({counts_text(searched)})."
    if again:
        text += f" Finalists: {len(again)} trials ({counts_text(again)})."
    yield text
    spans = [
        (axis.key, axis.text, axis.condition or "always", words(base_value(sweep, axis.key))) for axis in sweep.space
    ]
    yield "## Space"
    yield table(("setting", "drawn", "when", "base"), spans)


def _finalists(decision: Decision) -> Iterator[str]:
    first = decision.objective[0]
    keys = dict.fromkeys([*decision.objective, "val/accuracy", "val/nll", "val/ece", "val/ood/interp/log_px/auroc"])
    shown = [key for key in keys if any(key in candidate.metrics for candidate in decision.candidates)]
    head = ("candidate", "seeds finished", *shown, f"{first} less the base's", "beats the base")
    yield table(head, [_finalist(candidate, decision, shown) for candidate in decision.candidates])
    yield (
        "Mean ± half of the 95 % t-interval over seeds; the difference is paired by seed, and the base is beaten where "
        "all seeds finished and the interval excludes 0. Each interval is of one comparison, not of all together."
    )
    per_seed = [
        (candidate.name, *(_number(candidate.metrics.get(first), seed) for seed in _seeds(decision)))
        for candidate in decision.candidates
    ]
    yield f"{first} by seed:"
    yield table(("candidate", *(f"seed {seed}" for seed in _seeds(decision))), per_seed)


def _finalist(candidate: Candidate, decision: Decision, keys: Sequence[str]) -> list[str]:
    name = f"**{candidate.name}**" if candidate.name == decision.winner else candidate.name
    ended = [f"{n} {what}" for n, what in ((candidate.diverged, "diverged"), (candidate.failed, "failed")) if n]
    done = ", ".join([f"{candidate.finished} of {len(candidate.seeds)}", *ended])
    cells = [mean(candidate.metrics.get(key)) for key in keys]
    paired = candidate.against_base
    if candidate.name == BASE:
        return [name, done, *cells, "", ""]
    return [name, done, *cells, interval(paired), "yes" if candidate.beats_base else "no"]


def _front(rows: Sequence[Row], sweep: Sweep) -> Iterator[str]:
    if len(sweep.config.objective) < 2:
        return
    front = best(rows, sweep)
    if front:
        yield f"## Pareto front: {len(front)} trials that no other one dominates"
        yield table(*_trials(front, sweep))


def _best(rows: Sequence[Row], sweep: Sweep) -> Iterator[str]:
    ranked = ranking(rows, sweep)
    if not ranked:
        return
    shown = ranked[:SHOWN]
    base = [row for row in ranked[SHOWN:] if row.is_base]  # always there to compare with
    yield f"## Best of the search: {len(shown)} of {len(ranked)} that finished" + (", and the base" if base else "")
    yield table(*_trials([*shown, *base], sweep))


def _trials(rows: Sequence[Row], sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    wanted = sweep.config.objective
    keys = [axis.key for axis in sweep.space]
    others = sorted({key for row in rows for key in row.point} - set(keys))
    digits = {key: decimals_for([row.metrics[key] for row in rows]) for key in wanted}
    lines = []
    for row in rows:
        figures = [f"{row.metrics[key]:.{digits[key]}f}" for key in wanted]
        drawn = [words(row.point[key]) if key in row.point else "" for key in [*keys, *others]]
        origin = ["; ".join(row.forks)] if any(row.forks for row in rows) else []
        name = row.name if not row.is_base else f"{row.name} (base)"
        lines.append([name, *figures, *drawn, *origin, row.status])
    head = ["went on from"] if any(row.forks for row in rows) else []
    return ["trial", *wanted, *keys, *others, *head, "status"], lines


def reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why trials came to nothing; equal reasons once."""
    known: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status in ("diverged", "failed"):
            known.setdefault((row.status, " ".join(row.reason.split())), []).append(row)
    if not known:
        return
    yield "## Why trials came to nothing"
    lines = []
    for (status, reason), group in sorted(known.items(), key=lambda item: STATUSES.index(item[0][0])):
        named = ", ".join(f"{row.name} at step {row.step}" for row in group[:5])
        more = f" and {len(group) - 5} more" if len(group) > 5 else ""
        told = reason if len(reason) <= LENGTH else reason[: LENGTH - 3] + "..."
        lines.append(f"- {status}: {named}{more}: {_plain(told) or 'no reason is known'}")
    rest = [f"- and {len(lines) - SHOWN} other reasons: see trials.csv"] if len(lines) > SHOWN else []
    yield "\n".join(lines[:SHOWN] + rest)


def _seeds(decision: Decision) -> list[int]:
    return sorted({seed for candidate in decision.candidates for seed in candidate.seeds})


def _over(found: Spread, seeds: Sequence[int]) -> list[str]:
    values = [found.values.get(seed) for seed in seeds]
    digits = decimals_for([value for value in values if value is not None])
    return [interval(found), *("" if value is None else f"{value:.{digits}f}" for value in values)]


def _number(found: Spread | None, seed: int) -> str:
    if found is None or seed not in found.values:
        return ""
    return f"{found.values[seed]:.{decimals_for(found.values.values())}f}"


def mean(found: Spread | None) -> str:
    if found is None:
        return ""
    digits = decimals_for([found.mean])
    return f"{found.mean:.{digits}f}" + ("" if found.half is None else f" ± {found.half:.{digits}f}")


def interval(found: Spread | None) -> str:
    if found is None:
        return ""
    ends = [end for end in (found.low, found.high) if end is not None]
    digits = decimals_for([found.mean, *ends])
    return f"{found.mean:.{digits}f}" + (f" [{', '.join(f'{end:.{digits}f}' for end in ends)}]" if ends else "")


def _cell(text: str) -> str:
    return _plain(text).replace("|", r"\|")


def _plain(text: str) -> str:
    """Without what Markdown would take for HTML."""
    return re.sub(r"\s+", " ", text).replace("<", "&lt;")
