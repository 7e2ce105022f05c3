"""Networks whose features say how alike two sets of images are: FID, KID, precision and recall are of features.

Greyscale sets have a small classifier of their own, trained once by a bundled recipe (`jobs/recipes/*_lenet.yaml`,
`benchmarks/extractors.py`); its weights are shipped in `weights/`, with their hashes in `weights/lenet.json`. For any
other set there is Inception through torch-fidelity, whose weights are the user's own copy.
Figures of two extractors cannot be compared, nor can those of two files of one.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load
from torch import Tensor, nn

from jem.config import DataConfig, ModelConfig
from jem.data.augment import to_float
from jem.errors import CheckpointError, ConfigError, Problem
from jem.evaluate import baselines
from jem.evaluate.evaluate import BATCH
from jem.evaluate.generation import whole_float32
from jem.evaluate.others import content_of
from jem.models import ImageShape

WEIGHTS = Path(__file__).parent / "weights"
SHARED = {"mnist": "mnist5k"}
"""Whose classifier a set without one of its own takes: mnist5k is 5,000 of MNIST's images."""

KEY = "evaluate.generate.inception"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_BATCH = 50
"""Images of 299x299 at once: a tenth of a gigabyte each layer; it divides `BATCH`."""

Extracted = tuple[Float[Tensor, "n d"], Float[Tensor, "n classes"]]
"""Features and class logits, float32 on the CPU."""


@dataclass(frozen=True)
class Extractor:
    """A fixed network. `features`: of images [n, c, h, w], uint8 or on [-1, 1] and then as 8-bit files would hold them.

    What a chain has beyond [-1, 1] is cut off and what is left is rounded to 256 levels, as data are: a difference that
    no file of the sample shows does not count. Raises ValueError for images that are not finite.
    """

    name: str  # lenet or inception
    of: str  # the data it was trained on
    sha256: str  # of the file that holds its weights
    features: Callable[[Tensor], Extracted]


def lenet(_config: ModelConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """Three convolutions, 64 features, class logits (after LeCun et al., 1998): 41 k weights for 8x8, 61 k for 28x28.

    A map is halved after a convolution as long as its side is 4 or more. The features are what the last layer sees.
    """
    side = torch.Size(image_shape[1:])
    layers: list[nn.Module] = []
    for (inside, outside), kernel in zip(itertools.pairwise((image_shape[0], 16, 32, 64)), (5, 3, 3), strict=True):
        layers += [nn.Conv2d(inside, outside, kernel, padding=kernel // 2), nn.ReLU()]
        if min(side) >= 4:
            layers.append(nn.MaxPool2d(2))
            side = torch.Size(n // 2 for n in side)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side.numel(), 64), nn.ReLU(), nn.Linear(64, n_classes))


def extractor_for(
    data: DataConfig, image_shape: ImageShape, inception: str | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of a data set: Inception with the weights at the path `inception` where given, else its own.

    The network computes on `device`. Raises ConfigError if the set has none or the file of Inception is unfit,
    CheckpointError if a shipped file is not the one whose hash is recorded.
    """
    if inception is not None:
        return _inception(Path(inception).expanduser(), image_shape, torch.device(device))
    content = content_of(data)
    name = SHARED.get(content, content)
    facts = shipped().get(name)
    if facts is None or tuple(facts["image_shape"]) != tuple(image_shape):
        raise ConfigError([Problem(KEY, _none_for(content, image_shape))])
    return _shipped_lenet(name, facts, torch.device(device))


def shipped() -> dict[str, dict[str, Any]]:
    """What is recorded of each shipped classifier, by its data set: its file's sha256, its shape, its training."""
    path = WEIGHTS / "lenet.json"
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); install the package anew") from error
    return found


def to_bytes(images: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """-1 to 1 becomes 0 to 255, to the nearest; what is beyond is cut off. Raises ValueError if not finite."""
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(images)} images are not finite: a chain that diverged is no sample")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _shipped_lenet(name: str, facts: dict[str, Any], device: torch.device) -> Extractor:
    path = WEIGHTS / f"lenet_{name}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); install the package anew") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != facts["sha256"]:
        recorded = f"its SHA-256 is {sha256}, lenet.json has {facts['sha256']}"
        raise CheckpointError(f"{path}: is not the file that figures are compared by: {recorded}; restore it")
    c, h, w = facts["image_shape"]
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are replaced
        network = lenet(ModelConfig(), (c, h, w), facts["n_classes"])
    network.load_state_dict(load(data))
    network.requires_grad_(False).eval().to(device)
    penultimate, last = baselines.features(network), baselines.head(network)

    def batch(images: Tensor) -> tuple[Tensor, Tensor]:
        found = penultimate(to_float(images.to(device), torch.float32))
        return found, last(found)

    return Extractor("lenet", name, sha256, lambda images: _in_batches(batch, images, BATCH))


def _inception(path: Path, image_shape: ImageShape, device: torch.device) -> Extractor:
    """torch-fidelity's Inception-v3, as TensorFlow's FID has it: features 2048, logits without bias."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError([Problem(KEY, "needs torch-fidelity: pip install torch-fidelity")]) from error
    if image_shape[0] not in (1, 3):
        raise ConfigError([Problem(KEY, f"takes grey or RGB images, these have {image_shape[0]} channels")])
    data = _read_weights(path)
    try:
        with torch.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(data)
            )
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError([Problem(KEY, f"is {str(path)!r}, {_unfit}: {reason}; {_remedy}")]) from error
    network.to(device)

    def batch(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(images.to(device).expand(-1, 3, -1, -1))
        return features, logits

    sha256 = hashlib.sha256(data).hexdigest()
    return Extractor("inception", "imagenet", sha256, lambda images: _in_batches(batch, images, INCEPTION_BATCH))


_unfit = "which does not hold the weights of torch-fidelity's Inception"
_remedy = f"give {INCEPTION_FILE} from {INCEPTION_URL}"


def _read_weights(path: Path) -> bytes:
    """The file's bytes, once it is known that they are tensors alone: torch-fidelity would run whatever is in it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigError([Problem(KEY, f"is {str(path)!r}, which cannot be read ({why}); {_remedy}")]) from error
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none makes torch raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError([Problem(KEY, f"is {str(path)!r}, {_unfit}: {reason}; {_remedy}")]) from error
    return data


@torch.no_grad()
def _in_batches(batch: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, size: int) -> Extracted:
    """In batches that are fixed: the last bits of an image's features depend on the size of its batch."""
    pixels = images if images.dtype == torch.uint8 else to_bytes(images)
    with whole_float32():
        found = [batch(part) for part in torch.split(pixels, size)]
    features, logits = (torch.cat([part.float().cpu() for part in column]) for column in zip(*found, strict=True))
    return features, logits


def _none_for(content: str, image_shape: ImageShape) -> str:
    return (
        f"is not given, and there is no feature extractor for data.name={content} of shape {list(image_shape)}: "
        f"digits, mnist5k (also for mnist) and fashion_mnist have one; {KEY}=PATH takes torch-fidelity's Inception "
        f"weights, {INCEPTION_FILE} from {INCEPTION_URL}"
    )
