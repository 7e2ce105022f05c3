"""The doctor, and a training, on a cluster of two nodes: one that shares the storage, and one that does not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from ray_faults import ROOT, TINY, Cluster, Command

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
APART = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']


def can_be_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    return subprocess.run([*APART, tmp_path / "a", tmp_path / "b", "true"], capture_output=True).returncode == 0


def doctor(cluster, *settings, **variables):
    environment = os.environ | cluster.environment | {"RAY_ADDRESS": cluster.address} | variables
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py"), *settings]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    return ended, json.loads(ended.stdout.splitlines()[-1])


def test_every_node_is_looked_at_and_one_with_another_storage_is_named(tmp_path, tmp_path_factory, folder, monkeypatch):
    if not can_be_apart(tmp_path):
        pytest.skip("mounts cannot be made here (no root, or a container without CAP_SYS_ADMIN)")
    storage, elsewhere = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("elsewhere")
    cluster = Cluster()
    try:
        cluster.head()
        ended, result = doctor(cluster, f"storage_path={storage}", "workers=1")
        about = {check["what"]: check for check in result["checks"] if "(" in check["where"]}
        assert {about[what]["state"] for what in ("machine", "storage", "clock")} == {"ok"}, ended.stdout
        assert not [check for check in result["checks"] if check["what"] in ("storage", "cluster") and check["remedy"]]
        token = cluster.environment["RAY_AUTH_TOKEN"]
        cluster.node(before=[*APART, elsewhere, storage])
        ended, result = doctor(cluster, f"storage_path={storage}", "workers=4")
        assert ended.returncode == 1
        (lost,) = [c for c in result["checks"] if c["what"] == "storage" and c["state"] == "failed"]
        assert "is not the folder that the driver has" in lost["found"]
        assert "s3://" in lost["remedy"]
        (few,) = [c for c in result["checks"] if c["what"] == "workers"]
        assert few["found"] == "workers=4, the cluster has 2 CPUs"
        assert token not in ended.stdout + ended.stderr
        assert list(storage.iterdir()) == list(elsewhere.iterdir()) == [], "nothing is left"
        environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        run = Command(folder, *TINY, "name=apart", "steps=20", "workers=2", f"storage_path={storage}").end()
        assert (run.code, run.result["status"]) == (2, "bad data"), run.err
        assert f"{storage}/apart on {socket.gethostname()} is not the folder that the driver" in run.result["message"]
        assert "an object store" in run.result["message"]
        assert not [*storage.glob("apart/checkpoints/*"), *elsewhere.glob("apart/checkpoints/*")]
        wrong, result = doctor(cluster, f"storage_path={storage}", RAY_AUTH_TOKEN="0" * 64)
        assert wrong.returncode == 1
        (check,) = [c for c in result["checks"] if c["what"] == "cluster"]
        assert "cannot be joined" in check["found"]
        assert "RAY_AUTH_TOKEN" in check["remedy"]
    finally:
        cluster.close()
