"""Make a run's final model one that comes with the project:  python benchmarks/bundle.py runs/NAME BUNDLED

Writes jobs/models/BUNDLED: the portable model without the paths of the machine that it was trained on. Then it is
evaluated by that name, as anyone can, and the report, card and pictures are put beside it:

python benchmarks/bundle.py runs/fashion_mnist-1f2e3d4c fashion_mnist [evaluate.*=...]
python benchmarks/bundle.py fashion_mnist [evaluate.*=...]        # the model that is there is measured again
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from jem.predict import CARD, WEIGHTS, read_card
from orchestrator.bundled import MODELS
from orchestrator.evaluation import evaluate_model
from orchestrator.final_model import EXAMPLES
from orchestrator.scoring import portable_folder

OF_A_MACHINE = ("folder", "source", "checkpoint", "uri", "run_id")


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if "=" not in argument]
    name = arguments[-1]
    if len(arguments) == 2:
        take(arguments[0], name)
    measure(name, [argument for argument in sys.argv[1:] if "=" in argument])
    files = sorted((MODELS / name).iterdir())
    size = sum(path.stat().st_size for path in files)
    print(f"{MODELS / name}: {size / 2**20:.1f} MiB; {[path.name for path in files]}")


def take(source: str, name: str) -> None:
    """The run's portable model, in place of what is there."""
    target = MODELS / name
    with tempfile.TemporaryDirectory() as temporary:
        folder = portable_folder(source, None, Path(temporary))
        card = read_card(folder)
        info = {key: value for key, value in card.info.items() if key not in OF_A_MACHINE} | {"name": name}
        target.mkdir(parents=True, exist_ok=True)
        for file in target.iterdir():
            file.unlink()
        for file in (WEIGHTS, EXAMPLES):
            shutil.copyfile(folder / file, target / file)
        text = json.loads((folder / CARD).read_text()) | {"info": info}
        (target / CARD).write_text(json.dumps(text, indent=1) + "\n")
    assert dataclasses.replace(card, info=info) == read_card(target)


def measure(name: str, settings: list[str]) -> None:
    """Its report, card and pictures."""
    target = MODELS / name
    with tempfile.TemporaryDirectory() as temporary:
        report = evaluate_model(name, None, [*settings, f"storage_path={temporary}"], Console(stderr=True)).report
        assert report is not None
        made = Path(report).parent
        text = json.loads((made / "report.json").read_text())
        (target / "report.json").write_text(json.dumps(text) + "\n")  # a line, not 46,000
        for file in ("model_card.md", *(path.name for path in made.glob("*.png"))):
            shutil.copyfile(made / file, target / file)


if __name__ == "__main__":
    main()
