"""The samples of a model in its report: their figures, whether they are copies, how the chains that make them move."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from jem.config import EvaluateConfig, JEMConfig
from jem.data.augment import to_float
from jem.data.splits import DataSet
from jem.evaluate import generation
from jem.evaluate.extractors import extractor_for, to_bytes

SAMPLES = {"full": 1000, "paper": 10_000}
SHOWN, COLUMNS = 100, 10
"""Images in the report's grids."""


def training_length(config: JEMConfig) -> int:
    """How many SGLD steps a chain lives in training, on average: it restarts with `reinit_prob` every `steps`.

    20 draws' worth where chains never restart; where their length adapts, of those of the shortest. With PYLD each of
    the inner steps counts: chains that are scored take them with the whole network's gradient.
    """
    return max(1, round(config.sgld.steps * config.sgld.inner_steps / (config.replay.reinit_prob or 0.05)))


def lengths(config: JEMConfig, settings: EvaluateConfig) -> tuple[int, list[int]]:
    """The length of a fresh chain that is scored, and the steps at which chains are looked at."""
    length = training_length(config)
    return settings.generate.steps or length, generation.log_marks(length, settings.generate.lengths)


def n_samples(settings: EvaluateConfig) -> int:
    """Of each sampler."""
    return settings.generate.samples or SAMPLES[settings.suite]


def evenly(total: int, most: int) -> Tensor:
    """Rows [min(total, most)], evenly spaced over `total`."""
    return torch.arange(min(total, most)) * total // min(total, most)


def fairly(labels: Int[Tensor, " n"], most: int) -> Int[Tensor, " m"]:
    """Rows, evenly spaced; at random, the same every time, where that would be a matter of how the classes come.

    Of images whose classes come in turns every tenth one may be of one class. Spaced rows of shuffled or of sorted
    images have as many of each class as there should be, within what chance makes (the chi-squared of Pearson).
    """
    rows = evenly(len(labels), most)
    there = labels.bincount().double()
    wanted = there * len(rows) / max(len(labels), 1)
    off = labels[rows].bincount(minlength=len(there)).double() - wanted
    chi_squared = (off.square() / wanted)[there > 0].sum().item()
    free = max(int((there > 0).sum()) - 1, 1)
    return rows if chi_squared <= free + 5 * math.sqrt(2 * free) else generation.at_random(len(labels), most)


def gen_section(
    samplers: Mapping[str, tuple[Float[Tensor, "n c h w"], str]],
    data: DataSet,
    config: JEMConfig,
    settings: EvaluateConfig,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """FID and its kin of each sampler's images (with what is said of it), and of test images, as many, as a floor.

    Raises ConfigError where there is no extractor for these data.
    """
    extractor = extractor_for(config.data, data.image_shape, settings.generate.inception, device)
    chosen = fairly(data.test.labels, n_samples(settings))
    train, test = data.train.images, data.test.images[chosen]
    reference, _ = extractor.features(train)
    held_out = to_float(test, torch.float32)
    shown = held_out[fairly(data.test.labels[chosen], SHOWN)]
    copies_of_test = generation.nearest(shown, train, 1)[0].median().item()
    found = {}
    for name, (images, how) in (*samplers.items(), ("test", (held_out, "held-out images, not samples: the floor"))):
        distances, _ = generation.nearest(images[generation.at_random(len(images), SHOWN)], train, 1)
        found[name] = {
            "n": len(images),
            "how": how,
            "figures": generation.figures(*extractor.features(images), reference),
            "nearest": {"median": distances.median().item(), "of_test": copies_of_test},
        }
    return {
        "extractor": {"name": extractor.name, "of": extractor.of, "sha256": extractor.sha256},
        "reference": {"split": "train", "n": len(train)},
        "samplers": found,
    }


def gen_metrics(section: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`gen/<sampler>/<figure>_<extractor>`."""
    for sampler, found in section["samplers"].items():
        for figure, value in found["figures"].items():
            yield f"gen/{sampler}/{figure}_{section['extractor']['name']}", value
        yield f"gen/{sampler}/nearest", found["nearest"]["median"]


def gen_tags(section: Mapping[str, Any]) -> dict[str, str]:
    """What a figure's name leaves open: which network its features are of."""
    extractor = section["extractor"]
    return {f"gen.{extractor['name']}": f"{extractor['of']} sha256:{extractor['sha256']}"}


def chains_section(
    rows: Float[Tensor, "n marks figures"],
    marks: list[int],
    config: JEMConfig,
    data_energy: Tensor,
    times: Sequence[int] = (1, 10, 100),
) -> dict[str, Any]:
    """Chains against steps: the median over chains and the 10 % and 90 % of them; mean acceptance.

    `times`: multiples of the training length that are among `marks`.
    """
    by_name = dict(zip(generation.DIAGNOSTICS, rows.double().unbind(dim=2), strict=True))
    sgld = config.sgld
    same = sgld.final_step_size is None and sgld.final_noise_scale is None  # else each step has a T of its own
    own, one = (by_name[f"acceptance_{which}"].mean(dim=0).tolist() for which in ("own", "one"))
    section: dict[str, Any] = {"n": len(rows), "length": training_length(config), "times": [*times], "steps": marks}
    section |= {name: _bands(by_name[name]) for name in ("energy", "grad_norm", "saturation")}
    return section | {
        "data_energy": _bands(data_energy.double()[:, None])[0],
        "acceptance": {
            "temperature": sgld.noise_scale**2 / (2 * sgld.step_size) if same else None,
            "own": [_number(value) for value in own],
            "one": [_number(value) for value in one],
        },
    }


def chain_metrics(section: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`chains/<times>x/<figure>`: medians at each of `lengths` times the training length."""
    for times in section["times"]:
        at = section["steps"].index(times * section["length"])
        for name in ("energy", "grad_norm", "saturation"):
            if section[name][at][0] is not None:
                yield f"chains/{times}x/{name}", section[name][at][0]
        if section["acceptance"]["own"][at] is not None:
            yield f"chains/{times}x/acceptance", section["acceptance"]["own"][at]


def _bands(values: Float[Tensor, "n marks"]) -> list[list[float | None]]:
    found = values.quantile(torch.tensor([0.5, 0.1, 0.9], dtype=values.dtype), dim=0)
    return [[_number(value) for value in column] for column in found.T.tolist()]


def _number(value: float) -> float | None:
    """JSON has no NaN: a chain that left every range has no figure."""
    return value if abs(value) < float("inf") else None


def grids(
    samplers: Mapping[str, tuple[Float[Tensor, "n c h w"], str]], train: UInt8[Tensor, "m c h w"]
) -> dict[str, dict[str, Any]]:
    """Each sampler's first samples, and ten of them above the training images that are nearest."""
    found = {}
    for name, (images, how) in samplers.items():
        found[f"samples_{name}"] = picture(images[:SHOWN], f"{how}; not selected")
        first = to_bytes(images[:COLUMNS])
        k = min(3, len(train))
        _, rows = generation.nearest(images[:COLUMNS], train, k)
        below = [train[rows[:, i]] for i in range(k)]
        caption = f"{name}: samples in the top row, below each its {k} nearest training images (L2 of the pixels)"
        found[f"neighbours_{name}"] = picture(torch.cat([first, *below]), caption, len(first))
    return found


def picture(images: Shaped[Tensor, "n c h w"], caption: str, columns: int = COLUMNS) -> dict[str, Any]:
    """Images inside a report: uint8 [n, c, h, w] in base64."""
    pixels = images if images.dtype == torch.uint8 else to_bytes(images)
    content = base64.b64encode(pixels.contiguous().numpy().tobytes()).decode()
    return {"shape": list(pixels.shape), "pixels": content, "columns": columns, "caption": caption}
