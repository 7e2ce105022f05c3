"""jobs/train.py up to where Ray would start: help, mistakes, dry runs, runs that are finished."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from commands import TRAIN, bring, imported, train

from jobs import train as job
from orchestrator.config import load_run_config
from orchestrator.runs import RunRecord

HEAVY = {"torch", "ray", "mlflow", "numpy", "torchvision", "sklearn", "pyarrow"}
FAST = ("steps=4", "batch_size=8", "model.channels=[4]", "sgld.steps=1", "replay.capacity=16")


def test_help_names_recipes_and_settings_and_imports_nothing_heavy(tmp_path):
    ended, modules = imported(tmp_path, "--help")
    assert ended.code == 0
    assert not HEAVY & modules
    assert "yaml" in modules, "the imports are seen"
    for text in ("cifar10_paper", "digits_classifier", "--dry-run", "--fresh", "key=value"):
        assert text in ended.out
    for setting in ("workers = required", "sgld.step_size = 1", "evaluate.suite = 'fast'", "none | fast", "143"):
        assert setting in ended.out, setting


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("digits", "sgld.step=3", "workers=0"), ("did you mean 'sgld.steps'?", "workers: is 0, must be at least 1")),
        (("digitz",), ("did you mean 'digits'?",)),
        (("digits", "--nonsense"), ("--nonsense",)),
        ((), ("recipe",)),
    ],
    ids=["two mistakes", "unknown recipe", "unknown option", "no recipe"],
)
def test_a_bad_command_ends_with_json_before_anything_heavy_is_imported(tmp_path, arguments, said):
    ended, modules = imported(tmp_path, *arguments)
    assert ended.code == 2
    assert not HEAVY & modules
    assert ended.result["status"] == "bad configuration"
    assert len(ended.out.splitlines()) == 1
    for text in said:
        assert text in ended.result["message"]
        assert text in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.glob("runs*")) == []


def test_a_dry_run_needs_no_data_and_starts_no_ray(tmp_path):
    ended, modules = imported(tmp_path, "cifar10", f"data.root={tmp_path}/empty", "--dry-run", "workers=4")
    assert ended.code == 0, ended.err
    assert "torch" in modules
    assert not {"ray", "mlflow", "torchvision", "sklearn"} & modules
    result = ended.result
    assert (result["status"], result["step"], result["checkpoint"]) == ("planned", 0, None)
    assert result["name"].startswith("cifar10-")
    assert result["metrics"]["parameters"] == 36_471_338
    for text in ("depth: 28", "workers: 4", f"{tmp_path}/empty", "GFLOP", "36,471,338", "MiB", "train 45,000"):
        assert text in ended.out, text
    assert {path.name[:3] for path in tmp_path.iterdir()} == {"std"}, "something was written"


@pytest.mark.parametrize("buffered", [[], ["-u"]])
def test_a_reader_that_goes_is_no_error(tmp_path, buffered):
    command = [sys.executable, *buffered, str(TRAIN), "digits", "--dry-run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)


def test_options_may_stand_anywhere(here):
    ended = here(job.train, "--dry-run", "digits", "workers=1", "--fresh", "seed=3")
    assert ended.code == 0, ended.err
    assert "seed: 3" in ended.out


def test_a_function_of_ones_own_is_found_where_the_command_is_typed(tmp_path, here):
    bring(tmp_path, "slow_net.py")
    ended = train(tmp_path, "digits", "--dry-run", "model.name=slow_net:slow", "model.channels=[4]")
    assert ended.code == 0, ended.err
    assert ended.result["metrics"]["parameters"] == 40 + 4 * 64 * 10 + 10
    missing = here(job.train, "digits", "--dry-run", "model.name=other:slow")
    assert missing.code == 2
    assert "there is no module 'other'" in missing.result["message"]


def test_a_finished_run_is_read_out_and_no_ray_is_started(tmp_path):
    run = tmp_path / "runs" / "done"
    config = load_run_config("digits", ["name=done", *FAST])
    result = {
        **{"run_id": "abc", "name": "done", "checkpoint": f"{run}/checkpoints/4", "step": 4, "status": "finished"},
        "metrics": {"test/accuracy": 0.5, "val/nll": math.nan},
    }
    run.mkdir(parents=True)
    record = RunRecord("done", config.science, "digest", "finished", result=result)
    (run / "run.json").write_text(json.dumps(vars(record)))
    ended, modules = imported(tmp_path, "digits", "name=done", *FAST)
    assert ended.code == 0, ended.err
    assert "ray" not in modules
    assert (result | {"metrics": {"test/accuracy": 0.5, "val/nll": None}}).items() <= ended.result.items()
    assert "0.5000" in ended.out
    assert not (run / "events.jsonl").exists()


def test_under_a_submitted_job_a_relative_folder_is_refused_before_ray_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for flags in ((), ("--dry-run",)):
        ended, modules = imported(tmp_path, "digits", *flags)
        assert ended.code == 2
        assert "ray" not in modules
        assert "a submitted job's directory is thrown away" in ended.result["message"]
