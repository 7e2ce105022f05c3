"""What the README shows is what the project does."""

from __future__ import annotations

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
        assert f"`{re.sub('_(paper|classifier)$', '', recipe.stem)}`" in README


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 1000


def test_the_table_of_results_is_that_of_the_runs():
    columns = [f"test/{key}" for key in ("accuracy", "nll", "ece")]
    columns += [f"ood/{o}/{s}/auroc" for o in ("interp", "uniform") for s in ("log_px", "max_py", "approx_mass")]
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for recipe, step, figures in rows:
        run = json.loads((ROOT / "docs" / "results" / f"{recipe}.json").read_text())
        assert run["step"] == int(step)
        assert figures.split(" | ") == [f"{run['metrics'][key]:.3f}" for key in columns]
