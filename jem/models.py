"""Networks: images in, logits out.

A network of your own is a function of the signature of `small_conv` below, named in a recipe as
`package.module:function`; its settings are `config.options`. PYLD (sgld.inner_steps) needs a method `halves` of it:
the first layer and the rest, two functions of which the network is the composition.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jem.config import ModelConfig
from jem.errors import ConfigError, Problem
from jem.plugins import load_function

ImageShape = tuple[int, int, int]
"""Channels, height, width."""


def make_network(config: ModelConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """The network that `config` names, with torch's default initialisation from the global generator.

    Its convolutions' weights are channels last in memory, and so is what they compute, which is faster
    (docs/performance.md) and differs in the last bits.
    """
    function = MODELS.get(config.name) or load_function(config.name, "model.name")
    network: nn.Module = function(config, image_shape, n_classes)
    return network.to(memory_format=torch.channels_last)


def small_conv(config: ModelConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """3x3 convolutions of `config.channels`, then a linear layer on the flattened map.

    The side is halved wherever the channels grow, as long as it stays 4 or more.
    """
    side = torch.Size(image_shape[1:])
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise((image_shape[0], *config.channels)):
        halve = bool(layers) and outside > inside and min(side) >= 8
        stride = 2 if halve else 1
        layers += [nn.Conv2d(inside, outside, 3, stride, padding=1), _norm(config, outside), _activation(config)]
        side = torch.Size((n + 1) // stride if halve else n for n in side)
    last = layers.pop()  # after the flattening, which leaves its gradient in the memory order of its input
    return SmallConv(*layers, nn.Flatten(), last, nn.Linear(config.channels[-1] * side.numel(), n_classes))


class SmallConv(nn.Sequential):
    """What `small_conv` makes."""

    def halves(self) -> tuple[nn.Module, nn.Module]:
        """The first convolution with its norm and its activation, and the rest."""
        first = 3 if isinstance(self[3], nn.Conv2d) else 2  # of one convolution the activation comes after
        return nn.Sequential(*self[:first]), nn.Sequential(*self[first:])


def wide_resnet(config: ModelConfig, image_shape: ImageShape, n_classes: int) -> nn.Module:
    """WRN-depth-width (Zagoruyko & Komodakis, 2016) as JEM uses it: no dropout, LeakyReLU 0.2, any norm.

    Raises ConfigError where instance norm would have a single pixel to go by.
    """
    if config.norm == "instance" and max(image_shape[1:]) <= 4:
        message = "is instance, a norm over an image's pixels: of {} x {} the last blocks have one; take another norm"
        raise ConfigError([Problem("model.norm", message.format(*image_shape[1:]))])
    return WideResNet(config, image_shape, n_classes)


class WideResNet(nn.Module):
    """Three groups of pre-activation residual blocks, global average pooling, a linear layer."""

    def __init__(self, config: ModelConfig, image_shape: ImageShape, n_classes: int) -> None:
        super().__init__()
        widths = [16, *(w * config.width for w in (16, 32, 64))]
        blocks = (config.depth - 4) // 6
        self.conv1 = nn.Conv2d(image_shape[0], widths[0], 3, padding=1)
        self.layer1 = _group(config, widths[0], widths[1], blocks, stride=1)
        self.layer2 = _group(config, widths[1], widths[2], blocks, stride=2)
        self.layer3 = _group(config, widths[2], widths[3], blocks, stride=2)
        self.norm = _norm(config, widths[3])
        self.activation = _activation(config)
        self.class_output = nn.Linear(widths[3], n_classes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        return self.after_first(self.conv1(x))

    def after_first(self, h: Float[Tensor, "n 16 h w"]) -> Float[Tensor, "n classes"]:
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.class_output(self.activation(self.norm(h)).mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def halves(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The first convolution, which is linear, and the rest."""
        return self.conv1, self.after_first


class Block(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 convolution on x where the shape changes."""

    def __init__(self, config: ModelConfig, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = _norm(config, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, stride, padding=1)
        self.activation = _activation(config)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.activation(self.norm1(x)))
        h = self.conv2(self.activation(self.norm2(h)))
        return self.shortcut(x) + h  # type: ignore[no-any-return]


class ActNorm(nn.Module):
    """A scale and a shift for each channel (Kingma & Dhariwal, 2018), set by `initialize_act_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None] + self.shift[:, None, None]


@torch.no_grad()
def initialize_act_norm(network: nn.Module, images: Float[Tensor, "n c h w"]) -> None:
    """Set every ActNorm so that its output on `images` has mean 0 and variance 1 in each channel.

    Call it on every rank with the same images (the first global batch), before training: the weights
    must not depend on how a batch is shared.
    """

    def fit(module: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(module, ActNorm)
        std, mean = torch.std_mean(inputs[0], dim=(0, 2, 3))
        module.scale.copy_(1 / (std + 1e-6))
        module.shift.copy_(-mean * module.scale)

    handles = [m.register_forward_pre_hook(fit) for m in network.modules() if isinstance(m, ActNorm)]
    if handles:
        network(images)
    for handle in handles:
        handle.remove()


MODELS: dict[str, Callable[[ModelConfig, ImageShape, int], nn.Module]] = {
    "small_conv": small_conv,
    "wide_resnet": wide_resnet,
}


def _group(config: ModelConfig, inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(config, inside, outside, stride)
    return nn.Sequential(first, *(Block(config, outside, outside, 1) for _ in range(blocks - 1)))


def _norm(config: ModelConfig, channels: int) -> nn.Module:
    norms: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm2d(channels),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
        "layer": lambda: nn.GroupNorm(1, channels),
        "act": lambda: ActNorm(channels),
    }
    return norms[config.norm]()


def _activation(config: ModelConfig) -> nn.Module:
    return nn.SiLU() if config.activation == "silu" else nn.LeakyReLU(0.2)
