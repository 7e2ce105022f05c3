"""Starting from a model that exists: a checkpoint of ours, a registered model, or a classifier's state_dict."""

from __future__ import annotations

import io
from typing import Any

import torch
from safetensors.torch import load as parse_tensors
from torch import Tensor

from jem import checkpoint
from jem.config import JEMConfig
from jem.errors import CheckpointError, DataError
from jem.files import Location
from jem.predict import PRIOR
from jem.released import Released, is_released, read_released, unpickled
from jem.replay import Stored
from jem.train import TrainState
from jem.world import World


def initialize_from(source: str, state: TrainState, world: World, config: JEMConfig) -> None:
    """Put weights into `state`, and the chains too where the source holds such.

    `source`: a checkpoint directory (its final weights; its chains where capacity and image shape are the
    same), a released JEM .pt (likewise; its chains where none keeps a class), a directory that holds one
    model.safetensors, or a state_dict as .safetensors or .pt. Of a .pt tensors alone are read. Raises DataError naming
    what does not fit the network, CheckpointError for a damaged one.
    """
    try:
        location = Location.of(source)
    except ValueError as error:
        raise DataError(f"init_from: {error}") from error
    if (location / checkpoint.MANIFEST).exists():
        manifest = checkpoint.read_manifest(location)
        weights = manifest.tensors(f"{manifest.info['final']}.safetensors")
        if state.replay is not None and _same_chains(manifest, state):
            capacity = state.replay.config.capacity
            state.replay.take_over(checkpoint.read_chains(manifest, world, capacity), state.generator)
    else:
        found = read_state_dict(location, config.model.norm)
        weights = found.weights if isinstance(found, Released) else found
        if isinstance(found, Released) and not config.sgld.conditional:
            _take_chains(found, state, world)
    try:
        checkpoint.load_weights(state.network, weights, f"init_from={source}")
    except CheckpointError as error:  # the file may be good: it is the setting that does not go with the network
        raise DataError(str(error)) from error
    if state.average is not None:
        state.average.load_state_dict(state.network.state_dict())


def read_state_dict(location: Location, norm: str | None = None) -> dict[str, Tensor] | Released:
    """A network's tensors by name, or a released JEM. Raises DataError if it is neither.

    `norm`: of the network they are for, as a released file does not always tell.
    """
    if location.is_dir():
        location = location / "model.safetensors"
    if not location.exists():
        raise DataError(f"init_from: there is no {location.uri}; give a checkpoint directory, .safetensors or .pt")
    try:
        if location.name.endswith(".safetensors"):
            content: Any = parse_tensors(location.read())
        else:
            content = torch.load(io.BytesIO(location.read()), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no state_dict makes torch raise
        reason = unpickled(error)
        raise DataError(f"init_from: {location.uri} is not a file of tensors: {reason}") from error
    if is_released(content):
        return read_released(location, norm=norm)
    for key in ("state_dict", "model_state_dict"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError(f"init_from: {location.uri} is not a state_dict (a mapping from names to tensors)")
    named = {str(key).removeprefix("module."): value for key, value in content.items()}
    return {key: value for key, value in named.items() if not key.startswith(PRIOR)}  # of a portable model


def _take_chains(found: Released, state: TrainState, world: World) -> None:
    chains, replay = found.replay, state.replay
    if chains is None or replay is None:
        return
    if (len(chains), chains.shape[1:]) == (replay.config.capacity, replay.chains.shape[1:]):
        replay.take_over(Stored(chains[world.share(len(chains))], None), state.generator)


def _same_chains(manifest: checkpoint.Manifest, state: TrainState) -> bool:
    assert state.replay is not None
    config = manifest.info["config"]
    has_chains = any(name.startswith("chains-") for name in manifest.files)
    same = config["replay.capacity"] == state.replay.config.capacity
    return has_chains and same and tuple(manifest.info["image_shape"]) == tuple(state.replay.chains.shape[1:])
