import pytest
import torch
from torch import nn

from jem.config import ModelConfig
from jem.errors import ConfigError
from jem.models import ActNorm, initialize_act_norm, make_network

NORMS = ("none", "instance", "layer", "act", "batch")


def conv(inside, outside, side=3):
    return inside * outside * side * side + outside


def test_wrn_28_10_without_norm_has_36_471_338_parameters():
    """4 blocks a group: the first widens (with a 1x1 convolution beside it), the others keep the width."""
    by_hand = conv(3, 16) + 640 * 10 + 10
    for inside, outside in ((16, 160), (160, 320), (320, 640)):
        by_hand += conv(inside, outside) + conv(outside, outside) + conv(inside, outside, side=1)
        by_hand += 3 * 2 * conv(outside, outside)
    assert by_hand == 36_471_338
    with torch.device("meta"):
        network = make_network(ModelConfig(), (3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == by_hand


@pytest.mark.parametrize("norm", ["batch", "instance", "layer", "act"])
def test_a_norm_adds_a_scale_and_a_shift_for_every_channel_it_normalises(norm):
    """WRN-10-1: two norms a block on (16, 16), (16, 32), (32, 64) channels, one before the pooling on 64."""

    def count(norm):
        network = make_network(ModelConfig(depth=10, width=1, norm=norm), (3, 32, 32), 10)
        return sum(p.numel() for p in network.parameters())

    assert count(norm) - count("none") == 2 * (16 + 16 + 16 + 32 + 32 + 64 + 64)


def test_wrn_halves_the_side_twice_and_pools_what_is_left():
    network = make_network(ModelConfig(depth=10, width=1), (3, 32, 32), 7)
    sides = {}
    for name in ("conv1", "layer1", "layer2", "layer3"):
        getattr(network, name).register_forward_hook(
            lambda _, __, out, name=name: sides.update({name: tuple(out.shape[1:])})
        )
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert sides == {"conv1": (16, 32, 32), "layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}


@pytest.mark.parametrize("name", ["small_conv", "wide_resnet"])
@pytest.mark.parametrize("norm", NORMS)
def test_an_images_logits_depend_on_its_batch_with_batch_norm_only(name, norm, generator):
    torch.manual_seed(0)
    config = ModelConfig(name=name, depth=10, width=1, channels=(4, 8), norm=norm)
    network = make_network(config, (3, 8, 8), 5).double().train()
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    initialize_act_norm(network, x)
    apart = (network(x)[:2] - network(torch.cat([x[:2], 3 * x[2:4]]))[:2]).abs().max()
    assert (apart > 1e-3) == (norm == "batch")
    assert apart > 1e-3 or apart < 1e-12
    network.eval()
    torch.testing.assert_close(network(x)[:2], network(x[:2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("channels", "side", "strides", "features"),
    [
        ((16, 32, 64, 64), 8, [1, 2, 1, 1], 64 * 4 * 4),  # 8 -> 4, and no further
        ((16, 32, 64, 64), 28, [1, 2, 2, 1], 64 * 7 * 7),
        ((8, 16, 32, 64), 30, [1, 2, 2, 2], 64 * 4 * 4),  # 30 -> 15 -> 8 -> 4
        ((16, 16, 8), 32, [1, 1, 1], 8 * 32 * 32),
    ],
)
def test_small_conv_halves_the_side_where_channels_grow_and_8_or_more_are_left(channels, side, strides, features):
    network = make_network(ModelConfig(name="small_conv", channels=channels), (1, side, side), 10)
    convolutions = [m for m in network if isinstance(m, nn.Conv2d)]
    assert [m.stride[0] for m in convolutions] == strides
    assert network[-1].in_features == features
    assert network(torch.zeros(2, 1, side, side)).shape == (2, 10)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("leaky_relu", [-0.4, 3.0]), ("silu", [-2 / (1 + torch.e**2), 3 / (1 + torch.e**-3)])],
)
@pytest.mark.parametrize("name", ["small_conv", "wide_resnet"])
def test_leaky_relu_has_slope_0_2_and_silu_is_x_times_the_sigmoid(name, activation, expected):
    network = make_network(ModelConfig(name=name, depth=10, width=1, activation=activation), (1, 8, 8), 3)
    found = [m for m in network.modules() if isinstance(m, (nn.LeakyReLU, nn.SiLU))]
    assert len(found) == 4
    for module in found:
        assert module(torch.tensor([-2.0, 3.0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["small_conv", "wide_resnet"])
def test_act_norm_starts_with_mean_0_and_variance_1_in_each_channel_and_layer(name, generator):
    config = ModelConfig(name=name, depth=10, width=1, channels=(4, 8), norm="act")
    torch.manual_seed(0)
    network = make_network(config, (1, 8, 8), 5).double()
    images = 3 + 5 * torch.randn(50, 1, 8, 8, generator=generator, dtype=torch.float64)
    initialize_act_norm(network, images)
    seen = []
    for module in network.modules():
        if isinstance(module, ActNorm):
            module.register_forward_hook(lambda _, __, out: seen.append(torch.var_mean(out, dim=(0, 2, 3))))
    network(images)
    assert len(seen) == (2 if name == "small_conv" else 7)
    for variance, mean in seen:
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-9, rtol=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0)


def test_act_norm_is_set_once_and_then_does_not_see_the_batch(generator):
    network = make_network(ModelConfig(name="small_conv", channels=(4,), norm="act"), (1, 8, 8), 5)
    initialize_act_norm(network, torch.randn(20, 1, 8, 8, generator=generator))
    before = [p.clone() for p in network.parameters()]
    network(100 * torch.randn(20, 1, 8, 8, generator=generator))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_network_of_ones_own_is_named_by_module_and_function_and_gets_its_options():
    network = make_network(ModelConfig(name="toys:mlp", options={"hidden": 3}), (2, 2, 2), 4)
    assert [p.shape for p in network.parameters()][:1] == [(3, 8)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:f", "no module 'no_such_module'"),
        ("toys:nothing", "has no 'nothing'"),
        ("toys:torch", "module"),
    ],
)
def test_a_network_that_is_not_there_is_named_with_the_setting(name, says):
    with pytest.raises(ConfigError, match=r"model\.name") as caught:
        make_network(ModelConfig(name=name), (1, 8, 8), 2)
    assert says in str(caught.value)


@pytest.mark.parametrize(("height", "width", "fits"), [(4, 4, False), (4, 5, True), (8, 8, True)])
def test_instance_norm_of_a_wide_resnet_needs_more_than_one_pixel_in_its_last_blocks(height, width, fits):
    config = ModelConfig(name="wide_resnet", depth=10, width=1, norm="instance")
    if fits:
        assert make_network(config, (3, height, width), 5)(torch.randn(2, 3, height, width)).shape == (2, 5)
    else:
        with pytest.raises(ConfigError, match=r"model.norm: is instance, .*of 4 x 4 the last blocks have one"):
            make_network(config, (3, height, width), 5)
