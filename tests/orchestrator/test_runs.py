"""A run's folder: its record, its lock, what --fresh does."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from pyarrow import fs as pafs
from worker_runs import object_store

from jem.errors import ConfigError
from jem.files import Location
from orchestrator import runs
from orchestrator.config import load_run_config
from orchestrator.runs import (
    _moved,
    lock,
    open_record,
    planned_folder,
    read_record,
    storage_of,
    under_ray_job,
    write_config,
)

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from jem.files import Location
from orchestrator.runs import lock
from worker_runs import object_store
root = Location.of(sys.argv[2]) / "NAME" if sys.argv[1] == "local" else object_store(Path(sys.argv[2])) / "NAME"
with lock(root):
    print("held", flush=True)
    sys.stdin.readline()
"""


class Holder:
    """Another driver that works on the run NAME."""

    def __init__(self, kind, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, kind, str(folder), str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
        )
        assert self.process.stdout.readline() == "held\n"

    def end(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.process.wait(20)

    def kill(self):
        self.process.kill()
        self.process.wait(20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(params=["local", "object store"])
def kind(request):
    return request.param


@pytest.fixture
def root(kind, tmp_path):
    return Location.of(tmp_path) / "NAME" if kind == "local" else object_store(tmp_path) / "NAME"


def test_a_second_driver_on_a_live_run_is_told_host_and_pid(kind, root, tmp_path):
    with Holder(kind, tmp_path) as holder:
        with pytest.raises(ConfigError) as caught, lock(root):
            pass
        assert f"pid {holder.process.pid} on {socket.gethostname()} is working on this run" in str(caught.value)
        assert caught.value.exit_code == 2
        assert root.uri in str(caught.value)
        holder.end()
        with lock(root):
            pass


def test_the_lock_of_a_dead_driver_is_taken_over_at_once(kind, root, tmp_path):
    with Holder(kind, tmp_path) as holder:
        holder.kill()
        start = time.monotonic()
        with lock(root):
            assert time.monotonic() - start < 10, "not after missed beats"
            held = json.loads((root.parent / ".NAME.lock").read())
            assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())


def test_a_lock_is_released_and_may_be_taken_again(root):
    for _ in range(2):
        with lock(root):
            pass
    with pytest.raises(ValueError, match="mine"), lock(root):
        raise ValueError("mine")
    with lock(root):
        pass


def test_runs_of_other_names_do_not_hold_each_other_up(root):
    with lock(root), lock(root.parent / "NAME.1"), lock(root.parent / "OTHER"):
        pass


def write_lock(root, **changes):
    mine = json.loads(runs._identity())
    (root.parent / ".NAME.lock").write(json.dumps(mine | changes).encode())


def test_a_driver_on_another_host_counts_as_dead_after_three_missed_beats(tmp_path):
    root = object_store(tmp_path) / "NAME"
    write_lock(root, host="elsewhere", pid=1, time=time.time() - 2 * runs.HEARTBEAT_S)
    with pytest.raises(ConfigError, match="pid 1 on elsewhere is working"), lock(root):
        pass
    write_lock(root, host="elsewhere", pid=1, time=time.time() - 4 * runs.HEARTBEAT_S)
    with lock(root):
        pass


def test_a_process_that_has_a_dead_drivers_number_is_not_the_driver(tmp_path):
    root = object_store(tmp_path) / "NAME"
    write_lock(root, start=0.0)  # this pid, but a process that began long ago
    with lock(root):
        pass


def test_a_lock_on_an_object_store_beats_even_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "HEARTBEAT_S", 0.05)
    root = object_store(tmp_path) / "NAME"
    away, write, beats = threading.Event(), Location.write, queue.Queue()

    def write_or_fail(location, data):
        beats.put(away.is_set())
        if away.is_set():
            raise OSError("the store is away")
        write(location, data)

    monkeypatch.setattr(Location, "write", write_or_fail)

    def wait_for(failed):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if beats.get(timeout=20) == failed:
                return True
        return False

    with lock(root):
        assert wait_for(failed=False)
        away.set()
        assert wait_for(failed=True)
        away.clear()
        assert wait_for(failed=False)
    assert not (tmp_path / "bucket" / ".NAME.lock").exists()


def test_of_two_drivers_that_take_an_object_stores_lock_at_once_the_last_to_write_has_it(tmp_path, monkeypatch):
    root = object_store(tmp_path) / "NAME"
    path = root.parent / ".NAME.lock"
    theirs = json.dumps({"host": "elsewhere", "pid": 7, "start": 1.0, "time": time.time()})
    monkeypatch.setattr(runs.time, "sleep", lambda _: path.write(theirs.encode()))
    with pytest.raises(ConfigError, match="pid 7 on elsewhere is working on this run"), lock(root):
        pass
    assert path.read().decode() == theirs, "it is theirs to remove"


# Records


def config(*settings):
    return load_run_config("digits", ["name=NAME", *settings])


def begun(root, *settings, status="stopped"):
    record = open_record(root, config(*settings), fresh=False)
    record.status = status
    record.attempts.append({"number": len(record.attempts) + 1})
    record.save(root)
    return record


def test_the_record_of_a_run_comes_back_whole(root):
    record = begun(root)
    again = open_record(root, config("steps=9", "workers=1"), fresh=False)
    assert json.dumps(asdict(again)) == json.dumps(asdict(record))
    assert read_record(root) == again
    content = json.loads((root / "run.json").read())
    assert content["name"] == "NAME"
    assert content["digest"] in load_run_config("digits", []).name
    assert content["attempts"] == [{"number": 1}]


def test_the_same_name_with_other_science_is_refused_with_the_differences(root):
    begun(root)
    with pytest.raises(ConfigError) as caught:
        open_record(root, config("seed=3", "optimizer.betas=[0.5, 0.9]", "steps=9"), fresh=False)
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["optimizer.betas", "seed", ""]
    assert f"seed: is 3, the run {root.uri} has 0" in str(caught.value)
    assert "[0.5, 0.9]" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert caught.value.exit_code == 2


def test_fresh_moves_the_old_run_aside_and_numbers_it(root):
    for number in range(3):
        record = open_record(root, config(f"seed={number}"), fresh=True)
        assert record.attempts == []
        record.attempts.append({"number": 1})
        record.save(root)
        (root / "checkpoints" / 4).mkdir()
        (root / "checkpoints" / 4 / "manifest.json").write(str(number).encode())
    for name, number in (("NAME.1", 0), ("NAME.2", 1), ("NAME", 2)):
        folder = root.parent / name
        assert read_record(folder).science["seed"] == number
        assert (folder / "checkpoints" / 4 / "manifest.json").read() == str(number).encode()
    assert not (root.parent / "NAME.3").exists()


def test_a_moved_run_of_a_store_that_has_an_address_of_its_own_tells_of_its_new_place():
    query = "endpoint_override=minio:9000&scheme=http"
    root, storage = (Location(pafs.LocalFileSystem(), path, "s3", query) for path in ("b/runs/a", "b/runs"))
    told = {"checkpoint": (root / "checkpoints" / 8).uri, "of another": (storage / "ab" / "x").uri, "n": [1]}
    old, new = (each.uri.partition("?")[0] for each in (root, storage / "a.1"))
    assert _moved(told, old, new) == told | {"checkpoint": f"s3://b/runs/a.1/checkpoints/8?{query}"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": "NAME"}', b'{"unknown": 1}', b"\xff"])
def test_a_damaged_record_is_a_clear_error_and_fresh_mends_it(root, content):
    begun(root)
    (root / "run.json").write(content)
    with pytest.raises(ConfigError, match=r"run\.json: damaged .*--fresh"):
        open_record(root, config(), fresh=False)
    assert open_record(root, config(), fresh=True).status == "new"
    assert (root.parent / "NAME.1" / "run.json").read() == content


def test_the_configuration_is_written_as_a_recipe_that_gives_it_again(root, tmp_path):
    root.mkdir()
    write_config(root, config("seed=4"))
    copy = tmp_path / "copy.yaml"
    copy.write_bytes((root / "recipe.yaml").read())
    assert load_run_config(str(copy), []) == config("seed=4")


# Where runs live


def test_a_relative_folder_is_refused_under_a_submitted_job_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not under_ray_job()
    assert planned_folder(config("storage_path=./runs")) == f"{tmp_path}/runs/NAME"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for ask in (planned_folder, storage_of):
        with pytest.raises(ConfigError) as caught:
            ask(config("storage_path=./runs"))
        assert "storage_path: './runs' is relative, but a submitted job's directory is thrown away" in str(caught.value)
    assert not (tmp_path / "runs").exists()
    assert planned_folder(config(f"storage_path={tmp_path}")) == f"{tmp_path}/NAME"
    assert planned_folder(config("storage_path=s3://bucket/runs/")) == "s3://bucket/runs/NAME"
    minio = "s3://bucket/runs?endpoint_override=minio:9000"
    assert planned_folder(config(f"storage_path={minio}")) == "s3://bucket/runs/NAME?endpoint_override=minio:9000"
    monkeypatch.setenv("HOME", "/home/me")
    assert planned_folder(config("storage_path=~/runs")) == "/home/me/runs/NAME"


def test_storage_is_made_and_left_clean(tmp_path):
    storage = storage_of(config(f"storage_path={tmp_path}/a/b"))
    assert storage.local == tmp_path / "a" / "b"
    assert list(storage.local.iterdir()) == []


@pytest.mark.parametrize("path", ["{tmp}/file/runs", "nonsense://bucket/runs"])
def test_storage_that_cannot_be_written_is_a_bad_configuration(tmp_path, path):
    (tmp_path / "file").write_text("")
    path = path.format(tmp=tmp_path)
    with pytest.raises(ConfigError, match=r"storage_path: .* cannot be written") as caught:
        storage_of(config(f"storage_path={path}"))
    assert path in str(caught.value)
