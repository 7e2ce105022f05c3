"""What every command ends with."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from jem.errors import CheckpointError, ConfigError, DataError, DivergedError, JEMError, Problem
from orchestrator import submit
from orchestrator.command import Parser, run_command
from orchestrator.result import Result, show
from orchestrator.submit import _ended


def raising(error):
    def function():
        raise error

    return function


def ended(function, capsys):
    """(exit code, the last line of stdout as JSON, stderr)."""
    code = run_command(function)
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("finished", 0),
        ("planned", 0),
        ("failed", 1),
        ("bad configuration", 2),
        ("bad data", 2),
        ("no good checkpoint", 3),
        ("diverged", 4),
        ("stopped", 143),
        ("anything else", 1),
    ],
)
def test_a_status_has_its_exit_code(capsys, status, code):
    given, content, _ = ended(lambda: Result(status=status), capsys)
    assert (given, content["status"]) == (code, status)


@pytest.mark.parametrize(
    "error",
    [
        JEMError("x"),
        ConfigError([Problem("a", "x"), Problem("b", "y")]),
        DataError("x"),
        CheckpointError("x"),
        DivergedError("x"),
    ],
)
def test_an_error_ends_as_its_status_without_a_traceback(capsys, error):
    code, content, err = ended(raising(error), capsys)
    assert code == error.exit_code == Result(status=error.status).exit_code
    assert (content["status"], content["message"]) == (error.status, str(error))
    assert str(error) in err
    assert "Traceback" not in err


def test_an_error_nobody_foresaw_is_a_failure_with_its_traceback(capsys):
    code, content, err = ended(raising(ZeroDivisionError("by nothing")), capsys)
    assert (code, content["status"]) == (1, "failed")
    assert content["message"] == "ZeroDivisionError: by nothing"
    assert "Traceback" in err


def test_an_interrupt_is_a_stop(capsys):
    code, content, _ = ended(raising(KeyboardInterrupt()), capsys)
    assert (code, content["status"]) == (143, "stopped")


def test_an_unknown_option_is_a_bad_configuration(capsys):
    code, content, _ = ended(lambda: Parser("what").parse_args(["--nonsense"]), capsys)
    assert (code, content["status"]) == (2, "bad configuration")
    assert "--nonsense" in content["message"]


def test_the_json_is_one_line_of_strict_json_with_all_fields():
    metrics = {"a": 0.5, "b": math.nan, "c": math.inf}
    text = Result(name="n", metrics=metrics, message="two\nlines").json()
    assert "\n" not in text

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert {"run_id", "name", "checkpoint", "step", "metrics", "status"} <= content.keys()
    assert content["metrics"] == {"a": 0.5, "b": None, "c": None}
    assert content["message"] == "two\nlines"


def test_a_person_sees_final_metrics_and_where_things_are(capsys):
    result = Result(
        run_id="abc",
        name="digits",
        checkpoint="/runs/digits/" + "deep/" * 30 + "20",
        step=20,
        metrics={"test/accuracy": 0.98765, "train/loss": 1.0},
        status="finished",
        weights="best",
        samples="/runs/digits/samples/00000020.png",
        model="models:/jem-digits/3",
        champion="no: validation nll 0.3, version 2 has 0.2",
        tracking_uri="sqlite:////runs/mlflow.db",
    )
    show(result)
    out = capsys.readouterr().out
    for text in ("digits: finished at step 20", "test/accuracy", "0.9877", "best", "run abc in sqlite:////runs"):
        assert text in out
    assert "model: models:/jem-digits/3\nchampion: no: validation nll 0.3, version 2 has 0.2\n" in out
    for path in (result.checkpoint, result.samples):
        assert path in out, "a path in one piece can be copied"
    assert "train/loss" not in out


def test_a_thread_that_waits_for_ray_does_not_keep_the_process():
    """The exit code is given though such a thread never ends."""
    import subprocess
    import sys

    script = (
        "import threading, time, sys\n"
        "from orchestrator.command import RAY_THREAD, run_command\n"
        "from orchestrator.result import Result\n"
        "threading.Thread(target=time.sleep, args=(60,), name=RAY_THREAD).start()\n"
        "sys.exit(run_command(lambda: Result(status='stopped')))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 143
    assert json.loads(ended.stdout)["status"] == "stopped"


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED"])
def test_a_submitted_commands_line_is_its_own_but_for_job_and_code(status):
    client = SimpleNamespace(
        get_job_info=lambda _: SimpleNamespace(status=status, message="of Ray", driver_exit_code=4)
    )
    line = {"status": "diverged", "trials": {"diverged": 2}, "metrics": {"val/nll": 1.5}, "verdict": "none"}
    ended = _ended(client, "job-1", json.dumps(line))
    code = 0 if status == "SUCCEEDED" else 4
    assert json.loads(ended.json()).items() >= (line | {"job": "job-1", "code": code}).items()
    assert ended.exit_code == code
    told = json.loads(_ended(client, "job-1", "Traceback: no line of JSON").json())
    assert (told["status"], "own" in told) == ("finished" if code == 0 else "failed", False)
    assert told["message"] == "of Ray\nTraceback: no line of JSON"


def test_a_job_that_goes_on_after_its_log_ended_has_not_failed(monkeypatch):
    """A proxy may close the log's connection as if the job were over."""
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    running = SimpleNamespace(status="RUNNING", message="Job is currently running.", driver_exit_code=None)
    with pytest.raises(ConnectionError):
        _ended(SimpleNamespace(get_job_info=lambda _: running), "job-1", "")
    states = iter(["RUNNING", "RUNNING", "SUCCEEDED"])
    client = SimpleNamespace(
        get_job_info=lambda _: SimpleNamespace(status=next(states), message="", driver_exit_code=0)
    )
    assert _ended(client, "job-1", "done").status == "finished"


def test_a_missing_environment_is_said_to_be_and_another_missing_module_by_its_own_words(capsys):
    code, content, err = ended(raising(ModuleNotFoundError("No module named 'torch'", name="torch")), capsys)
    assert code == 1
    assert "has no module torch; is the project's environment active?" in content["message"]
    assert "Traceback" not in err
    code, content, err = ended(raising(ModuleNotFoundError("it needs torch-fidelity: pip install it")), capsys)
    assert content["message"] == "ModuleNotFoundError: it needs torch-fidelity: pip install it"
    assert "Traceback" in err
