"""The text of `jobs/sweep.py --help` that the settings themselves give."""

from __future__ import annotations

import textwrap

from jem.settings import describe
from orchestrator.sweep.config import SweepConfig, bundled_sweeps

SPACE = """\
the space, in the file or typed:
  space.KEY.uniform=[LOW, HIGH]      any number between; loguniform: even in its logarithm
  space.KEY.int=[LOW, HIGH]          any whole number, both ends too; logint: even in its logarithm
  space.KEY.choice=[A, B, ...]       any of them
  space.KEY.grid=[A, B, ...]         each of them, with searcher=grid
  space.KEY.when.OTHER=[A, ...]      drawn only where the axis OTHER is one of these, else the base's value
  space.KEY=none                     not searched
KEY is a setting of the runs (jobs/train.py --help lists them). KEY=VALUE fixes it for every trial, and is then not
searched; in the file such settings are below `settings:`.
"""

ARMS = """\
or arms, in the place of the space: each is trained with every seed, measured, and compared with the first one:
  arms.NAME.KEY=VALUE                a setting of the arm NAME, which is added if it is not there; steps is one, too
  arms.NAME.recipe=RECIPE            the arm starts from this recipe in the place of base
  arms.NAME={}                       the base as it is;  arms.NAME=none: not trained
Where and how trials run, and how they are measured, is the same for all arms: such as evaluate.suite=full.
"""


def settings_help() -> str:
    """All sweeps, every setting of one with its default and meaning, and how a space and arms are written."""
    sweeps = textwrap.fill(", ".join(bundled_sweeps()), 110, initial_indent="  ", subsequent_indent="  ")
    lines = ["sweeps:", sweeps, "", SPACE, ARMS, "settings (defaults; a sweep sets some):"]
    for key, default, meaning in describe(SweepConfig):
        lines += [
            f"  {key} = {default}",
            *textwrap.wrap(meaning, 104, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines)
