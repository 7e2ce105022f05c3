"""What two ranks do in one go, as starting them is what takes time; the tests look at what came of it."""

import time
from pathlib import Path

import pytest
from worker_runs import CPU, HOOKED, Death, die, fit, poison, prepared

from jem.errors import CheckpointError
from jem.files import Location
from orchestrator import control, training
from orchestrator.control import Control, request_stop

UNSTABLE = (
    *(HOOKED, "workers=2", "seed=2", "steps=60", "optimizer.learning_rate=0.3", "checkpoint.every=10"),
    *("evaluate.every=40", "recovery.every=5", "recovery.healthy_steps=15", "recovery.relax_steps=40"),
    *("recovery.max=30", "recovery.ladder=[seed,optimizer.learning_rate*0.1,optimizer.learning_rate*0.01]"),
)
"""Diverges by itself before step 60, and is saved by the ladder."""


def stories(world, folder):
    """Run on each of two ranks."""
    folder, told = Path(folder), {}
    control.LOOK_EVERY_S = 0
    jem = (HOOKED, "workers=2", "batch_size=7", "replay.capacity=25", "optimizer.ema_decay=0.9", "evaluate.final=best")
    reports = []
    told["whole"] = fit(folder / "whole", *jem, world=world, report=lambda *r: reports.append(r))
    told["reports"] = reports
    for attempt, passes in enumerate((3, 6), start=1):
        with pytest.raises(Death):
            fit(folder / "killed", *jem, world=world, hooks={passes: die}, attempt=attempt)
    told["killed"] = fit(folder / "killed", *jem, world=world, attempt=3)

    root = Location.of(folder / "stopped")
    ask = {6: lambda _: request_stop(root)} if world.rank == 0 else {}
    told["stopped"] = fit(folder / "stopped", *jem, world=world, hooks=ask)
    world.barrier()
    if world.rank == 0:
        control.clear_request(root)
    world.barrier()
    told["gone on"] = fit(folder / "stopped", *jem, world=world)

    exact = ("workers=2", "precision=float64", "evaluate.suite=fast")
    told["classifier"] = fit(folder / "classifier", *exact, world=world, recipe="digits_classifier")
    told["no data"] = fit(folder / "a", "data.name=worker_runs:missing_on_rank_1", "workers=2", world=world)
    told["no network"] = fit(folder / "b", "model.name=worker_runs:unfit_on_rank_1", "workers=2", world=world)
    nan = {6: poison} if world.rank == 1 else {}
    give_up = ("recovery.max=0", "recovery.every=3", "recovery.healthy_steps=0")
    told["diverged"] = fit(folder / "diverged", HOOKED, "workers=2", *give_up, world=world, hooks=nan)

    for attempt, passes in enumerate((43, 3), start=1):
        with pytest.raises(Death):
            fit(folder / "unstable killed", *UNSTABLE, world=world, hooks={passes: die}, attempt=attempt)
    told["unstable killed"] = fit(folder / "unstable killed", *UNSTABLE, world=world, attempt=3)
    told["unstable"] = fit(folder / "unstable", *UNSTABLE, world=world)

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(training.Training, "restore", away)
        told["unreadable"] = fit(folder / "unreadable", *UNSTABLE, world=world)

    source = folder / "whole" / "checkpoints" / "12"
    taken = prepared(folder / "taken", *jem[1:], "model.name=worker_runs:hooked", world=world, init_from=str(source))
    told["taken"] = taken.state.network.state_dict(), taken.state.replay.chains
    control.LOOK_EVERY_S = 1.0
    told["asked"] = wait_for_a_stop(world, folder)
    return told


def away(_training, manifest):
    raise CheckpointError(f"{manifest.directory.uri}: rank 1 cannot read it")


def wait_for_a_stop(world, folder):
    """Only rank 0 can see the request: rank 1 looks elsewhere, and its steps take longer."""
    root = Location.of(folder / "asked" / str(world.rank))
    control = Control(world, root, CPU)
    return first_stop(control, 400, pause=0.01 * (1 + world.rank), request=(20, root) if world.rank == 0 else None)


def first_stop(control, steps, pause=0.0, request=None):
    """The step at which `control` stops; `request` = (step, folder): then and there a stop is asked for."""
    for step in range(1, steps + 1):
        time.sleep(pause)
        if request and step == request[0]:
            request_stop(request[1])
        if control.due(step) and control.stop_requested(step):
            return step
    return None
