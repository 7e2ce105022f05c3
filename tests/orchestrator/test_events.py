from __future__ import annotations

import fcntl
import math
import multiprocessing
import os
import resource
import statistics
import time

import pytest

from orchestrator.events import EventLog, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "events.jsonl"


def test_events_come_back_in_order_with_the_time_in_ms(path):
    before = time.time() * 1000
    log = EventLog(path)
    log.append("metrics", step=1, metrics={"train/loss": 0.5})
    log.append("checkpoint", step=1)
    events, offset = read(path)
    assert [event["kind"] for event in events] == ["metrics", "checkpoint"]
    assert events[0]["metrics"] == {"train/loss": 0.5}
    assert all(isinstance(event["time"], int) and before - 1 <= event["time"] <= time.time() * 1000 for event in events)
    assert offset == log.size == path.stat().st_size


def test_numbers_that_are_not_finite_and_numpy_scalars_survive(path):
    import numpy as np

    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5)}
    EventLog(path).append("metrics", step=0, metrics=values)
    metrics = read(path)[0][0]["metrics"]
    assert math.isnan(metrics["a"])
    assert (metrics["b"], metrics["c"], metrics["d"]) == (math.inf, -math.inf, 0.5)


def test_what_cannot_be_json_is_refused_and_leaves_no_trace(path):
    log = EventLog(path)
    with pytest.raises(TypeError, match="cannot be put into the event log"):
        log.append("note", text={1, 2})
    assert path.read_bytes() == b""


@pytest.mark.parametrize("kept", [0, 1, 7, -2, -1])
def test_a_torn_last_line_is_repaired_when_the_log_is_opened(path, kept):
    log = EventLog(path)
    log.append("note", text="whole")
    whole = log.size
    log.append("note", text="torn" + "x" * 200_000)
    line = path.read_bytes()[whole:]
    os.truncate(path, whole + len(line[:kept]))
    log = EventLog(path)
    assert path.stat().st_size == whole
    log.append("note", text="after")
    assert [event["text"] for event in read(path)[0]] == ["whole", "after"]


def test_a_reader_leaves_a_torn_line_until_it_is_whole(path):
    EventLog(path).append("note", text="one")
    data = path.read_bytes()
    with open(path, "ab") as file:
        file.write(data[:10])
        file.flush()
        events, offset = read(path)
        assert (len(events), offset) == (1, len(data))
        file.write(data[10:])
    events, offset = read(path, offset)
    assert ([event["text"] for event in events], offset) == (["one"], 2 * len(data))
    assert read(path, offset) == ([], offset)


def test_a_log_that_is_not_there_yet_has_no_events(path):
    assert read(path, 0) == ([], 0)


@pytest.mark.parametrize("limit", [1, 40, 100, 10_000])
def test_reading_in_pieces_gives_the_same_events(path, limit):
    log = EventLog(path)
    for i in range(20):
        log.append("note", text="x" * i)
    pieces, offset = [], 0
    while offset < log.size:
        events, offset = read(path, offset, limit)
        pieces += events
    assert pieces == read(path)[0]
    events, position = read(path)
    half = len(log.since(0).splitlines(keepends=True)[0])
    assert read(path, 0, half)[1] == half, "a limit on the end of a line takes no further line"
    assert position == log.size


def test_a_damaged_line_does_not_hide_the_next(path):
    log = EventLog(path)
    log.extend(b'{"time": 1, "kind"\xff\n[]\n')
    log.append("note", text="after")
    assert [event["kind"] for event in read(path)[0]] == ["damaged", "damaged", "note"]


def test_the_raw_bytes_since_an_offset_rebuild_the_log_elsewhere(path, tmp_path):
    log, copy = EventLog(path), EventLog(tmp_path / "copy.jsonl")
    offset = 0
    for step in range(5):
        log.append("metrics", step=step, metrics={"a": step})
        copy.extend(log.since(offset))
        offset = log.size
    assert copy.path.read_bytes() == path.read_bytes()


def _append_many(path, name):
    log = EventLog(path)
    for i in range(300):
        log.append("note", text=f"{name}-{i}", padding="x" * (i % 50) * 100)
    log.close()


def test_two_processes_may_append_at_once(path):
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_append_many, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    texts = [event["text"] for event in read(path)[0]]
    assert len(texts) == 600
    for name in "ab":
        assert [text for text in texts if text[0] == name] == [f"{name}-{i}" for i in range(300)]


def test_an_append_costs_well_under_a_millisecond(path):
    log, metrics = EventLog(path), {f"train/metric_{i}": i / 7 for i in range(15)}
    costs = []
    for step in range(500):
        start = time.perf_counter()
        log.append("metrics", step=step, metrics=metrics)
        costs.append(time.perf_counter() - start)
    assert statistics.median(costs) < 0.5e-3


def test_a_writer_that_was_stopped_in_mid_write_holds_up_nobody(path):
    log = EventLog(path)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        start = time.perf_counter()
        log.append("note", text="one")
        assert time.perf_counter() - start < 0.05
        assert read(path)[0] == []
    log.append("note", text="two")
    assert [event["text"] for event in read(path)[0]] == ["one", "two"]


def test_a_full_disk_loses_no_event_and_raises_nothing(path, caplog):
    """A limit on the size of files fails as a full disk does: half of the line is written, then nothing."""
    log = EventLog(path)
    log.append("note", text="before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + 20, hard))
    try:
        for text in ("one", "two"):
            log.append("note", text=text)
        seen = path.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seen.endswith(b"\n"), "a torn line was left for another writer to continue"
    log.append("note", text="after")
    assert [event["text"] for event in read(path)[0]] == ["before", "one", "two", "after"]
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1
