"""Robustness, chains and samples as pictures, made of the report alone."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRIDS = ("samples_fresh", "neighbours_fresh", "samples_buffer", "neighbours_buffer", "adversarials", "distal")
NORMS = {"linf": "largest change of a pixel (Linf)", "l2": "Euclidean length of the change (L2)"}
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
DASHES = ("-", "--", "-.", ":")
SHIFT = 0.006
"""Between the intervals of two curves at the same eps, of the axis: beside each other, they can be told apart."""

INCH = 110
"""Pixels."""


def drawings(report: dict[str, Any]) -> dict[str, Callable[[], bytes]]:
    """By file name, what draws it; only what the report has figures for."""
    found: dict[str, Callable[[], bytes]] = {}
    if "robust" in report:
        found["robustness.png"] = partial(robustness, report)
    if "chains" in report:
        found["chains.png"] = partial(chains, report)
    grids = report.get("grids", {})
    return found | {f"{name}.png": partial(sheet, report, grids[name]) for name in GRIDS if name in grids}


def robustness(report: dict[str, Any]) -> bytes:
    """Accuracy against eps: each k under the strongest attack, and every attack on JEM-0 in thin lines."""
    from orchestrator.report_pictures import _figure, _png, _title

    section = report["robust"]
    figure = _figure(12, 5)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    for axes, (norm, of_axis) in zip(panels, NORMS.items(), strict=True):
        end = 1.15 * max(section["k"]["0"]["norms"][norm]["eps"]) if "0" in section["k"] else 0.0
        for i, (k, of_k) in enumerate(section["k"].items()):
            of_norm = of_k["norms"][norm]
            end = max(end, 1.15 * max(of_norm["eps"]))
            if k == "0":
                alone = [(name, found) for name, found in of_norm["found"].items() if name != "worst"]
                for (name, found), dashes in zip(alone, DASHES, strict=False):
                    x, y = steps(found, end)
                    style = {"linestyle": dashes, "color": "grey", "linewidth": 0.9, "alpha": 0.8}
                    axes.step(x, y, where="post", label=f"{name} alone", **style)
            label = f"JEM-{k}" if _is_jem(report) else "classifier"
            _curve(axes, of_norm, end, COLOURS[i % len(COLOURS)], label, "-", i - (len(section["k"]) - 1) / 2)
        _finish(axes, of_axis, end)
    many = section["counts"]
    how = f"{section['n']:,} test images; PGD {many['steps']} steps, {many['restarts']} starts"
    thin = "; thin: single attacks on JEM-0" if _is_jem(report) else "; thin: single attacks"
    doubt = "\nGRADIENT MASKING SUSPECTED: see the masking checks" if suspected(section) else ""
    figure.suptitle(f"{_title(report)}\naccuracy under the strongest attack on {how}{thin}{doubt}", fontsize=10)
    return _png(figure)


def against_robustness(report_a: dict[str, Any], report_b: dict[str, Any], against: Mapping[str, Any]) -> bytes:
    """Both models' curves on one plot, and each on the adversarials of the other."""
    from orchestrator.report_pictures import _drawable, _figure, _png

    figure = _figure(12, 5.4)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    names = [_drawable(r["model"].get("name") or r["model"]["source"], 34) for r in (report_a, report_b)]
    curves = sum(len(report["robust"]["k"]) for report in (report_a, report_b))
    for axes, (norm, label) in zip(panels, NORMS.items(), strict=True):
        end, shift = 0.0, 0
        for report, name, line in zip((report_a, report_b), names, ("-", "--"), strict=True):
            for k, of_k in report["robust"]["k"].items():
                of_norm = of_k["norms"][norm]
                end = max(end, 1.15 * max(of_norm["eps"]))
                title = f"JEM-{k}: {name}" if _is_jem(report) else name
                _curve(axes, of_norm, end, COLOURS[shift % len(COLOURS)], title, line, shift - (curves - 1) / 2)
                shift += 1
        transferred = against.get("transfer", {}).get(norm)
        if transferred:
            of_transfer = (
                ("b_on_a", "x", f"{names[0]}, on adversarials of {names[1]}"),
                ("a_on_b", "+", f"{names[1]}, on adversarials of {names[0]}"),
            )
            for way, mark, title in of_transfer:
                shares = [value[0] for value in transferred[way]]
                axes.plot(transferred["eps"], shares, mark, color="black", markersize=7, label=title)
        _finish(axes, label, end)
        axes.get_legend().remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    n = report_a["robust"]["n"]
    figure.suptitle(f"accuracy under the strongest attack on {n:,} test images, 95 % intervals", fontsize=10)
    return _png(figure)


def steps(found: Sequence[float | None], end: float) -> tuple[list[float], list[float]]:
    """The exact curve: accuracy falls where a smallest norm is; [0, ..., end] and the accuracy from each on."""
    norms = sorted(norm for norm in found if norm is not None and norm <= end)
    wrong = sum(norm == 0 for norm in norms)
    x, y = [0.0], [1 - wrong / len(found)]
    for i, norm in enumerate(norms[wrong:], start=wrong + 1):
        x.append(norm)
        y.append(1 - i / len(found))
    return [*x, end], [*y, y[-1]]


def suspected(section: Mapping[str, Any]) -> bool:
    """Whether a check of gradient masking failed for any k."""
    return not all(
        of_k["masking"]["larger_budget"]["ok"] and all(norm["ok"] for norm in of_k["masking"]["black_box"].values())
        for of_k in section["k"].values()
    )


def _is_jem(report: Mapping[str, Any]) -> bool:
    return "robust_k" not in report.get("left_out", {})


def _curve(
    axes: Axes, of_norm: Mapping[str, Any], end: float, colour: str, label: str, line: str, place: float
) -> None:
    axes.step(*steps(of_norm["found"]["worst"], end), where="post", color=colour, linestyle=line, label=label)
    values = of_norm["accuracy"]["worst"]
    middle = [value[0] for value in values]
    spread = [[value[0] - value[1] for value in values], [value[2] - value[0] for value in values]]
    beside = [eps + place * SHIFT * end for eps in of_norm["eps"]]
    axes.errorbar(beside, middle, spread, fmt="o", color=colour, markersize=3.5, linewidth=1, alpha=0.8)


def _finish(axes: Axes, label: str, end: float) -> None:
    axes.set(xlabel=f"{label}, pixels on [0, 1]", ylabel="accuracy", xlim=(0, 1.08 * end), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="upper right")


def chains(report: dict[str, Any]) -> bytes:
    """What chains from the prior do in 100 times the steps that one lives in training."""
    from orchestrator.report_pictures import _figure, _png, _title

    section = report["chains"]
    x = [1 + step for step in section["steps"]]  # 0 has no place on a logarithmic axis
    figure = _figure(12, 6.4)
    grid = figure.subplots(2, 2, sharex=True).flatten()
    for axes, key, label in zip(
        grid,
        ("energy", "grad_norm", "saturation"),
        ("energy (nats)", "norm of its gradient", "saturation"),
        strict=False,
    ):
        bands = [[math.nan if v is None else v for v in band] for band in section[key]]
        axes.plot(x, [band[0] for band in bands], color="tab:blue", marker=".", label="chains: median, 10 to 90 %")
        axes.fill_between(x, [band[1] for band in bands], [band[2] for band in bands], color="tab:blue", alpha=0.2)
        axes.set_ylabel(label)
    if any(band[0] for band in section["grad_norm"]):  # a logarithm of nothing is an error
        grid[1].set_yscale("log")
    if None not in section["data_energy"]:
        middle, low, high = section["data_energy"]
        grid[0].axhspan(low, high, color="tab:green", alpha=0.2, label="test images: 10 to 90 %")
        grid[0].axhline(middle, color="tab:green", linewidth=0.8)
    temperature = section["acceptance"]["temperature"]
    own = "at the T of each step" if temperature is None else f"at T = {temperature:.2g}, the chains' own"
    for which, title, colour in (
        ("own", own, "tab:blue"),
        ("one", "at T = 1", "tab:red"),
    ):
        rates = [math.nan if v is None else v for v in section["acceptance"][which]]
        grid[3].plot(x, rates, color=colour, marker=".", label=title)
    grid[3].set(ylabel="Metropolis acceptance", ylim=(-0.03, 1.03))
    for axes in grid:
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
        for times in section["times"]:
            axes.axvline(1 + times * section["length"], color="black", linestyle=":", linewidth=0.8)
    grid[0].legend(fontsize=7)
    grid[3].legend(fontsize=7)
    for axes in grid[2:]:
        axes.set_xlabel("1 + SGLD steps")
    times = " and ".join(", ".join(map(str, section["times"])).rsplit(", ", 1))
    about = f"{section['n']} chains from the prior; dotted: {times} times the {section['length']:,} steps of training"
    figure.suptitle(f"{_title(report)}\n{about}", fontsize=10)
    return _png(figure)


def sheet(report: Mapping[str, Any], packed: Mapping[str, Any]) -> bytes:
    """A grid of images below its caption, pixel for pixel."""
    import numpy as np
    import torch

    from orchestrator.pictures import grid
    from orchestrator.report_pictures import _drawable, _figure, _png, _title

    pixels = np.frombuffer(base64.b64decode(packed["pixels"]), np.uint8).reshape(packed["shape"])
    cells = grid(torch.from_numpy(pixels.copy()).float() / 127.5 - 1, packed["columns"])
    height, width = cells.shape[:2]
    lines = _wrapped(f"{_title(dict(report))}\n{_drawable(packed['caption'], 400)}", max(40, width // 6))
    top = 16 * (lines.count("\n") + 1) + 10
    wide = max(width, 6 * max(map(len, lines.split("\n")))) + 12
    figure = _figure(wide / INCH, (height + top) / INCH)
    figure.set_layout_engine("none")
    figure.text(6 / wide, 1 - 4 / (height + top), lines, va="top", fontsize=7, linespacing=1.3)
    figure.figimage(cells, 6, 0)
    return _png(figure)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, width) or [""])
