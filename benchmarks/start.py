"""How long a run takes to begin, and to end:  python benchmarks/start.py [--times 7] [--out FILE]

`python jobs/train.py digits steps=20`, again and again: seconds from the command to the end of its first training step
(as events.jsonl tells), and from its last step to its end. With one and with two workers, on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, save, steps_logged

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20


def once(workers: int) -> dict[str, float]:
    """Seconds to the first step, and from the last one on."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["seed=0", f"steps={STEPS}", "tracking.every=1", f"workers={workers}", f"storage_path={folder}"]
        command = [sys.executable, str(ROOT / "jobs/train.py"), "digits", *settings, "evaluate.suite=none"]
        begin = time.time()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        end = time.time()
        (log,) = Path(folder).glob("*/events.jsonl")
        events = [json.loads(line) for line in log.read_text().splitlines()]
    trained = steps_logged(events)
    return {"first_step_s": trained[1] - begin, "end_s": end - trained[STEPS]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/start.py", *sys.argv[1:]]),
        "hardware": machine(),
        "workers": {},
    }
    for workers in (1, 2):
        once(workers)  # the disk's cache is warm from here on
        rows = [once(workers) for _ in range(arguments.times)]
        found = {}
        for key in rows[0]:
            values = sorted(row[key] for row in rows)
            found[key] = {
                "median": round(statistics.median(values), 1),
                "range": [round(values[0], 1), round(values[-1], 1)],
            }
        result["workers"][str(workers)] = found | {"runs": arguments.times}
        print(f"{workers} workers: {json.dumps(found)}", flush=True)
    save(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
