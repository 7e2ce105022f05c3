import hashlib
import io
import json
import shutil

import pytest
import torch

from jem.config import DataConfig, ModelConfig
from jem.data.augment import to_float
from jem.data.sources import load
from jem.errors import CheckpointError, ConfigError
from jem.evaluate import extractors
from jem.evaluate.evaluate import BATCH
from jem.evaluate.extractors import KEY, WEIGHTS, extractor_for, lenet, shipped, to_bytes
from jem.evaluate.sets import uniform_noise

SHAPES = {"digits": (1, 8, 8), "mnist5k": (1, 28, 28), "fashion_mnist": (1, 28, 28)}
LOWEST = {"digits": 0.97, "mnist5k": 0.97, "fashion_mnist": 0.89}


def shipped_for(name):
    return extractor_for(DataConfig(name=name), SHAPES.get(name, (1, 28, 28)))


@pytest.fixture
def images(generator):
    return uniform_noise(torch.Size((7, 1, 8, 8)), generator)


# The network


@pytest.mark.parametrize(("shape", "most"), [((1, 8, 8), 41_000), ((1, 28, 28), 62_000), ((3, 5, 4), 90_000)])
def test_lenet_is_small_and_has_logits_of_any_image(shape, most, generator):
    network = lenet(ModelConfig(), shape, 7)
    assert network(torch.randn(2, *shape, generator=generator)).shape == (2, 7)
    assert sum(p.numel() for p in network.parameters()) < most


# What is shipped


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_file_is_the_one_that_is_recorded_and_its_training_is_told(name):
    facts = shipped()[name]
    file = (WEIGHTS / f"lenet_{name}.safetensors").read_bytes()
    assert hashlib.sha256(file).hexdigest() == facts["sha256"]
    assert len(file) < 300_000
    assert facts["recipe"] == f"{name}_lenet"
    assert facts["recipe"] in facts["training"]
    assert set(facts) >= {"seed", "command", "data_digest", "parameters"}
    assert facts["test_accuracy"] >= LOWEST[name]
    found = shipped_for(name)
    assert (found.name, found.of, found.sha256) == ("lenet", name, facts["sha256"])


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_a_shipped_classifier_has_the_accuracy_that_is_recorded(name):
    data = load(DataConfig(name=name))
    assert data.digest == shipped()[name]["data_digest"]
    features, logits = shipped_for(name).features(to_float(data.test.images))
    accuracy = (logits.argmax(1) == data.test.labels).double().mean().item()
    assert accuracy >= LOWEST[name]
    assert accuracy == pytest.approx(shipped()[name]["test_accuracy"], abs=1e-3)
    assert features.shape == (len(data.test), 64)
    assert (features.dtype, logits.dtype) == (torch.float32, torch.float32)
    square = shipped_for(name).features(to_float(data.train.images))[0].square().mean()
    assert square == pytest.approx(1, abs=1e-3)


def test_mnist_takes_mnist5ks_classifier():
    assert shipped_for("mnist").sha256 == shipped_for("mnist5k").sha256


@pytest.fixture
def copied(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(extractors, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def test_a_tampered_file_is_refused_by_name_and_the_others_are_not(copied):
    path = copied / "lenet_digits.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"weights/lenet_digits.safetensors: is not the file .* SHA-256"
    ) as caught:
        shipped_for("digits")
    assert shipped()["digits"]["sha256"] in str(caught.value)
    assert shipped_for("mnist5k").of == "mnist5k"


@pytest.mark.parametrize("name", ["lenet_digits.safetensors", "lenet.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        shipped_for("digits")


@pytest.mark.parametrize("name", ["kmnist", "cifar10", "svhn", "mine:data"])
def test_a_set_without_an_extractor_is_told_which_file_to_get(name):
    with pytest.raises(ConfigError, match=f"no feature extractor for data.name={name}") as caught:
        extractor_for(DataConfig(name=name), (3, 32, 32))
    (problem,) = caught.value.problems
    assert problem.key == KEY
    assert f"{KEY}=PATH" in problem.message
    assert "https://github.com/toshas/torch-fidelity/releases" in problem.message
    assert "weights-inception-2015-12-05-6726825d.pth" in problem.message


def test_digits_of_another_shape_are_not_measured_by_the_classifier_of_digits():
    with pytest.raises(ConfigError, match=r"data.name=digits of shape \[1, 16, 16\]"):
        extractor_for(DataConfig(name="digits"), (1, 16, 16))


# Features


def test_what_no_8_bit_file_shows_does_not_count(images):
    features = shipped_for("digits").features
    exact = to_float(to_bytes(images))
    near = exact + 0.4 / 127.5
    for x, same in ((near, exact), (torch.where(exact > 0.9, 7.0, near), torch.where(exact > 0.9, 1.0, exact))):
        for found, expected in zip(features(x), features(same), strict=True):
            assert torch.equal(found, expected)
    assert not torch.equal(features(exact + 1.2 / 127.5)[0], features(exact)[0])


def test_bytes_are_those_that_images_were_made_from():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_float(every)), every)


def test_images_that_are_not_finite_are_refused(images):
    images[2, 0, 3, 3] = float("nan")
    images[5, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="2 of 7 images are not finite"):
        shipped_for("digits").features(images)


def test_logits_are_the_classifiers_and_nothing_random_is_touched(images):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    features, logits = shipped_for("digits").features(images)
    assert torch.equal(torch.get_rng_state(), state)
    network = lenet(ModelConfig(), (1, 8, 8), 10)
    network.load_state_dict(extractors.load((WEIGHTS / "lenet_digits.safetensors").read_bytes()))
    torch.testing.assert_close(logits, network(to_float(to_bytes(images))).detach())
    torch.testing.assert_close(logits, network[-1](features).detach())
    assert not logits.requires_grad


def test_batches_are_fixed(generator, monkeypatch):
    images = uniform_noise(torch.Size((BATCH + 3, 1, 8, 8)), generator)
    sizes = []
    features = shipped_for("digits").features
    monkeypatch.setattr(extractors, "to_float", lambda x, *rest: (sizes.append(len(x)), to_float(x, *rest))[1])
    features(images)
    assert sizes == [BATCH, 3]


# Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights as torch-fidelity's file has them: a dictionary of tensors without the counters of batches."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unread(FeatureExtractorInceptionV3):
        def load_state_dict(self, _):
            return None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Unread("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path


def test_inception_is_torch_fidelitys_network_with_the_users_weights(inception_file, images, monkeypatch):
    from torch_fidelity import utils

    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = extractor_for(DataConfig(name="digits"), (1, 8, 8), str(inception_file))
    features, logits = found.features(images[:3])
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.name, found.sha256) == ("inception", hashlib.sha256(inception_file.read_bytes()).hexdigest())
    assert (features.shape, logits.shape) == ((3, 2048), (3, 1008))
    theirs = utils.create_feature_extractor(
        *("inception-v3-compat", ["2048", "logits_unbiased"]),
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(inception_file),
    )
    expected = theirs(to_bytes(images[:3]).expand(-1, 3, -1, -1))
    for ours, their in zip((features, logits), expected, strict=True):
        between = (their[0] - their[1]).abs().max()  # random weights tell images apart by little
        assert (ours - their).abs().max() < 1e-2 * between


class Exploit:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"no weights", "does not hold the weights of torch-fidelity's Inception"),
        ({"conv.weight": torch.zeros(2)}, "does not hold the weights of torch-fidelity's Inception"),
        ([1, 2], "does not hold the weights of torch-fidelity's Inception"),
        ({"conv.weight": Exploit()}, "does not hold the weights of torch-fidelity's Inception"),
    ],
    ids=["missing", "bytes", "others", "list", "code"],
)
def test_a_file_that_is_not_inceptions_is_refused_and_nothing_in_it_is_run(tmp_path, content, message, capsys):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=message) as caught:
        extractor_for(DataConfig(name="cifar10"), (3, 32, 32), str(path))
    (problem,) = caught.value.problems
    assert problem.key == KEY
    assert str(path) in problem.message
    assert "weights-inception-2015-12-05-6726825d.pth" in problem.message
    assert "executed" not in capsys.readouterr().out


def test_inception_takes_grey_and_rgb_alone(inception_file):
    with pytest.raises(ConfigError, match="these have 4 channels"):
        extractor_for(DataConfig(name="mine:data"), (4, 32, 32), str(inception_file))


def test_without_torch_fidelity_inceptions_message_says_what_to_install(inception_file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ConfigError, match="pip install torch-fidelity"):
        extractor_for(DataConfig(name="digits"), (1, 8, 8), str(inception_file))


def test_lenet_json_is_plain_and_names_every_file_there_is():
    found = json.loads((WEIGHTS / "lenet.json").read_text())
    assert {f"lenet_{name}.safetensors" for name in found} == {path.name for path in WEIGHTS.glob("*.safetensors")}
