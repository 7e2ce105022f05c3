"""The tables of README.md and docs/*.md from the runs' figures in docs/results:  python benchmarks/results.py [--check]

A table stands between two markers, each on a line of its own: `<!-- results: NAME -->` and `<!-- end results -->`.
What is between them is written here, from the files that TABLES names; `--check` writes nothing and exits with 1
where text and data differ. If anything is wrong with the markers or the data, no page is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import ablation_tables as ablation
import claims
import robust_tables as robust
import speed_tables as speed
import symptoms

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.sweep.config import Sweep, load_sweep
from orchestrator.sweep.decide import decide
from orchestrator.sweep.summary import summary, table
from orchestrator.sweep.table import BESIDE, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("docs/results")
SPEED = "../../benchmarks/results"

BEGIN = re.compile(r"<!--\s*results:\s*(.*?)\s*-->")
END = "<!-- end results -->"

RECIPES = ("digits", "mnist5k")
"""Of which the paper's claims, robustness and samples were measured."""

SCORED = {
    "digits": ["baseline", "combined", "combined_mixed", "combined_dat", "classifier"],
    "fashion_mnist": ["baseline", "gaussian_prior", "ema", "combined", "combined_full_weight", "classifier"],
}
"""Ablations, and the arms of each of which every score is shown."""

SETS = {"midpoints": "interp", "uniform noise": "uniform", "Fashion-MNIST": "fashion_mnist"}
SCORES = {"log p(x)": "log_px", "max p(y|x)": "max_py", "approx. mass": "approx_mass"}


@dataclass(frozen=True)
class Table:
    """What is between two markers: the files below docs/results that it is made of, and the function of their paths."""

    data: tuple[str, ...]
    build: Callable[..., str]


@dataclass(frozen=True)
class Region:
    """A table as it stands in a page: its lines are those after line `begin`, a marker, and before line `end`."""

    page: str
    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Stale:
    """A table that is not what its data give: `line` is the first one that differs."""

    page: str
    name: str
    line: int
    said: str


@dataclass
class Found:
    """All tables against their data: the pages as they should be, and what is wrong with markers and data."""

    pages: dict[str, str] = field(default_factory=dict)
    stale: list[Stale] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def overview(*paths: Path) -> str:
    """JEM beside its classifier twin, of every recipe; bold where the paired difference excludes 0."""
    seeds = [_json(path)["seeds"] for path in paths]
    found = [claims.summary(runs) for runs in seeds]
    names = ("accuracy", "NLL", "ECE", "NLL at temperature", "ECE at temperature")
    rows = {name: claims.FIGURES[name] for name in names}
    rows |= {f"AUROC, {s}: {p}": f"ood/{SETS[s]}/{SCORES[p]}/auroc" for s in SETS for p in SCORES}
    head = ["", *(f"`{recipe}{twin}`" for recipe in RECIPES for twin in ("", "_classifier"))]
    lines = []
    for label, key in rows.items():
        lower = "NLL" in label or "ECE" in label
        lines.append([label, *(cell for one in found for cell in _twins(one[key], lower))])
    return table(head, lines)


def _twins(figure: Mapping[str, list[float]], lower: bool) -> Iterator[str]:
    """The two models' cells, the better one bold; `lower`: less is better."""
    _, low, high = figure["difference"]
    better = {"jem": high < 0 if lower else low > 0, "classifier": low > 0 if lower else high < 0}
    for model, bold in better.items():
        text = claims.shown(figure[model])
        yield f"**{text}**" if bold else text


def of_claims(others: Sequence[str], path: Path) -> str:
    """Every figure of one recipe, as benchmarks/claims.py prints them; `others`: data sets besides those of all."""
    sets = ["interp", "uniform", "rot90", "textures", "fashion_mnist", *others]
    return claims.table(claims.summary(_json(path)["seeds"]), sets)


def divergence(plain: Path, recovered: Path) -> str:
    """Seed by seed: when a run without recovery was found sick, and what became of one that recovers."""
    alone = {run["seed"]: run for run in _json(plain)["runs"]}
    head = (
        "seed",
        "one process, no recovery: noticed at step",
        "two workers: first noticed at",
        "rollbacks",
        "val accuracy",
        "saturated pixels beyond the data's",
        "last step",
    )
    lines = []
    for run in _json(recovered)["runs"]:
        metrics, rollbacks = run["metrics"], run["rollbacks"]
        sick = alone[run["seed"]]["sick at"]
        cells = [
            run["seed"],
            "no" if sick is None else sick,
            rollbacks[0]["from_step"] if rollbacks else "no",
            ", ".join(f"{back['from_step']} to {back['step']}" for back in rollbacks) or "-",
            f"{metrics['val/accuracy']:.3f}",
            f"{metrics['train/chain_saturation']:.5f}",
            run["step"],
        ]
        lines.append([str(cell) for cell in cells])
    return table(head, lines)


def of_sweep(section: str, path: Path) -> str:
    """A section of the summary of a bundled sweep, made of its trials anew: what a sweep writes into its folder."""
    sweep = bundled(path.parent.name)
    rows = trials(path, sweep)
    _, *sections = re.split(r"^## ", summary(rows, sweep, decide(rows, sweep)), flags=re.MULTILINE)
    (found,) = [text for text in sections if text.startswith(section)]
    return f"### {found.strip()}"


@cache
def bundled(name: str) -> Sweep:
    """Read once, which is most of the time that a sweep's tables take."""
    return load_sweep(name, [])


def trials(path: Path, sweep: Sweep) -> list[Row]:
    """The rows of a sweep's trials.csv."""
    axes = [axis.key for axis in sweep.space]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [_row(line, axes) for line in lines]


def _row(line: Mapping[str, str], axes: Sequence[str]) -> Row:
    beside = {*BESIDE, *axes, "went on from", "run_id", "folder"}
    return Row(
        name=line["name"],
        stage=line["stage"],
        number=int(line["number"]),
        candidate=line["candidate"],
        point={key: _value(line[key]) for key in axes if line[key]},
        seed=int(line["seed"]),
        status=line["status"],
        reason=line["reason"],
        step=int(line["step"]),
        seconds=float(line["seconds"]),
        metrics={key: float(text) for key, text in line.items() if key not in beside and text},
        forks=tuple(filter(None, line.get("went on from", "").split("; "))),
    )


def _value(text: str) -> Any:
    """What trials.csv writes as this: none, JSON, or text as it is."""
    try:
        return None if text == "none" else json.loads(text)
    except ValueError:
        return text


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def first_use(used: Path, trained: Path) -> str:
    """What a new user waits for, and how fast the demo's recipe trains."""
    seconds, metrics = _json(used), _json(trained)["metrics"]
    rows = [
        ("install, warm package cache", f"{seconds['install_s']:.0f} s"),
        ("`make demo` after the install (2,400 steps, start-up and evaluation included)", f"{seconds['demo_s']:.0f} s"),
        ("rate of the digits recipe, K=5, two workers", f"{metrics['train/images_per_s']:,.0f} images/s"),
    ]
    return table(("", "measured"), rows)


TABLES = {
    "step-cpu": Table((f"{SPEED}/step_cpu.json",), speed.steps),
    "scaling": Table((f"{SPEED}/scaling.json",), speed.scaling),
    "start": Table((f"{SPEED}/start.json",), speed.start),
    "evaluation-speed": Table((f"{SPEED}/evaluation_cpu.json",), speed.evaluation),
    "numerics": Table((f"{SPEED}/numerics.json",), speed.numerics),
    "stream": Table((f"{SPEED}/stream.json",), speed.stream),
    "memory-cpu": Table((f"{SPEED}/memory_cpu.json",), speed.memory),
    "first-use": Table(("first_use.json", "digits.json"), first_use),
    "claims": Table(tuple(f"claims_{recipe}.json" for recipe in RECIPES), overview),
    "claims-digits": Table(("claims_digits.json",), partial(of_claims, ["mnist5k"])),
    "claims-mnist5k": Table(("claims_mnist5k.json",), partial(of_claims, ["digits"])),
    "divergence": Table(("divergence_plain.json", "divergence_recovered.json"), divergence),
    "digits_sgld-finalists": Table(("sweeps/digits_sgld/trials.csv",), partial(of_sweep, "Finalists")),
    "digits_sgld-search": Table(("sweeps/digits_sgld/trials.csv",), partial(of_sweep, "Best of the search")),
    "orchestration": Table((f"{SPEED}/orchestration.json",), speed.orchestration),
    **{
        f"ablation-{name}{part}": Table((f"ablation_{name}{file}",), build)
        for name, shown in SCORED.items()
        for part, file, build in (
            ("", "", ablation.figures),
            ("-differences", "", ablation.differences),
            ("-scores", "", partial(ablation.scores, shown)),
            ("-tuning", "_tuning.json", ablation.tuning),
            ("-settings", "", ablation.settings),
        )
    },
    "fashion_mnist-one-by-one": Table(("fashion_mnist_one_by_one.json",), ablation.one_by_one),
    "ablation-digits-recovery": Table(("ablation_digits_recovery",), ablation.recoveries),
    "symptoms": Table(("symptoms_digits.json",), symptoms.ends),
    **{
        name.format(recipe): Table((f"robustness_{recipe}.json",), build)
        for recipe in RECIPES
        for name, build in (
            ("robust-{}", robust.worst),
            ("robust-{}-attacks", robust.attacks),
            ("robust-{}-masking", robust.masking),
            ("samples-{}", robust.generation),
            ("samples-{}-steps", robust.by_step),
            ("samples-{}-chains", robust.chains),
        )
    },
}


def examine(root: Path) -> Found:
    """Build every table that has a place in a page, and compare."""
    found = Found()
    placed = set()
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        page = str(path.relative_to(root))
        before = path.read_bytes().decode()
        lines = before.split("\n")
        placed |= {name for name in map(_begun, lines) if name}
        for region in reversed(list(regions(page, lines, found.wrong))):  # from below, so that line numbers hold
            text = _built(region, root, found.wrong)
            if text is not None:
                made = ["", *text.split("\n"), ""]
                _compare(region, lines[region.begin : region.end - 1], made, found.stale)
                lines[region.begin : region.end - 1] = made
        if "\n".join(lines) != before:
            found.pages[page] = "\n".join(lines)
    found.stale.sort(key=lambda stale: (stale.page, stale.line))
    found.wrong += [_unplaced(name) for name in TABLES if name not in placed]
    return found


def regions(page: str, lines: Sequence[str], wrong: list[str]) -> Iterator[Region]:
    """The tables of a page, top down; what is wrong with its markers is told in `wrong`."""
    name, begin = "", 0

    def unended(limit: str) -> str:
        return f"{page}:{begin}: table {name} has no {END} before {limit}: write it on a line after the table"

    for number, line in enumerate(lines, 1):
        begun = _begun(line)
        if begun is not None:
            if begin:
                wrong.append(unended(f"line {number}, where the next one begins"))
            name, begin = begun, number
        elif line.strip() == END and begin:
            yield Region(page, name, begin, number)
            begin = 0
        elif line.strip() == END:
            wrong.append(f"{page}:{number}: {END} ends no table: write <!-- results: NAME --> before it, or remove it")
    if begin:
        wrong.append(unended("the end of the file"))


def _begun(line: str) -> str | None:
    """The table that begins with this line."""
    marker = BEGIN.fullmatch(line.strip())
    return marker[1] if marker else None


def _built(region: Region, root: Path, wrong: list[str]) -> str | None:
    """The table anew; None, and why in `wrong`, where that cannot be."""
    here = f"{region.page}:{region.begin}"
    if region.name not in TABLES:
        remedy = f"take one of {', '.join(TABLES)}, or add it to TABLES in benchmarks/results.py"
        wrong.append(f"{here}: no table is called {region.name!r}: {remedy}")
        return None
    entry = TABLES[region.name]
    paths = [root / RESULTS / name for name in entry.data]
    missing = [str(path.relative_to(root)) for path in paths if not path.exists()]
    if missing:
        remedy = f"git checkout -- {' '.join(missing)}, or measure again"
        wrong.append(f"{here}: table {region.name} is made of {' and '.join(missing)}, not there: {remedy}")
        return None
    try:
        return entry.build(*paths)
    except (ConfigError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        files = " ".join(str(path.relative_to(root)) for path in paths)
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        wrong.append(f"{here}: table {region.name} cannot be made of {files} ({said}): git checkout -- {files}")
        return None


def _compare(region: Region, has: Sequence[str], made: Sequence[str], stale: list[Stale]) -> None:
    if has == made:
        return
    same = next((i for i, (a, b) in enumerate(zip(has, made, strict=False)) if a != b), min(len(has), len(made)))
    there, given = (repr(lines[same]) if same < len(lines) else "nothing more" for lines in (has, made))
    line = region.begin + 1 + same
    stale.append(Stale(region.page, region.name, line, f"{there} is there, the data give {given}"))


def _unplaced(name: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    number = next((number for number, line in enumerate(lines, 1) if line.lstrip().startswith(f'"{name}":')), 1)
    markers = f"<!-- results: {name} --> and {END}"
    return f"benchmarks/results.py:{number}: table {name} is in no page: write {markers} where it belongs, or remove it"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a table is not what its data give")
    check = parser.parse_args(arguments).check
    found = examine(root)
    for problem in found.wrong:
        print(problem, file=sys.stderr)
    if check:
        for one in found.stale:
            said = f"table {one.name} is out of date: {one.said}: run make results"
            print(f"{one.page}:{one.line}: {said}", file=sys.stderr)
    elif found.wrong:
        print("nothing was written", file=sys.stderr)
    else:
        for page, text in found.pages.items():
            Location.of(root / page).write(text.encode())
        for one in found.stale:
            print(f"{one.page}: table {one.name} made anew")
    if not found.wrong and not found.stale:
        print(f"all {len(TABLES)} tables are what their data give")
    return 1 if found.wrong or (check and found.stale) else 0


if __name__ == "__main__":
    sys.exit(main())
