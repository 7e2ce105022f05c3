"""Commands as jobs on a head of one machine, by `ray job submit` and jobs/submit.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port
from ray_faults import TINY, Cluster, Tracked, log_of

from jem.errors import ConfigError
from orchestrator import facts
from orchestrator.submit import check_size, uploaded

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SECRET = "a-secret-of-the-users"
PLAIN = [argument for argument in TINY if not argument.startswith("model.")]
"""The tiny recipe without the slowed network, which lies beside the tests."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a user has: the code, and beside it much that a job does not need."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jem", "orchestrator", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "tests" / "jobs" / "slow_net.py", folder)
    (folder / ".env").write_text(f"TOKEN={SECRET}")
    for name in ("runs", "data", ".venv", ".git"):
        (folder / name).mkdir()
        (folder / name / "file").write_text(SECRET)
    return folder


class Head:
    """A head with its dashboard, on which jobs are submitted from `checkout`."""

    def __init__(self, cluster, address, checkout):
        self.cluster, self.address, self.checkout = cluster, address, checkout
        self.environment = os.environ | cluster.environment | {"RAY_API_SERVER_ADDRESS": address}

    def wait_for_dashboard(self, timeout=100):
        """On a busy machine it answers later than it is up."""
        deadline = time.monotonic() + timeout
        while (listed := self.ray("list")).returncode != 0:
            assert time.monotonic() < deadline, listed.stderr
            time.sleep(1)

    def ray(self, *arguments):
        ray = Path(sys.executable).with_name("ray")
        return subprocess.run(
            [ray, "job", *arguments], cwd=self.checkout, env=self.environment, capture_output=True, text=True
        )

    def submit(self, *command, job=None):
        """By Ray's own command, as the README has it."""
        named = ("--submission-id", job) if job else ()
        return self.ray("submit", *named, "--working-dir", ".", "--", "python", *command)

    def submit_ours(self, *command):
        ours = [sys.executable, "jobs/submit.py", "python", *command]
        return subprocess.run(ours, cwd=self.checkout, env=self.environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory, checkout):
    """Its Python finds other code of the same names, installed long ago."""
    stale = tmp_path_factory.mktemp("stale")
    for name in ("jem", "orchestrator"):
        (stale / name).mkdir()
        (stale / name / "__init__.py").write_text("raise SystemExit('the copy that is installed on the cluster runs')")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the environment is active, as docs/cluster.md says
    told = {"RAY_JOB_STOP_WAIT_TIME_S": "40", "PYTHONPATH": str(stale), "PATH": path}
    told["RAY_DASHBOARD_STARTUP_TIMEOUT_S"] = "150"  # of a busy machine; Ray's own minute is a reason to go on without
    cluster = Cluster(told)
    port, agent = free_port(), free_port()
    dashboard = "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"
    cluster.head(*dashboard, f"--dashboard-agent-listen-port={agent}")
    cluster.environment.pop("PYTHONPATH")
    head = Head(cluster, f"http://127.0.0.1:{port}", checkout)
    try:
        head.wait_for_dashboard()
        yield head
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def last_line(text):
    """The command's JSON, among what `ray job submit` adds at the end of its output."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"run_id"')]
    assert len(found) == 1, text
    return found[0]


@pytest.fixture(scope="module")
def trained(head, storage):
    ended = head.submit(
        "jobs/train.py", *PLAIN, "name=one", "steps=20", "workers=1", f"storage_path={storage}", job="one"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return last_line(ended.stdout)


def test_a_submitted_training_ends_as_it_does_at_home(head, storage, trained):
    assert (trained["name"], trained["status"], trained["step"]) == ("one", "finished", 20)
    log = head.ray("logs", "one").stdout.rstrip().splitlines()
    job_lines = [line for line in log if "ray job" not in line.lower()]
    assert json.loads(job_lines[-1]) == trained, "the JSON line is the last of the job's log"
    tracked = Tracked(storage / "mlflow.db", trained["run_id"])
    assert tracked.status == "FINISHED"
    assert tracked.tags["code.digest"] == facts.code_digest(), "what ran is what was uploaded"


def test_neither_secrets_nor_data_are_uploaded(head, checkout):
    names = {path.relative_to(checkout).as_posix() for path, _ in uploaded(checkout)}
    assert {"jobs/train.py", "jem/data/sources.py", "jem/evaluate/weights/lenet_digits.safetensors"} <= names
    assert not [n for n in names if n.startswith((".env", "runs", "data", ".venv", ".git/"))]
    code = "import pathlib; print(sorted(str(p) for p in pathlib.Path().rglob('*') if '__pycache__' not in str(p)))"
    listed = head.submit("-c", code)
    assert listed.returncode == 0, listed.stderr
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("['")]
    there = {name for name in json.loads(line.replace("'", '"')) if Path(checkout, name).is_file()}
    assert there == names, "the list is Ray's"


def test_jobs_submit_ends_with_the_commands_own_exit_code_and_json(head, storage, trained):
    again = head.submit_ours("jobs/train.py", *PLAIN, "name=one", "steps=20", "workers=1", f"storage_path={storage}")
    assert again.returncode == 0, again.stdout + again.stderr
    result = json.loads(again.stdout.splitlines()[-1])
    assert result["code"] == 0
    assert {key: result[key] for key in trained} == trained
    bad = head.submit_ours("jobs/train.py", "digits", "sgld.stepz=3", f"storage_path={storage}")
    assert bad.returncode == 2, bad.stdout + bad.stderr
    assert json.loads(bad.stdout.splitlines()[-1])["status"] == "bad configuration"
    assert "sgld.stepz" in bad.stderr
    info = head.ray("status", json.loads(bad.stdout.splitlines()[-1])["job"])
    assert "exit code 2" in info.stdout + info.stderr, "the real exit status is in the job's message"
    here = head.submit_ours("jobs/train.py", "digits", "storage_path=./runs")
    assert here.returncode == 2
    assert "a submitted job's directory is thrown away" in here.stderr


def test_a_wrong_token_is_refused(head):
    environment = head.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    ours = [sys.executable, "jobs/submit.py", "python", "-c", "print(1)"]
    ended = subprocess.run(ours, cwd=head.checkout, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "no cluster answers there" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_stopped_job_leaves_a_checkpoint_and_a_closed_run_and_goes_on_when_submitted_again(head, storage):
    command = ("jobs/train.py", *TINY, "name=stopped", "steps=60", "workers=1", f"storage_path={storage}")
    slow = "model.options.pause=0.3"
    run = storage / "stopped"
    named = ("--submission-id", "to-stop", "--no-wait", "--working-dir", ".")
    began = head.ray("submit", *named, "--", "python", *command, slow)
    assert began.returncode == 0, began.stderr
    deadline = time.monotonic() + 300
    while not [e for e in log_of(run, "checkpoint") if e["step"] >= 10]:
        assert time.monotonic() < deadline, head.ray("logs", "to-stop").stdout
        time.sleep(0.3)
    stopped = head.ray("stop", "to-stop")
    assert stopped.returncode == 0, stopped.stderr
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "stopped"
    step = record["result"]["step"]
    assert 10 < step < 60
    assert record["result"]["checkpoint"] == f"{run}/checkpoints/{step}"
    tracked = Tracked(storage / "mlflow.db", record["mlflow"]["run_id"])
    assert tracked.status == "KILLED"
    again = head.submit(*command, slow)
    assert again.returncode == 0, again.stdout
    assert last_line(again.stdout)["run_id"] == record["mlflow"]["run_id"]
    assert [event["step"] for event in log_of(run, "attempt")] == [0, step]
    assert tracked.status == "FINISHED"


def test_evaluating_scoring_and_sweeping_are_jobs_too(head, storage, checkout, trained):
    model = f"{storage}/one"
    small = ("evaluate.suite=fast", "evaluate.sets=[uniform]", f"storage_path={storage}")
    evaluated = head.submit("jobs/evaluate.py", model, *small)
    assert evaluated.returncode == 0, evaluated.stdout
    assert "test/accuracy" in last_line(evaluated.stdout)["metrics"]
    images = storage / "images"
    prepared = head.submit("jobs/prepare.py", "digits", str(images))
    assert prepared.returncode == 0, prepared.stdout
    scored = head.submit("jobs/score.py", model, str(images), str(storage / "scores"))
    assert scored.returncode == 0, scored.stdout
    assert (storage / "scores" / "scores.json").exists()
    sweep = storage / "sweep.yaml"
    told = "base: digits_uniform\nobjective: val/nll\nsearcher: random\n"
    told += "budget: {trials: 2, minutes: 3, steps: 10}\nfinalists: 0\n"
    settings = {a.partition("=")[0]: a.partition("=")[2] for a in PLAIN if "=" in a} | {"workers": "1"}
    lines = [f"  {key}: {value}" for key, value in settings.items()]
    sweep.write_text("\n".join([told + "settings:", *lines, "space: {sgld.step_size: {uniform: [0.5, 1.0]}}"]))
    swept = head.submit("jobs/sweep.py", str(sweep), f"storage_path={storage}")
    assert swept.returncode == 0, swept.stdout
    assert last_line(swept.stdout)["status"] == "finished"


def test_a_folder_too_large_is_refused_with_its_ten_largest_files(tmp_path):
    for i in range(12):
        with (tmp_path / f"big-{i:02}.bin").open("wb") as file:
            file.truncate((40 + i) * 2**20)
    (tmp_path / ".env").write_text(SECRET)
    with pytest.raises(ConfigError) as error:
        check_size(tmp_path)
    lines = str(error.value).splitlines()
    assert "546 MiB to upload, Ray takes 512" in lines[0]
    assert [line.split()[-1] for line in lines[1:-1]] == [f"big-{i:02}.bin" for i in range(11, 1, -1)]
    assert ".rayignore" in lines[-1]
    (tmp_path / ".rayignore").write_text("big-*.bin")
    check_size(tmp_path)
