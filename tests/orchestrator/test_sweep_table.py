"""Trials as rows, read from their folders, and as tables."""

import json
import math
import random

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from made_sweeps import BEGUN, made_finalist, made_search, made_trial, sweep_of

from jem.files import Location
from orchestrator.sweep.config import OBJECTIVES
from orchestrator.sweep.table import Row, best, counts, fronts, read_trials, value, write_tables

NLL, ACCURACY = OBJECTIVES["val/nll"], OBJECTIVES["val/accuracy"]


def read(root):
    return read_trials(Location.of(root))


def row(name, status="finished", point=None, **metrics):
    named = {key.replace("_", "/", 1): number for key, number in metrics.items()}
    candidate = "base" if name == "t000" else name
    return Row(name, "search", int(name[1:]), candidate, point or {}, 0, status, metrics=named)


def test_rows_hold_what_trial_and_run_say_by_stage_and_number(tmp_path):
    made_finalist(tmp_path, "t002", 3, {"sgld.steps": 5}, metrics={"val/nll": 0.3}, number=1)
    made_finalist(tmp_path, "base", 3, metrics={"val/nll": 0.4}, number=0)
    for name in ("t010", "t002", "t000"):
        made_trial(tmp_path, name, {"sgld.steps": 5}, metrics={"val/nll": 0.2}, step=300, seconds=12.0)
    rows = read(tmp_path)
    assert [r.name for r in rows] == ["t000", "t002", "t010", "f-base-s3", "f-t002-s3"]
    assert rows[1] == Row(
        *("t002", "search", 2, "t002", {"sgld.steps": 5}, 0, "finished", "", 300, 12.0, {"val/nll": 0.2}, "id-t002"),
        folder=str(tmp_path / "trials/t002"),
        started=BEGUN + 80,
        ended=BEGUN + 92,
    )
    assert (rows[4].candidate, rows[4].seed, rows[0].is_base, rows[1].is_base) == ("t002", 3, True, False)


@pytest.mark.parametrize("file", ["trial.json", "run.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"name": 3}', '{"name": "t001", "stage": "no"}', "\0"])
def test_a_damaged_trial_counts_as_failed_says_why_and_hides_no_other(tmp_path, file, content):
    made_search(tmp_path, sweep_of(tmp_path), 3)
    (tmp_path / "trials/t001" / file).write_text(content)
    before, damaged, after = read(tmp_path)
    assert (damaged.name, damaged.stage, damaged.number, damaged.status) == ("t001", "search", 1, "failed")
    assert str(tmp_path / "trials/t001" / file) in damaged.reason
    assert "damaged" in damaged.reason
    assert [before.status, after.status] == ["finished", "finished"]


def test_a_trial_without_its_identity_is_known_by_the_folders_name(tmp_path):
    for folder in (made_finalist(tmp_path, "t007", 4), made_trial(tmp_path, "s3"), made_trial(tmp_path, "t000")):
        (folder / "trial.json").remove()
    known = [(r.name, r.stage, r.candidate, r.seed, r.status) for r in read(tmp_path)]
    assert known == [
        ("t000", "search", "base", 0, "failed"),
        ("s3", "seeds", "base", 3, "failed"),
        ("f-t007-s4", "finalists", "t007", 4, "failed"),
    ]
    assert "is missing" in read(tmp_path)[0].reason


def test_values_that_do_not_fit_the_record_are_damage_too(tmp_path):
    folder = made_trial(tmp_path, "t000", metrics={"val/nll": 0.2})
    record = json.loads((folder / "run.json").read())
    (folder / "run.json").write(json.dumps(record | {"attempts": [{"started": "yesterday"}]}).encode())
    (damaged,) = read(tmp_path)
    assert damaged.status == "failed"
    assert "damaged" in damaged.reason


def test_a_trial_that_goes_on_has_the_newest_figures_of_its_log(tmp_path):
    folder = made_trial(tmp_path, "t001", {}, "running", {"val/nll": 0.9, "train/loss": math.nan}, step=50)
    record = json.loads((folder / "run.json").read())
    record["result"] = {"status": "stopped", "step": 20, "metrics": {"val/nll": 2.0}, "message": "stopped"}
    (folder / "run.json").write(json.dumps(record).encode())
    (found,) = read(tmp_path)
    assert (found.status, found.step, found.metrics, found.reason) == ("running", 50, {"val/nll": 0.9}, "")
    assert found.ended == 0


def test_a_trial_whose_run_has_not_begun_is_running(tmp_path):
    (made_trial(tmp_path, "t001") / "run.json").remove()
    assert [(r.status, r.seconds, r.metrics) for r in read(tmp_path)] == [("running", 0.0, {})]


def test_the_time_of_a_killed_attempt_is_up_to_its_last_event(tmp_path):
    folder = made_trial(tmp_path, "t001", started=BEGUN, seconds=30.0)
    record = json.loads((folder / "run.json").read())
    record["attempts"] = [{"started": BEGUN - 100}, *record["attempts"]]
    (folder / "run.json").write(json.dumps(record).encode())
    times = [int(1000 * (BEGUN + offset)) for offset in (-95, -60, 5)]
    lines = [json.dumps({"time": time, "kind": "note", "text": ""}) for time in times]
    (folder / "events.jsonl").write("".join(f"{line}\n" for line in lines).encode())
    (found,) = read(tmp_path)
    assert found.seconds == pytest.approx(40 + 30, abs=0.01)
    assert (found.started, found.ended) == (BEGUN - 100, BEGUN + 30)


def test_what_was_set_aside_or_is_hidden_is_no_trial(tmp_path):
    for name in ("t001", "t001.1", ".t002"):
        made_trial(tmp_path, name)
    assert [r.name for r in read(tmp_path)] == ["t001"]
    assert read(tmp_path / "nowhere") == []


def test_a_status_that_is_no_trials_is_a_failure_which_is_told(tmp_path):
    made_trial(tmp_path, "t001", {}, "no good checkpoint", message="all are damaged")
    (found,) = read(tmp_path)
    assert (found.status, found.reason) == ("failed", "no good checkpoint: all are damaged")


def test_a_trial_that_came_to_nothing_counts_as_the_worst_and_a_pruned_one_not_at_all():
    assert value(row("t001", val_nll=0.3), NLL) == 0.3
    assert value(row("t001"), NLL) == 100  # it finished, and the figure was not finite
    assert value(row("t001", "diverged", val_nll=0.3), NLL) == 100
    assert value(row("t001", "failed", val_accuracy=0.9), ACCURACY) == 0
    assert [value(row("t001", status, val_nll=0.3), NLL) for status in ("pruned", "running", "stopped")] == [None] * 3


def test_counts_are_by_status_in_one_order():
    rows = [row(f"t{i:03}", status) for i, status in enumerate(("running", "failed", "finished", "failed"))]
    assert list(counts(rows).items()) == [("finished", 1), ("failed", 2), ("running", 1)]


def test_the_best_is_the_search_s_best_finished_trial_the_base_included(tmp_path):
    sweep = sweep_of(tmp_path)
    rows = [row("t000", val_nll=0.3), row("t001", val_nll=0.2), row("t002", "pruned", val_nll=0.1), row("t003")]
    assert [r.name for r in best(rows, sweep)] == ["t001"]
    assert [r.name for r in best(rows[:1] + rows[2:], sweep)] == ["t000"]
    assert best(rows[2:], sweep) == []


def test_fronts_are_those_of_the_definition():
    """Each row is in the first front in which none of those that are left dominates it."""
    noise = random.Random(0)
    rows = [row(f"t{i:03}", val_nll=noise.randint(0, 9), val_accuracy=noise.randint(0, 9)) for i in range(60)]

    def dominates(a, b):
        pairs = (b.metrics["val/nll"] - a.metrics["val/nll"], a.metrics["val/accuracy"] - b.metrics["val/accuracy"])
        return min(pairs) >= 0 and max(pairs) > 0

    found = fronts(rows, [NLL, ACCURACY])
    assert sorted(r.name for front in found for r in front) == sorted(r.name for r in rows)
    assert len(found) > 3
    for k, front in enumerate(found):
        assert not any(dominates(a, b) for a in front for b in front)
        assert k == 0 or all(any(dominates(a, b) for a in found[k - 1]) for b in front)
        assert [r.metrics["val/nll"] for r in front] == sorted(r.metrics["val/nll"] for r in front)


def test_tables_have_typed_columns_that_are_empty_where_nothing_was_drawn(tmp_path):
    rows = [
        row("t000", val_nll=0.25),
        row("t001", "failed", {"sgld.steps": 5, "sgld.step_size": 1, "data.flip": True, "model.norm": "none"}),
        row("t002", "finished", {"sgld.steps": 7, "sgld.step_size": 0.5, "optimizer.clip_norm": None}, val_nll=0.5),
        row("t003", "finished", {"optimizer.clip_norm": 1.5, "model.channels": [8, 16]}, val_accuracy=0.75),
    ]
    assert write_tables(rows, tmp_path) == ["trials.csv", "trials.parquet"]
    table = pyarrow.parquet.read_table(tmp_path / "trials.parquet")
    types = {
        "number": pa.int64(),
        "sgld.steps": pa.int64(),
        "sgld.step_size": pa.float64(),
        "data.flip": pa.bool_(),
        "model.norm": pa.string(),
        "optimizer.clip_norm": pa.string(),
        "val/nll": pa.float64(),
    }
    assert {key: table.schema.field(key).type for key in types} == types
    assert table["sgld.steps"].to_pylist() == [None, 5, 7, None]
    assert table["sgld.step_size"].to_pylist() == [None, 1.0, 0.5, None]
    assert table["data.flip"].to_pylist() == [None, True, None, None]
    assert table["optimizer.clip_norm"].to_pylist() == [None, None, "none", "1.5"]
    assert table["model.channels"].to_pylist() == [None, None, None, "[8, 16]"]
    assert table["val/nll"].to_pylist() == [0.25, None, 0.5, None]
    text = pyarrow.csv.read_csv(tmp_path / "trials.csv")
    assert text.column_names == table.column_names
    assert text["sgld.step_size"].to_pylist() == [None, 1.0, 0.5, None]
    assert text["name"].to_pylist() == ["t000", "t001", "t002", "t003"]


def test_a_table_of_no_trials_has_columns_and_no_rows(tmp_path):
    write_tables([], tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "trials.parquet")
    assert table.num_rows == 0
    assert "status" in table.column_names
