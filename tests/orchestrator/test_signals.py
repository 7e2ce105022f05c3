"""SIGTERM and Ctrl-C on a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.signals import StopSignals

ROOT = Path(__file__).parents[2]

DRIVER = """
import sys, time
from orchestrator.signals import StopSignals
with StopSignals() as signals:
    if sys.argv[1] == "stolen":  # as ray.init does
        import signal
        signal.signal(signal.SIGTERM, lambda *_: print("stolen", flush=True))
        signals.listen()
    print("ready", flush=True)
    try:
        while not signals.stopping:
            time.sleep(0.05)
        print("stopping", flush=True)
        time.sleep(1 if sys.argv[1] != "patient" else 30)
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


def test_it_can_take_the_signals_back_from_who_took_them(driver):
    process = driver("stolen")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopping\nstopped\n"


def test_afterwards_the_handlers_are_what_they_were():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stopping
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_it_does_nothing():
    failed = []

    def work():
        try:
            with StopSignals():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert failed == []
