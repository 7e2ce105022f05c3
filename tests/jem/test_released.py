"""Checkpoints of the paper's own code, from a network written here after that code's structure."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from jem import released
from jem.config import ModelConfig
from jem.errors import DataError
from jem.files import Location
from jem.models import make_network
from jem.released import is_released, read_released

SIZES = [(10, 1), (16, 2)]


class TheirActNorm(nn.Module):
    """scale (x + loc), which the first batch sets."""

    def __init__(self, channels):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x):
        if not self.initialized:
            std, mean = torch.std_mean(x.transpose(0, 1).flatten(1), dim=1)
            self.loc.data = -mean[None, :, None, None]
            self.scale.data = 1 / (std + 1e-6)[None, :, None, None]
            self.initialized.fill_(1)
        return self.scale * (x + self.loc)


NORMS = {
    "none": nn.Identity,  # takes any arguments
    "batch": lambda channels: nn.BatchNorm2d(channels, momentum=0.9),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "act": TheirActNorm,
}


class TheirBlock(nn.Module):
    def __init__(self, inside, outside, stride, norm):
        super().__init__()
        self.bn1 = NORMS[norm](inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.bn2 = NORMS[norm](outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, stride=stride, padding=1)
        changes = stride != 1 or inside != outside
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride)) if changes else nn.Sequential()

    def forward(self, x):
        out = self.conv1(F.leaky_relu(self.bn1(x), 0.2))
        out = self.conv2(F.leaky_relu(self.bn2(out), 0.2))
        return out + self.shortcut(x)


class TheirTrunk(nn.Module):
    def __init__(self, depth, width, channels, norm):
        super().__init__()
        n = (depth - 4) // 6
        sides = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        for group, stride in ((1, 1), (2, 2), (3, 2)):
            inside, outside = sides[group - 1], sides[group]
            blocks = [TheirBlock(outside if i else inside, outside, 1 if i else stride, norm) for i in range(n)]
            setattr(self, f"layer{group}", nn.Sequential(*blocks))
        self.bn1 = NORMS[norm](sides[3])
        self.linear = nn.Linear(sides[3], 10)  # unused, and of 10 classes whatever the data

    def forward(self, x):
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.avg_pool2d(F.leaky_relu(self.bn1(out), 0.2), 8).flatten(1)


class Theirs(nn.Module):
    def __init__(self, depth=10, width=1, n_classes=10, channels=3, norm="none"):
        super().__init__()
        self.f = TheirTrunk(depth, width, channels, norm)
        self.energy_output = nn.Linear(64 * width, 1)
        self.class_output = nn.Linear(64 * width, n_classes)

    def classify(self, x):
        return self.class_output(self.f(x))


def theirs(**settings):
    """With every tensor drawn, norms' and biases' too, so that none is at a value that hides a mistake."""
    torch.manual_seed(3)
    network = Theirs(**settings)
    with torch.no_grad():
        for name, value in network.f.named_parameters():
            if "conv" not in name and "shortcut" not in name:
                value.uniform_(0.5, 1.5)
    network.train()
    network.classify(torch.rand(8, network.f.conv1.in_channels, 32, 32) * 2 - 1)  # running figures, act norms
    return network.eval()


def saved(tmp_path, network, replay=None, state=None, legacy=False, **more):
    state = network.state_dict() if state is None else state
    content = {"model_state_dict": state, "replay_buffer": replay, **more}
    content = {key: value for key, value in content.items() if value is not None}
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
    return Location.of(tmp_path / "ckpt.pt")


def imported(made):
    network = make_network(made.model, made.image_shape, made.n_classes)
    network.load_state_dict(made.weights)
    return network.eval()


@pytest.fixture
def images(generator):
    return torch.rand(5, 3, 32, 32, generator=generator) * 2 - 1


def same(ours, expected):
    """Not to the bit: the pooling adds its 64 numbers in another order; 1e-5 of the spread of the logits."""
    return (ours - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "the format of 2019"])
@pytest.mark.parametrize(("depth", "width"), SIZES)
def test_an_imported_network_gives_the_logits_of_the_released_one(tmp_path, images, depth, width, legacy):
    network = theirs(depth=depth, width=width, n_classes=7)
    made = read_released(saved(tmp_path, network, legacy=legacy))
    assert made.model == ModelConfig(depth=depth, width=width)
    assert (made.n_classes, made.image_shape, made.replay, made.note) == (7, (3, 32, 32), None, "")
    assert same(imported(made)(images), network.classify(images))


def test_but_for_the_pooling_they_are_equal_to_the_bit(tmp_path, images):
    network = theirs(depth=16, width=2)
    ours = imported(read_released(saved(tmp_path, network))).to(memory_format=torch.contiguous_format)  # as theirs
    maps = ours.layer3(ours.layer2(ours.layer1(ours.conv1(images))))
    assert torch.equal(ours.class_output(F.avg_pool2d(F.leaky_relu(maps, 0.2), 8).flatten(1)), network.classify(images))


@pytest.mark.parametrize("norm", ["batch", "instance", "layer", "act"])
def test_every_norm_of_theirs_is_recognised_and_gives_the_same_logits(tmp_path, images, norm):
    network = theirs(norm=norm)
    made = read_released(saved(tmp_path, network))
    assert made.model == ModelConfig(depth=10, width=1, norm=norm)
    assert same(imported(made)(images), network.classify(images))
    assert ("momentum" in made.note) == (norm == "batch")


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_norms_that_look_the_same_are_asked_for_where_the_file_does_not_tell(tmp_path, images, norm):
    network = theirs(norm=norm)
    path = saved(tmp_path, network, state=dict(network.state_dict()))  # a plain dict has no versions of modules
    with pytest.raises(DataError, match="instance or layer, which look the same; say which"):
        read_released(path)
    made = read_released(path, norm=norm)
    assert made.model.norm == norm
    assert same(imported(made)(images), network.classify(images))


def test_the_replay_buffer_comes_along_and_says_the_images_shape(tmp_path, generator):
    chains = torch.randn(20, 1, 30, 32, generator=generator)
    made = read_released(saved(tmp_path, theirs(channels=1), replay=chains))
    assert torch.equal(made.replay, chains)
    assert made.image_shape == (1, 30, 32)


def test_what_data_parallel_puts_before_names_is_taken_off(tmp_path, images):
    network = theirs(norm="layer")
    state = nn.DataParallel(network).state_dict()
    assert all(key.startswith("module.") for key in state)
    made = read_released(saved(tmp_path, network, state=state))
    assert same(imported(made)(images), network.classify(images))


@pytest.mark.parametrize(("depth", "width", "n_classes"), [(28, 10, 10), (28, 10, 100), (40, 2, 10), (16, 8, 10)])
def test_depth_and_width_are_those_of_the_names_and_shapes(depth, width, n_classes):
    with torch.device("meta"):  # no memory
        state = Theirs(depth, width, n_classes).state_dict()
        own = make_network(ModelConfig(depth=depth, width=width), (3, 32, 32), n_classes).state_dict()
    model = released._model(state, state, "here", None)
    assert model == ModelConfig(depth=depth, width=width)
    renamed = released._renamed(state)
    assert {name: value.shape for name, value in renamed.items()} == {name: v.shape for name, v in own.items()}


def test_a_trained_energy_head_is_told_of_as_the_density_may_be_another(tmp_path):
    network = theirs()
    assert not read_released(saved(tmp_path, network)).note
    network.energy_output.weight.data *= 10
    assert "--uncond" in read_released(saved(tmp_path, network)).note


def test_the_heads_that_no_logit_depends_on_may_be_absent(tmp_path):
    state = {k: v for k, v in theirs().state_dict().items() if not k.startswith(("f.linear", "energy_output"))}
    assert read_released(saved(tmp_path, None, state=state)).n_classes == 10


def test_another_number_of_classes_is_refused_with_both_numbers(tmp_path):
    path = saved(tmp_path, theirs(n_classes=7))
    assert read_released(path, n_classes=7).n_classes == 7
    with pytest.raises(DataError, match=r"class_output has 7 classes, the data 10"):
        read_released(path, n_classes=10)


def test_only_this_layout_counts_as_released():
    state = theirs().state_dict()
    assert is_released({"model_state_dict": state})
    assert is_released({"model_state_dict": {f"module.{key}": value for key, value in state.items()}})
    ours = make_network(ModelConfig(depth=10, width=1), (3, 32, 32), 10).state_dict()
    for other in (state, {"state_dict": state}, {"model_state_dict": ours}, [], None, {"model_state_dict": 3}):
        assert not is_released(other)


def without(*starts):
    return lambda state: {key: value for key, value in state.items() if not key.startswith(starts)}


def replaced(**values):
    return lambda state: {**state, **{key.replace("__", "."): value for key, value in values.items()}}


DAMAGED = {
    "has no class_output.weight": without("class_output"),
    r"class_output.bias is missing": without("class_output.bias"),
    "3 groups of as many blocks each.*layer2: none": without("f.layer2"),
    "layer1: 0; layer2: 0; layer3: 0, 2": replaced(f__layer3__2__conv1__weight=torch.zeros(1)),
    "layer4": replaced(f__layer4__0__conv1__weight=torch.zeros(1)),
    r"layer2.0.conv2.weight has shape \[32, 32, 1, 1\], \[32, 32, 3, 3\]": replaced(
        f__layer2__0__conv2__weight=torch.zeros(32, 32, 1, 1)
    ),
    "f.layer1.0.conv1 has 24 channels, .* 16 times its width": replaced(
        f__layer1__0__conv1__weight=torch.zeros(24, 16, 3, 3)
    ),
    "f.layer1.0.conv1.weight, or it is empty": replaced(f__layer1__0__conv1__weight=torch.zeros(0, 16, 3, 3)),
    "f.bn1 holds embed": replaced(f__bn1__embed=torch.zeros(3)),
    "layer1.0.norm1.weight is missing": replaced(f__bn1__weight=torch.ones(64), f__bn1__bias=torch.ones(64)),
    "layer3.0.gate.weight is unknown": replaced(f__layer3__0__gate__weight=torch.zeros(1)),
    "extra is unknown": replaced(extra=torch.zeros(1)),
    "f.conv1.bias holds numbers that are not finite": replaced(f__conv1__bias=torch.full((16,), torch.nan)),
    "f.conv1.bias is str, must be a dense tensor": replaced(f__conv1__bias="0.5"),
    r"f.conv1.bias is torch.complex64": replaced(f__conv1__bias=torch.zeros(16, dtype=torch.complex64)),
    "f.conv1.bias is Tensor, must be a dense tensor": replaced(f__conv1__bias=torch.zeros(16).to_sparse()),
    "energy_output.weight claims 64000000000 numbers": replaced(
        energy_output__weight=torch.zeros(1).expand(1_000_000_000, 64)
    ),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(("message", "change"), DAMAGED.items(), ids=list(DAMAGED))
def test_what_is_no_network_of_theirs_is_named(tmp_path, message, change):
    path = saved(tmp_path, None, state=change(theirs().state_dict()))
    with pytest.raises(DataError, match=f"ckpt.pt: .*{message}"):
        read_released(path, norm="layer")


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        (torch.zeros(4, 1, 32, 32), r"replay_buffer has shape \[4, 1, 32, 32\], must be \[n, 3, 32, 32\]"),
        (torch.zeros(4, 3, 28, 28), r"replay_buffer has shape"),
        (torch.zeros(0, 3, 32, 32), r"replay_buffer has shape"),
        (torch.zeros(3, 32, 32), r"replay_buffer has shape"),
        (torch.full((1, 3, 32, 32), torch.inf), "replay_buffer holds numbers that are not finite"),
        ([], "replay_buffer is list"),
    ],
)
def test_chains_that_are_not_of_its_network_are_named(tmp_path, replay, message):
    with pytest.raises(DataError, match=message):
        read_released(saved(tmp_path, theirs(), replay=replay))


def test_what_else_the_file_holds_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds optimizer, epoch beside model_state_dict and replay_buffer"):
        read_released(saved(tmp_path, theirs(), optimizer={"lr": 1.0}, epoch=3))


def test_an_act_norm_that_has_seen_no_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is an act norm that has seen no data"):
        read_released(saved(tmp_path, Theirs(norm="act")))


def test_another_layout_is_named(tmp_path):
    torch.save({"state_dict": theirs().state_dict()}, tmp_path / "ckpt.pt")
    with pytest.raises(DataError, match="has not the layout of a released JEM"):
        read_released(Location.of(tmp_path / "ckpt.pt"))


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_hostile_file_says_is_not_done(tmp_path, legacy):
    victim = tmp_path / "executed"
    state = OrderedDict(theirs().state_dict())
    path = saved(tmp_path, None, state=state, replay=Hostile(str(victim)), legacy=legacy)
    with pytest.raises(DataError, match=r"ckpt.pt: is damaged or holds more than tensors, nothing of it is used"):
        read_released(path)
    assert not victim.exists()
    torch.load(path.path, weights_only=False)
    assert victim.exists(), "else the file is not hostile and the test shows nothing"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, share, legacy):
    path = saved(tmp_path, theirs(), legacy=legacy)
    data = path.read()
    path.write(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"ckpt.pt: is damaged"):
        read_released(path)


@pytest.mark.parametrize("content", [b"<html>not found</html>", pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(100)])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"ckpt.pt: ") as caught:
        read_released(Location.of(tmp_path / "ckpt.pt"))
    assert "weights_only" not in str(caught.value), "torch's advice is to execute it"


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(DataError, match="there is no such file"):
            read_released(Location.of(path))
