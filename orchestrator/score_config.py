"""The settings of jobs/score.py. Mistakes and --help are instant: neither torch nor Ray is imported."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jem.data.catalog import SPLITS
from jem.errors import ConfigError
from jem.settings import Settings, build, describe, group, setting
from orchestrator.config import parse_arguments

OWN = ("file", "row", "label", "index", "probability", "probabilities", "log_density", "in_distribution", "true_label")
"""Columns of the scores."""


@dataclass(frozen=True, kw_only=True)
class MLflowConfig(Settings):
    """Where models:/ and runs:/ are looked up."""

    uri: str | None = setting(
        None, doc="MLflow tracking URI; none: MLFLOW_TRACKING_URI where set, else SQLite inside storage_path"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Settings):
    """What is scored, and on what."""

    split: str | None = setting(None, choices=SPLITS, doc="of a data set of jobs/prepare.py; none: all")
    column: str = setting("image", doc="of the images")
    label: str | None = setting(
        "label",
        doc="column of the right classes (a class's number or name), for the accuracy and written as true_label, by "
        "name where a data set of jobs/prepare.py has other classes than the model; the default need not exist; "
        "none: there is none",
    )
    keep: tuple[str, ...] = setting((), doc="more columns to be written beside the scores, such as [id, path]")
    rows_per_unit: int = setting(
        50_000,
        ge=1,
        doc="rows a file of scores; what is lost at most when stopped, a worker; of image files at most 1,000",
    )
    workers: int | None = setting(None, ge=1, doc="at most so many; none: one a GPU, or one a CPU where there is none")
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), doc="auto: GPUs where there are any")
    storage_path: str = setting("./runs", doc="folder of all runs, for MLflow's SQLite file in it")
    tracking: MLflowConfig = group(MLflowConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for name in self.keep:
            if name in (*OWN, self.label, self.column):
                why = "is what a column of the scores is called" if name in OWN else "is another setting's column"
                yield "keep", f"has {name!r}, which {why}; the column of right classes is named by label="
            elif self.keep.count(name) > 1:
                yield "keep", f"has {name!r} twice"
                return
        if self.column == self.label:
            yield "label", f"is {self.label!r}, the same as column"


def score_config(changes: Sequence[str]) -> ScoreConfig:
    """KEY=VALUE settings; every mistake in one ConfigError."""
    entries, problems = parse_arguments(changes)
    try:
        config = build(ScoreConfig, entries)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def settings_help() -> str:
    """Every setting with its default and meaning."""
    lines = ["settings (defaults):"]
    for key, default, meaning in describe(ScoreConfig):
        lines += [
            f"  {key} = {default}",
            *textwrap.wrap(meaning, 104, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines)
