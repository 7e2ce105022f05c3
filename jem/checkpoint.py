"""Checkpoints: each rank writes its own part, then rank 0 commits them all with a manifest.

A directory without `manifest.json` is not a checkpoint. The manifest names every file with its size
and SHA-256, so that a damaged, missing or foreign file is found before anything of it is used. Nothing
that is read executes: tensors are safetensors, the rest is JSON.

    STEP/manifest.json                     the commit
    STEP/model.safetensors                 weights; ema.safetensors, best.safetensors where there are such
    STEP/optimizer.safetensors             moments and step counts, by parameter name
    STEP/chains-RANK-of-SIZE.safetensors   a rank's shard of the replay buffer
    STEP/rank-RANK-of-SIZE.safetensors     its generator, and sums of metrics not yet reported
    STEP/events.jsonl                      the run's log since the checkpoint before
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor

from jem.errors import CheckpointError, DivergedError
from jem.files import Location
from jem.optim import load_optimizer_tensors, optimizer_tensors
from jem.randomness import generator
from jem.train import TrainState
from jem.world import World

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint says of itself."""

    directory: Location
    step: int
    world_size: int
    world_epoch: int
    device: str
    files: dict[str, dict[str, Any]]
    info: dict[str, Any]  # of the caller: configuration, data, versions, which weights are final

    def read(self, name: str) -> bytes:
        """A file's bytes, checked against the manifest. Raises CheckpointError naming the file."""
        if name not in self.files:
            raise CheckpointError(f"{self.directory.uri}: the manifest lists no {name}")
        path = self.directory / name
        try:
            data = path.read()
        except OSError as error:
            raise CheckpointError(f"{path.uri}: cannot be read ({_first_line(error)})") from error
        expected = self.files[name]
        if len(data) != expected["bytes"]:
            raise CheckpointError(f"{path.uri}: has {len(data)} bytes, {expected['bytes']} were written")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path.uri}: its contents are not what was written (SHA-256 differs)")
        return data

    def tensors(self, name: str) -> dict[str, Tensor]:
        return dict(parse_tensors(self.read(name)))

    def verify(self) -> None:
        """Read everything. Raises CheckpointError naming the first file that is not as it was written."""
        for name in self.files:
            self.read(name)


def save(
    directory: Location,
    state: TrainState,
    world: World,
    info: Mapping[str, Any],
    sums: Mapping[str, Tensor],
    best: Mapping[str, Tensor] | None = None,
    events: bytes = b"",
) -> None:
    """Write the checkpoint; every rank calls this, and when it returns the checkpoint is committed.

    `sums` are tensors of this rank that add up over ranks; they come back from `restore`. Raises
    DivergedError, before anything is written, if weights or chains are not finite.
    """
    fault = _non_finite(state)
    if world.any(fault is not None, state.generator.device):
        raise DivergedError(f"step {state.step}: {fault or 'another rank'} is not finite; no checkpoint was written")
    if world.rank == 0:
        (directory / MANIFEST).remove()  # what is there is about to be replaced: it is no checkpoint any more
        directory.mkdir()
    world.barrier()
    written = {}
    for name, data in _parts(state, world, sums, best, events).items():
        (directory / name).write(data)
        written[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / _part_record(world.rank, world.size)).write(_json(written))
    world.barrier()
    if world.rank == 0:
        records = [json.loads((directory / _part_record(r, world.size)).read()) for r in range(world.size)]
        manifest = {
            "schema": SCHEMA,
            "step": state.step,
            "world_size": world.size,
            "world_epoch": state.world_epoch,
            "device": state.generator.device.type,
            "files": {name: entry for record in records for name, entry in record.items()},
            "info": dict(info),
        }
        (directory / MANIFEST).write(_sealed(manifest))
        for rank in range(world.size):
            (directory / _part_record(rank, world.size)).remove()
    world.barrier()


def read_manifest(directory: Location) -> Manifest:
    """The manifest of a checkpoint directory. Raises CheckpointError if there is none or it is damaged."""
    path = directory / MANIFEST
    try:
        data = path.read()
        content = json.loads(data)
        if content["schema"] != SCHEMA:
            raise CheckpointError(f"{path.uri}: schema {content['schema']}, this version reads {SCHEMA}")
        del content["sha256"]
        if _sealed(content) != data:
            raise CheckpointError(f"{path.uri}: damaged (its contents are not what was written)")
        fields = ("step", "world_size", "world_epoch", "device", "files", "info")
        return Manifest(directory, *(content[field] for field in fields))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory.uri}: not a checkpoint, it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.uri}: damaged ({_first_line(error)})") from error


def committed(root: Location) -> list[Location]:
    """Directories of committed checkpoints below `root`, newest first."""
    found = [d for d in root.children() if d.name.isdecimal() and (d / MANIFEST).exists()]
    return sorted(found, key=lambda d: int(d.name), reverse=True)


def newest_good(root: Location) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint whose every file is as it was written, and what is wrong with newer ones."""
    faults: list[str] = []
    for directory in committed(root):
        try:
            manifest = read_manifest(directory)
            manifest.verify()
            return manifest, faults
        except CheckpointError as error:
            faults.append(str(error))
    return None, faults


def restore(manifest: Manifest, state: TrainState, world: World, seed: int) -> dict[str, Tensor]:
    """Put the checkpoint into `state`; this rank's `sums`.

    With the world size and kind of device that wrote it, everything goes on exactly. With another, the
    same chains are sliced anew, none lost and none twice, the generators start streams of their own,
    and rank 0 takes over all sums.
    """
    load_weights(state.network, manifest.tensors("model.safetensors"), manifest.directory.uri)
    load_optimizer_tensors(state.network, state.optimizer, manifest.tensors("optimizer.safetensors"))
    if state.average is not None:
        load_weights(state.average, manifest.tensors("ema.safetensors"), manifest.directory.uri)
    state.step, state.world_epoch = manifest.step, manifest.world_epoch
    if state.replay is not None:
        state.replay.chains = read_chains(manifest, world, state.replay.config.capacity).to(state.replay.chains)
    if (manifest.world_size, manifest.device) == (world.size, state.generator.device.type):
        sums = manifest.tensors(_rank_file(world.rank, world.size))
        state.generator.set_state(sums.pop("generator"))
        return sums
    state.world_epoch += 1
    state.generator = generator(
        state.generator.device, seed, "chains", world.rank, world.size, state.world_epoch, state.step
    )
    parts = [manifest.tensors(_rank_file(r, manifest.world_size)) for r in range(manifest.world_size)]
    mine = parts if world.rank == 0 else []
    return {
        key: sum((part[key] for part in mine), torch.zeros_like(parts[0][key]))
        for key in parts[0]
        if key != "generator"
    }


def read_chains(manifest: Manifest, world: World, capacity: int) -> Tensor:
    """This rank's rows of the whole replay buffer [shard, c, h, w], read from the shards that hold them."""
    rows = world.share(capacity)
    pieces = []
    for rank in range(manifest.world_size):
        held = World(rank, manifest.world_size).share(capacity)
        begin, end = max(rows.start, held.start), min(rows.stop, held.stop)
        if begin < end:
            name = _chains_file(rank, manifest.world_size)
            shard = manifest.tensors(name)["chains"]
            if len(shard) != held.stop - held.start:
                found = f"{manifest.directory.uri}/{name}: holds {len(shard)} chains"
                raise CheckpointError(f"{found}, replay.capacity={capacity} makes it {held.stop - held.start}")
            pieces.append(shard[begin - held.start : end - held.start])
    return torch.cat(pieces)


def load_weights(network: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state_dict. Raises CheckpointError that names what does not fit."""
    own = network.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in tensors]
    wrong += [f"{key} is unknown" for key in tensors if key not in own]
    wrong += [
        f"{key} has shape {list(tensors[key].shape)}, {list(value.shape)} was expected"
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{source}: does not fit this network: {'; '.join(wrong[:5])}{more}")
    network.load_state_dict(tensors)


def _parts(
    state: TrainState,
    world: World,
    sums: Mapping[str, Tensor],
    best: Mapping[str, Tensor] | None,
    events: bytes,
) -> dict[str, bytes]:
    """The files this rank writes."""
    parts = {_rank_file(world.rank, world.size): _pack({**sums, "generator": state.generator.get_state()})}
    if state.replay is not None:
        parts[_chains_file(world.rank, world.size)] = _pack({"chains": state.replay.chains})
    if world.rank > 0:
        return parts
    parts["model.safetensors"] = _pack(state.network.state_dict())
    parts["optimizer.safetensors"] = _pack(optimizer_tensors(state.network, state.optimizer))
    if state.average is not None:
        parts["ema.safetensors"] = _pack(state.average.state_dict())
    if best is not None:
        parts["best.safetensors"] = _pack(best)
    parts["events.jsonl"] = events
    return parts


def _non_finite(state: TrainState) -> str | None:
    """The name of a tensor that holds NaN or infinity."""
    tensors = dict(state.network.state_dict())
    if state.average is not None:
        tensors |= {f"the average's {name}": value for name, value in state.average.state_dict().items()}
    if state.replay is not None:
        tensors["the replay buffer"] = state.replay.chains
    floats = ((name, t) for name, t in tensors.items() if t.is_floating_point())
    return next((name for name, t in floats if not t.isfinite().all()), None)


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    # cloned, as tensors that share memory (tied weights) are not packed
    return bytes(pack_tensors({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}))


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON that ends with a digest of itself: nothing else vouches for the manifest."""
    return _json({**content, "sha256": hashlib.sha256(_json(content)).hexdigest()})


def _rank_file(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def _chains_file(rank: int, size: int) -> str:
    return f"chains-{rank:05d}-of-{size:05d}.safetensors"


def _part_record(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.json"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
