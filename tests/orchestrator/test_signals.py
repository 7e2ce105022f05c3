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

from jem.files import Location
from orchestrator.signals import StopSignals

ROOT = Path(__file__).parents[2]

DRIVER = """
import sys, time
from jem.files import Location
from orchestrator.signals import StopSignals
with StopSignals(Location.of(sys.argv[1])) as signals:
    if sys.argv[2] == "stolen":  # as ray.init does
        import signal
        signal.signal(signal.SIGTERM, lambda *_: print("stolen", flush=True))
        signals.listen()
    print("ready", flush=True)
    try:
        while not signals.stopping:
            time.sleep(0.05)
        print("stopping", flush=True)
        time.sleep(1 if sys.argv[2] != "patient" else 30)
        print("stopped", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.fixture
def driver(tmp_path):
    started = []

    def start(mood=""):
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), mood],
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
def test_the_first_signal_asks_for_a_checkpoint_and_says_so(driver, tmp_path, number):
    process = driver()
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out == "stopping\nstopped\n"
    assert "a checkpoint first" in err
    assert (tmp_path / "stop").exists()
    assert process.returncode == 0


def test_a_second_ctrl_c_interrupts_at_once(driver):
    process = driver("patient")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "interrupted\n"
    assert time.monotonic() - begin < 5


def test_a_second_sigterm_does_not_cut_the_checkpoint_short(driver):
    process = driver()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopped\n"


def test_it_can_take_the_signals_back_from_who_took_them(driver, tmp_path):
    process = driver("stolen")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "stopping\nstopped\n"
    assert (tmp_path / "stop").exists()


def test_afterwards_the_handlers_are_what_they_were(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals(Location.of(tmp_path)) as signals:
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stopping
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_it_does_nothing(tmp_path):
    failed = []

    def work():
        try:
            with StopSignals(Location.of(tmp_path)):
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert failed == []
