"""Search for settings:  python jobs/sweep.py SWEEP [key=value ...] [--dry-run] [--fresh]

Trials of a recipe with other settings, as many at once as fit; the best ones again over several seeds, beside the
recipe as it is; a decision. Or an ablation (python jobs/sweep.py ablation_digits): named arms, each trained with every
seed and compared with the first. The same command goes on with a sweep that was stopped. The last line on stdout is
one JSON object. Exit codes as jobs/train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.result import Result
from orchestrator.sweep.config import load_sweep
from orchestrator.sweep.help import settings_help


def sweep() -> Result:
    parser = Parser(__doc__, settings_help())
    parser.add_argument("sweep", help="a bundled sweep's name, or a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting below, or any of a run")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and start nothing")
    parser.add_argument("--fresh", action="store_true", help="keep the old sweep as NAME.1 and start anew")
    arguments = parser.parse_intermixed_args()
    sys.path.append(str(Path.cwd()))  # package.module:function of the user's own
    loaded = load_sweep(arguments.sweep, arguments.settings)
    if arguments.dry_run:
        from orchestrator.sweep.plan import plan

        return plan(loaded)
    if loaded.arms:
        from orchestrator.sweep.ablation import run_ablation

        compared = run_ablation(loaded, arguments.fresh)
        print(f"{compared.name}: {compared.status}. {compared.verdict}")
        return compared
    from orchestrator.sweep.driver import run_sweep

    result = run_sweep(loaded, arguments.fresh)
    print(f"{result.name}: {result.status}. {result.verdict}")
    return result


if __name__ == "__main__":
    sys.exit(run_command(sweep))
