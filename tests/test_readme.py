"""What the README shows is what the project does."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shortened = example.replace("steps=200", "steps=2")
    assert shortened != example
    names: dict = {}
    exec(shortened, names)
    assert names["samples"].shape == (16, 1, 8, 8)
    assert names["state"].step == 2
    assert "log p(x)" in capsys.readouterr().out


def test_the_tree_names_every_module():
    tree = README[README.index("### Tree") : README.index("## Development")]
    for package in ("jem", "orchestrator"):
        for module in (ROOT / package).glob("*.py"):
            if module.name != "__init__.py":
                assert module.name in tree, f"{package}/{module.name} is not in the README's tree"


def test_every_recipe_is_named():
    for recipe in (ROOT / "jobs" / "recipes").glob("*.yaml"):
        assert f"`{re.sub('_(paper|classifier|lenet)$', '', recipe.stem)}`" in README


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 1000


def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("claims")
    results = {
        name: json.loads((ROOT / f"docs/results/claims_{name}.json").read_text()) for name in ("digits", "mnist5k")
    }
    return module, results


def test_the_table_of_results_is_that_of_the_runs(monkeypatch):
    module, results = claims(monkeypatch)
    rows = re.findall(
        r"^\| (accuracy|NLL.*?|ECE.*?|AUROC.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", README, re.MULTILINE
    )
    assert len(rows) == 14
    sets = {"midpoints": "interp", "uniform noise": "uniform", "Fashion-MNIST": "fashion_mnist"}
    scores = {"log p(x)": "log_px", r"max p(y\|x)": "max_py", "approx. mass": "approx_mass"}
    for label, *cells in rows:
        set_name, colon, score = label.removeprefix("AUROC, ").partition(": ")
        key = f"ood/{sets[set_name]}/{scores[score]}/auroc" if colon else module.FIGURES[label]
        columns = [(name, model) for name in results for model in ("jem", "classifier")]
        for cell, (name, model) in zip(cells, columns, strict=True):
            seeds = results[name]["seeds"]
            mean, low, high = module.interval([seed[model][key] for seed in seeds])
            assert cell.strip("*") == f"{mean:.3f} ± {(high - low) / 2:.3f}"
            _, low, high = module.interval([seed["jem"][key] - seed["classifier"][key] for seed in seeds])
            higher, lower = (low > 0, high < 0) if model == "jem" else (high < 0, low > 0)
            assert cell.startswith("**") == (lower if "ECE" in label or "NLL" in label else higher)
