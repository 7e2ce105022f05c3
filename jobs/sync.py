"""Send to MLflow what it did not take at the time:  python jobs/sync.py [NAME ...] [key=value ...]

python jobs/sync.py                                        all runs in ./runs that MLflow has not got whole
python jobs/sync.py digits-0b0f8f3c                        one; runs/digits-0b0f8f3c does as well
python jobs/sync.py digits_sgld-1f2e3d4c                   a sweep and its trials; .../trials/t003 is one of them
python jobs/sync.py storage_path=/data/runs                those of another storage
python jobs/sync.py digits-0b0f8f3c tracking.uri=http://HOST:5000
                                                           to another MLflow, or where the URI has a password

Every point and picture is there once, however often this is called. A run that is being worked on is left to its
own driver. The last line on stdout is one JSON object, `runs` in it has an entry a run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result

EXIT_CODES = "exit codes: 0 done, 1 some could not be sent, 2 no such run or storage"


def sync() -> Result:
    parser = Parser(__doc__, EXIT_CODES)
    parser.add_argument("arguments", metavar="NAME", nargs="*", help="runs; storage_path=... tracking.uri=... of all")
    arguments = parser.parse_intermixed_args()
    from orchestrator.sync import sync_runs

    return sync_runs(arguments.arguments)


if __name__ == "__main__":
    sys.exit(run_command(sync))
