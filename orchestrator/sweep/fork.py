"""A trial goes on from another one's checkpoint, weights, chains and all, with settings near the other's (PBT).

Who is good enough to be gone on from keeps the checkpoint that it was measured at: TRIAL/handed/STEP. Who goes on
from it first writes that down (trial.json), then does it, and does it again if it is killed in the middle.
Jaderberg et al., Population Based Training of Neural Networks, 2017.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from jem import checkpoint
from jem.checkpoint import MANIFEST, SCHEMA, Manifest, sealed
from jem.files import Location
from jem.settings import flatten
from orchestrator import recovery
from orchestrator.config import RunConfig, shareable
from orchestrator.runs import RunRecord

TRIAL, HANDED, INCOMING = "trial.json", "handed", "incoming"
KEPT = 3
"""Checkpoints that a trial keeps for others: one that is about to go on from an older one still finds it."""

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Fork:
    """From `donor`'s checkpoint of `step` on, the trial trains at `point`."""

    id: str
    donor: str
    step: int
    point: dict[str, Any]
    done: bool = False

    def __str__(self) -> str:
        return f"from {self.donor} at step {self.step}"


def read_forks(root: Location) -> list[Fork]:
    """What a trial has gone on from, oldest first."""
    with suppress(FileNotFoundError):
        return [Fork(**fork) for fork in json.loads((root / TRIAL).read()).get("forks", [])]
    return []


def write_trial(root: Location, content: Mapping[str, Any], forks: list[Fork]) -> None:
    told = {"forks": [asdict(fork) for fork in forks]} if forks else {}
    (root / TRIAL).write(json.dumps({**content, **told}, indent=1).encode())


def note(root: Location, fork: Fork) -> None:
    """Write down that the trial in `root` is to go on from another; nothing happens if that is known."""
    content = json.loads((root / TRIAL).read())
    forks = read_forks(root)
    if fork.id not in {known.id for known in forks}:
        write_trial(root, content, [*forks, fork])


def hold(root: Location, step: int) -> int | None:
    """Keep the newest checkpoint that a trial had at `step`, whatever becomes of the trial; its step, if any."""
    held = {int(directory.name) for directory in checkpoint.committed(root / HANDED)}
    for directory in checkpoint.committed(root / "checkpoints"):
        found = int(directory.name)
        if found > step:
            continue
        if found not in held:
            try:
                _link(directory, root / HANDED / found)
            except OSError:  # pruned at this moment
                continue
        for old in checkpoint.committed(root / HANDED)[KEPT:]:
            checkpoint.discard(old)
        return found
    return None


def prepare(root: Location, fork: Fork, config: RunConfig) -> Location:
    """The donor's checkpoint beside the trial's own ones, as one of `config`; all that can fail of going over.

    The files are the donor's, bit for bit; only the chains' generators start streams of their own when it is read.
    Raises CheckpointError if the donor's is damaged, OSError if it cannot be written; the trial is then as it was.
    """
    source = checkpoint.read_manifest(root.parent / fork.donor / HANDED / fork.step)
    source.verify()
    made = root / INCOMING / fork.step
    _link(source.directory, made, without=(MANIFEST, EVENTS))
    (made / MANIFEST).write(_manifest(source, fork, config))
    return made


def go_over(root: Location, made: Location, config: RunConfig, record: RunRecord) -> None:
    """Put what was prepared in the place of all that the trial has; run.json says so."""
    record.science, record.digest = config.science, config.digest
    record.save(root)
    folder = root / "checkpoints"
    for directory in checkpoint.committed(folder):
        checkpoint.discard(directory)
    (root / recovery.FILE).remove()
    (folder / made.name).remove()
    made.move_to(folder / made.name)


def _manifest(source: Manifest, fork: Fork, config: RunConfig) -> bytes:
    told = {"fork": {"id": fork.id, "why": str(fork)}}
    info = source.info | {"config": flatten(shareable(config)), "rollbacks": 0} | told
    files = {name: file for name, file in source.files.items() if name != EVENTS}
    fields = ("step", "world_size", "world_epoch", "device")
    head = {"schema": SCHEMA, **{key: getattr(source, key) for key in fields}}
    return sealed(json.loads(json.dumps({**head, "info": info, "files": files})))


def _link(source: Location, target: Location, without: tuple[str, ...] = ()) -> None:
    """The folder under another name: its files are never written again, so that links will do. The manifest is last."""
    target.remove()  # what an interrupted attempt has left
    files = source.children()
    if not files:
        raise FileNotFoundError(source.uri)
    target.mkdir()
    for file in sorted(files, key=lambda file: file.name == MANIFEST):
        if file.name in without or file.name.startswith((".", "part-")):
            continue
        if not source.is_local:
            (target / file.name).write(file.read())
            continue
        try:
            os.link(file.local, (target / file.name).local)
        except FileNotFoundError:
            raise
        except OSError:  # a filesystem without links
            shutil.copyfile(file.local, (target / file.name).local)
