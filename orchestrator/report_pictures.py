"""An evaluation as pictures, made of its report alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from orchestrator.report_images import drawings
from orchestrator.report_table import UNDEFINED, WORDS, interval_text, parts, sections, shortened, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MAIN = ("log_px", "max_py", "approx_mass", "refine", "refine_l2")
"""The model's own scores; the others are baselines."""

COLOURS = dict(zip(MAIN, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"), strict=True))
BASELINE = "dimgrey"
PAIR = ("tab:blue", "tab:orange")
COLUMNS = 4


def pictures(report: dict[str, Any]) -> dict[str, bytes]:
    """PNGs by file name; what a report has no figures for is left out."""
    return {name: draw() for name, draw in _drawings(report).items()}


def picture_names(report: dict[str, Any]) -> list[str]:
    """The file names of `pictures`."""
    return list(_drawings(report))


def _drawings(report: dict[str, Any]) -> dict[str, Callable[[], bytes]]:
    functions = {
        "reliability.png": (reliability, report.get("reliability")),
        "confusion.png": (confusion, report.get("confusion")),
        "ood.png": (aurocs, report.get("ood")),
        "roc.png": (roc, report.get("roc")),
        "histograms.png": (histograms, report.get("histograms")),
    }
    drawn = {name: partial(function, report) for name, (function, found) in functions.items() if found}
    return drawn | drawings(report)


def reliability(report: dict[str, Any]) -> bytes:
    """Accuracy by confidence, before and after temperature scaling."""
    figure = _figure(11, 5.6)
    for part, title, bins in zip(figure.subfigures(1, 2, squeeze=False)[0], *_diagrams(report), strict=True):
        _diagram(part, bins, title)
    reason = report["temperature"]["reason"]
    of_temperature = "" if reason == "fitted" else f"\ntemperature: {_drawable(reason, 100)}"
    figure.suptitle(
        f"{_title(report)}\nreliability on {report['test']['n']:,} test images{of_temperature}", fontsize=10
    )
    return _png(figure)


def against_reliability(report_a: dict[str, Any], report_b: dict[str, Any]) -> bytes:
    """The diagrams of two models, one below the other."""
    figure = _figure(11, 11.2)
    for row, report in zip(figure.subfigures(2, 1, squeeze=False)[:, 0], (report_a, report_b), strict=True):
        for part, title, bins in zip(row.subfigures(1, 2, squeeze=False)[0], *_diagrams(report), strict=True):
            _diagram(part, bins, title)
        row.suptitle(f"{_title(report)}\nreliability on {report['test']['n']:,} test images", fontsize=10)
    return _png(figure)


def _diagrams(report: dict[str, Any]) -> tuple[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """Titles and bins, before and after temperature scaling."""
    before, after = (interval_text(report.get(key, {}).get("ece"), 3) for key in ("test", "test_scaled"))
    temperature = f"{report['temperature']['value']:.4g}"
    titles = (f"as it is: ECE {before}", f"at temperature {temperature}: ECE {after}")
    return titles, (report["reliability"]["before"], report["reliability"]["after"])


def _diagram(part: SubFigure, bins: dict[str, Any], title: str) -> None:
    axes, strip = part.subplots(2, 1, sharex=True, height_ratios=(4, 1.1))
    low, accuracy, counts = bins["low"], bins["accuracy"], bins["counts"]
    width = [b - a for a, b in zip(low, bins["high"], strict=True)]
    gap = [c - a for a, c in zip(accuracy, bins["confidence"], strict=True)]
    axes.bar(low, accuracy, width, align="edge", color="#8db6dc", edgecolor="white", label="accuracy")
    red = {"color": "tab:red", "alpha": 0.35, "hatch": "///", "edgecolor": "tab:red", "linewidth": 0.5}
    axes.bar(low, gap, width, bottom=accuracy, align="edge", **red, label="gap to the mean confidence")
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="upper left")
    strip.bar(low, counts, width, align="edge", color="silver", edgecolor="white")
    for left, wide, count in zip(low, width, counts, strict=True):
        strip.annotate(
            f"{count:,.0f}", (left + wide / 2, count), (0, 2), textcoords="offset points", ha="center", rotation=90
        ).set_fontsize(6)
    strip.set_yscale("log")
    strip.set(ylim=(0.5, 40 * max(counts)), ylabel="images", xlabel="confidence")  # room for the numbers
    for one in (axes, strip):
        one.tick_params(labelsize=8)
        one.grid(alpha=0.2)


def confusion(report: dict[str, Any]) -> bytes:
    """What the images of each class were taken for; colours are shares of the row."""
    import numpy as np

    matrix = np.asarray(report["confusion"], dtype=float)
    n = len(matrix)
    with np.errstate(invalid="ignore"):
        share = matrix / matrix.sum(axis=1, keepdims=True)
    side = min(max(0.45 * n, 3.0), 10.0)
    figure = _figure(side + 2.4, side + 1.8)
    axes = figure.subplots()
    shown = axes.imshow(np.ma.masked_invalid(share), cmap="Blues", vmin=0, vmax=1)  # no image: the background
    axes.set_facecolor("lightgrey")
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("share of the row's images", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    ticks = range(0, n, math.ceil(n / 100))
    names = [_class_name(report, i) for i in ticks]
    size = min(9.0, 0.8 * 72 * side / len(names))
    rotation = 90 if max(map(len, names)) > 2 or n > 40 else 0
    axes.set_xticks(ticks, names, fontsize=size, rotation=rotation)
    axes.set_yticks(ticks, names, fontsize=size)
    if n <= 20:
        for i, j in np.ndindex(n, n):
            colour = "white" if share[i, j] > 0.5 else "black" if matrix[i, j] else "darkgrey"
            axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="the model's answer", ylabel="right class")
    axes.set_title(f"{_title(report)}\naccuracy {interval_text(report['test']['accuracy'])}", fontsize=10)
    return _png(figure)


def aurocs(report: dict[str, Any]) -> bytes:
    """AUROC of every score against every set, a panel a set."""
    entries = report["ood"]
    order = _scores([score for entry in entries.values() for score in entry["scores"]])
    columns = min(COLUMNS, len(entries))
    figure = _figure(max(5.5, 3.6 * columns), (0.24 * len(order) + 1.0) * math.ceil(len(entries) / columns) + 0.6)
    grid = _grid(figure, len(entries), columns, sharey=True, sharex=True)
    for axes, (name, entry) in zip(grid, entries.items(), strict=False):
        for row, score in enumerate(order):
            value = entry["scores"].get(score, {}).get("auroc")
            _dot(axes, row, value, _colour(score), "o" if score in MAIN else "D")
            _beside(axes, row, interval_text(value, 3) if score in entry["scores"] else "not measured")
        _rows(axes, order)
        axes.axvline(0.5, color="black", linestyle="--", linewidth=0.8)
        axes.set_title(f"{_drawable(name, 28)}, {entry['n']:,} images", fontsize=9)
    _range(grid, [figures.get("auroc") for entry in entries.values() for figures in entry["scores"].values()])
    figure.suptitle(f"{_title(report)}\nAUROC of test images against others, 95 % intervals", fontsize=10)
    return _png(figure)


def roc(report: dict[str, Any]) -> bytes:
    """ROC curves of the model's own scores and of the best baseline, a panel a set."""
    found = report["roc"]
    columns = min(COLUMNS, len(found))
    figure = _figure(max(5.0, 3.3 * columns), 3.5 * math.ceil(len(found) / columns) + 0.2)
    for axes, (name, curves) in zip(_grid(figure, len(found), columns), found.items(), strict=False):
        scores = report["ood"].get(name, {}).get("scores", {})
        value = {score: (parts(scores.get(score, {}).get("auroc")) or (math.nan,))[0] for score in curves}
        known = [score for score in curves if score not in MAIN and not math.isnan(value[score])]
        best = [max(known, key=value.__getitem__)] if known else []
        for score in [one for one in _scores(curves) if one in MAIN[:4]] + best:
            style = ("-", score) if score in MAIN else ("--", f"{score}, best baseline")
            label = f"{style[1]}: {UNDEFINED if math.isnan(value[score]) else format(value[score], '.3f')}"
            curve = curves[score]
            axes.plot(curve["fpr"], curve["tpr"], style[0], color=_colour(score), linewidth=1.3, label=label)
        axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=0.8)
        axes.axhline(0.95, color="silver", linewidth=0.8, zorder=0)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
        axes.set_xlabel("others accepted (FPR)", fontsize=8)
        axes.set_ylabel("test images accepted (TPR)", fontsize=8)
        axes.set_title(_drawable(name, 32), fontsize=9)
        axes.legend(fontsize=6.5, loc="lower right", title="AUROC", title_fontsize=7)
    figure.suptitle(f"{_title(report)}\nROC; grey line: 95 % of the test images accepted", fontsize=10)
    return _png(figure)


def histograms(report: dict[str, Any]) -> bytes:
    """How the scores of the test images and of each set are spread: a row a set, a column a score."""
    found = report["histograms"]
    scores = _scores(found)[:COLUMNS]
    sets = list(dict.fromkeys(name for score in scores for name in found[score]["counts"] if name != "test"))
    figure = _figure(max(6.0, 3.4 * len(scores)), 1.5 * len(sets) + 1.1)
    grid = figure.subplots(len(sets), len(scores), squeeze=False, sharex="col")
    for row, name in enumerate(sets):
        for column, score in enumerate(scores):
            axes, counts, edges = grid[row][column], found[score]["counts"], found[score]["edges"]
            axes.stairs(_shares(counts.get("test")), edges, fill=True, color="tab:blue", alpha=0.45)
            if name in counts:
                axes.stairs(_shares(counts[name]), edges, color="tab:red", linewidth=1.2)
            if score == "log_px":
                axes.axvline(report["threshold"]["log_px"], color="black", linestyle="--", linewidth=0.8)
            axes.set_yticks([])
            axes.tick_params(labelsize=7)
        grid[row][0].set_ylabel(_drawable(name, 20), fontsize=8, color="tab:red")
    for column, score in enumerate(scores):
        grid[0][column].set_title(score, fontsize=9)
    how = "share of images by score; blue: test images, red: the set named"
    dashed = "; dashed: threshold" if "log_px" in scores else ""
    figure.suptitle(f"{_title(report)}\n{how}{dashed}", fontsize=10)
    return _png(figure)


def against_picture(against: dict[str, Any]) -> bytes:
    """Two models side by side: a panel a metric of classification and calibration, then the AUROC, a panel a set."""
    upper, lower = _panels(against["rows"])
    heights = [_height(panels) for panels in (upper, lower) if panels]
    figure = _figure(15, sum(heights) + 1.1)
    halves = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for half, panels in zip(halves, [panels for panels in (upper, lower) if panels], strict=True):
        of_auroc = panels is lower
        grid = _grid(half, len(panels), COLUMNS, sharex=of_auroc)
        for axes, (title, rows) in zip(grid, panels.items(), strict=False):
            for k, (_, row) in enumerate(rows):
                for model, colour in enumerate(PAIR):
                    _dot(axes, k + 0.32 * model - 0.16, row["values"][model], colour, "os"[model])
                digits = 3 if of_auroc else 4
                _beside(axes, k, "\n".join(interval_text(value, digits) for value in row["values"]))
            _rows(axes, [label + ("" if verdict(row) == "-" else " *") for label, row in rows])
            axes.set_title(_drawable(title, 34), fontsize=9)
            if of_auroc:
                axes.axvline(0.5, color="black", linestyle="--", linewidth=0.8)
        if of_auroc:
            _range(grid, [value for rows in lower.values() for _, row in rows for value in row["values"]])
    _legend(figure, against["models"])
    return _png(figure)


Panels = dict[str, list[tuple[str, dict[str, Any]]]]


def _panels(rows: Sequence[dict[str, Any]]) -> tuple[Panels, Panels]:
    """By title, (label, row): of classification and calibration by metric, of the AUROC by set."""
    upper: Panels = {}
    lower: Panels = {}
    for row in rows:
        if row["group"] not in ("ood", "robust"):
            key = row["metric"].rsplit("/", 1)[-1]
            title = f"{WORDS.get(key, key)}, {row['better']} is better"
            label = "at temperature" if row["group"] == "after temperature" else "as it is"
            upper.setdefault(title, []).append((label, row))
    aurocs_only = [row for row in rows if row["group"] == "ood" and row["metric"].endswith("/auroc")]
    for title, labelled in sections(aurocs_only).items():
        name = title.removeprefix("ood: ")
        lower[f"AUROC against {name}"] = [(label.removesuffix(f" {WORDS['auroc']}"), row) for label, row in labelled]
    return upper, lower


def _height(panels: Panels) -> float:
    return math.ceil(len(panels) / COLUMNS) * (0.34 * max(map(len, panels.values())) + 0.8)


def _legend(figure: Figure, models: Sequence[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=mark, linewidth=1.5) for colour, mark in zip(PAIR, "os", strict=True)
    ]
    names = [_drawable(model.get("name") or model["source"], 50) for model in models]
    labels = [f"{name} ({model['digest'][:8]})" for name, model in zip(names, models, strict=True)]
    note = "95 % intervals; *: the interval of the paired difference excludes 0"
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9, title=note, title_fontsize=9)


def _grid(figure: Figure | SubFigure, panels: int, columns: int, **shared: Any) -> list[Axes]:
    """Axes row by row; those beyond the last panel are blank."""
    grid = figure.subplots(math.ceil(panels / columns), columns, squeeze=False, **shared).flatten()
    for axes in grid[panels:]:
        axes.set_axis_off()
    for axes in grid[max(0, panels - columns) : panels]:
        axes.tick_params(labelbottom=True)  # sharing hides them above a blank place
    return list(grid[:panels])


def _dot(axes: Axes, y: float, value: Any, colour: str, marker: str) -> None:
    """A figure and its interval, which need not hold it; nothing where it is undefined."""
    found = parts(value)
    if found is not None:
        middle, low, high = found
        axes.plot([low, high], [y, y], color=colour, linewidth=1.8, alpha=0.7)
        axes.plot([middle], [y], color=colour, marker=marker, markersize=4.5)


def _beside(axes: Axes, y: float, text: str) -> None:
    axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=6.5, linespacing=1.1)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """A row a label, the first on top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)


def _range(grid: Sequence[Axes], values: Sequence[Any]) -> None:
    """AUROC from the lowest that occurs, or a little below 0.5, to 1."""
    lows = [min(found[:2]) for found in map(parts, values) if found and not math.isnan(found[1])]
    for axes in grid:
        axes.set_xlim(max(-0.02, min([0.45, *lows]) - 0.03), 1.02)


def _shares(counts: Sequence[float] | None) -> list[float]:
    total = sum(counts or ()) or 1.0
    return [count / total for count in counts or ()]


def _scores(found: Iterable[str]) -> list[str]:
    """Each once: the model's own, then the others in their order."""
    unique = list(dict.fromkeys(found))
    return [score for score in MAIN if score in unique] + [score for score in unique if score not in MAIN]


def _colour(score: str) -> str:
    return COLOURS.get(score, BASELINE)


def _title(report: dict[str, Any]) -> str:
    model = report["model"]
    return f"{_drawable(model.get('name') or model['source'], 36)} on {_drawable(report['data']['name'], 20)}"


def _class_name(report: dict[str, Any], index: int) -> str:
    """A class' name, or its number where the font has no letters for it."""
    name = report["data"]["classes"][index]
    return _drawable(name, 16) if name.strip() and all(map(_has_glyph, shortened(name, 16))) else str(index)


def _drawable(text: str, length: int) -> str:
    """Text that matplotlib draws as it is: shortened, $ no formula, unknown letters as boxes without a warning."""
    return "".join(c if _has_glyph(c) else "□" for c in shortened(text, length)).replace("$", r"\$")


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return font.get_char_index(ord(character)) != 0


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: there is no screen, and this may run in a thread

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
