"""Samples of a trained model: the chains that draw them, and the files that they become."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jem.config import SGLDConfig
from jem.data.augment import to_float
from jem.energy import Logits, energy
from jem.errors import ConfigError, DivergedError, Problem
from jem.evaluate.extractors import to_bytes
from jem.evaluate.generation import fresh
from jem.evaluate.sampled import training_length as default_steps
from jem.randomness import generator as stream
from jem.settings import flatten
from jem.train import WIDE, dtype_of, frozen_logits
from orchestrator.evaluate_on import Progress, one_thread
from orchestrator.facts import facts
from orchestrator.opened import Opened
from orchestrator.pictures import grid, grid_png
from orchestrator.report_files import whole_folder

__all__ = ["Drawn", "Plan", "default_steps", "draw", "marks", "write"]

BATCH = 100
"""Chains run together, always so many: an image's logits change in the last bits with the size of its batch."""

FORWARD = 250
SHOWN, COLUMNS, FILMED = 100, 10, 25
FRAME_MS, LAST_MS = 80, 2000
MANY = 0.2
"""Saturated pixels that are worth a word: those of chains of the training's length are a few in a hundred."""


@dataclass(frozen=True)
class Plan:
    """What is to be drawn. `label`: a class's number, "all", or None for E(x)."""

    count: int
    label: int | str | None
    classes: tuple[str, ...]
    steps: int
    init: str
    seed: int
    sgld: SGLDConfig
    frames: int
    device: str
    folder: Path
    notes: tuple[str, ...] = ()

    def labels(self, first: int, stop: int) -> Tensor | None:
        """The classes [stop - first] that these chains are to have; they do not depend on how many are drawn."""
        rows = torch.arange(first, stop)
        if self.label is None:
            return None
        return rows % len(self.classes) if self.label == "all" else torch.full_like(rows, int(self.label))

    @property
    def batches(self) -> int:
        return -(-self.count // BATCH)


@dataclass(frozen=True)
class Drawn:
    """`x` [n, c, h, w]: where the chains ended, on the host; `film`: where the first of them stood at each of `marks`.

    `probabilities` [n, classes], p(y|x), and `energies` [n] are of the images as they are saved.
    """

    x: Tensor
    film: list[Tensor]
    probabilities: Tensor
    energies: Tensor


def draw(opened: Opened, plan: Plan) -> Drawn:
    """Run the chains. Raises DivergedError, with the step, for chains that are not finite."""
    device = torch.device("cuda" if plan.device != "cpu" and torch.cuda.is_available() else "cpu")
    progress = Progress(f"sampling {opened.name}")
    with progress, one_thread():
        network = opened.network().to(device).requires_grad_(False)
        logits = frozen_logits(network, opened.config)
        film: dict[int, Tensor] = {}
        x = torch.cat(list(_chains(opened, plan, logits, device, film, progress)))
        answers = _logits_of(logits, saved(x), device)
    if not answers.isfinite().all():
        raise DivergedError(f"{opened.source}: its logits are not finite for these samples; it diverged")
    return Drawn(x, [film[step] for step in sorted(film)], answers.double().softmax(dim=1), energy(answers.double()))


def _chains(
    opened: Opened, plan: Plan, logits: Logits, device: torch.device, film: dict[int, Tensor], progress: Progress
) -> Iterator[Tensor]:
    """Where each batch's chains end, on the host, as many of them as are wanted."""
    starts = _from_buffer(opened, plan, logits, device) if plan.init == "buffer" else None
    prior = opened.prior().to(device) if starts is None else None
    filmed = set(marks(plan.steps, plan.frames))
    progress.begin(plan.batches * plan.steps)
    for batch in range(plan.batches):
        first, stop = batch * BATCH, (batch + 1) * BATCH
        wanted = min(plan.count - first, BATCH)
        noise = stream(device, "sample", plan.seed, batch)
        labels = plan.labels(first, stop)
        if prior is not None:
            classes = torch.arange(first, stop) % opened.n_classes if labels is None else labels
            x = prior.sample(classes.to(device), noise).to(dtype_of(opened.config))
        else:
            assert starts is not None
            x = starts[first:stop].to(device)

        def look(step: int, x: Tensor, batch: int = batch, wanted: int = wanted) -> None:
            if not x[:wanted].isfinite().all():
                raise DivergedError(_diverged(plan, step))
            if batch == 0 and step in filmed:
                film[step] = x[: min(wanted, FILMED)].cpu()
            if step:
                progress.add(1)

        look(0, x)
        x = fresh(logits, x, plan.steps, plan.sgld, noise, None if labels is None else labels.to(device), look)
        yield x[:wanted].cpu()


def _diverged(plan: Plan, step: int) -> str:
    if step == 0:
        return "the chains of the replay buffer are not finite; draw fresh ones, init=fresh"
    return (
        f"chains are not finite at step {step} of {plan.steps}; nothing was written. The model diverged or the steps "
        f"are too long: lower sgld.step_size ({plan.sgld.step_size:g}) or steps, or take an earlier checkpoint"
    )


def _from_buffer(opened: Opened, plan: Plan, logits: Logits, device: torch.device) -> Tensor:
    """Chains [batches * 100, ...] of the checkpoint, in an order that the seed alone decides.

    A last batch that is not whole is filled up with further ones, or again with the first. Raises ConfigError where
    a class has fewer than are asked for.
    """
    assert opened.buffer is not None
    chains = opened.buffer()
    order = torch.randperm(len(chains), generator=stream("cpu", "sample", plan.seed, "buffer"))
    rows = torch.arange(plan.batches * BATCH)
    wanted = plan.labels(0, len(rows))
    if wanted is None:
        return chains[order[rows % len(chains)]]
    if opened.config.sgld.conditional:
        classes = order % len(plan.classes)  # as ReplayBuffer.labels has it, of the whole buffer
    else:
        classes = _logits_of(logits, saved(chains), device).argmax(dim=1)[order]
    share, turns = plan.count, rows
    if plan.label == "all":
        share, turns = plan.count // len(plan.classes), rows // len(plan.classes)
    problems, chosen = [], torch.empty_like(rows)
    for c in sorted(set(wanted.tolist())):
        pool, of_class = order[classes == c], wanted == c
        if len(pool) < share:
            problems.append(f"{len(pool)} are of class {plan.classes[c]}")
        else:
            chosen[of_class] = pool[turns[of_class] % len(pool)]
    if problems:
        message = f"is {plan.count}, {share} of a class; of the buffer's {len(chains)} chains {', '.join(problems)}"
        raise ConfigError([Problem("count", f"{message}; ask for fewer, or init=fresh", "command line")])
    return chains[chosen]


def saved(x: Tensor) -> Tensor:
    """Chains as the images that samples.npy keeps, on [-1, 1] in 256 levels."""
    return to_float(to_bytes(x), x.dtype)


@torch.no_grad()
def _logits_of(logits: Logits, x: Tensor, device: torch.device) -> Tensor:
    return torch.cat([logits(part.to(device)).cpu() for part in torch.split(x, FORWARD)])


def marks(steps: int, frames: int) -> list[int]:
    """The steps of an animation: 0, then from 1 to the last in equal ratios, as far as whole steps allow.

    As many as `frames`, or all where there are fewer.
    """
    n = min(frames - 1, steps)
    found = [0]
    for i in range(1, n + 1):
        found.append(min(steps - (n - i), max(found[-1] + 1, round(steps ** (i / n)))))
    return found


def write(folder: Path, opened: Opened, plan: Plan, drawn: Drawn) -> dict[str, Any]:
    """The folder with all its files, or none; what samples.json says. Raises OSError."""
    images, columns = _arranged(plan, drawn.x)
    contents = {"grid.png": grid_png(images, columns), "samples.npy": _npy(drawn.x)}
    if plan.steps:
        contents["chain.gif"] = gif([sheet(plan, x) for x in drawn.film])
    said = _said(opened, plan, drawn) | {"files": [*contents, "samples.json"]}
    contents["samples.json"] = (json.dumps(said, indent=1, allow_nan=False) + "\n").encode()

    def fill(target: Path) -> None:
        for name, content in contents.items():
            (target / name).write_bytes(content)

    whole_folder(folder, fill)
    return said


def _arranged(plan: Plan, x: Tensor) -> tuple[Tensor, int]:
    """The images of grid.png and its columns: the first hundred, or the first ten of each class, a row a class."""
    if plan.label != "all":
        return x[:SHOWN], COLUMNS
    each = min(len(x) // len(plan.classes), COLUMNS)
    rows = torch.arange(each * len(plan.classes)).reshape(each, len(plan.classes)).T.flatten()
    return x[rows], each if each > 1 else COLUMNS


def sheet(plan: Plan, x: Tensor) -> np.ndarray:
    """A frame: up to 25 chains in rows of five; where every class is drawn and few enough, a column a class."""
    n = len(plan.classes)
    if plan.label == "all" and 4 <= n <= 12:
        return grid(x[: len(x) // n * n], n)
    return grid(x, 5)


def gif(sheets: list[np.ndarray]) -> bytes:
    """An animation that repeats, its last picture held. Grey pictures keep every level, colours are cut to 256."""
    grey = all((s[..., :1] == s).all() for s in sheets)
    pictures = [Image.fromarray(s[..., 0] if grey else s) for s in sheets]
    if not grey:
        pictures = [picture.quantize(256) for picture in pictures]
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_MS]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0].save(buffer, "GIF", **options)
    return buffer.getvalue()


def _npy(x: Tensor) -> bytes:
    """uint8 [n, h, w, c]."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(to_bytes(x).permute(0, 2, 3, 1).numpy()), allow_pickle=False)
    return buffer.getvalue()


def _said(opened: Opened, plan: Plan, drawn: Drawn) -> dict[str, Any]:
    """samples.json but for its files: what was drawn of what, and what the model says of it."""
    predicted = drawn.probabilities.argmax(dim=1).bincount(minlength=len(plan.classes)).tolist()
    labels = plan.labels(0, plan.count)
    of_class = None if labels is None else drawn.probabilities.gather(1, labels[:, None]).mean().item()
    # the share of the chains' pixels at the clamp, or twice as far out as data where there is none
    saturation = (drawn.x.abs() >= (plan.sgld.clamp or WIDE)).double().mean().item()
    model = {"source": opened.source, "name": opened.name, "digest": opened.digest, "step": opened.step}
    return {
        "model": model | {"weights": opened.weights, "checkpoint": opened.checkpoint},
        "settings": {
            "count": plan.count,
            "class": plan.label if plan.label in (None, "all") else plan.classes[int(plan.label)],
            "steps": plan.steps,
            "init": plan.init,
            "prior": opened.config.replay.prior,
            "seed": plan.seed,
            "sgld": {key: value for key, value in flatten(plan.sgld).items() if key not in ("steps", "conditional")},
        },
        "notes": [*plan.notes, *_warnings(plan, saturation)],
        "labels": None if labels is None else labels.tolist(),  # the classes asked for, image by image
        "energy": {  # of the images as they are saved, like all but saturation; nats up to the model's own constant
            "mean": drawn.energies.mean().item(),
            "std": drawn.energies.std(correction=0).item(),
            "min": drawn.energies.min().item(),
            "max": drawn.energies.max().item(),
        },
        "confidence": drawn.probabilities.amax(dim=1).mean().item(),  # mean max p(y|x), without temperature scaling
        "class_probability": of_class,  # mean p(y|x) of the class asked for
        "predicted": dict(zip(plan.classes, predicted, strict=True)),
        "saturation": saturation,
        "film": marks(plan.steps, plan.frames) if plan.steps else None,  # the steps that chain.gif shows
        "facts": facts(),
    }


def _warnings(plan: Plan, saturation: float) -> list[str]:
    """What a picture does not show, as what is out of range is cut off in it."""
    if saturation < MANY or plan.sgld.clamp is not None:  # at a clamp many data, black around, are rightly
        return []
    return [
        f"{100 * saturation:.0f} % of the pixels are saturated (twice as far out as data, or more): the chains have "
        "left the data, draw with fewer steps"
    ]
