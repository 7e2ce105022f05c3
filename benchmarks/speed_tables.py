"""The tables of docs/performance.md, each from the file that its benchmark wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import claims

from orchestrator.sweep.summary import table


def steps(path: Path) -> str:
    """Our step beside the released code's, a matrix product and a plain classifier's."""
    head = (
        *("network, batch, K", "mode", "released code's step", "ours", "times as fast"),
        *("of the product's rate", "classifiers' steps it costs", "by arithmetic"),
    )
    rows = []
    for name, modes in _json(path)["cases"].items():
        for mode, found in modes.items():
            paper, product, plain = (found[f"against_{other}"] for other in ("paper", "product", "classifier"))
            seconds = [_ms(each) for each in paper["seconds"]]
            cost = f"{plain['ratio']:.1f}", f"{plain['arithmetic']:.1f}"
            rows.append([name, mode, *seconds, _ratio(paper), f"{product['ratio']:.0%}", *cost])
    return table(head, rows)


def orchestration(path: Path) -> str:
    """A run by jobs/train.py beside the bare loop."""
    found = _json(path)
    low, high = (f"{100 * (each - 1):+.1f} %" for each in found["range"])
    row = [
        *(f"{found['bare_s']:.0f} s", f"{found['orchestrated_s']:.0f} s", f"{100 * (found['ratio'] - 1):+.1f} %"),
        *(f"{low} to {high}", str(found["checkpoints"]), f"{found['outside_s']:.0f} s"),
    ]
    head = ("bare loop", "jobs/train.py", "difference", "of the pairs", "checkpoints", "start-up and end, besides")
    return table(head, [row])


def scaling(path: Path) -> str:
    """Two workers of one run beside two runs."""
    rows = []
    for name, found in _json(path)["cases"].items():
        rates = [f"{found['images_per_s'][kind]:,.0f}" for kind in ("alone", "together")]
        low, high = found["range"]
        rows.append([name, *rates, f"{found['ratio']:.1%} ({low:.1%} to {high:.1%})", f"{found['not_hidden']:.1%}"])
    head = ("work", "images/s of two runs", "of two workers", "ratio", "averaging that is not hidden")
    return table(head, rows)


def start(path: Path) -> str:
    """From the command to the first step, and from the last step to the end."""
    head = ("workers", "command to first step", "last step to end", "runs")
    rows = []
    for workers, found in _json(path)["workers"].items():
        cells = [f"{one['median']:.1f} s ({one['range'][0]:.1f} to {one['range'][1]:.1f})" for one in _two(found)]
        rows.append([workers, *cells, str(found["runs"])])
    return table(head, rows)


def _two(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [found["first_step_s"], found["end_s"]]


def evaluation(path: Path) -> str:
    """FLOP a second of an evaluation over those of training."""
    rows = []
    for name, found in _json(path)["suites"].items():
        low, high = found["range"]
        ratio = f"{found['ratio']:.0%} ({low:.0%} to {high:.0%})"
        cells = f"{found['images']:,}", f"{found['gflop']:,}", f"{found['seconds']:.1f} s"
        rows.append([f"`evaluate.suite={name}`", *cells, f"{found['of_the_network']:.0%}", ratio])
    head = ("suite", "images a split", "GFLOP", "time", "of it in the network", "FLOP/s, of training's")
    return table(head, rows)


def memory(path: Path) -> str:
    """The sampling phase's peak above what was held before, by K, and the bytes of a buffer by its storage."""
    measured = _json(path)
    peaks, buffer = measured["sampling_peak"], measured["buffer"]
    by_steps = list(peaks["ours"])
    rows = [[kind, *(f"{of[k]['median_mib']:.0f} MiB" for k in by_steps)] for kind, of in peaks.items()]
    first = table((f"peak of sampling, {measured['network']}", *(f"K={k}" for k in by_steps)), rows)
    shape = " x ".join(map(str, buffer["shape"]))
    sizes = [f"{size / 1e6:.0f} MB" for size in buffer["bytes"].values()]
    chains = [f"{buffer['chains']:,} chains {shape}", *sizes]
    return f"{first}\n\n" + table(("`replay.dtype`", *buffer["bytes"]), [chains])


def stream(path: Path) -> str:
    """Training from the disk beside training from memory."""
    found = _json(path)
    ratios = []
    for kind in ("in between", "while reading"):
        one = found["training"][kind]
        ratios.append(f"{one['ratio']:.3f} ({one['range'][0]:.3f} to {one['range'][1]:.3f})")
    row = [
        *(f"{found['images']:,} ({found['gigabytes']:g} GB)", f"{found['peak_anonymous_gb']:.2f} GB"),
        *(f"{found['images_per_s_read']:,}", f"{found['window_read_s']:g} s of {found['window_lasts_s']:,} s", *ratios),
    ]
    head = (
        *("images", "anonymous memory at most", "images/s read", "reading a window, of the time it lasts"),
        *("step, of that from memory", "while a window is read"),
    )
    return table(head, [row])


def numerics(path: Path) -> str:
    """What each change of precision or storage does to the figures, seed by seed."""
    found = _json(path)["summary"]
    means, differences = found["means"]["float32"], found["differences"]
    rows = [
        [key, claims.shown(mean), *(claims.shown(pair[key], signed=True) for pair in differences.values())]
        for key, mean in means.items()
    ]
    return table(("figure", "float32", *differences), rows)


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _ratio(found: dict[str, Any]) -> str:
    low, high = found["range"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"
