"""The model as MLflow runs it: in a process of its own, behind HTTP, and with input that is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from made_models import portable
from ports import free_port

from jem.predict import Predictor
from orchestrator.outbox import Model
from orchestrator.register import code_of, register, save_pyfunc

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]


def pictures(n):
    return np.random.default_rng(1).integers(0, 256, (n, 4, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(the portable model, the same as MLflow keeps it)."""
    folder = tmp_path_factory.mktemp("pyfunc")
    card = portable(folder / "model")
    save_pyfunc(folder / "saved", folder / "model", card)
    return folder / "model", folder / "saved"


@pytest.fixture(scope="module")
def loaded(model):
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(model[1]))


ELSEWHERE = """
import sys
sys.path[:] = [p for p in sys.path if p != ROOT]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{f} {f.__module__}"]
import importlib.util
assert importlib.util.find_spec("jem") is None, "this process must know jem from the model alone"
import numpy as np, mlflow.pyfunc
found = mlflow.pyfunc.load_model(MODEL)
table = found.predict(np.load("images.npy"))
import jem
assert jem.__file__.startswith(MODEL), jem.__file__
assert "orchestrator" not in sys.modules
np.savez("table.npz", label=table.label.to_numpy(str), probabilities=np.array(table.probabilities.tolist()),
         **{k: table[k].to_numpy() for k in ("probability", "log_density", "in_distribution")})
"""


def test_it_answers_the_same_bits_where_nothing_of_this_project_is_installed(model, tmp_path):
    """Without pickle, in a fresh process, with the code that the model carries."""
    folder, saved = model
    images = pictures(300)
    np.save(tmp_path / "images.npy", images)
    code = ELSEWHERE.replace("ROOT", repr(str(ROOT))).replace("MODEL", repr(str(saved)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table, answer = np.load(tmp_path / "table.npz"), Predictor.load(folder)(images)
    assert table["label"].tolist() == answer.label
    for name in ("probability", "probabilities", "log_density", "in_distribution"):
        np.testing.assert_array_equal(table[name], getattr(answer, name), strict=True)
    assert 0 < answer.in_distribution.sum() < 300


def test_nothing_in_it_is_pickled(model):
    files = [path for path in model[1].rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    kinds = {path.suffix for path in files}
    assert kinds <= {"", ".py", ".typed", ".yaml", ".json", ".txt", ".safetensors", ".npy"}
    (numpy,) = model[1].rglob("*.npy")
    np.load(numpy, allow_pickle=False)


def test_the_input_example_is_answered(model, loaded):
    example = loaded.metadata.load_input_example(str(model[1]))
    assert loaded.predict(np.asarray(example, np.uint8)).shape == (3, 5)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (
            pictures(2).transpose(0, 3, 1, 2),
            r"[Ss]hape of input \(2, 3, 4, 6\) does not match expected shape \(-1, 4, 6, 3\)",
        ),
        (pictures(2) / 255, "dtype of input float64 does not match expected dtype uint8"),
        (pictures(2) % 2, r"uint8 images of shape \[n, 4, 6, 3\] \(NHWC\), 0 to 255 were expected, .* exceeds 1"),
    ],
)
def test_what_is_no_such_image_is_refused_with_what_was_expected(loaded, images, said):
    with pytest.raises(Exception, match=said):
        loaded.predict(images)


def test_black_images_are_images_beside_others_and_alone_may_be_floats_cut_off_on_the_way(loaded):
    black = np.zeros((2, 4, 6, 3), np.uint8)
    assert len(loaded.predict(np.concatenate([black, pictures(1)]))) == 3
    with pytest.raises(Exception, match="exceeds 1"):
        loaded.predict(black)


def test_a_model_can_take_floats_with_the_channels_first(tmp_path):
    import mlflow.pyfunc

    card = portable(tmp_path / "model", layout="NCHW", dtype="float32")
    save_pyfunc(tmp_path / "saved", tmp_path / "model", card)
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "saved"))
    images = (pictures(2) / 255).astype(np.float32).transpose(0, 3, 1, 2)
    answer = Predictor.load(tmp_path / "model")(images)
    np.testing.assert_array_equal(loaded.predict(images).log_density, answer.log_density)
    with pytest.raises(Exception, match=r"float32 images of shape .* 0 to 1 were expected .* from 1.5 to 1.5"):
        loaded.predict(np.full_like(images, 1.5))


def test_a_network_of_the_users_own_goes_along(tmp_path, monkeypatch):
    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets" / "__init__.py").touch()
    (tmp_path / "my_single.py").touch()
    (tmp_path / "my_loose").mkdir()
    (tmp_path / "my_loose" / "net.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert list(code_of({"model.name": "my_nets.small:net"})) == [ROOT / "jem", tmp_path / "my_nets"]
    assert list(code_of({"model.name": "my_single:net"})) == [ROOT / "jem", tmp_path / "my_single.py"]
    loose = list(code_of({"model.name": "my_loose.net:net"}))
    assert loose == [ROOT / "jem", tmp_path / "my_loose"], "a package without __init__.py is one"
    assert list(code_of({"model.name": "small_conv"})) == [ROOT / "jem"]
    assert list(code_of({"model.name": "torch.nn:Linear"})) == [ROOT / "jem"]


@pytest.fixture
def server(migrated, tmp_path):
    """The address of `mlflow models serve` for the champion of a registered model, and that model's folder."""
    from mlflow import MlflowClient

    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, uri)
    run_id = client.create_run(client.create_experiment("jem", f"{tmp_path}/artifacts")).info.run_id
    card = portable(tmp_path / "model")
    register(client, run_id, tmp_path / "model", Model("model", 7, "served", "nll", card.digest))
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served@champion"]
    command += ["--env-manager", "local", "--port", str(port)]
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",  # it calls uvicorn by its name
    }
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not answers(f"{address}/ping"):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield address, tmp_path / "model"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def post(address, images):
    body, kind = json.dumps({"inputs": images}).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, kind), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["message"]


def test_the_champion_is_served_as_json(server):
    address, folder = server
    images = pictures(3)
    code, answer = post(f"{address}/invocations", images.tolist())
    assert code == 200, answer
    expected = Predictor.load(folder)(images)
    rows = answer["predictions"]
    assert [row["label"] for row in rows] == expected.label
    assert [row["probability"] for row in rows] == pytest.approx(expected.probability.tolist(), rel=1e-6)
    assert np.array([row["probabilities"] for row in rows]) == pytest.approx(expected.probabilities, rel=1e-6)
    assert [row["log_density"] for row in rows] == pytest.approx(expected.log_density.tolist(), rel=1e-6)
    assert [row["in_distribution"] for row in rows] == expected.in_distribution.tolist()
    for wrong, said in (
        (pictures(1)[:, :3].tolist(), "does not match expected shape (-1, 4, 6, 3)"),
        (np.full((1, 4, 6, 3), 256).tolist(), "out of bounds for uint8"),
        ((pictures(1) / pictures(1).max()).tolist(), "0 to 255 were expected"),
    ):
        code, message = post(f"{address}/invocations", wrong)
        assert code >= 400
        assert said in message
