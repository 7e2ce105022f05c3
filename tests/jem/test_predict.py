import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from toys import small

from jem.config import EvaluateConfig
from jem.data.augment import to_float
from jem.errors import CheckpointError, DataError, DivergedError
from jem.evaluate import evaluate
from jem.models import make_network
from jem.predict import BATCH, CARD, WEIGHTS, Card, Predictor, read_card, read_weights, save
from jem.settings import flatten
from jem.train import dtype_of, frozen_logits
from jem.world import World

SHAPE, CLASSES = (3, 4, 6), ("cat", "dog", "ant")


def made(folder, layout="NHWC", dtype="uint8", temperature=2.0, threshold=1.0, **changes):
    """A model of random weights in `folder`; its network."""
    config = small(**{"model__name": "small_conv", "model__channels": (4, 8)} | changes)
    torch.manual_seed(0)
    network = make_network(config.model, SHAPE, len(CLASSES)).to(dtype_of(config))
    for parameter in network.parameters():
        parameter.data.mul_(3)
    values = (flatten(config), SHAPE, CLASSES, temperature, threshold, layout, dtype, "ab" * 32, {"step": 7})
    save(folder, Card(*values), network.state_dict())
    return frozen_logits(network, config)


def pictures(n, seed=0):
    """uint8 [n, h, w, c]."""
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 6, 3), dtype=np.uint8)


def equal(one, other):
    return one.label == other.label and all(np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))


def test_the_answer_is_the_softmax_of_the_scaled_logits_and_the_logsumexp_of_the_bare_ones(tmp_path):
    logits = made(tmp_path, temperature=2.5, threshold=1.25)
    images = pictures(20)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    f = logits(x).detach().double()
    p = (f / 2.5).exp() / (f / 2.5).exp().sum(dim=1, keepdim=True)
    answer = Predictor.load(tmp_path)(images)
    np.testing.assert_allclose(answer.probabilities, p.numpy(), rtol=1e-5)
    np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(answer.log_density, f.exp().sum(dim=1).log().numpy(), rtol=1e-5)
    assert answer.index.tolist() == p.argmax(dim=1).tolist()
    assert answer.label == [CLASSES[i] for i in answer.index]
    assert len(set(answer.label)) > 1
    np.testing.assert_array_equal(answer.probability, answer.probabilities.max(axis=1))
    np.testing.assert_array_equal(answer.in_distribution, answer.log_density >= 1.25)
    assert 0 < answer.in_distribution.sum() < 20
    assert answer.probabilities.dtype == answer.log_density.dtype == answer.probability.dtype == np.float64


def test_an_image_at_the_threshold_counts_as_seen(tmp_path):
    made(tmp_path)
    images = pictures(5)
    at = Predictor.load(tmp_path)(images).log_density[2]
    made(tmp_path, threshold=float(at))
    assert Predictor.load(tmp_path)(images).in_distribution[2]


@pytest.mark.parametrize("precision", ["float32", "bf16", "float64"])
def test_answers_are_the_bits_that_the_evaluation_sees(tmp_path, precision):
    logits = made(tmp_path, precision=precision)
    images = pictures(BATCH + 30)
    split = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    like = torch.zeros((), dtype=torch.float64 if precision == "float64" else torch.float32)
    config = EvaluateConfig()
    seen = evaluate.over_batches(logits, to_float(split, torch.float32), config, World(), like, "clean")
    assert torch.equal(Predictor.load(tmp_path).logits(images), seen)
    assert BATCH == evaluate.BATCH


def test_bytes_and_the_same_as_fractions_in_either_layout_give_the_same_bits(tmp_path):
    images = pictures(10)
    images.reshape(-1)[:256] = np.arange(256)  # every byte there is
    made(tmp_path / "hwc")
    made(tmp_path / "chw", layout="NCHW", dtype="float32")
    hwc, chw = Predictor.load(tmp_path / "hwc"), Predictor.load(tmp_path / "chw")
    answer = hwc(images)
    for dtype in (np.float32, np.float64):
        assert equal(hwc((images / 255).astype(dtype)), answer)
    assert equal(hwc(torch.from_numpy(images)), answer)
    assert equal(chw(images.transpose(0, 3, 1, 2)), answer)
    assert equal(chw((images / 255).astype(np.float32).transpose(0, 3, 1, 2)), answer)
    assert equal(hwc(images.astype(">f8") / 255), answer)
    images.setflags(write=False)
    assert equal(hwc(images), answer)


def test_no_images_have_no_answers(tmp_path):
    made(tmp_path)
    answer = Predictor.load(tmp_path)(pictures(0))
    assert answer.label == []
    assert [part.shape for part in answer[1:]] == [(0,), (0,), (0, 3), (0,), (0,)]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 3, 4, 6), np.uint8), "shape [2, 3, 4, 6]"),
        (np.zeros((4, 6, 3), np.uint8), "shape [4, 6, 3]"),
        (np.zeros((), np.uint8), "shape []"),
        (np.zeros((1, 4, 6, 3), np.int64), "these are int64"),
        (torch.zeros((1, 4, 6, 3), dtype=torch.float16), "these are float16"),
        (np.full((1, 4, 6, 3), "x"), "these are <U1"),
        (np.full((1, 4, 6, 3), 1.5), "from 1.5 to 1.5"),
        (np.full((1, 4, 6, 3), -0.1), "from -0.1 to -0.1"),
        (np.full((1, 4, 6, 3), np.nan), "from nan to nan"),
        (np.full((1, 4, 6, 3), np.inf), "from inf to inf"),
    ],
)
def test_what_is_no_such_image_is_refused_with_what_was_expected(tmp_path, images, said):
    made(tmp_path)
    with pytest.raises(DataError) as error:
        Predictor.load(tmp_path)(images)
    assert "uint8 images of shape [n, 4, 6, 3] (NHWC), 0 to 255 were expected" in str(error.value)
    assert said in str(error.value)


def test_one_pixel_that_is_not_a_number_is_enough_to_refuse(tmp_path):
    made(tmp_path)
    images = np.zeros((3, 4, 6, 3), np.float32)
    images[1, 2, 3, 0] = np.nan
    with pytest.raises(DataError, match="nan"):
        Predictor.load(tmp_path)(images)


def test_a_model_that_answers_with_infinity_says_so(tmp_path):
    made(tmp_path)
    predictor = Predictor.load(tmp_path)
    next(predictor.network.parameters()).data.fill_(float("inf"))
    with pytest.raises(DivergedError, match="not finite"):
        predictor(pictures(3))


def test_the_card_comes_back_as_it_was(tmp_path):
    made(tmp_path, layout="NCHW", dtype="float32")
    card = read_card(tmp_path)
    assert (card.image_shape, card.classes, card.layout, card.dtype) == (SHAPE, CLASSES, "NCHW", "float32")
    assert (card.temperature, card.threshold, card.digest, card.info) == (2.0, 1.0, "ab" * 32, {"step": 7})
    assert card.config["model.channels"] == [4, 8]
    assert Predictor.load(tmp_path).card == card


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    made(tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    for read in (Predictor.load, read_weights):
        with pytest.raises(CheckpointError, match=WEIGHTS):
            read(tmp_path)


def test_the_weights_can_be_had_alone(tmp_path):
    made(tmp_path)
    state = Predictor.load(tmp_path).network.state_dict()
    weights = read_weights(tmp_path)
    assert set(weights) == set(state)
    assert all(torch.equal(weights[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"schema": 9}, "schema 9"), ({"layout": "HWNC"}, "HWNC"), ({"temperature": 0.0}, "temperature 0.0")],
)
def test_a_card_that_is_none_of_ours_is_refused(tmp_path, change, said):
    made(tmp_path)
    content = json.loads((tmp_path / CARD).read_text()) | change
    (tmp_path / CARD).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        Predictor.load(tmp_path)


def test_a_network_that_does_not_fit_the_weights_is_refused(tmp_path):
    made(tmp_path)
    content = json.loads((tmp_path / CARD).read_text())
    content["config"]["model.channels"] = [4, 9]
    (tmp_path / CARD).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not fit"):
        Predictor.load(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no model"):
        Predictor.load(tmp_path / "nothing")


def test_half_a_folder_is_no_model(tmp_path, monkeypatch):
    """A death between the two files leaves neither the old model nor a mixture of two."""
    made(tmp_path)
    card = read_card(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("jem.predict.json.dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("jem.files.Location.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, card, {})
    with pytest.raises(DataError, match="holds no model"):
        Predictor.load(tmp_path)


def test_predicting_needs_torch_numpy_safetensors_and_jaxtyping_alone():
    """What is listed as a served model's requirements is all it imports."""
    absent = ("pyarrow", "sklearn", "scipy", "pandas", "torchvision", "PIL", "matplotlib", "ray", "mlflow", "yaml")
    code = f"import sys, jem.predict; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
