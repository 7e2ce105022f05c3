"""A trained model as people use it: images in; a class, its probability and "have I seen such images?" out.

It is a folder of two files, neither of which can execute anything:

    model.safetensors   the weights; as prior/NAME, what chains start from, where that is not uniform noise
    model.json          the card: network, classes, temperature, threshold, what images it takes, where it is from

Needs torch, numpy, safetensors and jaxtyping, no more: this is what runs where a model is served.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from jem.config import JEMConfig
from jem.data.augment import to_float
from jem.errors import CheckpointError, ConfigError, DataError, DivergedError
from jem.models import make_network
from jem.settings import Entry, build
from jem.train import dtype_of, frozen_logits

WEIGHTS, CARD = "model.safetensors", "model.json"
SCHEMA = 1

BATCH = 250
"""As in `jem.evaluate.evaluate`: an image's logits change in the last bits with the size of its batch."""

LAYOUTS = ("NHWC", "NCHW")
DTYPES = {"uint8": "0 to 255", "float32": "0 to 1"}
"""What images can be, and their range."""


@dataclass(frozen=True)
class Card:
    """What a model says of itself; model.json."""

    config: dict[str, Any]  # flat JEMConfig: "model.name", "precision", ...
    image_shape: tuple[int, int, int]  # channels, height, width
    classes: tuple[str, ...]
    temperature: float  # divides the logits for p(y|x); fitted on validation
    threshold: float  # of log_density: 95 % of the validation images reach it
    layout: str  # of the images that it takes: NHWC or NCHW
    dtype: str  # likewise: uint8 (0 to 255) or float32 (0 to 1)
    digest: str  # SHA-256 of the checkpoint's file of these weights
    info: dict[str, Any] = field(default_factory=dict)  # anything else: step, weights, data_digest, validation, ...

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or self.dtype not in DTYPES:
            raise ValueError(f"layout {self.layout!r}, dtype {self.dtype!r}: not of {LAYOUTS} and {tuple(DTYPES)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0 and math.isfinite(self.threshold)):
            raise ValueError(f"temperature {self.temperature}, threshold {self.threshold}: not finite and positive")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image in its layout."""
        c, h, w = self.image_shape
        return (h, w, c) if self.layout == "NHWC" else (c, h, w)

    @property
    def expects(self) -> str:
        """In words."""
        size = ", ".join(map(str, self.shape))
        return f"{self.dtype} images of shape [n, {size}] ({self.layout}), {DTYPES[self.dtype]}"


class Predictions(NamedTuple):
    """Of n images; arrays of float64 where nothing else is said."""

    label: list[str]  # the most probable class
    index: np.ndarray  # type: ignore[assignment]  # its number, int64; no tuple's method is missed here
    probability: np.ndarray  # [n], its p(y|x), temperature-scaled
    probabilities: np.ndarray  # [n, classes], p(y|x)
    log_density: np.ndarray  # [n], log p(x) up to the model's own constant: never compare it between two models
    in_distribution: np.ndarray  # [n], bool: log_density reaches the threshold


PRIOR = "prior/"


def save(folder: Path, card: Card, weights: Mapping[str, Tensor], prior: Mapping[str, Tensor] | None = None) -> None:
    """Write the folder; the card comes last and holds the digest of the weights, so that half a folder is none."""
    from jem.files import Location  # needs pyarrow, which is not needed to predict

    target = Location.of(folder)
    both = {**weights, **{f"{PRIOR}{name}": tensor for name, tensor in (prior or {}).items()}}
    data = pack_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in both.items()})
    content = {"schema": SCHEMA, "weights": {"bytes": len(data), "sha256": _sha256(data)}, **dataclasses.asdict(card)}
    (target / CARD).remove()
    (target / WEIGHTS).write(data)
    (target / CARD).write(json.dumps(content, indent=1).encode())


def read_card(folder: Path) -> Card:
    """Raises DataError if the folder holds no model, CheckpointError if its card is damaged."""
    return _read(Path(folder))[0]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The network's tensors by name. Raises as `read_card`, and CheckpointError if they are not what was written."""
    return _parted(Path(folder))[0]


def read_prior(folder: Path) -> dict[str, Tensor]:
    """What `jem.prior.Prior.tensors` gave, by name; empty for a model whose chains start uniform. Raises as above."""
    return _parted(Path(folder))[1]


def _parted(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's tensors, and the prior's."""
    tensors = parse_tensors(_weights(folder, _read(folder)[1]))
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(PRIOR)}
    return weights, {name.removeprefix(PRIOR): tensors[name] for name in tensors.keys() - weights.keys()}


class Predictor:
    """A model that is ready to answer."""

    def __init__(self, card: Card, network: nn.Module, config: JEMConfig, device: torch.device | str = "cpu") -> None:
        self.card, self.network, self.device = card, network, torch.device(device)
        self._logits, self._dtype = frozen_logits(network, config), dtype_of(config)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Predictor:
        """Raises DataError if the folder holds no model, CheckpointError if it is not as it was written."""
        folder = Path(folder)
        card, weights = read_card(folder), read_weights(folder)
        try:
            config = build(JEMConfig, {key: Entry(value) for key, value in ({"seed": 0} | card.config).items()})
            network = make_network(config.model, card.image_shape, len(card.classes)).to(device, dtype_of(config))
        except ConfigError as error:
            raise CheckpointError(f"{folder / CARD}: its settings are none of this version's: {error}") from error
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{folder / WEIGHTS}: does not fit the network of its {CARD}: {error}") from error
        return cls(card, network, config, device)

    def __call__(self, images: np.ndarray | Tensor) -> Predictions:
        """Of images [n, ...] in the card's layout, uint8 0 to 255 or float 0 to 1 (float32 or float64).

        Raises DataError that says what was expected if they are anything else.
        """
        logits = self.logits(images).cpu()  # Apple's GPUs have no float64
        p = (logits.double() / self.card.temperature).softmax(dim=1).numpy()
        log_density = logits.logsumexp(dim=1).double().numpy()
        index = p.argmax(axis=1)
        chosen = p[np.arange(len(p)), index]
        seen = log_density >= self.card.threshold
        return Predictions([self.card.classes[i] for i in index], index, chosen, p, log_density, seen)

    @torch.no_grad()
    def logits(self, images: np.ndarray | Tensor) -> Tensor:
        """f(x) [n, classes] on the model's device, as the network gives them; images as in a call."""
        parts = [self._logits(x.to(self.device, self._dtype)) for x in self._batches(self._checked(images))]
        if not parts:
            return torch.zeros(0, len(self.card.classes), dtype=self._dtype, device=self.device)
        logits = torch.cat(parts)
        if not logits.isfinite().all():
            raise DivergedError("the model's logits are not finite for these images; it diverged, use another one")
        return logits

    def _checked(self, images: np.ndarray | Tensor) -> Tensor:
        """[n, ...] in the card's layout."""
        x = images if isinstance(images, Tensor) else torch.from_numpy(_plain(images, self.card))
        if tuple(x.shape[1:]) != self.card.shape or x.ndim == 0:
            raise DataError(f"{self.card.expects} were expected, these have shape {list(x.shape)}")
        if x.dtype not in (torch.uint8, torch.float32, torch.float64):
            raise DataError(f"{self.card.expects} were expected, these are {str(x.dtype).removeprefix('torch.')}")
        if x.is_floating_point() and len(x):
            low, high = x.min().item(), x.max().item()  # of NaN both are NaN
            if not (low >= 0 and high <= 1):
                raise DataError(f"{self.card.expects} were expected (float: 0 to 1), these go from {low:g} to {high:g}")
        return x

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        """float32 [n, c, h, w] on [-1, 1], as the network was trained on."""
        for begin in range(0, len(images), BATCH):
            x = images[begin : begin + BATCH]
            x = x.permute(0, 3, 1, 2) if self.card.layout == "NHWC" else x
            x = x.contiguous()  # the memory's layout decides which convolution computes the last bits
            yield to_float(x) if x.dtype == torch.uint8 else to_float(x.float() * 255)


def _plain(images: Any, card: Card) -> np.ndarray:
    """As an array that torch takes."""
    array = np.asarray(images)
    if array.dtype.name not in (*DTYPES, "float64"):
        raise DataError(f"{card.expects} were expected, these are {array.dtype}")
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])  # torch warns of what cannot be written


def _read(folder: Path) -> tuple[Card, str]:
    """The card, and the digest of the weights that it belongs to."""
    path = folder / CARD
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise CheckpointError(f"{path}: schema {content['schema']}, this version reads {SCHEMA}")
        fields = {f.name: content[f.name] for f in dataclasses.fields(Card)}
        fields |= {"image_shape": tuple(fields["image_shape"]), "classes": tuple(fields["classes"])}
        return Card(**fields), str(content["weights"]["sha256"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder}: holds no model, as it has no {CARD}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def _weights(folder: Path, recorded: str) -> bytes:
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if _sha256(data) != recorded:
        raise CheckpointError(f"{path}: its contents are not what was written (SHA-256 differs)")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
