"""Run a command as a job on a Ray cluster:  python jobs/submit.py [options] python jobs/train.py RECIPE ...

python jobs/submit.py python jobs/train.py digits storage_path=s3://bucket/runs
python jobs/submit.py --no-wait python jobs/sweep.py digits_sgld storage_path=/shared/runs

As `ray job submit --working-dir . -- ...`, and besides: a folder too large to upload is refused with its ten largest
files, the code's commit becomes a tag of the run, and exit code and last line are those of the command itself.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result

EXIT_CODES = "exit codes: that of the command; 1 no cluster answers, 2 nothing that can be submitted"


def submit() -> Result:
    parser = Parser(__doc__, EXIT_CODES)
    parser.add_argument("--address", help="of the cluster's dashboard; default as for ray job submit")
    parser.add_argument("--working-dir", type=Path, help="what is uploaded; default: this checkout")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the job; not for secrets")
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job's log")
    parser.add_argument("command", nargs="...", help="what runs there, in the uploaded folder")
    arguments = parser.parse_args()
    from orchestrator import submit as jobs

    folder = (arguments.working_dir or ROOT).resolve()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    return jobs.submit(command, arguments.address, folder, not arguments.no_wait, arguments.env)


if __name__ == "__main__":
    sys.exit(run_command(submit))
