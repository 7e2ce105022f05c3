"""A process that hangs, ended by its watchdog."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.watchdog import Watchdog

ROOT = Path(__file__).parents[2]

WORKER = """
import ctypes, sys, time
from orchestrator.watchdog import Watchdog
def steps():
    for _ in range(20):
        watchdog.touch()
        time.sleep(0.1)
def hang():
    {"sleeping": lambda: time.sleep(60), "holding the GIL": lambda: ctypes.PyDLL(None).sleep(60),
     "not": lambda: None}[sys.argv[1]]()
with Watchdog(1.0) as watchdog:
    print("began", flush=True)
    steps()
    print("20 steps", flush=True)
    hang()
if sys.argv[1] == "not":  # it goes on with what may be silent for as long as it likes, and with batches
    for _ in range(2):
        time.sleep(1.5)
        watchdog.touch()
    time.sleep(1.5)
print("done", flush=True)
"""


@pytest.fixture
def worker():
    started = []

    def start(how):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", WORKER, how], cwd=ROOT, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["sleeping", "holding the GIL"])
def test_a_process_that_hangs_ends_and_says_where(worker, how):
    process = worker(how)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "began\n20 steps\n"), "two seconds of steps are no second without one"
    assert "Timeout" in err
    assert "in hang" in err


def test_a_process_that_goes_on_is_left_alone_and_so_is_what_follows(worker):
    process = worker("not")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "began\n20 steps\ndone\n", "")


def test_a_process_that_was_stopped_for_too_long_does_nothing_more_once_it_is_continued(worker):
    process = worker("not")
    assert process.stdout.readline() == "began\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(20) == 1


def test_a_touch_is_cheap():
    with Watchdog(300) as watchdog:
        begin = time.perf_counter()
        for _ in range(10_000):
            watchdog.touch()
        assert time.perf_counter() - begin < 1, "100 microseconds each"
