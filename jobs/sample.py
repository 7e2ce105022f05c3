"""Draw images of a trained JEM:  python jobs/sample.py MODEL [key=value ...]

python jobs/sample.py runs/digits-0b0f8f3c                     100 fresh chains, as long as those of the training
python jobs/sample.py runs/digits-0b0f8f3c class=all           ten of each class, a row a class
python jobs/sample.py models:/jem-digits@champion class=3 steps=2000 count=30
python jobs/sample.py runs/digits-0b0f8f3c init=buffer         the chains that the training left, as they stand

MODEL  a run's folder (its newest checkpoint), a checkpoint directory, the folder of a portable model or the name of
       one that comes with the project (fashion_mnist), models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID, or a
       released JEM .pt (data.name=, model.norm= if needed)

Writes a folder: grid.png, samples.npy (uint8 [n, h, w, c], which a served model's predict takes), samples.json (how
they were drawn; energy, p(y|x), saturation) and chain.gif, the way of the first chains. All or none of it; the same
command replaces it. Samples are not selected. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result
from orchestrator.sampling import sample as draw
from orchestrator.sampling import settings_help

EXIT_CODES = (
    "exit codes: 0 finished, 1 failed, 2 bad configuration or data, 3 the model is damaged, 4 the chains or the model "
    "diverged, 143 stopped"
)


def sample() -> Result:
    parser = Parser(__doc__, f"{settings_help()}\n\n{EXIT_CODES}")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*")
    arguments = parser.parse_intermixed_args()
    sys.path.append(str(Path.cwd()))  # package.module:function of the user's own
    return draw(arguments.model, arguments.settings)


if __name__ == "__main__":
    sys.exit(run_command(sample))
