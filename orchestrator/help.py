"""The text of --help that the settings themselves give."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from jem.settings import describe
from orchestrator.config import RunConfig
from orchestrator.free import FREE


def settings_help(recipes: list[str]) -> str:
    """All recipes, and every setting with its default and meaning."""
    lines = ["recipes:", textwrap.fill(", ".join(recipes), 110, initial_indent="  ", subsequent_indent="  "), ""]
    return "\n".join([*lines, "settings (defaults; a recipe sets some):", *_settings("")])


def free_help() -> str:
    """What may be said of a model that is trained."""
    return "\n".join(["settings (defaults; evaluate.suite is full here):", *_settings(FREE)])


def _settings(begin: str | tuple[str, ...]) -> Iterator[str]:
    for key, default, meaning in describe(RunConfig):
        if key.startswith(begin):
            yield from textwrap.wrap(f"{key} = {default}", 110, initial_indent="  ", subsequent_indent="      ")
            yield from textwrap.wrap(meaning, 104, initial_indent="      ", subsequent_indent="      ")
