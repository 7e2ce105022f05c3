"""Ray Data as the executor: units in, each scored by one of a pool of actors that have loaded the model once."""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from jem.errors import CheckpointError, ConfigError, DataError, DivergedError, JEMError, Problem
from jem.predict import CARD, WEIGHTS, Predictor
from orchestrator.command import RAY_THREAD
from orchestrator.ray_cluster import Cluster, cores, leave_ray, ray_session
from orchestrator.score_rows import Work, score_unit
from orchestrator.score_units import Unit
from orchestrator.signals import NUMBERS

T = TypeVar("T")

RETRIES = 3
"""How often a unit is tried again after its worker has died: Ray Data's own default is for ever."""

LEAVE_S = 10.0
"""How long an interrupted command waits for Ray to end."""

KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, DivergedError)}

QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Ray's C++ tells, at the level of an error, that restarted actors need their arguments: ours stay until the end."""

ALONE = {"RAY_ENABLE_AUTO_CONNECT": "0"}
"""A call that comes after ray.shutdown fails: by default Ray connects then, to any cluster that it finds a trace of."""


class Scorer:
    """What an actor is: a model, and what to do with a unit."""

    def __init__(self, work: Work, files: Any, device: str) -> None:
        """`files`: a reference to the portable model's files, by name: its folder may be on another machine."""
        import ray

        torch.set_num_threads(1)  # float32 sums depend on how many share them, and workers share the cores
        self.work = work
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(files).items():
                (Path(folder) / name).write_bytes(content)
            self.predictor = Predictor.load(Path(folder), device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """An error that a user can act on is an answer: raised, it would arrive wrapped in tracebacks."""
        unit = Unit(**json.loads(batch["unit"][0]))
        kind = message = ""
        try:
            score_unit(self.predictor, self.work, unit)
        except JEMError as error:
            kind, message = type(error).__name__, str(error)
        except OSError as error:  # a full disk, a store that refuses
            kind, message = "JEMError", f"{(self.work.out / unit.name).uri}: {error}"
        return {"rows": [unit.rows], "kind": [kind], "message": [message]}


def score_on_ray(
    folder: Path, work: Work, units: Sequence[Unit], workers: int | None, device: str, done: Callable[[int], None]
) -> None:
    """Score all units; `done` is told the rows of each one that is written. Raises the first unit's error."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ.update(ALONE)  # read when Ray is imported
    files = {name: (folder / name).read_bytes() for name in (CARD, WEIGHTS)}

    def call() -> None:
        # one more CPU than workers, in a Ray of our own: Ray Data's own tasks find room whatever the workers hold
        with ray_session(min(len(units), workers or cores()) + 1) as cluster:
            for row in _stream(files, work, units, *_share(cluster, workers, device, len(units))):
                if row["kind"]:
                    raise KINDS.get(row["kind"], JEMError)(row["message"])
                done(row["rows"])

    interruptibly(call)


def interruptibly(call: Callable[[], T]) -> T:
    """`call()` in a thread, while the main thread waits: there, Ray would take the signals for itself."""
    box: list[Any] = []

    def run() -> None:
        try:
            box.extend((call(), None))
        except BaseException as error:  # handed over to the main thread
            box.extend((None, error))

    thread = threading.Thread(target=run, daemon=True, name=RAY_THREAD)
    thread.start()
    try:
        while thread.is_alive():
            if threading.current_thread() is threading.main_thread():
                for number in NUMBERS:  # Ray's C++ side takes SIGTERM at some point of ray.init
                    signal.signal(number, signal.default_int_handler)
            thread.join(0.05)
    except KeyboardInterrupt:
        leave_ray(LEAVE_S)
        raise
    if box[1] is not None:
        raise box[1]
    return box[0]  # type: ignore[no-any-return]


def _share(cluster: Cluster, workers: int | None, device: str, units: int) -> tuple[int, str]:
    """How many workers on what device."""
    gpus = int(cluster.gpus)
    if device == "cuda" and not gpus and cluster.private:
        raise ConfigError([Problem("device", "is 'cuda', but there is no GPU; set device=cpu")])
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    most = gpus if device == "cuda" else cores() if cluster.private else int(cluster.cpus)
    return max(1, min(units, workers or most)), device


def _stream(
    files: dict[str, bytes], work: Work, units: Sequence[Unit], workers: int, device: str
) -> Iterator[dict[str, Any]]:
    """What came of each unit, in the order in which they end."""
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, too
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a unit takes as long as it takes
    context.max_consecutive_actor_init_deaths = RETRIES
    blocks = ray.data.from_items([{"unit": json.dumps(asdict(unit))} for unit in units], override_num_blocks=len(units))
    held = ray.put(files)  # for as long as actors may start
    # starts with whatever there is room for; one unit at work and one waiting for each
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2
    )
    arguments = {"fn_constructor_args": (work, held, device), "batch_size": 1, "compute": pool}
    arguments |= {"num_cpus": 1, "num_gpus": 1 if device == "cuda" else 0}
    if "ray_remote_args_fn" in inspect.signature(blocks.map_batches).parameters:  # until Ray 2.64, without a successor
        arguments["ray_remote_args_fn"] = lambda: {"max_task_retries": RETRIES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scored = blocks.map_batches(Scorer, **arguments)
    try:
        yield from scored.iter_rows()
    except ray.exceptions.RayError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise JEMError(
            f"scoring stopped ({type(error).__name__}: {reason}); what is scored stays, and the same command goes on. "
            "Workers that die each time may lack memory: try fewer, workers=1"
        ) from error
