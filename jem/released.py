"""Checkpoints of the paper's own code (github.com/wgrathwohl/JEM, train_wrn_ebm.py), as tensors of our WideResNet.

Such a file is `{"model_state_dict": ..., "replay_buffer": [n, 3, 32, 32]}`. Its tensors' names and ours:

    f.conv1.*                        conv1.*
    f.layerI.J.{conv1, conv2}.*      layerI.J.{conv1, conv2}.*
    f.layerI.J.{bn1, bn2}.*          layerI.J.{norm1, norm2}.*    where there is a norm
    f.layerI.J.shortcut.0.*          layerI.J.shortcut.*          where a block changes the shape
    f.bn1.*                          norm.*                       where there is a norm
    class_output.*                   class_output.*
    f.linear.*, energy_output.*      dropped: no logit depends on them

The rest is fixed in that code: LeakyReLU of slope 0.2, average pooling over 8x8, images of 32x32 on [-1, 1].
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jem.config import ModelConfig
from jem.errors import DataError
from jem.files import Location
from jem.models import ImageShape, make_network

SIDE = 32
"""Of the released code's images: the file itself says it by its chains alone."""
FILE_KEYS = ("model_state_dict", "replay_buffer")
UNUSED = ("f.linear.", "energy_output.")
RENAMED = (
    (re.compile(r"^f\.bn1\."), "norm."),
    (re.compile(r"^f\.(layer\d+\.\d+)\.bn([12])\."), r"\1.norm\2."),
    (re.compile(r"^f\.(layer\d+\.\d+)\.shortcut\.0\."), r"\1.shortcut."),
    (re.compile(r"^f\."), ""),
)
NORMS = {
    frozenset[str](): "none",
    frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}): "batch",
    frozenset({"loc", "scale", "initialized"}): "act",
}
LOOK_ALIKE = frozenset({"weight", "bias"})
"""Both instance and layer norm have these tensors, of one shape."""


class Released(NamedTuple):
    """A released checkpoint in this project's terms."""

    weights: dict[str, Tensor]  # by our WideResNet's names; float32
    model: ModelConfig
    n_classes: int
    image_shape: ImageShape
    replay: Tensor | None  # chains, float32 [n, c, h, w]
    note: str = ""  # what the model cannot carry over, in words


def unpickled(error: Exception) -> str:
    """Why torch.load has read no tensors, without its advice to execute what the file holds."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return "it is none of torch.save's files of tensors" if "weights_only" in reason else reason


def is_released(content: Any) -> bool:
    """Whether what a .pt file holds has the layout of the paper's code."""
    state = content.get("model_state_dict") if isinstance(content, Mapping) else None
    return isinstance(state, Mapping) and any(_bare(key) == "f.conv1.weight" for key in state)


def read_released(location: Location, n_classes: int | None = None, norm: str | None = None) -> Released:
    """Read a released .pt; of a file only tensors are taken, nothing in it is executed.

    `n_classes`: how many the caller needs. `norm`: "instance" or "layer", where the file does not say which.
    Raises DataError for a file that is damaged, hostile, of another layout or not representable.
    """
    where = location.uri
    if not location.exists() or location.is_dir():
        raise DataError(f"{where}: there is no such file; give the .pt of a released JEM")
    data = location.read()
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none makes torch raise
        reason = unpickled(error)
        raise DataError(f"{where}: is damaged or holds more than tensors, nothing of it is used: {reason}") from error
    if not is_released(content):
        layout = "{'model_state_dict': {'f.conv1.weight': ...}, 'replay_buffer': ...}"
        raise DataError(f"{where}: has not the layout of a released JEM, which is {layout}")
    if foreign := [key for key in content if key not in FILE_KEYS]:
        keep = f"save {' and '.join(FILE_KEYS)} alone"
        raise DataError(f"{where}: holds {_listed(foreign)} beside {' and '.join(FILE_KEYS)}; {keep}")
    state = {_bare(key): value for key, value in content["model_state_dict"].items()}
    for name, value in (*state.items(), ("replay_buffer", content.get("replay_buffer"))):
        if value is not None:
            _check_tensor(value, len(data), f"{where}: {name}")
    return _convert(state, content, where, n_classes, norm)


def _convert(
    state: dict[str, Tensor], content: Mapping[str, Any], where: str, n_classes: int | None, norm: str | None
) -> Released:
    model = _model(state, content["model_state_dict"], where, norm)
    found = len(state["class_output.weight"])
    if n_classes not in (None, found):
        raise DataError(f"{where}: class_output has {found} classes, the data {n_classes}; choose data of {found}")
    weights = _renamed(_act_norms(state, where) if model.norm == "act" else state)
    chains = content.get("replay_buffer")
    image_shape = _image_shape(state, chains, where)
    with torch.device("meta"):
        own = make_network(model, image_shape, found).state_dict()
    _check_fit(weights, own, where)
    weights = {name: weights[name].to(own[name].dtype).contiguous() for name in own}
    replay = None if chains is None else chains.float().contiguous()
    return Released(weights, model, found, image_shape, replay, _note(state, model))


def _model(state: Mapping[str, Tensor], raw: Any, where: str, norm: str | None) -> ModelConfig:
    """Depth, width and norm, from which blocks there are, how wide the first is and what its norms hold."""
    blocks: dict[str, set[int]] = {"1": set(), "2": set(), "3": set()}
    for key in state:
        if match := re.match(r"f\.layer(\d+)\.(\d{1,6})\.", key):
            blocks.setdefault(match[1], set()).add(int(match[2]))
    counts = [len(indices) for indices in blocks.values()]
    if len(blocks) != 3 or len(set(counts)) != 1 or any(b != set(range(counts[0])) for b in blocks.values()):
        numbers = "; ".join(f"layer{group}: {_listed(sorted(indices))}" for group, indices in blocks.items())
        raise DataError(f"{where}: a Wide ResNet has 3 groups of as many blocks each, counted from 0; found {numbers}")
    for key in ("f.conv1.weight", "f.layer1.0.conv1.weight", "class_output.weight"):
        if key not in state or not state[key].ndim or not len(state[key]):
            raise DataError(f"{where}: has no {key}, or it is empty")
    wide = len(state["f.layer1.0.conv1.weight"])
    if wide % 16:
        raise DataError(f"{where}: f.layer1.0.conv1 has {wide} channels, a Wide ResNet has 16 times its width")
    kind = _norm(state, raw, where, norm)
    return ModelConfig(name="wide_resnet", depth=6 * counts[0] + 4, width=wide // 16, norm=kind)


def _norm(state: Mapping[str, Tensor], raw: Any, where: str, wanted: str | None) -> str:
    held = frozenset(key.removeprefix("f.bn1.") for key in state if key.startswith("f.bn1."))
    if held in NORMS:
        return NORMS[held]
    if held != LOOK_ALIKE:
        raise DataError(
            f"{where}: f.bn1 holds {_listed(sorted(held))}; known are the norms batch, instance, layer, act"
        )
    # PyTorch saves a version with each module: that of InstanceNorm2d is 2, that of GroupNorm is 1
    saved = getattr(raw, "_metadata", None)
    metadata = saved if isinstance(saved, Mapping) else {}
    versions = {value.get("version") for key, value in metadata.items() if _bare(key) == "f.bn1"}
    if versions in ({1}, {2}):
        return "layer" if versions == {1} else "instance"
    if wanted in ("instance", "layer"):
        return wanted
    raise DataError(f"{where}: its norm is instance or layer, which look the same; say which: model.norm=instance")


def _act_norms(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Theirs is scale (x + loc), set by the first batch it sees; ours is scale x + shift."""
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "initialized":
            if not bool(value.all()):
                raise DataError(f"{where}: {module} is an act norm that has seen no data; the model was never run")
        elif leaf == "loc":
            scale = state.get(f"{module}.scale")
            if scale is None or scale.shape != value.shape:
                raise DataError(f"{where}: {module}.scale is missing or of another shape than {key}")
            made[f"{module}.shift"] = (scale * value).flatten()
        else:
            made[key] = value.flatten() if leaf == "scale" else value
    return made


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        if not key.startswith(UNUSED):
            for pattern, ours in RENAMED:
                key, count = pattern.subn(ours, key)
                if count:
                    break
            renamed[key] = value
    return renamed


def _image_shape(state: Mapping[str, Tensor], chains: Tensor | None, where: str) -> ImageShape:
    weight = state["f.conv1.weight"]
    channels = weight.shape[1] if weight.ndim == 4 else 0
    if chains is None:
        return channels, SIDE, SIDE
    c, h, w = chains.shape[1:] if chains.ndim == 4 and len(chains) else (0, 0, 0)
    if c != channels or any(-(-side // 4) != 8 for side in (h, w)):  # two strides of 2, then a window of 8x8
        expected = f"[n, {channels}, {SIDE}, {SIDE}]"
        raise DataError(f"{where}: replay_buffer has shape {list(chains.shape)}, must be {expected}, as its network")
    return c, h, w


def _check_tensor(value: Any, file_bytes: int, what: str) -> None:
    """A dense, finite tensor that is really in the file: a view may claim any size at no cost."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise DataError(f"{what} is {type(value).__name__}, must be a dense tensor")
    if value.is_complex() or value.is_quantized or value.dtype == torch.bool:
        raise DataError(f"{what} is {value.dtype}, must be of real numbers")
    if value.numel() * value.element_size() > file_bytes:
        raise DataError(f"{what} claims {value.numel()} numbers, more than the file holds")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise DataError(f"{what} holds numbers that are not finite: the training had diverged")


def _check_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} has shape {list(weights[name].shape)}, {list(value.shape)} was expected"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        raise DataError(f"{where}: is no Wide ResNet of the released code (our names): {_listed(wrong)}")


def _note(state: Mapping[str, Tensor], model: ModelConfig) -> str:
    """The energy head is there in every file, and trained only with --uncond, which the file does not say."""
    notes = []
    head = state.get("energy_output.weight")
    start = 1 / math.sqrt(64 * model.width)  # nn.Linear draws from U(-start, start), and no gradient reaches it
    if head is not None and bool((head.abs() > start * (1 + 1e-6)).any()):
        notes.append(
            "energy_output is not as PyTorch initialises it: if this was trained with --uncond, its density was that "
            "head's, which is dropped; log p(x) here is the logsumexp of the class logits"
        )
    if model.norm == "batch":
        notes.append("batch norm's momentum was 0.9 there and is 0.1 here: it matters to further training alone")
    return "; ".join(notes)


def _bare(key: Any) -> str:
    """Without what DataParallel puts before names."""
    return str(key).removeprefix("module.")


def _listed(items: Iterable[Any]) -> str:
    items = [str(item) for item in items]
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more if items else "none"
