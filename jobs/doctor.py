"""Is this machine, or the cluster at RAY_ADDRESS, fit to train on?  python jobs/doctor.py [key=value ...]

python jobs/doctor.py storage_path=/shared/runs workers=4
RAY_ADDRESS=head:6379 python jobs/doctor.py storage_path=s3://bucket/runs tracking.uri=http://head:5000

A table of what was looked at, and below it what to do about each failure. Settings are those of jobs/train.py. Without
RAY_ADDRESS it looks at this machine and starts nothing; with it, at every node. It leaves nothing behind. The last line
on stdout is one JSON object; `checks` in it has an entry a row.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result


def doctor() -> Result:
    parser = Parser(__doc__, "exit codes: 0 fit, 1 not, 2 bad configuration")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="storage_path, tracking.uri, workers, device")
    arguments = parser.parse_args()
    from orchestrator.fit import diagnose

    return diagnose(arguments.settings)


if __name__ == "__main__":
    sys.exit(run_command(doctor))
