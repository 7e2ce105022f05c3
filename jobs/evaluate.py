"""Measure a trained model:  python jobs/evaluate.py MODEL [key=value ...] [--against MODEL]

python jobs/evaluate.py runs/digits-0b0f8f3c                  a run's newest checkpoint, or a checkpoint directory
python jobs/evaluate.py models:/jem-digits@champion           a registered model; runs:/ID for a run's
python jobs/evaluate.py fashion_mnist                         the model that comes with the project
python jobs/evaluate.py runs/JEM --against runs/CLASSIFIER    two models on the same images, and their differences
python jobs/evaluate.py released.pt data.name=cifar10 data.root=~/data evaluate.noise_std=0.03

Accuracy, calibration before and after temperature scaling, and out-of-distribution detection, each with a 95 %
interval; suite `full` unless evaluate.suite=fast. Report, plots and model card are kept beside the run and in its
MLflow run. Asked again, it answers from there. workers=N spreads the work over N Ray workers, for the same bits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.help import free_help
from orchestrator.result import Result

EXIT_CODES = "exit codes: 0 done, 1 failed, 2 bad configuration or data, 3 damaged checkpoint, 4 diverged, 143 stopped"


def evaluate() -> Result:
    parser = Parser(__doc__, f"{EXIT_CODES}\n\n{free_help()}")
    parser.add_argument("model", metavar="MODEL", help="what to measure")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="any below, workers; of a .pt also model.*, data.*"
    )
    parser.add_argument("--against", metavar="MODEL", help="another model of the same data: its classifier twin")
    arguments = parser.parse_intermixed_args()
    sys.path.append(str(Path.cwd()))  # package.module:function of the user's own
    from rich.console import Console

    from orchestrator.evaluation import evaluate_model

    return evaluate_model(arguments.model, arguments.against, arguments.settings, Console(width=120))


if __name__ == "__main__":
    sys.exit(run_command(evaluate))
