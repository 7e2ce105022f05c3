import json
import subprocess
import sys
from pathlib import Path

import image_fakes as fakes
import pytest

from jem.config import DataConfig
from jem.data import parquet
from jem.data.sources import load
from jem.errors import ConfigError
from jem.files import Location
from jobs.prepare import prepare
from orchestrator.command import run_command
from orchestrator.prepare import data_config
from orchestrator.runs import lock

SCRIPT = Path(__file__).parents[3] / "jobs" / "prepare.py"


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*arguments):
        """(exit code, the JSON of stdout's last line, stderr)."""
        monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
        code = run_command(prepare)
        printed = capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]), printed.err

    return run


def test_a_prepared_source_loads_as_the_source_itself_and_verifies(run, tmp_path):
    code, result, text = run("digits", tmp_path / "out", "validation_size=50")
    assert code == 0
    counts = {"train_images": 1387, "validation_images": 50, "test_images": 360, "classes": 10, "files": 3}
    assert result["metrics"].items() >= counts.items()
    expected = {"run_id": None, "name": "digits", "checkpoint": None, "step": None, "status": "finished"}
    assert result.items() >= (expected | {"data": str(tmp_path / "out")}).items()
    assert "reading digits: embedded in scikit-learn" in text
    written = load(DataConfig(name="parquet", root=str(tmp_path / "out")))
    assert written.digest == load(DataConfig(name="digits", validation_size=50)).digest
    assert run("--verify", tmp_path / "out")[:2] == (0, result)


def test_a_folder_of_images_is_named_by_its_path(run, tmp_path):
    fakes.folder(tmp_path / "photos", {"cat": 20, "dog": 20})
    code, result, _ = run(tmp_path / "photos", tmp_path / "out", "data.image_size=8", "channels=1")
    assert (code, result["name"]) == (0, "imagefolder")
    assert parquet.read(parquet.Location.of(tmp_path / "out")).image_shape == (1, 8, 8)


def test_training_images_of_a_folder_are_out_of_the_order_of_their_classes(run, tmp_path):
    """Streamed as they lie there, a window would be of few classes. Read from the folder they are the same data."""
    fakes.folder(tmp_path / "photos", dict.fromkeys("abcd", 60))
    assert run(tmp_path / "photos", tmp_path / "out", "image_size=4", "channels=1")[0] == 0
    written = parquet.read(parquet.Location.of(tmp_path / "out"))
    plain = load(DataConfig(name="imagefolder", root=str(tmp_path / "photos"), image_size=4, channels=1))
    assert written.digest == plain.digest
    levels = plain.train.images[:, 0, 0, 0].tolist()
    pairs = set(zip(levels, plain.train.labels.tolist(), strict=True))
    assert len(pairs) == len(plain.train)
    assert pairs < {(level, label) for level in range(60) for label in range(4)}
    changes = (plain.train.labels.diff() != 0).double().mean()
    assert abs(changes - 3 / 4) < 4 * (3 / 16 / len(plain.train)) ** 0.5


def test_an_occupied_place_ends_with_exit_code_2_before_the_source_is_read(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, result, text = run("cifar10", tmp_path, f"root={tmp_path}")
    assert (code, result["status"]) == (2, "bad data")
    assert "exists and is not an empty folder" in text


def test_missing_data_ends_with_exit_code_2_and_leaves_nothing(run, tmp_path):
    code, result, text = run("svhn", tmp_path / "out", f"root={tmp_path}", "download=false")
    assert (code, result["status"]) == (2, "bad data")
    assert "data.name=svhn: is not there" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("digitz", "there is no such folder; did you mean 'digits'?"),
        ("f.png", "is a file, a folder of images was expected"),
    ],
)
def test_a_source_that_is_none_is_named(run, tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.png").write_bytes(b"")
    code, result, _ = run(source, tmp_path / "out")
    assert (code, said in result["message"]) == (2, True)


def test_a_place_inside_the_folder_of_images_is_refused(run, tmp_path):
    fakes.folder(tmp_path / "photos", {"cat": 20, "dog": 20})
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for out in (tmp_path / "photos" / "out", tmp_path / "link" / "cat" / "out", tmp_path / "photos"):
        code, result, _ = run(tmp_path / "photos", out, "image_size=8")
        assert (code, result["message"]) == (2, f"OUT: {out} is inside SOURCE, where it would be taken for data")
    assert not (tmp_path / "photos" / "out").exists()
    code, result, _ = run(tmp_path / "photos", tmp_path / "out", "root=elsewhere")
    assert code == 2
    assert f"root: is given, but SOURCE is the folder {tmp_path / 'photos'} itself" in result["message"]


def test_two_commands_do_not_write_to_one_place(run, tmp_path):
    with lock(Location.of(tmp_path / "out")):
        code, result, _ = run("digits", tmp_path / "out")
    assert code == 2
    assert "is working on" in result["message"]


def test_damage_ends_verification_with_exit_code_2(run, tmp_path):
    run("digits", tmp_path / "out")
    file = tmp_path / "out" / "train-00000-of-00001.parquet"
    raw = bytearray(file.read_bytes())
    raw[1000] ^= 4
    file.write_bytes(raw)
    code, result, text = run("--verify", tmp_path / "out")
    assert (code, result["status"]) == (2, "bad data")
    assert "train-00000-of-00001.parquet: its bytes are not those that were written" in text


def test_a_store_that_refuses_ends_with_exit_code_1(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, result, text = run("digits", tmp_path / "file" / "out")
    assert (code, result["status"]) == (1, "failed")
    assert "failed: " in text


def test_all_mistakes_are_reported_at_once_by_the_names_of_the_settings():
    with pytest.raises(ConfigError) as caught:
        data_config("digit", ["image_size=x", "data.chanels=1"])
    text = str(caught.value)
    assert "command line: data.image_size: is 'x', a number was expected" in text
    assert "data.chanels: no such setting; did you mean 'channels'?" in text
    assert "did you mean 'digits'?" in text
    with pytest.raises(ConfigError, match="'validation' is not of the form key=value"):
        data_config("digits", ["validation"])


def test_options_of_a_source_can_be_given():
    assert data_config("celeba", ["options.attribute=Bald"]).options == {"attribute": "Bald"}


@pytest.mark.parametrize("arguments", [["digits"], ["--verify", "digits", "out"], []])
def test_too_few_or_too_many_arguments_end_with_exit_code_2(run, arguments):
    code, result, _ = run(*arguments)
    assert (code, result["status"]) == (2, "bad configuration")
    assert "see --help" in result["message"]


def test_help_and_mistakes_come_before_torch_is_imported(tmp_path):
    for arguments, code in ((["--help"], 0), (["digits", tmp_path / "out", "flip=maybe"], 2)):
        command = [sys.executable, "-X", "importtime", SCRIPT, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code
        assert "argparse" in done.stderr
        assert not {"torch", "torchvision", "ray", "mlflow"} & set(done.stderr.split())


def test_the_users_own_function_is_found_in_the_folder_the_command_runs_in(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def made(config):\n"
        "    return {'train': (np.zeros((40, 1, 4, 4), np.uint8), np.arange(40) % 2)}\n"
    )
    done = subprocess.run([sys.executable, SCRIPT, "mine:made", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["data"] == str(tmp_path / "out")


def test_a_terminated_command_says_so_and_leaves_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, signal\nfrom jem.data import rows, parquet\nfrom jem.data.sources import load\n"
        "from jem.config import DataConfig\n"
        "def made(config):\n"
        "    parquet.write_rows = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return load(DataConfig(name='digits'))\n"
    )
    done = subprocess.run([sys.executable, SCRIPT, "mine:made", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 143
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "stopped"
    assert not (tmp_path / "out").exists()
