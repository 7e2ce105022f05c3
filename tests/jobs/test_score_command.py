"""jobs/score.py as a process, with Ray Data and signals, all real. Each command that scores costs 10 to 30 s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import ROOT, Command, Ended, bring

from jem.config import JEMConfig, ModelConfig
from jem.models import small_conv
from jem.predict import Card, Predictor, save
from jem.settings import flatten

SHAPE = (1, 8, 8)
ROWS, PER_UNIT = 2600, 600  # rows of each of two files: 4 whole units and a short one


class Scoring(Command):
    """`python jobs/score.py ARGUMENTS` in `folder`, running."""

    def __init__(self, folder, *arguments, flags=(), **variables):
        self.out, self.err = (folder / f"std{name}-{time.monotonic_ns()}" for name in ("out", "err"))
        command = [sys.executable, *flags, str(ROOT / "jobs" / "score.py"), *map(str, arguments)]
        with self.out.open("w") as out, self.err.open("w") as err:
            environment = os.environ | variables
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=environment)
        self.descendants = set()

    def scorers(self):
        """The processes of the actors, as far as these are alive."""
        self.look()
        found = []
        for process in self.descendants:
            try:
                if "MapWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def ended(folder, *arguments, **options) -> Ended:
    command = Scoring(folder, *arguments, **options)
    try:
        return command.end()
    finally:
        command.kill()


def make_model(folder, name="small_conv"):
    config = JEMConfig(seed=0, model=ModelConfig(name=name, channels=(4, 8)))
    torch.manual_seed(0)
    network = small_conv(config.model, SHAPE, 10)
    weights = {key if name == "small_conv" else f"network.{key}": value for key, value in network.state_dict().items()}
    classes = tuple("0123456789")
    save(folder, Card(flatten(config), SHAPE, classes, 1.5, 2.3, "NHWC", "uint8", "ab" * 32), weights)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed: two models of the same weights, one of them slow; two files of data."""
    folder = tmp_path_factory.mktemp("typed")
    make_model(folder / "model")
    make_model(folder / "slow", "slow_scores:slow")
    bring(folder, "slow_scores.py")
    random = np.random.default_rng(0)
    (folder / "data").mkdir()
    for name in ("a", "b"):
        images = random.integers(0, 256, (ROWS, *SHAPE), dtype=np.uint8)
        tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
        table = pa.table({"image": tensors, "label": random.integers(0, 10, ROWS)})
        pq.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=300)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """All scores, by two workers."""
    return ended(folder, "model", "data", "whole", f"rows_per_unit={PER_UNIT}", "workers=2")


def scores_in(out):
    return sorted(out.glob("scores-*.parquet"))


def imported(ended):
    """Names of modules, where the command ran with -X importtime."""
    return {line.rsplit("|", 1)[1].strip() for line in ended.err.splitlines() if line.startswith("import time:")}


def contents(out):
    """The scores themselves: the files also say which settings the model has."""
    return [pq.read_table(path) for path in scores_in(out)]


def test_help_and_mistakes_are_there_at_once_and_start_nothing(folder):
    helped = ended(folder, "--help")
    assert helped.code == 0
    for text in ("rows_per_unit = 50000", "MODEL  the folder of a portable model", "exit codes: 0 finished"):
        assert text in helped.out
    wrong = ended(folder, "model", "data", "out", "worker=2", flags=("-X", "importtime"))
    assert (wrong.code, wrong.result["status"]) == (2, "bad configuration")
    assert "did you mean 'workers'" in wrong.result["message"]
    assert not imported(wrong) & {"torch", "ray", "mlflow"}
    assert not (folder / "out").exists()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_scores_are_the_predictors_whoever_computed_them(folder, whole):
    assert whole.code == 0, whole.err
    result, summary = whole.result, json.loads((folder / "whole" / "scores.json").read_text())
    assert (result["status"], result["rows"], result["units"]) == ("finished", 2 * ROWS, 10)
    assert result["metrics"]["accuracy"] == summary["accuracy"]
    assert "5,200 of 5,200 rows, 10 of 10 units" in whole.err
    predictor, tables = Predictor.load(folder / "model"), iter(contents(folder / "whole"))
    for name in ("a", "b"):
        data = pq.read_table(folder / "data" / f"{name}.parquet").combine_chunks()
        images = data["image"].chunk(0).to_numpy_ndarray().transpose(0, 2, 3, 1)
        for start in range(0, ROWS, PER_UNIT):
            expected, table = predictor(images[start : start + PER_UNIT]), next(tables)
            np.testing.assert_array_equal(table["log_density"].to_numpy(), expected.log_density)
            np.testing.assert_array_equal(table["probability"].to_numpy(), expected.probability)
            assert table["true_label"].to_pylist() == data["label"][start : start + PER_UNIT].to_pylist()
            assert set(table["file"].to_pylist()) == {f"{name}.parquet"}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_same_command_scores_what_is_missing_and_nothing_else(folder, whole):
    out, arguments = folder / "whole", ("model", "data", "whole", f"rows_per_unit={PER_UNIT}")
    done = ended(folder, *arguments, flags=("-X", "importtime"))
    assert done.result == whole.result
    assert "torch" in imported(done)
    assert "ray" not in imported(done), "Ray was imported for nothing"
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in scores_in(out)}
    lost = scores_in(out)[3]
    lost.unlink()
    again = ended(folder, *arguments, "workers=1")
    assert again.code == 0, again.err
    assert again.result == whole.result
    assert "going on: 9 of 10 units" in again.err
    after = {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in scores_in(out)}
    assert {path for path in after if after[path][:2] != before[path][:2]} == {lost}
    assert after[lost][2] == before[lost][2], "one worker or two: the same bytes"


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_bad_row_ends_it_with_file_and_row(folder):
    images = np.zeros((30, *SHAPE), np.int64)
    images[25, 0, 7, 7] = 256
    pq.write_table(pa.table({"image": images.tolist()}), folder / "bad.parquet", row_group_size=10)
    command = ended(folder, "model", "bad.parquet", "bad", "rows_per_unit=10")
    assert (command.code, command.result["status"]) == (2, "bad data"), command.err
    assert "bad.parquet, row 25: holds 256; expected uint8 [1, 8, 8]" in command.result["message"]
    assert "Traceback" not in command.err
    assert not (folder / "bad" / "scores.json").exists()
