"""What runs there are, what is wrong with them, and the command to type next:  python jobs/runs.py [NAME ...]

python jobs/runs.py                                  all runs in ./runs, a row a run, newest first
python jobs/runs.py digits-0b0f8f3c                  one in detail; runs/digits-0b0f8f3c does as well
python jobs/runs.py storage_path=s3://bucket/runs    those of another storage
python jobs/runs.py --verify digits-0b0f8f3c         compare every byte of its checkpoints with its checksum

Sweeps and several seeds follow below the table; named, they show their trials. It only reads, and can be asked at any
time. The last line on stdout is one JSON object, `runs` in it has an entry a run, `folders` one of each of these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result

EXIT_CODES = "exit codes: 0 done, 1 --verify found damage, 2 no such run or storage, 3 --verify found nothing good"


def runs() -> Result:
    parser = Parser(__doc__, EXIT_CODES)
    parser.add_argument("arguments", metavar="NAME", nargs="*", help="runs to show in detail; storage_path=... of all")
    parser.add_argument("--verify", action="store_true", help="read every byte of the checkpoints")
    arguments = parser.parse_intermixed_args()
    from orchestrator.overview import overview

    return overview(arguments.arguments, arguments.verify, str(Path(sys.argv[0]).parent))


if __name__ == "__main__":
    sys.exit(run_command(runs))
