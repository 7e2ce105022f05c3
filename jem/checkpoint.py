"""Checkpoints: what they hold, how they are read and checked. How they are written: saving.py.

A directory without `manifest.json` is not a checkpoint. The manifest names every file with its size
and SHA-256, so that a damaged, missing or foreign file is found before anything of it is used. Nothing
that is read executes: tensors are safetensors, the rest is JSON.

    STEP/manifest.json                     the commit
    STEP/model.safetensors                 weights; ema.safetensors, best.safetensors where there are such
    STEP/optimizer.safetensors             moments and step counts, by parameter name
    STEP/chains-RANK-of-SIZE.safetensors   a rank's shard of the replay buffer, and the bound of uint8 levels
    STEP/sampler.safetensors               the prior's statistics and the chains' length, where there are such
    STEP/rank-RANK-of-SIZE.safetensors     its generator, and sums of metrics not yet reported
    STEP/events.jsonl                      the run's log since the checkpoint before
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as parse_tensors
from torch import Tensor

from jem.config import JEMConfig
from jem.errors import CheckpointError, JEMError, StorageError
from jem.files import Location
from jem.optim import load_optimizer_tensors
from jem.randomness import generator
from jem.replay import Stored
from jem.train import TrainState, dtype_of
from jem.world import World

SCHEMA = 2
MANIFEST, SAMPLER = "manifest.json", "sampler.safetensors"
LENGTH = "chain_length"

AWAY = {
    *(errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
"""What a disk says that is no fault of the file; EIO is one, or of the disk below it."""


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
        """A file's bytes, checked against the manifest.

        Raises CheckpointError naming the file, or StorageError where that could not be found out.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.directory.uri}: the manifest lists no {name}")
        path = self.directory / name
        try:
            data = path.read()
        except OSError as error:
            raise _unread(path, error) from error
        expected = self.files[name]
        if len(data) != expected["bytes"]:
            raise CheckpointError(f"{path.uri}: has {len(data)} bytes, {expected['bytes']} were written")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path.uri}: its contents are not what was written (SHA-256 differs)")
        return data

    def tensors(self, name: str) -> dict[str, Tensor]:
        return dict(parse_tensors(self.read(name)))

    def verify(self) -> None:
        """Read everything. Raises CheckpointError naming the first file that is not as it was written or is foreign."""
        if self.directory.name != str(self.step):
            raise CheckpointError(f"{self.directory.uri}: its manifest is that of a checkpoint of step {self.step}")
        for name in self.files:
            self.read(name)
        for path in self.directory.children():
            if path.name not in self.files and not path.name.startswith((MANIFEST, "part-", ".")):
                raise CheckpointError(f"{path.uri}: does not belong to this checkpoint, its manifest does not list it")


def read_manifest(directory: Location) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises CheckpointError if there is none or it is damaged, StorageError where that could not be found out.
    """
    path = directory / MANIFEST
    try:
        data = path.read()
        content = json.loads(data)
        if content["schema"] != SCHEMA:
            raise CheckpointError(f"{path.uri}: schema {content['schema']}, this version reads {SCHEMA}")
        del content["sha256"]
        if sealed(content) != data:
            raise CheckpointError(f"{path.uri}: damaged (its contents are not what was written)")
        fields = ("step", "world_size", "world_epoch", "device", "files", "info")
        return Manifest(directory, *(content[field] for field in fields))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory.uri}: not a checkpoint, it has no {MANIFEST}") from error
    except OSError as error:
        raise _unread(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.uri}: damaged ({_first_line(error)})") from error


def _unread(path: Location, error: OSError) -> JEMError:
    """Of a file that cannot be read: is it not what was written, or does the storage not answer?

    Who took the second for the first would go back to an older checkpoint, and remove the newer ones.
    """
    gone = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    if gone or (path.is_local and error.errno not in AWAY):
        return CheckpointError(f"{path.uri}: cannot be read ({_first_line(error)})")
    return StorageError(f"{path.uri}: cannot be read at present ({_first_line(error)}); try again when it can")


def committed(root: Location) -> list[Location]:
    """Directories of committed checkpoints below `root`, newest first."""
    found = [d for d in root.children() if d.name.isdecimal() and (d / MANIFEST).exists()]
    return sorted(found, key=lambda d: int(d.name), reverse=True)


def discard(directory: Location) -> None:
    """Remove a checkpoint; a death in the middle of it leaves no half of one that counts."""
    (directory / MANIFEST).remove()
    directory.remove()


def newest_good(
    directories: Iterable[Location], check: Callable[[Manifest], None] = lambda _: None
) -> tuple[Manifest | None, list[str]]:
    """The first checkpoint whose every file is as it was written, and what is wrong with those before it.

    `check` may raise CheckpointError for one that is whole and yet not the caller's. Raises StorageError where one
    cannot be read at present.
    """
    faults: list[str] = []
    for directory in directories:
        try:
            manifest = read_manifest(directory)
            manifest.verify()
            check(manifest)
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
        anew = generator(state.generator.device, seed, "chains stored anew", world.rank, world.size, manifest.step)
        state.replay.take_over(read_chains(manifest, world, state.replay.config.capacity), anew)
        _restore_sampler(manifest, state)
    if (manifest.world_size, manifest.device) == (world.size, state.generator.device.type):
        sums = manifest.tensors(rank_file(world.rank, world.size))
        state.generator.set_state(sums.pop("generator"))
        return sums
    state.world_epoch += 1
    state.generator = generator(
        state.generator.device, seed, "chains", world.rank, world.size, state.world_epoch, state.step
    )
    parts = [manifest.tensors(rank_file(r, manifest.world_size)) for r in range(manifest.world_size)]
    mine = parts if world.rank == 0 else []
    return {
        key: sum((part[key] for part in mine), torch.zeros_like(parts[0][key]))
        for key in parts[0]
        if key != "generator"
    }


def sampler_tensors(state: TrainState) -> dict[str, Tensor]:
    """What the chains need besides where they stand, the same on every rank."""
    assert state.replay is not None
    length = {} if state.chain_length is None else {LENGTH: state.chain_length}
    return {**state.replay.prior.tensors(), **length}


def prior_tensors(manifest: Manifest) -> dict[str, Tensor]:
    """What `jem.prior.Prior.tensors` gave; empty where chains start uniform."""
    return {name: tensor for name, tensor in _sampler(manifest).items() if name != LENGTH}


def _restore_sampler(manifest: Manifest, state: TrainState) -> None:
    assert state.replay is not None
    prior = _sampler(manifest)
    length = prior.pop(LENGTH, None)
    if prior:
        state.replay.prior = state.replay.prior.with_tensors(prior)
    if state.chain_length is not None and length is not None:
        state.chain_length = length.to(state.chain_length.device)


def _sampler(manifest: Manifest) -> dict[str, Tensor]:
    return manifest.tensors(SAMPLER) if SAMPLER in manifest.files else {}


def read_chains(manifest: Manifest, world: World, capacity: int) -> Stored:
    """This rank's rows of the whole replay buffer [shard, c, h, w], as they are stored in the shards that hold them."""
    rows = world.share(capacity)
    pieces = []
    bound: float | None = None
    for rank in range(manifest.world_size):
        held = World(rank, manifest.world_size).share(capacity)
        begin, end = max(rows.start, held.start), min(rows.stop, held.stop)
        if begin < end:
            name = chains_file(rank, manifest.world_size)
            tensors = manifest.tensors(name)
            shard = tensors["chains"]
            bound = tensors["bound"].item() if "bound" in tensors else None
            if len(shard) != held.stop - held.start:
                found = f"{manifest.directory.uri}/{name}: holds {len(shard)} chains"
                raise CheckpointError(f"{found}, replay.capacity={capacity} makes it {held.stop - held.start}")
            pieces.append(shard[begin - held.start : end - held.start])
    return Stored(torch.cat(pieces), bound)


def chains_of(manifest: Manifest, config: JEMConfig) -> Callable[[], Tensor] | None:
    """Reads all chains of the replay buffer [capacity, c, h, w]; None for a classifier, which has none.

    It raises CheckpointError for shards that are damaged.
    """
    if not config.objective.samples_needed:
        return None
    return lambda: read_chains(manifest, World(), config.replay.capacity).positions(dtype_of(config))


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


def to_json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON that ends with a digest of itself: nothing else vouches for the manifest."""
    return to_json({**content, "sha256": hashlib.sha256(to_json(content)).hexdigest()})


def rank_file(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def chains_file(rank: int, size: int) -> str:
    return f"chains-{rank:05d}-of-{size:05d}.safetensors"


def part_record(rank: int, size: int) -> str:
    return f"part-{rank:05d}-of-{size:05d}.json"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
