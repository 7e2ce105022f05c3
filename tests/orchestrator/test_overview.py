"""What the runs of a storage are said to be, and what to type next."""

from __future__ import annotations

import fcntl
import json
import math
import shlex
import threading
import time
from pathlib import Path

import pytest
from made_runs import Driver, made, rolled_back
from worker_runs import fit, object_store

from jem.errors import ConfigError
from jem.files import Location
from orchestrator.advice import advise, train_command
from orchestrator.config import load_run_config
from orchestrator.events import EventLog
from orchestrator.overview import overview
from orchestrator.runs import lock
from orchestrator.survey import holder, look


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """./runs of the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "runs"


def listed(*arguments, verify=False):
    """The entries by name."""
    return {entry["name"]: entry for entry in overview([*arguments], verify).runs}


def typed(command):
    """The configuration that a `python jobs/train.py` command gives."""
    words = [word for word in shlex.split(command) if word != "--fresh"]
    assert words[:2] == ["python", "jobs/train.py"]
    return load_run_config(words[2], words[3:])


def test_a_sweep_is_named_and_is_no_damaged_run(storage, capsys):
    made(storage, "one")
    made(storage / "search" / "trials", "t000")
    (storage / "search" / "sweep.json").write_text("{}")
    (storage / "search" / "events.jsonl").write_text("")
    assert listed().keys() == {"one"}
    said = capsys.readouterr().out
    assert "search: a sweep, damaged; its trials: python jobs/runs.py storage_path=" in said
    assert f"  {storage}/search/sweep.json: damaged (it has no status); its command with --fresh begins anew" in said
    assert listed(f"storage_path={storage / 'search' / 'trials'}").keys() == {"t000"}


def test_the_table_has_a_row_a_run_newest_first(storage, capsys):
    made(storage, "old", age=7200)
    made(storage, "new", "stopped", message="stopped on request at step 20, with a checkpoint")
    rolled_back(made(storage, "wild", "diverged", message="energy gap", age=600), "seed", "sgld.steps*2")
    (storage / "mlartifacts" / "x").mkdir(parents=True)
    result = overview([])
    assert [entry["name"] for entry in result.runs] == ["new", "wild", "old"]
    assert (result.status, result.exit_code) == ("listed", 0)
    lines = capsys.readouterr().out.splitlines()
    head = "run status step val/accuracy val/nll attempts disk begun last sign rollbacks"
    assert lines[0].split() == head.split()
    assert lines[2].startswith("wild  diverged  20/100")
    assert lines[2].endswith("2: seed, sgld.steps*2")
    assert "new: stopped on request at step 20, with a checkpoint" in lines
    assert "  next: python jobs/train.py runs/new/recipe.yaml" in lines
    assert not any(line.startswith("old:") for line in lines), "nothing is wrong with it"


def test_the_newest_scores_are_in_the_row_wherever_they_are_known_from(storage, capsys):
    running = made(storage, "running", "running")
    log = EventLog(running.local / "events.jsonl")
    for step, accuracy in ((30, 0.5), (40, 0.75)):
        log.append("metrics", step=step, metrics={"val/accuracy": accuracy, "val/nll": math.nan})
    log.close()
    elsewhere = made(storage, "elsewhere", age=60, log=False)  # its log stayed on another machine
    record = json.loads((elsewhere.local / "run.json").read_text())
    record["result"]["metrics"] = {"val/accuracy": 0.875, "val/nll": 0.25, "test/accuracy": 0.5}
    (elsewhere.local / "run.json").write_text(json.dumps(record))
    made(storage, "none", age=120)
    entries = listed()
    assert entries["running"]["scores"]["val/accuracy"] == 0.75
    assert entries["elsewhere"]["scores"] == {"val/accuracy": 0.875, "val/nll": 0.25}
    assert entries["none"]["scores"] == {}
    best = made(storage, "best", age=30)  # with evaluate.final=best the last measurement is of other weights
    log = EventLog(best.local / "events.jsonl")
    log.append("metrics", step=20, metrics={"val/accuracy": 0.5})
    log.close()
    (best.local / "run.json").write_text(json.dumps(record | {"name": "best"}))
    assert listed("best")["best"]["scores"]["val/accuracy"] == 0.875
    rows = [line.split()[2:5] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert rows == [["40/100", "0.750", "nan"], ["20/100", "0.875", "0.250"], ["20/100", "-", "-"]]


def test_a_storage_without_runs_and_one_that_is_not_there(storage, capsys):
    assert overview([]).runs == []
    assert "no runs in" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        overview(["storage_path=nowhere"])
    made(storage, "digits-1")
    with pytest.raises(ConfigError, match=r"no run 'digist-1' in .*; did you mean digits-1"):
        overview(["digist-1"])
    with pytest.raises(ConfigError, match="steps: is no setting of this command"):
        overview(["steps=3"])


def test_a_run_is_running_only_while_its_driver_lives(storage):
    root = made(storage, "tiny", "running")
    assert listed()["tiny"]["status"] == "interrupted"
    with Driver(root.path) as driver:
        entry = listed()["tiny"]
        assert (entry["status"], entry["problem"], entry["next"]) == ("running", "", None)
        driver.kill()
        entry = listed()["tiny"]
    assert entry["status"] == "interrupted"
    assert entry["problem"] == "its driver (pid 7 on here) ended without a word"
    assert typed(entry["next"]).name == "tiny"


def test_a_driver_that_gives_no_sign_for_long_is_told(storage):
    root = made(storage, "tiny", "running")
    with Driver(root.path) as driver:
        run = look(root)
        told = advise(run, "jobs", time.time() + 3000)
        assert f"pid {driver.process.pid} on" in told.problem
        assert "gave no sign for 50 min" in told.problem


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="elsewhere the lock is tried")
def test_asking_who_works_on_a_run_keeps_nobody_from_working_on_it(storage):
    root, asked, done = made(storage, "tiny"), [], threading.Event()

    def ask():
        while not done.is_set():
            asked.append(holder(root))

    with lock(root):  # its file names this process from now on
        assert holder(root) is not None
    assert holder(root) is None, "this process lives on, but no longer works on the run"
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(300):
            with lock(root):
                time.sleep(0.0002)
    finally:
        done.set()
        thread.join()
    assert len(asked) > 50


@pytest.mark.parametrize("held", [True, False])
def test_a_driver_in_another_container_is_known_by_its_lock(storage, held):
    root = made(storage, "tiny", "running")
    path = storage / ".tiny.lock"
    path.write_text(json.dumps({"host": "another", "pid": 1, "start": 0, "time": 0}))
    with path.open() as file:
        if held:
            fcntl.flock(file, fcntl.LOCK_EX)
        assert holder(root) == ("pid 1 on another" if held else None)


@pytest.mark.parametrize(("silence", "status"), [(5, "running"), (60, "interrupted")])
def test_on_an_object_store_the_heartbeat_tells(storage, tmp_path, silence, status):
    root = made(object_store(tmp_path), "tiny", "running")
    beat = {"host": "another", "pid": 1, "start": 0, "time": time.time() - silence}
    (root.parent / ".tiny.lock").write(json.dumps(beat).encode())
    assert look(root).status == status


def test_a_run_in_an_object_store_is_continued_from_the_nearest_bundled_recipe(storage, tmp_path):
    changes = ("workers=1", "model.channels=[4, 8]", "sgld.clamp=1.5", "objective.energy_l2=1e-3")
    root = made(object_store(tmp_path), "digits-x", "stopped", *changes, uri="http://there:5000")
    (root / "checkpoints" / "15" / "manifest.json").write(b"{}")
    command = train_command(look(root), "jobs")
    config = typed(command)
    assert "tracking.uri=http://there:5000" in command
    assert config.storage_path == "store://bucket"
    assert json.loads(json.dumps(config.science)) == look(root).record["science"]
    assert (config.name, config.workers, config.steps) == ("digits-x", 1, 100)
    assert look(made(object_store(tmp_path), "y", "running")).step is None
    (root / "run.json").write(b'{"status": "running"}')
    assert look(root).step == 15, "of its checkpoints, where the log is on another machine"


BROKEN = {
    "run.json": b"{",
    "run.json ": b"[1, 2]",
    "run.json  ": b"\xff\xfe",
    "recipe.yaml": b"a: [",
    "recipe.yaml ": b"just text",
    "recovery.json": b'{"rollbacks": ',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_told_in_its_row_and_hides_no_other_run(storage, name):
    made(storage, "good")
    root = made(storage, "bad", "stopped")
    (root.local / name.strip()).write_bytes(BROKEN[name])
    entries = listed()
    assert f"{root.uri}/{name.strip()}: damaged" in entries["bad"]["problem"]
    assert entries["bad"]["next"].startswith("python jobs/train.py")
    assert entries["bad"]["status"] == ("damaged" if "run" in name else "stopped")
    assert (entries["good"]["status"], entries["good"]["problem"]) == ("finished", "")
    assert overview(["bad"]).exit_code == 0


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "events.jsonl", "recovery.json", "checkpoints"])
def test_something_odd_in_a_files_place_is_told_too(storage, name):
    root = made(storage, "bad", "stopped", log=name != "events.jsonl")
    (root.local / name).unlink(missing_ok=True)
    if name == "checkpoints":
        (root.local / name).write_text("a file")
    else:
        (root.local / name).mkdir()
    entry = listed("bad")["bad"]
    assert str(storage / "bad") in entry["problem"]


def test_values_of_the_wrong_kind_are_no_reason_to_fail(storage):
    root = made(storage, "bad", "stopped")
    odd = {"status": 3, "attempts": [1, {"started": "x", "step": []}], "mlflow": [], "result": "none"}
    (root / "run.json").write(json.dumps(odd).encode())
    (root / "recovery.json").write(b'{"rollbacks": [1, {"remedies": 2}]}')
    (root / "recipe.yaml").write(b"steps: many\nname: [1]\nstorage_path: 3\nrecovery: {max: x}")
    assert listed()["bad"]["status"] == "3"
    assert listed("bad")["bad"]["rollbacks"] == 1


def test_a_log_that_is_being_written_and_partly_damaged_is_read(storage, capsys):
    root = made(storage, "tiny", "running", step=30)
    with (root.local / "events.jsonl").open("ab") as file:
        file.write(b"\x00\x00 torn\n" + b'{"kind": "metrics", "st')
    assert listed("tiny")["tiny"]["step"] == 30
    assert "1 lines of" in capsys.readouterr().out


STATUSES = {
    "running": "python jobs/train.py runs/tiny/recipe.yaml",
    "stopped": "python jobs/train.py runs/tiny/recipe.yaml",
    "failed": "python jobs/train.py runs/tiny/recipe.yaml",
    "bad data": "python jobs/train.py runs/tiny/recipe.yaml",
    "no good checkpoint": "python jobs/train.py runs/tiny/recipe.yaml --fresh",
}


@pytest.mark.parametrize("status", STATUSES)
def test_the_next_command_continues_the_same_run(storage, status):
    root = made(storage, "tiny", status, "sgld.steps=3", message="why\nand where")
    entry = listed()["tiny"]
    assert entry["next"] == STATUSES[status]
    assert status == "running" or entry["problem"] == "why\nand where"
    config = typed(entry["next"])
    assert (config.name, Location.of(config.storage_path).path) == ("tiny", str(storage))
    assert json.loads(json.dumps(config.science)) == look(root).record["science"]


def test_the_command_is_right_for_a_run_that_was_moved_and_from_another_folder(storage, tmp_path, monkeypatch):
    made(storage, "tiny", "stopped").move_to(Location.of(tmp_path / "else where" / "tiny.1"))
    monkeypatch.chdir(tmp_path.parent)
    root = Location.of(tmp_path / "else where" / "tiny.1")
    config = typed(train_command(look(root), "jobs"))
    assert config.name == "tiny.1"
    assert Location.of(config.storage_path).path == str(tmp_path / "else where")


def test_what_is_finished_needs_nothing_unless_mlflow_has_not_got_it(storage, capsys):
    made(storage, "whole")
    made(storage, "untold", complete=False)
    entries = listed()
    assert entries["whole"]["next"] is None
    assert entries["untold"]["next"] == "python jobs/sync.py untold"
    assert "MLflow at sqlite:///" in entries["untold"]["problem"]
    entries = listed(str(storage / "whole"))
    assert "to go on   python jobs/train.py runs/whole/recipe.yaml steps=200" in capsys.readouterr().out


def test_divergence_offers_more_rollbacks_or_other_settings_under_another_name(storage):
    root = made(storage, "wild", "diverged", "recovery.max=2", message="energy gap 1.2e+06")
    rolled_back(root, "seed", "optimizer.learning_rate*0.5")
    told = advise(look(root), "jobs", time.time())
    assert typed(told.next).recovery.max == 7
    other = typed(told.alternative)
    assert (other.name, other.optimizer.learning_rate) == ("wild-b", 0.0005)
    assert listed()["wild"]["remedies"] == ["seed", "optimizer.learning_rate*0.5"]
    (root / "recovery.json").remove()
    assert typed(advise(look(root), "jobs", time.time()).next).name == "wild-b", "rollbacks were not what was missing"


def test_a_password_is_asked_for_and_not_taken_for_stars(storage, monkeypatch):
    uri = "tracking.uri=http://me:secret@there:5000"
    root = made(storage, "tiny", "stopped", uri, uri="http://me:***@there:5000")
    assert "tracking.uri=http://me:PASSWORD@there:5000" in train_command(look(root), "jobs")
    root = made(storage, "other", "stopped", uri="http://me:***@there:5000")
    assert "PASSWORD" in train_command(look(root), "jobs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@there:5000")
    assert "tracking.uri" not in train_command(look(root), "jobs")


def test_one_run_in_detail(storage, capsys):
    root = made(storage, "tiny", "running", log=False)
    record = json.loads((root / "run.json").read())
    record["attempts"].append({"number": 2, "host": "there", "pid": 8, "started": time.time(), "workers": 4})
    (root / "run.json").write(json.dumps(record).encode())
    rolled_back(root, "seed")
    log = EventLog(root.local / "events.jsonl")
    for attempt, step in ((1, 0), (1, 5), (2, 5)):
        log.append("attempt", attempt=attempt, step=step, workers=2)
        log.append("metrics", step=step + 3, metrics={"train/loss": math.nan, "val/accuracy": 0.9})
    log.append("failed_checkpoint", step=8, reason="the disk is full")
    log.close()
    result = overview(["tiny"])
    first, second = result.runs[0]["details"]["attempts"]
    assert (first["status"], first["step"], first["restarts"]) == ("interrupted", 8, 1)
    assert (second["host"], second["workers"], second["restarts"]) == ("there", 4, 0)
    assert result.runs[0]["details"]["failed_checkpoints"][0]["reason"] == "the disk is full"
    assert json.loads(result.json())["runs"][0]["details"]["metrics"] == {"train/loss": None, "val/accuracy": 0.9}
    assert (result.name, result.step) == ("tiny", 8)
    out = capsys.readouterr().out
    assert "no checkpoint could be written at step 8: the disk is full" in out
    assert ["1", "231", "150", "seed", "energy", "gap", "1.2e+06"] in [line.split() for line in out.splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with real checkpoints, of steps 4, 8 and 12."""
    root = tmp_path_factory.mktemp("trained") / "tiny"
    fit(root)
    return root


@pytest.fixture
def checkpoints(trained, storage):
    """Those of a run in ./runs."""
    root = made(storage, "tiny", "stopped")
    root.fs.create_dir(f"{root.path}/checkpoints")
    for folder in (trained / "checkpoints").iterdir():
        (root.local / "checkpoints" / folder.name).mkdir()
        for file in folder.iterdir():
            (root.local / "checkpoints" / folder.name / file.name).write_bytes(file.read_bytes())
    return root.local / "checkpoints"


def state_of(verify=False):
    result = overview(["tiny"], verify)
    return {c["step"]: c["state"] for c in result.runs[0]["details"]["checkpoints"]}, result


def test_checkpoints_are_listed_and_verified(checkpoints):
    steps = sorted((int(d.name) for d in checkpoints.iterdir()), reverse=True)
    found, result = state_of()
    assert list(found) == steps
    assert set(found.values()) == {"whole"}
    assert result.checkpoint == str(checkpoints / "12")
    assert set(state_of(verify=True)[0].values()) == {"verified"}
    assert all(c["bytes"] > 1000 for c in result.runs[0]["details"]["checkpoints"])


def test_a_cut_file_is_seen_at_once_and_a_changed_byte_by_verification(checkpoints):
    weights, optimizer = checkpoints / "12" / "model.safetensors", checkpoints / "8" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    optimizer.write_bytes(bytes([optimizer.read_bytes()[0] ^ 1]) + optimizer.read_bytes()[1:])
    found, result = state_of()
    assert f"{weights}: has " in found[12]
    assert found[8] == "whole"
    assert (result.exit_code, result.checkpoint) == (0, str(checkpoints / "8"))
    found, result = state_of(verify=True)
    assert f"{optimizer}: its contents are not what was written" in found[8]
    assert result.exit_code == 1
    assert str(weights) in result.runs[0]["problem"]
    assert result.runs[0]["next"] == "python jobs/train.py runs/tiny/recipe.yaml"


def test_where_no_checkpoint_is_good_the_way_on_is_fresh(checkpoints):
    for folder in checkpoints.iterdir():
        (folder / "model.safetensors").unlink()
    _, result = state_of(verify=True)
    assert result.exit_code == 3
    assert result.runs[0]["next"] == "python jobs/train.py runs/tiny/recipe.yaml --fresh"
