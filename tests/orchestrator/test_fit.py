"""The doctor, on this machine: what it finds, what it says to do, and that it leaves nothing behind."""

from __future__ import annotations

import base64
import http.server
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator import fit, fit_node, ray_cluster
from orchestrator.fit import FAILED, OK, WARNING, diagnose, judge

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_token(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "TOKEN", tmp_path / "token")
    return tmp_path / "token"


def found(result, what, state):
    return [check for check in result.checks if (check["what"], check["state"]) == (what, state)]


def test_a_machine_that_is_fit_is_said_to_be_so_and_nothing_is_left_there(tmp_path):
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    result = json.loads(ended.stdout.splitlines()[-1])
    others = [c for c in result["checks"] if not c["what"].startswith(("room", "token"))]  # those are the tester's
    assert others
    assert {check["state"] for check in others} == {OK}, ended.stdout
    assert (result["status"] == "fit") == (ended.returncode == 0)
    assert list(tmp_path.iterdir()) == [], "neither runs nor a probe"


def test_a_storage_that_cannot_be_written_fails_with_a_remedy(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    result = diagnose([f"storage_path={tmp_path}/file/runs"])
    (check,) = [c for c in result.checks if c["state"] == FAILED and c["what"].startswith("storage")]
    assert str(tmp_path / "file") in check["found"]
    assert result.exit_code == 1
    assert f"remedy: {check['remedy']}" in capsys.readouterr().out


def test_a_gpu_that_is_asked_for_and_is_not_there_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(fit_node, "NVIDIA", tmp_path / "none")
    result = diagnose([f"storage_path={tmp_path}", "device=cuda"])
    assert found(result, "CUDA", FAILED)[0]["found"] == "device=cuda, and there is no GPU"
    assert result.exit_code == 1
    assert found(diagnose([f"storage_path={tmp_path}"]), "CUDA", OK)


def test_a_token_that_others_can_read_fails_and_is_not_shown(tmp_path, own_token, capsys):
    own_token.write_text("the-secret-token")
    own_token.chmod(0o644)
    (check,) = found(diagnose([f"storage_path={tmp_path}"]), "token file", FAILED)
    assert check["remedy"] == f"chmod 600 {own_token}"
    own_token.chmod(0o600)
    assert found(diagnose([f"storage_path={tmp_path}"]), "token file", OK)
    assert "the-secret-token" not in "".join(capsys.readouterr())


def test_a_database_of_an_older_mlflow_needs_an_upgrade_and_is_left_as_it_is(migrated, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    assert found(diagnose([f"storage_path={tmp_path}"]), "MLflow", OK)
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        db.execute("UPDATE alembic_version SET version_num = 'c48cb773bb87'")
    (check,) = found(diagnose([f"storage_path={tmp_path}"]), "MLflow", FAILED)
    assert "has schema c48cb773bb87" in check["found"]
    assert f"mlflow db upgrade {uri}" in check["remedy"]
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        assert db.execute("SELECT version_num FROM alembic_version").fetchall() == [("c48cb773bb87",)]


class Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)

    do_POST = do_GET  # noqa: N815 - the name that http.server asks for

    def log_message(self, *_):
        pass


def test_an_mlflow_that_is_down_or_refuses_us_is_said_without_the_password(tmp_path, capsys):
    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://me:pass-word@127.0.0.1:{server.server_port}"
    (check,) = found(diagnose([f"storage_path={tmp_path}", f"tracking.uri={uri}"]), "MLflow", FAILED)
    assert "refuses us (401)" in check["found"]
    assert "MLFLOW_TRACKING_USERNAME" in check["remedy"]
    server.shutdown()
    server.server_close()
    (check,) = found(diagnose([f"storage_path={tmp_path}", f"tracking.uri={uri}"]), "MLflow", FAILED)
    assert "does not answer" in check["found"]
    assert "pass-word" not in "".join(capsys.readouterr())


class Asks(Refuses):
    """Answers to me:pass-word."""

    def do_GET(self):
        known = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:pass-word").decode()
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET  # noqa: N815


def test_what_mlflow_reads_of_its_credentials_file_the_doctor_reads_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    server = http.server.HTTPServer(("127.0.0.1", 0), Asks)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = [f"storage_path={tmp_path}/runs", f"tracking.uri=http://127.0.0.1:{server.server_port}"]
    assert found(diagnose(settings), "MLflow", FAILED)
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = pass-word\n"
    )
    assert found(diagnose(settings), "MLflow", OK)
    server.shutdown()
    server.server_close()


def test_a_cluster_that_does_not_answer_is_a_failure_and_the_rest_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = diagnose([f"storage_path={tmp_path}"])
    (check,) = found(result, "cluster", FAILED)
    assert "nobody answers there" in check["found"]
    assert found(result, "torch", OK)
    assert found(result, "authentication", WARNING), "no token is set"
    assert list(tmp_path.iterdir()) == []


def test_what_a_node_says_is_judged_against_the_driver(tmp_path):
    storage = str(tmp_path)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / fit_node.DRIVER).write_text("probe")
    ours = fit_node.examine(storage, "probe", "node")
    assert {check.state for check in judge(ours, "node", storage, ours)} <= {OK, WARNING}
    assert (tmp_path / "probe" / "node").read_text() == "node"
    theirs = ours | {"code": "other", "python": "3.9.1", "shm": 2**20, "temporary": 2 * 2**30, "nvidia": True}
    theirs["storage"] = fit_node.use(storage, "absent", "node")
    states = {check.what: check for check in judge(theirs, "node", storage, ours)}
    assert {states[what].state for what in ("code", "Python", "storage", "room in /dev/shm")} == {FAILED}
    assert {states[what].state for what in ("room in /tmp", "CUDA")} == {WARNING}
    assert all(check.remedy for check in states.values() if check.state != OK)


def test_gpus_that_a_driver_too_old_leaves_unusable_are_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fit_node.gpus() == []


def test_what_breaks_a_look_is_a_failure_and_not_the_end():
    def breaks():
        yield fit.Check("first", "here", OK, "good")
        raise RuntimeError("no such thing")

    first, second = fit._safely("second", "here", breaks)
    assert (first.what, second.state, second.found) == ("first", FAILED, "RuntimeError: no such thing")
