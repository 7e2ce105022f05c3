"""What the README shows is what the project does."""

from __future__ import annotations

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
