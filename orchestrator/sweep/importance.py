"""Which parameters matter, as far as the trials tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.sweep.drawing import FINISHED, new_figure
from orchestrator.sweep.space import distributions, to_params
from orchestrator.sweep.table import Row, measured, objectives

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from orchestrator.sweep.config import Objective, Sweep

FEWEST = 4
"""Finished trials below which nothing is said."""


def importances(rows: Sequence[Row], sweep: Sweep) -> dict[str, dict[str, float]]:
    """By objective, the share of its variance that each parameter explains by itself (fANOVA, Hutter et al., 2014).

    Of the finished trials but the base, and the parameters that all of them have. Empty if they are too few, or all
    alike.
    """
    drawn = [row for row in measured(rows, sweep) if not row.is_base]
    keys = [key for key in common(rows, sweep) if len({repr(row.point[key]) for row in drawn}) > 1]
    if len(drawn) < FEWEST or len(keys) < 2:
        return {}
    found = {objective.key: _shares(drawn, sweep, keys, objective) for objective in objectives(sweep)}
    return {key: shares for key, shares in found.items() if shares}


def common(rows: Sequence[Row], sweep: Sweep) -> list[str]:
    """The parameters that every finished trial has: a conditional one cannot be compared with the others."""
    drawn = [row for row in measured(rows, sweep) if not row.is_base]
    return [axis.key for axis in sweep.space if all(axis.key in row.point for row in drawn)]


def importance_picture(rows: Sequence[Row], sweep: Sweep) -> Figure | None:
    """Bars, a panel an objective; None if there are no importances."""
    found = importances(rows, sweep)
    if not found:
        return None
    there = [axis.key for axis in sweep.space if axis.key in next(iter(found.values()))]
    columns = len(found)
    figure = new_figure(6.4 if columns == 1 else 3.6 * columns + 1.2, 0.36 * len(there) + 1.7)
    grid = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    total = {key: sum(shares[key] for shares in found.values()) for key in there}
    keys = sorted(there, key=lambda key: total[key])
    for axes, (objective, shares) in zip(grid, found.items(), strict=True):
        bars = axes.barh(keys, [shares[key] for key in keys], color=FINISHED, alpha=0.75)
        axes.bar_label(bars, [f"{100 * shares[key]:.0f} %" for key in keys], padding=3, fontsize=8)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.tick_params(labelsize=8)
        axes.set_title(f"importance for {objective}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(_notes(rows, sweep, there)), fontsize=8.5)
    return figure


def _notes(rows: Sequence[Row], sweep: Sweep, there: Sequence[str]) -> list[str]:
    n = sum(not row.is_base for row in measured(rows, sweep))
    always = common(rows, sweep)
    notes = [f"fANOVA of {n} finished trials, without those that were pruned, diverged or failed"]
    conditional = [axis.key for axis in sweep.space if axis.key not in always]
    same = [key for key in always if key not in there]
    if conditional:
        notes.append(f"left out, as not every trial has it: {', '.join(conditional)}")
    if same:
        notes.append(f"left out, as all trials have the same: {', '.join(same)}")
    return notes


def _shares(rows: Sequence[Row], sweep: Sweep, keys: list[str], objective: Objective) -> dict[str, float]:
    import optuna

    values = [row.metrics[objective.key] for row in rows]
    if len(set(values)) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    of = distributions(sweep.space)
    study = optuna.create_study(direction="minimize" if objective.mode == "min" else "maximize")
    for row, value in zip(rows, values, strict=True):
        params: dict[str, Any] = {key: x for key, x in to_params(sweep.space, row.point).items() if key in keys}
        study.add_trial(optuna.create_trial(params=params, distributions={k: of[k] for k in params}, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=keys)
    return {key: float(share) for key, share in found.items()}
