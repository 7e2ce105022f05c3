"""The remedies of recovery.ladder: how they are written, and what each makes of a run's settings.

seed (other noise, no setting), KEY*FACTOR, KEY=VALUE, KEY>=LEAST, KEY<=MOST, or a factor and a bound.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import TypeVar

import yaml

from jem.config import JEMConfig
from jem.errors import ConfigError, Problem
from jem.settings import Entry, flatten, override

C = TypeVar("C", bound=JEMConfig)

LADDER = (
    "seed",
    "optimizer.learning_rate*0.5",
    "sgld.steps*2",
    "objective.energy_l2*2>=0.1",
    "sgld.clamp<=1 sgld.gradient_clamp<=1",
)
"""What JEM's author and its successors found to help, from the cheapest on: other noise, a lower learning rate,
longer chains, an L2 penalty on energies (Du & Mordatch, 2019), proximal steps (JEM++, 2021)."""

REMEDIES = (
    *("optimizer.learning_rate", "optimizer.clip_norm", "sgld.steps", "sgld.step_size", "sgld.noise_scale"),
    *("sgld.clamp", "sgld.gradient_clamp", "objective.energy_l2", "objective.kl_weight"),
    *("objective.p_y_given_x_weight", "objective.p_x_weight", "objective.p_x_y_weight"),
)
"""Settings that a remedy may change in the middle of a run."""


def remedied(config: C, change: str) -> C:
    """The configuration with one change of a ladder made, such as `sgld.steps*2`; `seed` changes none.

    Raises ConfigError if what comes out cannot be.
    """
    key, factor, sign, text = _parts(change)
    if sign == "=":
        return override(config, {key: Entry(yaml.safe_load(text), raw=text)})
    if not factor and not sign:
        return config
    settings = flatten(config)
    before = math.inf if settings[key] is None else settings[key]
    if before == math.inf and not sign:
        raise ConfigError([Problem(key, f"is none, which cannot be multiplied; use {key}=VALUE")])
    value = before * float(factor or 1)
    if sign:
        value = max(value, float(text)) if sign == ">=" else min(value, float(text))
    if value == before:
        return config
    if key != "sgld.steps":
        return override(config, {key: value})
    most = settings["sgld.max_steps"]  # chains that adapt keep their room
    bound = {} if most is None else {"sgld.max_steps": max(2, round(most * value / before))}
    return override(config, {key: max(1, round(value)), **bound})


def _parts(change: str) -> tuple[str, str, str, str]:
    """KEY, FACTOR, the sign, and what stands behind it; empty where there is none."""
    match = re.fullmatch(r"([^*<>=]*)(?:\*([^<>=]*))?(?:(>=|<=|=)(.*))?", change)
    return tuple(part or "" for part in match.groups()) if match else (change, "", "", "")  # type: ignore[return-value]


def malformed(change: str) -> str | None:
    """What is wrong with how a change of a ladder is written, if anything."""
    if change == "seed":
        return None
    key, factor, sign, text = _parts(change)
    if key not in REMEDIES or not (factor or sign) or (factor and sign == "="):
        close = difflib.get_close_matches(key, REMEDIES, 1)
        hint = f"; did you mean {close[0]}?" if close else f"; such as {LADDER[1]}. KEY can be {', '.join(REMEDIES)}"
        hint = "" if key in REMEDIES else hint
        return f"must be seed, KEY*FACTOR, KEY=VALUE, KEY>=LEAST or KEY<=MOST{hint}"
    try:
        float(factor or 1)
        yaml.safe_load(text) if sign == "=" else float(text if sign else 1)
    except (ValueError, yaml.YAMLError):
        return f"where {text or factor!r} is no {'value' if sign == '=' else 'number'}"
    return None
