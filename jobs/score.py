"""Score a data set of any size:  python jobs/score.py MODEL DATA OUT [key=value ...]

python jobs/score.py models:/jem-digits@champion /data/digits ./scores split=test
python jobs/score.py runs/photos ./new_photos ./scores
python jobs/score.py runs/digits-0b0f8f3c photos.parquet ./scores column=picture 'keep=[id]'
python jobs/score.py ./model s3://bucket/images s3://bucket/scores rows_per_unit=100000

MODEL  the folder of a portable model, the name of one that comes with the project (fashion_mnist), a run's folder,
       models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID
DATA   what jobs/prepare.py wrote, or any Parquet file or folder of such, as a path or any URI that pyarrow knows;
       images as tensors or lists of uint8 [c, h, w], or as PNG or JPEG, all of the model's size;
       or a folder of image files of any sizes, which are cut to squares and resized as for training
OUT    a folder or URI: one Parquet file a unit of rows, scores.json when all is done

Columns of the scores: file, row, label, index, probability, probabilities, log_density, in_distribution, and
true_label where the data have labels: a column, or a folder of image files laid out as for training.
The work is done by Ray Data, on this machine or the cluster at RAY_ADDRESS. The same command goes on with the units
that are missing. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result
from orchestrator.score_config import settings_help
from orchestrator.scoring import score as score_all

EXIT_CODES = (
    "exit codes: 0 finished, 1 failed, 2 bad configuration or data, 3 the model is damaged, 4 the model has diverged, "
    "143 stopped"
)


def score() -> Result:
    parser = Parser(__doc__, f"{settings_help()}\n\n{EXIT_CODES}")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*")
    arguments = parser.parse_intermixed_args()
    sys.path.append(str(Path.cwd()))  # package.module:function of the user's own
    return score_all(arguments.model, arguments.data, arguments.out, arguments.changes)


if __name__ == "__main__":
    sys.exit(run_command(score))
