"""Train a joint energy model:  python jobs/train.py RECIPE [key=value ...] [--dry-run] [--fresh]

The same command continues a run that was stopped and reads out one that is finished. seeds=5 trains with five
seeds, as many at once as fit, and ends with the mean and the 95 % interval of each figure. The last line on
stdout is one JSON object. Exit codes: 0 done, 1 failed, 2 bad configuration or data, 3 no good checkpoint,
4 diverged beyond recovery, 143 stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout wins over an installed copy

from orchestrator.command import Parser, run_command
from orchestrator.config import bundled_recipes, load_run_config
from orchestrator.help import settings_help
from orchestrator.result import Result


def train() -> Result:
    parser = Parser(__doc__, settings_help(bundled_recipes()))
    parser.add_argument("recipe", help="a bundled recipe's name, or a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting below, by its dotted path")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and start nothing")
    parser.add_argument("--fresh", action="store_true", help="keep the old run as NAME.1 and start anew")
    arguments = parser.parse_intermixed_args()
    sys.path.append(str(Path.cwd()))  # package.module:function of the user's own
    config = load_run_config(arguments.recipe, arguments.settings)
    if arguments.dry_run:
        from orchestrator.plan import plan

        return plan(config)
    if config.seeds > 1:
        from orchestrator.sweep.seeds import run_seeds, show_seeds

        several = run_seeds(config, arguments.fresh)
        show_seeds(several)
        return several
    from orchestrator.launch import launch
    from orchestrator.result import show

    result = launch(config, arguments.fresh)
    show(result)
    return result


if __name__ == "__main__":
    sys.exit(run_command(train))
