"""The text of --help that the settings themselves give."""

from __future__ import annotations

import textwrap

from jem.settings import describe
from orchestrator.config import RunConfig


def settings_help(recipes: list[str]) -> str:
    """All recipes, and every setting with its default and meaning."""
    lines = ["recipes:", textwrap.fill(", ".join(recipes), 110, initial_indent="  ", subsequent_indent="  "), ""]
    lines.append("settings (defaults; a recipe sets some):")
    for key, default, meaning in describe(RunConfig):
        lines += textwrap.wrap(
            f"{key} = {default}", 110, initial_indent="  ", subsequent_indent="      "
        ) + textwrap.wrap(meaning, 104, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
