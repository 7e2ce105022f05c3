"""Every table of results in README.md and docs is what the files in docs/results give."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WRITTEN_BY_HAND = (
    "| | metric | convention |",
    "| fault | promise | test | measured |",
    "| Ray Train gives | ours, because |",
    "| what is seen | metric | cause | what to turn |",
)
"""First lines of the tables that no file of results is behind."""


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


@pytest.fixture
def copy(tmp_path):
    """The pages and their data, elsewhere."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("images"))
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def texts(root):
    return {path.name: path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md"))}


def line_of(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_the_tables_are_what_their_data_give(results, capsys):
    assert results.main(["--check"]) == 0, capsys.readouterr().err


def test_no_other_table_holds_results():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        rest = re.sub(r"<!-- results: .*?<!-- end results -->", "", page.read_text(), flags=re.DOTALL)
        for head in re.findall(r"^(\|.*)\n\|[ :|-]+\|$", rest, re.MULTILINE):
            assert head in WRITTEN_BY_HAND, f"{page.name}: {head} is a table without <!-- results: NAME --> around it"


@pytest.mark.parametrize(
    ("page", "name", "old", "new"),
    [
        ("README.md", "claims", "**0.048 ± 0.004**", "**0.049 ± 0.004**"),
        ("docs/evaluation.md", "claims-digits", "0.520 ± 0.041", "0.530 ± 0.041"),
        ("docs/evaluation.md", "claims-mnist5k", "| ECE | 0.024", "| ECE | 0.025"),
        ("docs/reliability.md", "divergence", "| 4 | 250 |", "| 4 | 275 |"),
        ("docs/sweeps.md", "digits_sgld-finalists", "0.070 ± 0.012", "0.060 ± 0.012"),
        ("docs/sweeps.md", "digits_sgld-search", "| 0.4274 |", "| 0.4275 |"),
    ],
)
def test_a_figure_that_was_changed_is_found_and_made_right(results, copy, capsys, page, name, old, new):
    before = texts(copy)
    edit(copy / page, old, new)
    changed = texts(copy)
    assert results.main(["--check"], copy) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{page}:{line_of(copy / page, new)}: table {name} is out of date: ")
    assert said.endswith(": run make results")
    assert new in said
    assert old in said
    assert texts(copy) == changed
    assert results.main([], copy) == 0
    assert capsys.readouterr().out == f"{page}: table {name} made anew\n"
    assert texts(copy) == before


def test_a_row_that_is_gone_comes_back(results, copy, capsys):
    page, before = copy / "docs/evaluation.md", texts(copy)
    last = line_of(page, "| AUROC mnist5k: vim |")
    edit(page, before["evaluation.md"].splitlines(keepends=True)[last - 1], "")
    assert results.main(["--check"], copy) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"docs/evaluation.md:{last}: table claims-digits is out of date: '' is there, the data give '|"
    )
    assert results.main([], copy) == 0
    assert texts(copy) == before


def test_made_again_nothing_changes_and_no_file_is_touched(results, copy, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert results.main([], copy) == 0
    assert "what their data give" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == stamps


def test_a_run_that_was_measured_anew_is_in_every_table(results, copy, capsys):
    path = copy / "docs/results/claims_digits.json"
    data = json.loads(path.read_text())
    for seed in data["seeds"]:
        seed["jem"]["test/accuracy"] = 0.5
    path.write_text(json.dumps(data))
    assert results.main([], copy) == 0
    assert capsys.readouterr().out.splitlines() == [
        "README.md: table claims made anew",
        "docs/evaluation.md: table claims-digits made anew",
    ]
    assert "| accuracy | 0.500 ± 0.000 | **0.979 ± 0.004** |" in (copy / "README.md").read_text()
    assert "| accuracy | 0.500 ± 0.000 | 0.979 ± 0.004 | **-0.479" in (copy / "docs/evaluation.md").read_text()


def test_a_sweeps_decision_is_that_of_its_trials(results):
    folder = ROOT / "docs/results/sweeps/digits_sgld"
    sweep = results.bundled(folder.name)
    written = json.loads(json.loads((folder / "decision.json").read_text())["decision"])
    decided = json.loads(results.decide(results.trials(folder / "trials.csv", sweep), sweep).json())
    for candidate in decided["candidates"]:
        candidate["metrics"].pop("val/temperature", None)  # of the winner, evaluated once it was decided
    assert decided == written


MARKER = "<!-- results: divergence -->"
END = "<!-- end results -->"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            MARKER,
            "<!-- results: divergances -->",
            r"{page}:{line}: no table is called 'divergances': take one of step-cpu, ",
        ),
        (MARKER, "", r"{page}:\d+: <!-- end results --> ends no table: write <!-- results: NAME -->"),
        (END, "", r"{page}:{line}: table divergence has no <!-- end results --> before the end of the file: write it"),
        (END, MARKER, r"{page}:{line}: table divergence has no <!-- end results --> before line \d+, where the next"),
    ],
)
def test_a_wrong_marker_is_told_and_nothing_is_written(results, copy, capsys, old, new, says):
    line = line_of(copy / "docs/reliability.md", MARKER)
    edit(copy / "docs/reliability.md", old, new)
    edit(copy / "README.md", "**0.048 ± 0.004**", "**0.049 ± 0.004**")
    before = texts(copy)
    for arguments in (["--check"], []):
        assert results.main(arguments, copy) == 1
        assert re.match(says.format(page="docs/reliability.md", line=line), capsys.readouterr().err)
    assert texts(copy) == before


def test_a_table_without_a_place_is_told(results, copy, capsys):
    path = copy / "docs/reliability.md"
    path.write_text(path.read_text().replace(MARKER, "").replace(END, ""))
    assert results.main(["--check"], copy) == 1
    (said,) = capsys.readouterr().err.splitlines()
    line = line_of(ROOT / "benchmarks/results.py", '"divergence": ')
    assert said.startswith(f"benchmarks/results.py:{line}: table divergence is in no page: write {MARKER} and {END}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is made of docs/results/divergence_plain.json, not there: git checkout -- "),
        ("{", "cannot be made of docs/results/divergence_plain.json .*JSONDecodeError.*: git checkout -- "),
        ('{"runs": []}', "cannot be made of docs/results/divergence_plain.json .*KeyError: 0.*: git checkout -- "),
    ],
)
def test_data_that_are_missing_or_damaged_are_told(results, copy, capsys, content, says):
    path = copy / "docs/results/divergence_plain.json"
    path.unlink() if content is None else path.write_text(content)
    assert results.main([], copy) == 1
    line = line_of(copy / "docs/reliability.md", MARKER)
    said, last = capsys.readouterr().err.splitlines()
    assert re.match(f"docs/reliability.md:{line}: table divergence {says}", said)
    assert last == "nothing was written"
