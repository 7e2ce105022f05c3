"""What is wrong with a run, and the command to type next."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from typing import Any

from jem.errors import ConfigError, JEMError
from jem.files import Location
from jem.settings import flatten
from orchestrator.config import bundled_recipes, load_run_config, shown
from orchestrator.details import Checkpoint
from orchestrator.survey import Run
from orchestrator.tracking import default_uri

QUIET_S = 600.0
"""A run that is worked on and gives no sign for longer may hang, or have been stopped by SIGSTOP."""


@dataclass
class Advice:
    """`problem` is empty where nothing is wrong; `alternative` is another command, where there are two ways."""

    problem: str = ""
    next: str | None = None
    alternative: str | None = None


def advise(run: Run, jobs: str, now: float, checkpoints: list[Checkpoint] | None = None) -> Advice:
    """`jobs` is the folder of the commands as it was typed; `checkpoints` where they were looked at."""
    faults = [*run.faults, *(f"checkpoint {c.step}: {c.state}" for c in checkpoints or [] if not c.good)]
    advice = _by_status(run, jobs, now)
    if checkpoints and not any(c.good for c in checkpoints) and run.status != "running":
        advice.next = train_command(run, jobs, fresh=True)
    advice.problem = "\n".join(filter(None, [advice.problem, *faults]))
    return advice


def _by_status(run: Run, jobs: str, now: float) -> Advice:
    goes_on, message = train_command(run, jobs), str(run.result.get("message") or "")
    if run.status == "running":
        quiet = now - run.seen if run.seen else 0.0
        return Advice(f"{run.holder} gave no sign for {round(quiet / 60)} min" if quiet > QUIET_S else "")
    if run.status == "damaged":
        fresh = (run.root / "run.json").exists()
        return Advice("", train_command(run, jobs, fresh=True) if fresh else goes_on)
    if run.status == "interrupted":
        last = run.attempts[-1] if run.attempts else {}
        return Advice(
            f"its driver (pid {last.get('pid', '?')} on {last.get('host', '?')}) ended without a word", goes_on
        )
    if run.status == "finished":
        if not run.sent:
            return Advice(f"MLflow at {run.mlflow.get('uri')} has not got everything", sync_command(run, jobs))
        more = train_command(run, jobs, {"steps": 2 * run.steps}) if run.steps else None
        return Advice("", None, more)
    if run.status == "diverged":
        return _diverged(run, jobs, message)
    if run.status == "no good checkpoint":
        return Advice(message, train_command(run, jobs, fresh=True))
    return Advice(message or "it left no message", goes_on)


def _diverged(run: Run, jobs: str, message: str) -> Advice:
    setting = run.setting
    rate = setting.get("optimizer.learning_rate")
    changes = {"name": f"{run.name}-b"} | ({"optimizer.learning_rate": rate / 2} if isinstance(rate, float) else {})
    other = train_command(run, jobs, changes)
    limit, made = setting.get("recovery.max"), len(run.rollbacks)
    if not isinstance(limit, int) or made < limit:
        return Advice(message, other)
    return Advice(message, train_command(run, jobs, {"recovery.max": max(2 * limit, made + 5)}), other)


def train_command(run: Run, jobs: str, changes: dict[str, Any] | None = None, fresh: bool = False) -> str:
    """The command that goes on with the run, from any folder and whatever the recipe's folder is called now."""
    changes = changes or {}
    if run.root.is_local and run.recipe:
        recipe = _short((run.root / "recipe.yaml").uri)
        settings = {} if run.recipe.get("name") == run.name else {"name": run.name}
        if _path_of(run.recipe.get("storage_path")) != run.root.parent.path:
            settings["storage_path"] = _short(run.root.parent.uri)
    else:
        recipe, settings = _from_bundled(run)
        settings |= {"name": run.name, "storage_path": _short(run.root.parent.uri)}
    settings |= _tracking(run) | changes
    words = [_short(f"{jobs}/train.py"), recipe, *(f"{key}={_text(value)}" for key, value in settings.items())]
    return shlex.join(["python", *words, *(["--fresh"] if fresh else [])])


def sync_command(run: Run, jobs: str) -> str:
    where = [] if run.root.parent.path == _path_of("./runs") else [f"storage_path={_short(run.root.parent.uri)}"]
    password = [f"tracking.uri={_no_stars(run.mlflow['uri'])}"] if ":***@" in str(run.mlflow.get("uri")) else []
    return shlex.join(["python", _short(f"{jobs}/sync.py"), run.name, *where, *password])


def _from_bundled(run: Run) -> tuple[str, dict[str, Any]]:
    """A bundled recipe and what this run has otherwise: a recipe that lies in an object store is no local file."""
    known = {key: value for key, value in run.setting.items() if key not in ("name", "storage_path", "tracking.uri")}
    base = next((r for r in sorted(bundled_recipes(), key=len, reverse=True) if run.name.startswith(r)), "digits")
    if not known:
        return (base if run.name.startswith(f"{base}-") else "RECIPE"), {}
    try:
        plain = json.loads(json.dumps(flatten(load_run_config(base, []))))
    except JEMError:
        return "RECIPE", {}
    return base, {key: value for key, value in known.items() if plain.get(key) != value}


def _tracking(run: Run) -> dict[str, Any]:
    """tracking.uri, where typing nothing would lead to another MLflow than the run's, or its password is missing."""
    uri = run.mlflow.get("uri")
    if not isinstance(uri, str):
        return {}
    configured = run.setting.get("tracking.uri") if run.root.is_local else None
    try:
        found = default_uri(run.root.parent, configured)[0]
    except ConfigError:
        found = ""
    return {} if shown(found) == uri and ":***@" not in found else {"tracking.uri": _no_stars(uri)}


def _no_stars(uri: str) -> str:
    return uri.replace(":***@", ":PASSWORD@")


def _path_of(storage_path: Any) -> str | None:
    try:
        return Location.of(str(storage_path)).path
    except ValueError:
        return None


def _short(path: str) -> str:
    """Relative to where one is, if it is below."""
    if "://" in path:
        return path
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
