"""Small networks and batches for tests; networks are named in configurations as `toys:mlp`."""

import torch
from torch import nn

from jem.config import JEMConfig
from jem.data.batches import Batch
from jem.settings import override


def mlp(config, image_shape, n_classes):
    """Smooth, two hidden layers of `options.hidden`."""
    hidden, inputs = config.options.get("hidden", 8), torch.Size(image_shape).numel()
    layers = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden, n_classes))


class Confined(nn.Module):
    """f(x) = mlp(x) - |x|^2 / 2, smooth: exp f(x) can be normalised on the plane."""

    def __init__(self, hidden, n_classes):
        super().__init__()
        inner = [nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        self.net = nn.Sequential(*inner, nn.Linear(hidden, n_classes))

    def forward(self, x):
        x = x.flatten(1)
        return self.net(x) - x.square().sum(dim=1, keepdim=True) / 2


def confined(config, image_shape, n_classes):
    return Confined(config.options.get("hidden", 64), n_classes)


def small(**changes):
    """A configuration of small numbers; `sgld__steps=3` is `sgld.steps`."""
    base = {
        "batch_size": 6,
        "model.name": "toys:mlp",
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0,
        "sgld.steps": 3,
        "replay.capacity": 12,
    }
    return override(JEMConfig(seed=0), base | {key.replace("__", "."): value for key, value in changes.items()})


def labelled_batch(images, labels, share=slice(None)):
    n = len(images)
    return Batch(images[share], labels[share], None, None, n, n)


def tensors_of(state):
    """All that a step moves and every rank holds alike."""
    found = {f"network {key}": value for key, value in state.network.state_dict().items()}
    if state.average is not None:
        found |= {f"average {key}": value for key, value in state.average.state_dict().items()}
    for name, parameter in state.network.named_parameters():
        found |= {f"{key} {name}": v for key, v in state.optimizer.state.get(parameter, {}).items()}
    return {key: value.clone() for key, value in found.items() if isinstance(value, torch.Tensor)}
