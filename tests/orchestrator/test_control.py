"""A request to stop is seen within about a second, and heeded by all ranks at the same step."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from rank_stories import first_stop

from jem.files import Location
from jem.world import World
from orchestrator.control import Control, clear_request, request_stop

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    return Location.of(tmp_path / "run")


def test_a_request_that_is_there_is_heeded_in_the_first_step(root):
    request_stop(root)
    assert Control(World(), root, CPU).stop_requested(1)
    assert Control(World(), root, CPU).due(500), "a run that goes on from step 499 looks in its first step"
    clear_request(root)
    assert not Control(World(), root, CPU).stop_requested(1)


def test_withdrawing_a_request_that_was_never_made_is_nothing(root):
    clear_request(root)


class Counting:
    """A folder that counts how often it is looked into."""

    def __init__(self, root):
        self.root, self.looks, self.is_local = root, 0, True

    def __truediv__(self, name):
        self.looks += 1
        return self.root / name


def test_it_looks_about_once_a_second_whatever_a_step_takes(root):
    folder = Counting(root)
    control = Control(World(), folder, CPU)
    begin = time.monotonic()
    assert first_stop(control, 250, pause=0.01) is None
    seconds = time.monotonic() - begin
    assert 2 <= folder.looks <= seconds + 4  # the first steps look to learn the pace


class Away:
    """A request on a store that takes its time to answer."""

    is_local = False

    def __init__(self):
        self.asked, self.answers = 0, threading.Event()

    def __truediv__(self, name):
        return self

    def exists(self):
        self.asked += 1
        if not self.answers.wait(20):
            raise OSError("no connection")
        return True


def test_no_step_waits_for_a_store_that_does_not_answer(root):
    store = Away()
    control = Control(World(), store, CPU)
    begin = time.monotonic()
    assert not any(control.stop_requested(step) for step in range(1, 30))
    assert time.monotonic() - begin < 10
    assert store.asked == 1, "one question at a time"
    store.answers.set()
    control.look.thread.join()
    assert control.stop_requested(30)


def test_slow_steps_look_every_time(root, monkeypatch):
    monkeypatch.setattr("orchestrator.control.LOOK_EVERY_S", 0.02)
    assert first_stop(Control(World(), root, CPU), 20, pause=0.03, request=(7, root)) == 7


def test_a_request_is_heeded_within_about_a_second(root):
    control = Control(World(), root, CPU)
    for step in range(1, 41):
        time.sleep(0.01)
        assert not (control.due(step) and control.stop_requested(step))
    request_stop(root)
    asked = time.monotonic()
    for step in range(41, 400):
        time.sleep(0.01)
        if control.due(step) and control.stop_requested(step):
            break
    assert time.monotonic() - asked < 20
