"""Write a data set as checked Parquet files, for data.name=parquet: python jobs/prepare.py SOURCE OUT [KEY=VALUE ...]

python jobs/prepare.py digits /data/digits
python jobs/prepare.py ./photos s3://bucket/photos image_size=64 channels=3
python jobs/prepare.py cifar10 /data/cifar10 root=~/downloads download=false
python jobs/prepare.py --verify /data/digits
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.prepare import prepare_or_verify
from orchestrator.result import Result

EXIT_CODES = "exit codes: 0 finished, 1 failed, 2 bad configuration or data (damaged, OUT not empty), 143 stopped"


def prepare() -> Result:
    parser = Parser(__doc__, EXIT_CODES)
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a data.name, or the path of a folder of images")
    parser.add_argument("out", metavar="OUT", help="an empty or new folder, as a path or any URI that pyarrow knows")
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", help="data.* settings, with or without the data.")
    parser.add_argument("--verify", action="store_true", help="only OUT is given: compare each byte with its checksum")
    arguments = parser.parse_intermixed_args()
    if arguments.verify == (arguments.source is not None):
        what = "--verify takes OUT alone" if arguments.verify else "SOURCE and OUT are both needed"
        parser.error(what)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds as Ctrl-C does: partial files are removed
    sys.path.append(str(Path.cwd()))  # package.module:function of the user's own

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return prepare_or_verify(arguments.source, arguments.out, arguments.changes, say)


if __name__ == "__main__":
    sys.exit(run_command(prepare))
