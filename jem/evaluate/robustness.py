"""How small a change of an image changes the answer: JEM-0, JEM-1 and JEM-10 under every attack.

A row for each attacked image holds the smallest norm that each attack found (see smallest.py), and the images found.
Attacks run in float32, whatever precision the model was trained in: rounding must not hide a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jem.config import EvaluateConfig, JEMConfig
from jem.energy import Logits
from jem.evaluate.attacks import Classifier, is_wrong, of_foolbox, pgd, square
from jem.evaluate.refined import refined
from jem.evaluate.smallest import Smallest

OnPart = Callable[[float], None]

BATCH = 25
"""Images attacked at once. Fixed, as noise is drawn for a batch; small, so that workers can share few images."""

UNBOUNDED = 1.0
"""The Linf eps within which every image lies: nothing withstands an attack that finds its way."""

MIN_NORM = {"linf": ("fmn",), "l2": ("ddn", "cw")}


class Counts(NamedTuple):
    """How hard a suite attacks."""

    images: int
    steps: int
    restarts: int
    min_norm_steps: int
    queries: int


SUITES = {"full": Counts(100, 20, 2, 50, 200), "paper": Counts(1000, 40, 20, 500, 5000)}


def counts(settings: EvaluateConfig) -> Counts:
    """The suite's, but for what is set."""
    suite, attack = SUITES[settings.suite], settings.attack
    return Counts(*(getattr(attack, key) or value for key, value in suite._asdict().items()))


def eps_of(settings: EvaluateConfig) -> dict[str, tuple[float, ...]]:
    """The grid of each norm, ascending."""
    return {"linf": settings.attack.linf, "l2": settings.attack.l2}


def attacks_of(norm: str, k: int, suite: str) -> tuple[str, ...]:
    """CW searches for its constant: through a refinement only in the suite `paper`."""
    smallest = tuple(name for name in MIN_NORM[norm] if name != "cw" or k == 0 or suite == "paper")
    return ("pgd", *smallest, "square")


def columns(settings: EvaluateConfig, k: int, pixels: int) -> dict[str, int]:
    """What a row of `attack` holds, in order, and how many numbers each part has."""
    found = {"wrong": 1, "unbounded": 1}
    for norm, grid in eps_of(settings).items():
        found |= {f"{norm}/{name}": 1 for name in attacks_of(norm, k, settings.suite)}
        found[f"{norm}/adversarial"] = pixels
        if k == 0:
            found |= {f"{norm}/transfer/{eps:g}": pixels for eps in grid}
    return found


def split(rows: Float[Tensor, "n columns"], settings: EvaluateConfig, k: int, pixels: int) -> dict[str, Tensor]:
    """The parts of rows by name: [n], or [n, pixels]."""
    widths = columns(settings, k, pixels)
    parts = torch.split(rows, list(widths.values()), dim=1)
    return {name: part if part.shape[1] > 1 else part[:, 0] for name, part in zip(widths, parts, strict=True)}


def cost(settings: EvaluateConfig, k: int) -> int:
    """Of an image, in forward passes, about."""
    each = _costs(settings, k)
    return sum(each[name] for norm, grid in eps_of(settings).items() for name in _names(settings, k, norm, grid))


def _names(settings: EvaluateConfig, k: int, norm: str, grid: tuple[float, ...]) -> list[str]:
    """Of all attacks in a norm, one by one."""
    planned = [name for _, name, _ in _plan(grid, k, counts(settings).restarts)]
    smallest = [name for name in attacks_of(norm, k, settings.suite) if name in MIN_NORM[norm]]
    return [*planned, *smallest, *(["transfer"] * len(grid) if k == 0 else [])]


def _costs(settings: EvaluateConfig, k: int) -> dict[str, int]:
    """Of each attack on an image, in forward passes, about. PGD and random search leave broken images alone."""
    many, copies = counts(settings), settings.attack.copies
    answer = 1 if k == 0 else copies * (3 * k + 1)
    gradients = [3] if k == 0 else [3, copies * (3 * k + 3), copies * (9 * k + 3)]
    towards, smallest = many.steps * sum(gradients), many.min_norm_steps * sum({gradients[0], gradients[-1]})
    found = {"pgd": towards // 2, "transfer": towards, "square": many.queries * answer // 2}
    return found | {"fmn": smallest, "ddn": smallest, "cw": 5 * smallest}


@torch.no_grad()
def attack(
    logits: Logits,
    x: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    k: int,
    config: JEMConfig,
    settings: EvaluateConfig,
    generator: torch.Generator,
    on_part: OnPart = lambda _: None,
    thrifty: bool = False,
) -> Float[Tensor, "n columns"]:
    """Attack images on [-1, 1]: the rows that `columns` describes. `on_part` is told each attack's share of it.

    `thrifty`: slower, for a device that has no room for the gradients of all images at once (see refined.py).

    The defence has noise of its own that no attack sees, the same at every answer: an image is not asked until it is
    wrong by chance. Every attack gets the images that it has not yet broken; its candidates count where the defence
    gets them wrong. Raises JEMError where a gradient is not finite at an image that is still right.
    """
    images = (x + 1) / 2
    of_attack, of_defence = _stream(generator), _stream(generator).initial_seed()

    def jem(noise: torch.Generator, k: int = k, straight: bool = False) -> Classifier:
        attack = settings.attack
        return refined(logits, k, config.sgld, attack.copies, attack.copy_noise, noise, straight, thrifty)

    def defended(tried: Tensor) -> Tensor:
        return jem(torch.Generator(tried.device).manual_seed(of_defence))(tried)

    plain, seen = jem(of_attack, 0), jem(of_attack)
    wrong = is_wrong(defended(images), labels)
    many, each, whole = counts(settings), _costs(settings, k), cost(settings, k)

    def by_gradients(smallest: Smallest, eps: float, restart: int) -> None:
        """PGD of the images that stand, by the cheapest gradient first; the next begins at its best points."""
        loss = ("cross-entropy", "margin")[restart % 2]
        start = None if restart else images
        for classify in (plain,) if k == 0 else (plain, jem(of_attack, straight=True), seen):
            rows = (smallest.found > eps).nonzero()[:, 0]
            if not len(rows):
                return
            begin = start[rows] if start is not None else None
            target = images[rows], labels[rows], smallest.norm, eps, many.steps
            ends = pgd(classify, *target, of_attack, loss, begin)
            for end in ends[: 1 if k == 0 else 2]:
                smallest.offer(rows, end, defended, eps)
            start = images.clone()
            start[rows] = ends[0]

    values: dict[str, Tensor] = {"wrong": wrong}
    rows = (~wrong).nonzero()[:, 0]
    far = Smallest(images, labels, "linf", wrong)
    values["unbounded"] = wrong.clone()
    if len(rows):
        reached, _ = pgd(seen, images[rows], labels[rows], "linf", UNBOUNDED, many.steps, of_attack, "margin")
        values["unbounded"][rows] = far.offer(rows, reached, defended, UNBOUNDED)
    for norm, grid in eps_of(settings).items():
        found = {name: Smallest(images, labels, norm, wrong) for name in attacks_of(norm, k, settings.suite)}
        for eps, name, restart in _plan(grid, k, many.restarts):
            rows = (found[name].found > eps).nonzero()[:, 0]
            if name == "pgd":
                by_gradients(found[name], eps, restart)
            elif len(rows):
                made = square(seen, images[rows], labels[rows], norm, eps, many.queries, of_attack)
                found[name].offer(rows, made, defended, eps)
            on_part(each[name] / whole)
        rows = (~wrong).nonzero()[:, 0]
        for name in (n for n in found if n in MIN_NORM[norm]):
            for classify in ((plain,) if k == 0 else (plain, seen)) if len(rows) else ():
                seed = int(torch.randint(2**31, (), generator=of_attack, device=of_attack.device))
                made = of_foolbox(name, classify, images[rows], labels[rows], many.min_norm_steps, seed)
                found[name].offer(rows, made, defended, None)
            on_part(each[name] / whole)
        values |= {f"{norm}/{name}": smallest.found for name, smallest in found.items()}
        values[f"{norm}/adversarial"] = _nearest(list(found.values()))
        for eps in grid if k == 0 else ():
            made, _ = pgd(seen, images, labels, norm, eps, many.steps, of_attack, "margin")
            values[f"{norm}/transfer/{eps:g}"] = made
            on_part(each["transfer"] / whole)
    order = columns(settings, k, x[0].numel())
    return torch.cat([values[name].to(x.dtype).reshape(len(x), width) for name, width in order.items()], dim=1)


def _plan(grid: tuple[float, ...], k: int, restarts: int) -> Iterator[tuple[float, str, int]]:
    """PGD at every eps and restart, the nearest first; the square attack at every eps of JEM-0, else at the middle."""
    for eps in grid:
        yield from ((eps, "pgd", restart) for restart in range(restarts))
    for eps in grid if k == 0 else (grid[len(grid) // 2],):
        yield eps, "square", 0


def _nearest(found: list[Smallest]) -> Tensor:
    """The nearest adversarial image of all attacks; the image itself where there is none."""
    norms = torch.stack([one.found for one in found])
    images = torch.stack([one.adversarials for one in found])
    return images[norms.argmin(dim=0), torch.arange(images.shape[1], device=images.device)]


def _stream(generator: torch.Generator) -> torch.Generator:
    """Another stream that this one decides."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed)


def distal(
    logits: Logits, x: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], target: float = 0.9, steps: int = 1000
) -> Float[Tensor, "n columns"]:
    """From noise to an image that the model is sure of: ascend log p(y|x) until p(y|x) > `target`.

    Normalised steps of root mean square .02 within [-1, 1]. Rows: p(y|x), the steps it took, the image.
    """
    count = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    for _ in range(steps + 1):
        with torch.enable_grad():
            position = x.detach().requires_grad_(True)
            log_p = logits(position).log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
            (gradient,) = torch.autograd.grad(log_p.sum(), position)
        p = log_p.detach().exp()
        going = p <= target
        if not going.any() or count.max() == steps:
            break
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
        step = 0.02 * math.sqrt(x[0].numel()) / length * going
        x = (x + step[:, None, None, None] * gradient).clamp(-1, 1)
        count = count + going
    return torch.cat([p[:, None].to(x.dtype), count[:, None], x.flatten(1)], dim=1)
