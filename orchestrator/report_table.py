"""An evaluation as tables on a terminal, made of its report alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.report_further import (
    chains_about,
    chains_table,
    gen_about,
    gen_table,
    masking_lines,
    robust_about,
    robust_tables,
)

if TYPE_CHECKING:
    from rich.console import Console

WORDS = {
    "accuracy": "accuracy",
    "nll": "NLL (nats)",
    "brier": "Brier (0 to 2)",
    "ece": "ECE",
    "ece_equal_mass": "ECE, equal mass",
    "mce": "MCE",
    "ece_classwise": "ECE, class-wise",
    "auroc": "AUROC",
    "aupr_in": "AUPR in",
    "aupr_out": "AUPR out",
    "fpr95": "FPR at 95 % TPR",
}
"""Metrics as people call them."""

CONVENTIONS = {
    "positive class": "in-distribution (the test split) is the positive class, and every score rises with it",
    "AUPR": "average precision, with in-distribution (in) or the others (out) as the positive class",
    "FPR at 95 % TPR": "share of the others accepted where 95 % of the test images are",
    "ECE, MCE": "20 equal-width bins of the top class' probability",
    "bias": "binned errors (ECE, MCE) are biased upward, the more so the smaller the test set",
}
"""What is said where a report brings no conventions of its own."""

CLASSES = 20
"""Classes shown each; of more, the `WORST`."""

WORST = 10

UNDEFINED = "undefined"


def show_report(report: dict[str, Any], console: Console) -> None:
    """Everything measured, each figure with its 95 % interval; what it means and what was left out."""
    for line in _header(report):
        _say(console, line)
    temperature = report["temperature"]
    head = ("test split", "as it is", f"at temperature {temperature['value']:.4g}")
    _table(console, head, classification_rows(report))
    _say(console, f"\ntemperature {temperature_text(temperature)}")
    _say(console, f"threshold   {threshold_text(report['threshold'])}")
    rows, note = per_class_rows(report)
    if rows:
        _say(console, "")
        _table(console, ("class", "n", "accuracy", "precision", "recall", "F1"), rows)
        _say(console, note)
    for name, entry in report.get("ood", {}).items():
        _say(console, f"\nout of distribution: {name}, {entry['n']:,} images: {entry['how']}")
        _say(console, f"share below the threshold: {interval_text(entry.get('called_outside'))}")
        _table(console, *ood_rows(entry))
    _further(console, report)
    _notes(console, report)


def _further(console: Console, report: dict[str, Any]) -> None:
    """Attacks, samples and chains, where they were measured."""
    if robust := report.get("robust"):
        _say(console, f"\nrobust accuracy: {robust_about(robust)}")
        for title, (head, rows) in robust_tables(robust):
            _say(console, f"\n{title}")
            _table(console, head, rows)
        for line in masking_lines(robust):
            _say(console, line)
    if gen := report.get("gen"):
        about, *hows = gen_about(gen)
        _say(console, f"\nsamples: {about}")
        _table(console, *gen_table(gen))
        for how in hows:
            _say(console, how)
    if chains := report.get("chains"):
        _say(console, f"\nchains: {chains_about(chains)}")
        _table(console, *chains_table(chains))


def _header(report: dict[str, Any]) -> Iterator[str]:
    model, data = report["model"], report["data"]
    step = "at an unknown step" if model.get("step") is None else f"at step {model['step']:,}"
    yield f"{model.get('name') or model['source']} {step}: suite {report['suite']}"
    yield f"model  {model['source']}, {model['parameters']:,} parameters, {model['weights']} weights"
    yield f"       sha256 {model['digest']}"
    yield f"data   {data['name']}, {shape_text(data)}, {splits_text(data)}"
    yield f"       sha256 {data['digest']}"
    yield f"test   {report['test']['n']:,} images; in brackets: 95 % bootstrap intervals over them"
    yield ""


def classification_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, as it is, after temperature scaling), a row a metric of the test split."""
    before, after = report["test"], report.get("test_scaled", {})
    rows = []
    for key in _ordered([*before, *after]):
        if key != "n":
            scaled = interval_text(after[key]) if key in after else "the same" if key == "accuracy" else "-"
            rows.append((WORDS.get(key, key), interval_text(before.get(key)), scaled))
    return rows


def per_class_rows(report: dict[str, Any]) -> tuple[list[tuple[str, ...]], str]:
    """A row a class, of many only those of the lowest F1; and what to say of that."""
    found, names = report.get("per_class") or {}, report["data"]["classes"]
    if not found:
        return [], ""
    order = list(range(len(names)))
    note = "n: its images; accuracy: of the answers to whether an image is of this class"
    if len(names) > CLASSES:
        lowest = sorted(order, key=lambda i: (parts(found["f1"][i]) or (-1.0,))[0])
        order, note = lowest[:WORST], f"the {WORST} of the lowest F1 of {len(names)} classes; {note}"
    keys = ("accuracy", "precision", "recall", "f1")
    return [(names[i], f"{found['support'][i]:g}", *(interval_text(found[k][i], 3) for k in keys)) for i in order], note


def ood_rows(entry: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and a row a score of a set's entry, with the metrics that it has."""
    keys = _ordered([key for figures in entry["scores"].values() for key in figures])
    rows = [
        (score, *(interval_text(figures[key], 3) if key in figures else "-" for key in keys))
        for score, figures in entry["scores"].items()
    ]
    return ("score", *(WORDS.get(key, key) for key in keys)), rows


def _notes(console: Console, report: dict[str, Any]) -> None:
    _say(console, "")
    for name, text in conventions(report).items():
        _say(console, f"{name}: {text}")
    noise = report.get("settings", {}).get("noise_std")
    if noise:
        _say(console, f"images: with Gaussian noise of {noise:g} on the [-1, 1] scale")
    for name, why in report.get("left_out", {}).items():
        _say(console, f"left out: {name}: {why}")


def show_against(against: dict[str, Any], console: Console) -> None:
    """Two models on the same images, and what the paired bootstrap says of their difference."""
    for letter, model in zip("AB", against["models"], strict=True):
        _say(console, f"{letter}  {model.get('name') or model['source']}: {model['source']}, sha256 {model['digest']}")
    _say(console, "")
    for title, rows in sections(against["rows"]).items():
        cells = []
        for label, row in rows:
            digits = 3 if row["group"] == "ood" else 4
            values = [interval_text(value, digits) for value in row["values"]]
            cells.append((label, *values, interval_text(row["difference"], digits, signed=True), verdict(row)))
        _table(console, (title, "A", "B", "A - B", "better"), cells)
        _say(console, "")
    _say(console, "A - B: the difference on the same resampled images (paired bootstrap), with its 95 % interval")
    _say(console, "better: named where that interval excludes 0, which about one of 20 does by chance alone")


def sections(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """The rows of two models by section, each with its label: a section a group, and one a set of outliers."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for row in rows:
        if row["group"] == "ood":
            _, name, score, metric = split_ood(row["metric"])
            title, label = f"ood: {name}", f"{score} {WORDS.get(metric, metric)}"
        elif row["group"] == "robust":
            title, label = "accuracy under the strongest attack", row["metric"].removesuffix("/worst/accuracy")
        else:
            key = row["metric"].rsplit("/", 1)[-1]
            title, label = row["group"], WORDS.get(key, key)
        found.setdefault(title, []).append((label, row))
    return found


def split_ood(metric: str) -> tuple[str, str, str, str]:
    """`ood/SET/SCORE/METRIC` in its parts; SET may hold slashes."""
    first, _, rest = metric.partition("/")
    name, score, key = rest.rsplit("/", 2)
    return first, name, score, key


def verdict(row: dict[str, Any]) -> str:
    """Which model is better, A or B, if the interval of the difference excludes 0; else -."""
    found = parts(row["difference"])
    if found is None or not (found[1] > 0 or found[2] < 0):  # a bound may be undefined
        return "-"
    return "A" if (found[1] > 0) == (row["better"] == "higher") else "B"


def conventions(report: dict[str, Any]) -> dict[str, str]:
    return report.get("conventions") or CONVENTIONS


def temperature_text(found: dict[str, Any]) -> str:
    before_after = [
        (WORDS[key], _number(found[f"{key}_before"]), _number(found[f"{key}_after"])) for key in ("nll", "ece")
    ]
    changes = " and ".join(f"{name} from {before} to {after}" for name, before, after in before_after)
    return f"{found['value']:.4g} ({found['reason']}), on the validation split: {changes}"


def threshold_text(found: dict[str, Any]) -> str:
    text = f"log p(x) >= {found['log_px']:.6g} is called in-distribution: {found['tpr']:.0%} of the validation images"
    return text + (f", {interval_text(found['test_accepted'])} of the test images" if "test_accepted" in found else "")


def shape_text(data: dict[str, Any]) -> str:
    c, h, w = data["image_shape"]
    return f"{h}x{w}x{c} images of {len(data['classes'])} classes"


def splits_text(data: dict[str, Any]) -> str:
    return " + ".join(f"{count:,} {split}" for split, count in data["sizes"].items())


def interval_text(value: Any, digits: int = 4, signed: bool = False) -> str:
    """`0.9889 [0.978, 0.997]`; the bounds of small figures have as many digits as the figure."""
    found = parts(value)
    if found is None:
        return UNDEFINED
    sign = "+" if signed else ""
    middle, low, high = found
    if math.isnan(low) or math.isnan(high):
        return f"{middle:{sign}.{digits}f} [{UNDEFINED}]"
    fine = digits if max(abs(low), abs(high)) < 0.01 else min(digits, 3)
    return f"{middle:{sign}.{digits}f} [{low:{sign}.{fine}f}, {high:{sign}.{fine}f}]"


def parts(value: Any) -> tuple[float, float, float] | None:
    """[figure, low, high], bounds that are undefined as NaN; None if the figure is: null, or NaN."""
    found = [math.nan if item is None else float(item) for item in value or ()]
    if len(found) != 3 or math.isnan(found[0]):
        return None
    return found[0], found[1], found[2]


def shortened(text: str, length: int) -> str:
    """One line of at most so many characters, its middle left out."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"


def _number(value: float | None) -> str:
    return UNDEFINED if value is None or math.isnan(value) else f"{value:.4f}"


def _ordered(keys: Sequence[str]) -> list[str]:
    """Each key once, the known ones first and in their order."""
    unique = list(dict.fromkeys(keys))
    return [key for key in WORDS if key in unique] + [key for key in unique if key not in WORDS]


def _say(console: Console, text: str) -> None:
    """A line as it is: paths and digests in one piece, brackets no markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Where the screen, or what stands for it without a terminal, is too narrow, intervals go below their figures.

    Where that is too wide too, lines are longer than the screen: nothing is cut off.
    """
    from rich.measure import Measurement

    table = _drawn(head, rows)
    free = console.options.update(max_width=10_000)
    if Measurement.get(console, free, table).maximum > console.width:
        table = _drawn(head, [[cell.replace(" [", "\n[") for cell in row] for row in rows])
    table.width = Measurement.get(console, free, table).maximum
    console.print(table, soft_wrap=True)


def _drawn(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in head:
        table.add_column(Text(name), no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
