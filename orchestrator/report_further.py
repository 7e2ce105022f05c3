"""Attacks, samples and chains of a report as rows of tables and as sentences, for a terminal and a card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NORMS = {"linf": "Linf", "l2": "L2"}
FIGURES = {
    "fid": "FID",
    "kid": "KID",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
}

Rows = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""A head and rows."""


def robust_tables(section: Mapping[str, Any], digits: int = 3) -> Iterator[tuple[str, Rows]]:
    """A title and a table for each k and norm: a row an attack, a column an eps."""
    from orchestrator.report_table import interval_text

    for k, of_k in section["k"].items():
        for norm, found in of_k["norms"].items():
            title = f"JEM-{k}, {NORMS[norm]}: clean {interval_text(of_k['clean'], digits)}"
            head = ("attack", *(f"eps {eps:g}" for eps in found["eps"]))
            rows = [
                (name, *(interval_text(value, digits) for value in values))
                for name, values in found["accuracy"].items()
            ]
            yield title, (head, rows)


def robust_about(section: Mapping[str, Any]) -> str:
    """What was done, in a line."""
    many, refine = section["counts"], section["refine"]
    return (
        f"{section['n']:,} test images; PGD {many['steps']} steps and {many['restarts']} starts; minimum-norm attacks "
        f"{many['min_norm_steps']} steps; square attack {many['queries']:,} tries; JEM-k averages {many['copies']} "
        f"copies with noise {refine['copy_noise']:g} and is attacked with JEM-0's adversarials, then with gradients "
        "past its refinement and through it"
    )


def masking_lines(section: Mapping[str, Any]) -> Iterator[str]:
    """What the checks of gradient masking found, a line each k."""
    for k, of_k in section["k"].items():
        budget, black_box = of_k["masking"]["larger_budget"], of_k["masking"]["black_box"]
        alone = ", ".join(
            f"{NORMS[norm]} {found['by_square_alone']} of {found['n']}" for norm, found in black_box.items()
        )
        good = budget["ok"] and all(found["ok"] for found in black_box.values())
        verdict = "no sign of hidden gradients" if good else "GRADIENT MASKING SUSPECTED"
        yield (
            f"JEM-{k}: {verdict}: without a bound {budget['accuracy']:.1%} withstand PGD; broken by random search and "
            f"by no gradient: {alone}"
        )


def gen_table(section: Mapping[str, Any]) -> Rows:
    """A row a sampler."""
    head = ("samples", "n", *(f"{label}" for label in FIGURES.values()), "nearest")
    rows = [
        (
            name,
            f"{found['n']:,}",
            *(f"{found['figures'][key]:.4g}" for key in FIGURES),
            f"{found['nearest']['median']:.3f}",
        )
        for name, found in section["samplers"].items()
    ]
    return head, rows


def gen_about(section: Mapping[str, Any]) -> Iterator[str]:
    """Which features, against what, and what each sampler is."""
    extractor, reference = section["extractor"], section["reference"]
    yield (
        f"features of {extractor['name']} ({extractor['of']}, sha256 {extractor['sha256'][:8]}), against "
        f"{reference['n']:,} images of the {reference['split']} split; nearest: median L2 distance to a training image"
    )
    for name, found in section["samplers"].items():
        yield f"{name}: {found['how']}"


def chains_table(section: Mapping[str, Any]) -> Rows:
    """At each of `evaluate.generate.lengths` times the training length."""
    head = ("steps", "energy", "gradient norm", "saturation", "acceptance", "acceptance at T = 1")
    rows = []
    for times in section["times"]:
        at = section["steps"].index(times * section["length"])
        values = [section[name][at][0] for name in ("energy", "grad_norm", "saturation")]
        values += [section["acceptance"][which][at] for which in ("own", "one")]
        cells = ("undefined" if value is None else f"{value:.4g}" for value in values)
        rows.append((f"{times * section['length']:,}", *cells))
    return head, rows


def chains_about(section: Mapping[str, Any]) -> str:
    middle = section["data_energy"][0]
    energy = "undefined" if middle is None else f"{middle:.4g}"
    temperature = section["acceptance"]["temperature"]
    own = "the T of each step" if temperature is None else f"T = {temperature:.2g}, its own"
    return (
        f"{section['n']} chains from the prior, medians; one of the training lives {section['length']:,} steps; the "
        f"energy of test images is {energy}; acceptance: of the SGLD move by Metropolis and Hastings at {own}"
    )


def robust_sentences(section: Mapping[str, Any]) -> Iterator[str]:
    """How robust the model is, in words."""
    from orchestrator.report_images import suspected

    for k, of_k in section["k"].items():
        for norm, found in of_k["norms"].items():
            worst, grid = found["accuracy"]["worst"], found["eps"]
            yield (
                f"JEM-{k} under the strongest attack measured ({NORMS[norm]}, pixels on [0, 1]) keeps "
                f"{worst[0][0]:.1%} of {section['n']:,} images at eps {grid[0]:g} and {worst[-1][0]:.1%} at "
                f"{grid[-1]:g}; {of_k['clean'][0]:.1%} without an attack"
            )
    if suspected(section):
        yield "gradient masking is **suspected**: a stronger attack may leave less than these figures say"
    yield "an attack that was not tried may find more: robust accuracy is an upper bound"
