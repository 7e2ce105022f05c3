"""jobs/sample.py as a process."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ROOT, Ended

from jem.config import JEMConfig, ModelConfig
from jem.models import small_conv
from jem.predict import Card, Predictor, save
from jem.settings import flatten
from jobs import sample as job

SHAPE = (1, 8, 8)
HEAVY = {"torch", "ray", "mlflow", "sklearn", "matplotlib", "PIL"}


def call(folder, *words, flags=()):
    """The command, ended."""
    command = [sys.executable, *flags, str(ROOT / "jobs" / "sample.py"), *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def imported(ended):
    return {line.rsplit("|", 1)[1].strip() for line in ended.err.splitlines() if line.startswith("import time:")}


@pytest.fixture
def folder(tmp_path):
    """Where the command is typed: a model lies there."""
    config = JEMConfig(seed=0, model=ModelConfig(name="small_conv", channels=(4, 8)))
    torch.manual_seed(0)
    network = small_conv(config.model, SHAPE, 10)
    card = Card(flatten(config), SHAPE, tuple("0123456789"), 1.5, 2.3, "NHWC", "uint8", "ab" * 32)
    save(tmp_path / "model", card, network.state_dict())
    return tmp_path


def test_help_and_mistakes_are_there_at_once(folder):
    helped = call(folder, "--help", flags=("-X", "importtime"))
    assert helped.code == 0
    for text in ("  class = none", "  sgld.step_size = none", "exit codes: 0 finished"):
        assert text in helped.out
    wrong = call(folder, "model", "count=0", "clas=3", flags=("-X", "importtime"))
    assert (wrong.code, wrong.result["status"]) == (2, "bad configuration")
    assert "count: is 0" in wrong.result["message"]
    assert "did you mean 'class'" in wrong.result["message"]
    assert not (imported(helped) | imported(wrong)) & HEAVY
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_the_last_line_says_where_the_samples_are_and_the_model_takes_them(folder):
    ended = call(folder, "model", "count=10", "class=all", "steps=20", "out=drawn")
    assert ended.code == 0, ended.err
    result = ended.result
    assert (result["status"], result["count"], result["steps"]) == ("finished", 10, 20)
    assert (result["folder"], result["samples"]) == (str(folder / "drawn"), str(folder / "drawn" / "grid.png"))
    assert sorted(result["files"]) == sorted(path.name for path in (folder / "drawn").iterdir())
    assert "sampling model: 100 %" in ended.err
    said = json.loads((folder / "drawn" / "samples.json").read_text())
    found = Predictor.load(folder / "model")(np.load(folder / "drawn" / "samples.npy"))
    assert said["energy"]["mean"] == pytest.approx(-found.log_density.mean(), abs=1e-5)
    assert sum(result["predicted"].values()) == 10


def test_divergence_ends_it_with_exit_code_4_and_nothing_is_written(folder, here):
    ended = here(job.sample, "model", "count=2", "steps=5", "sgld.step_size=1e39", "out=drawn")
    assert (ended.code, ended.result["status"]) == (4, "diverged"), ended.err
    assert "not finite at step" in ended.result["message"]
    assert "Traceback" not in ended.err
    assert [path.name for path in folder.iterdir()] == ["model"]
