"""Curves from a run's log."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from orchestrator.curves import curves_png, latest, read_series
from orchestrator.events import EventLog


@pytest.fixture
def log(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    yield log
    log.close()


def test_what_was_run_again_counts_as_it_was_last(log):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        log.append("metrics", step=step, metrics={"train/loss": loss})
    log.append("attempt", attempt=2, step=2)
    log.append("metrics", step=3, metrics={"train/loss": 1.0, "val/nll": 0.5})
    assert read_series(log.path) == {"train/loss": {1: 3.0, 2: 2.0, 3: 1.0}, "val/nll": {3: 0.5}}
    assert latest(log.path) == {"train/loss": 1.0, "val/nll": 0.5}


def test_there_is_no_picture_of_less_than_two_points(log):
    assert curves_png(log.path) is None
    log.append("metrics", step=1, metrics={"train/loss": 3.0})
    assert curves_png(log.path) is None
    assert latest(log.path) == {"train/loss": 3.0}


def test_the_picture_shows_curves_even_with_gaps(log):
    for step in range(5):
        loss = float("nan") if step == 2 else 1.0 / (step + 1)
        log.append("metrics", step=step, metrics={"train/loss": loss, "train/accuracy": 0.1 * step})
    pixels = np.asarray(Image.open(io.BytesIO(curves_png(log.path))).convert("RGB"))
    assert pixels.shape[1] > 2 * pixels.shape[0], "two panels beside each other"
    assert (pixels.std(axis=2) > 20).sum() > 100, "coloured lines"


def test_the_picture_says_where_a_run_diverged_and_went_back(log):
    for step in range(5):
        log.append("metrics", step=step, metrics={"train/loss": 1.0 / (step + 1)})
    plain = np.asarray(Image.open(io.BytesIO(curves_png(log.path))).convert("RGB"))
    log.append("rollback", number=1, from_step=3, step=1, reason="lost", remedy="seed", level=1)
    marked = np.asarray(Image.open(io.BytesIO(curves_png(log.path))).convert("RGB"))
    changed = (plain != marked).any(axis=2)
    assert changed.sum(axis=0).max() > 0.3 * changed.shape[0], "a line from the bottom to the top"
