"""--dry-run: the figures of a run that is not started."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from jem.data.batches import Batch
from jem.errors import JEMError
from jem.settings import override
from jem.train import start, train_step
from jem.world import World
from orchestrator.config import load_run_config
from orchestrator.plan import forward_cost, passes, plan

NET = ("model.name=small_conv", "model.channels=[4, 8]", "batch_size=16", "replay.capacity=100")


def config(*settings, recipe="digits_uniform"):
    return load_run_config(recipe, [*settings])


def test_the_figures_of_a_small_network_are_those_by_hand(capsys):
    """Two 3x3 convolutions on 8x8 (the second with stride 2, as channels grow) and a linear layer on 4x4."""
    result = plan(config(*NET, "workers=3", "sgld.steps=7", "optimizer.ema_decay=0.9"))
    parameters = (9 * 1 * 4 + 4) + (9 * 4 * 8 + 8) + (8 * 16 * 10 + 10)
    macs = 9 * 1 * 4 * 64 + 9 * 4 * 8 * 16 + 8 * 16 * 10
    assert result.metrics["parameters"] == parameters
    assert result.metrics["flop_per_image"] == 2 * macs
    assert result.metrics["flop_per_step"] == 2 * macs * (2 * 7 + 6) * 16
    assert result.metrics["times_a_classifier"] == pytest.approx((2 * 7 + 6) / 3)
    assert result.metrics["weights_bytes"] == parameters * 4 * 5  # weights, gradients, two moments, average
    assert result.metrics["replay_bytes_per_worker"] == 34 * 64 * 4  # 100 chains over 3
    assert result.metrics["data_bytes_per_worker"] == 1797 * 64
    out = capsys.readouterr().out
    assert f"{parameters:,}" in out
    assert "1 x 8 x 8, 10 classes" in out
    assert "embedded in scikit-learn" in out
    assert result.status == "planned"
    assert result.name == config(*NET, "sgld.steps=7", "optimizer.ema_decay=0.9").name


@pytest.mark.parametrize(
    ("settings", "cost"),
    [
        ((), 46),  # fully labelled: 20 x 2F + 3F (data) + 3F (samples)
        (("data.labels_per_class=4000",), 49),  # with the labelled batch apart
        (("sgld.steps=5",), 16),
        (("objective.p_x_weight=0",), 3),
        (("sgld.steps=5", "data.labels_per_class=4", "data.labelled_batch_size=32"), 17.5),
        (("data.augment_p_x=false",), 49),  # the data as they are, and augmented
        (("data.augment_p_x=false", "data.labels_per_class=4000"), 49),  # labelled images are apart as it is
        (("objective.kl_weight=0.3",), 54),  # each chain's last step differentiated: 8
        (("objective.kl_weight=0.3", "objective.kl_samples=16"), 48),
        (("objective.kl_weight=0.3", "optimizer.sam_rho=0.5"), 68),
        (("optimizer.sam_rho=0.5",), 52),  # 20 x 2F + 2 x 6F
        (("objective.p_x_weight=0", "optimizer.sam_rho=0.5"), 6),
        (("objective.p_x_weight=0", "objective.mass_weight=0.1"), 9),  # the norm of a gradient, differentiated: 6
        (("sgld.steps=5", "data.augment_p_x=false", "optimizer.sam_rho=0.5"), 28),  # SADA
    ],
)
def test_a_steps_cost_in_forward_passes_is_the_papers_arithmetic(settings, cost):
    assert passes(config(*settings, recipe="cifar10_paper")) == cost


class Counted(TorchDispatchMode):
    """As torch's FlopCounterMode, whose hooks on modules do not go with torch.autograd.grad."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
        self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data.augment_p_x": False, "data.noise_std": 0.1},
        {"optimizer.sam_rho": 0.5},
        {"objective.kl_weight": 0.3},
        {"objective.p_x_weight": 0.0, "objective.mass_weight": 0.1},
        {"objective.kl_weight": 0.3, "objective.kl_samples": 4, "optimizer.sam_rho": 0.5},
    ],
    ids=str,
)
def test_a_steps_cost_is_what_torch_counts(settings):
    """Within 5 %: an image needs no gradient while training, which the first layer saves."""
    net = {"model.name": "small_conv", "model.channels": (32,) * 6, "batch_size": 8, "replay.capacity": 8}
    run = override(config("sgld.steps=2"), net | settings)
    state = start(run, (1, 8, 8), 10)
    images, labels = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
    apart = (None, None) if run.data.augment_p_x else (images, labels)
    forward, _ = forward_cost(copy.deepcopy(state.network).to("meta"), (1, 8, 8))
    with Counted() as counter:
        train_step(state, Batch(images, labels, *apart, 8, 8), run, World())
    assert counter.flop == pytest.approx(passes(run) * forward * 8, rel=0.05)


def test_the_papers_network_costs_what_is_known_of_it():
    """WRN-28-10: 36.5 million parameters, 5.2 G multiply-adds an image; 0.7 more where a block halves in its second
    convolution, as in JEM's released code."""
    result = plan(config(recipe="cifar10_paper"))
    assert 36.4e6 < result.metrics["parameters"] < 36.6e6
    assert 11.8e9 < result.metrics["flop_per_image"] < 12.0e9
    assert result.metrics["times_a_classifier"] == pytest.approx(46 / 3)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2), ("uint8", 1)])
def test_chains_take_the_bytes_of_their_storage(dtype, width):
    result = plan(config(*NET, "workers=3", f"replay.dtype={dtype}", "sgld.clamp=1"))
    assert result.metrics["replay_bytes_per_worker"] == 34 * 64 * width


def test_sam_keeps_the_weights_it_goes_up_from():
    plain, sam = (plan(config(*NET, f"optimizer.sam_rho={rho}")).metrics for rho in (0, 0.5))
    assert sam["weights_bytes"] - plain["weights_bytes"] == 4 * plain["parameters"]


def test_images_apart_and_chains_of_the_kl_term_are_held_too():
    more = ((), ("data.augment_p_x=false",), ("data.labels_per_class=4", "data.labelled_batch_size=4"))
    more += (("objective.kl_weight=0.3", "objective.kl_samples=4"),)
    plain, *held = (plan(config(*NET, *settings)).metrics["activations_bytes_per_worker"] for settings in more)
    assert [figure / plain for figure in held] == [3 / 2, 2.25 / 2, 2.75 / 2]


def test_a_classifier_keeps_no_chains(capsys):
    result = plan(config(recipe="digits_classifier"))
    assert result.metrics["replay_bytes_per_worker"] == 0
    assert result.metrics["times_a_classifier"] == 1


def test_data_that_are_not_there_are_not_needed(tmp_path, capsys):
    result = plan(config(f"data.root={tmp_path}/nowhere", recipe="cifar10"))
    out = capsys.readouterr().out
    assert f"{tmp_path}/nowhere" in out
    assert "to be downloaded" in out
    assert "train 45,000, validation 5,000, test 10,000" in out
    assert result.metrics["parameters"] > 0
    assert list(tmp_path.iterdir()) == []


def test_data_that_only_their_function_knows_are_said_to_be_unknown(capsys):
    result = plan(config("data.name=mine:data"))
    assert "made by the function mine:data" in capsys.readouterr().out
    assert result.metrics == {}
    assert result.exit_code == 0


def test_nothing_is_computed_and_leaf_outputs_are_counted():
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(2 * 16, 5))
    flop, held = forward_cost(network, (1, 4, 4))
    assert flop == 2 * (9 * 2 * 16 + 32 * 5)
    assert held == 32 + 32 + 32 + 5


def test_the_folder_is_where_the_run_would_be(tmp_path, capsys):
    planned = plan(config(f"storage_path={tmp_path}/runs"))
    assert f"{tmp_path}/runs/{planned.name}" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init_from=/nowhere/model.safetensors"], "init_from: there is no /nowhere/model.safetensors"),
        (["evaluate.suite=fast", "evaluate.sets=[nosuch]"], "evaluate.sets: 'nosuch' is no set"),
        (["data.name=imagefolder", "data.root=/nowhere"], r"data.root: /nowhere \(missing\)"),
        (["data.name=parquet", "data.root=/nowhere"], r"data.root: /nowhere \(missing\)"),
    ],
)
def test_what_the_run_would_refuse_is_refused(settings, message):
    with pytest.raises(JEMError, match=message):
        plan(config(*settings))
