"""SIGTERM and Ctrl-C on a real process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.signals import StopSignals, deaf

ROOT = Path(__file__).parents[2]

DRIVER = """
import sys, time
from orchestrator.signals import StopSignals
def last_word():
    print("last word", flush=True)
    return 143
with StopSignals(last_word, within_s=1.0 if sys.argv[1] == "in time" else 60.0) as signals:
    print("ready", flush=True)
    try:
        while not signals.stopping:
            time.sleep(0.05)
        print("stopping", flush=True)
        time.sleep(30 if sys.argv[1] in ("patient", "in time") else 1)
        print("stopped", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.fixture
def driver():
    started = []

    def start(mood=""):
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, mood],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_says_what_follows(driver, number):
    process = driver()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out == "stopping\nstopped\n"
    assert "a checkpoint first" in err
    assert process.returncode == 0


def test_a_second_ctrl_c_interrupts_at_once(driver):
    process = driver("patient")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "interrupted\n"
    assert time.monotonic() - begin < 20, "it would sleep for 30"


def test_a_second_sigterm_does_not_cut_the_checkpoint_short(driver):
    process = driver()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopped\n"


def test_a_process_that_cannot_end_says_its_last_word_in_time(driver):
    process = driver("in time")
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopping\nlast word\n"
    assert process.returncode == 143
    assert 1 <= time.monotonic() - begin < 20, "it would sleep for 30"


def test_the_time_that_is_left_runs_from_the_first_signal():
    with StopSignals(within_s=28) as signals:
        assert signals.left == math.inf
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert 20 < signals.left <= 28


COMMAND = """
import sys, time
from orchestrator.command import run_command
from orchestrator.result import Result
def work():
    print("ready", flush=True)
    time.sleep(30)
sys.exit(run_command(work))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_interrupted_ends_with_its_last_line(number):
    with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=20)
    assert json.loads(out)["status"] == "stopped"
    assert process.returncode == 143


def test_while_deaf_no_signal_does_anything():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with deaf():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_afterwards_the_handlers_are_what_they_were():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stopping
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_it_does_nothing():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    during, failed = [], []

    def work():
        try:
            with StopSignals():
                during.extend(signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert failed == []
    assert during == before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
