"""Register a model that was trained elsewhere in your MLflow:  python jobs/register.py MODEL [key=value ...]

python jobs/register.py fashion_mnist                         the model that comes with this project
python jobs/register.py ./from_a_colleague storage_path=/data/runs
python jobs/register.py runs/digits-0b0f8f3c tracking.uri=http://HOST:5000

MODEL is the folder of a portable model (model.json and what lies beside it), a run's folder, or a bundled name. It
becomes a version of jem-DATA, so that models:/jem-DATA@champion and `mlflow models serve` find it; figures and
pictures beside it go into an MLflow run of its own. Called again, nothing is there twice. What is trained here is
registered by itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result

EXIT_CODES = "exit codes: 0 done, 1 MLflow did not take it, 2 no such model, 3 damaged model"


def register() -> Result:
    parser = Parser(__doc__, EXIT_CODES)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="storage_path, tracking.uri, tracking.experiment, evaluate.model_name, evaluate.champion",
    )
    arguments = parser.parse_intermixed_args()
    sys.path.append(str(Path.cwd()))  # package.module:function of the user's own
    from orchestrator.registering import register_model

    return register_model(arguments.model, arguments.settings)


if __name__ == "__main__":
    sys.exit(run_command(register))
