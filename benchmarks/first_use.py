"""What a new user waits for:  python benchmarks/first_use.py [--out FILE]

A fresh clone of what is committed here; in it `make install` and then `make demo`, with whatever the package cache has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, save

ROOT = Path(__file__).resolve().parents[1]


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    begin = time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return round(time.monotonic() - begin, 1), done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="first-use-")) / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    install, _ = timed(["make", "install"], folder)
    demo, out = timed(["make", "demo"], folder)
    last = json.loads(next(line for line in reversed(out.splitlines()) if line.startswith("{")))
    result = {
        "command": " ".join(["python benchmarks/first_use.py", *sys.argv[1:]]),
        "hardware": machine(),
        "install_s": install,
        "demo_s": demo,
        "demo": {key: last[key] for key in ("status", "step")} | {"accuracy": last["metrics"]["test/accuracy"]},
    }
    print(json.dumps(result, indent=1))
    save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
