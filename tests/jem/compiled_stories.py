"""What compile=true does, in a process of its own: code whose types are checked at run time cannot be compiled."""

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from toys import labelled_batch

from jem.compiled import Compiled
from jem.config import JEMConfig
from jem.energy import energy_fn
from jem.settings import override
from jem.sgld import differentiate
from jem.train import start, train_step
from jem.world import World

SHAPE = (1, 8, 8)
SETTINGS = {
    **{"model.name": "small_conv", "model.channels": (4,), "batch_size": 6, "replay.capacity": 12},
    **{"sgld.steps": 3, "optimizer.warmup_steps": 0, "precision": "bf16", "compile": True},
}


def images(n):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def compared(network, labels=None, weight=None):
    """The largest difference from autograd's energies and gradients, relative to these, and what was warned of."""
    compiled, x, found = Compiled(), images(5), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for factor in (1, 2, 3):
            if weight is not None:
                with torch.no_grad():  # as an update does
                    weight.mul_(factor)
            energy = energy_fn(network, labels)
            for ours, theirs in zip(compiled(energy, x), differentiate(energy, x), strict=True):
                assert not ours.requires_grad
                found.append(float((ours - theirs).abs().max() / theirs.abs().max()))
    assert all(p.grad is None for p in network.parameters())
    said = [str(w.message) for w in told if "compile=true" in str(w.message)]
    return {"difference": max(found), "said": said}


def smooth():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 3))


class Odd(nn.Module):
    """Looks at its input on the host, which cannot be compiled."""

    def forward(self, x):
        x = x.flatten(1)
        return torch.stack([x.sum(dim=1), x.square().sum(dim=1) * float(x.detach().numpy().std() > 0)], dim=1)


def marginal():
    network = smooth()
    return compared(network, weight=network[3].weight)


def conditional():
    network = smooth()
    return compared(network, torch.tensor([0, 2, 1, 1, 0]), network[3].weight)


def odd():
    return compared(Odd())


def no_compiler():
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        return compared(smooth())


def broken():
    try:
        Compiled()(energy_fn(lambda x: x.flatten(1) @ torch.zeros(3, 2)), images(2))
    except RuntimeError as error:
        return str(error)


def trained():
    """Digests of all that two runs have after some steps, each with code compiled for it."""
    config, found = override(JEMConfig(seed=0), SETTINGS), []
    for _ in range(2):
        torch.compiler.reset()
        state = start(config, SHAPE, 3)
        with torch._inductor.config.patch(force_disable_caches=True):
            for _ in range(3):
                train_step(state, labelled_batch(images(6), torch.arange(6) % 3), config, World())
        assert state.differentiate.compiled is not None
        assert not state.differentiate.failed
        kept = [*state.network.state_dict().values(), state.replay.chains]
        found.append(hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in kept)).hexdigest())
    return found


if __name__ == "__main__":
    stories = (marginal, conditional, odd, no_compiler, broken, trained)
    Path(sys.argv[1]).write_text(json.dumps({story.__name__: story() for story in stories}))
