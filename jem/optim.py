"""How the weights move: optimiser, schedule, averaged weights, and the guard against non-finite updates."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jem.config import OptimizerConfig


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam or SGD, fused: its kernel can skip an update by a flag that never leaves the device."""
    if config.name == "sgd":
        sgd = torch.optim.SGD(
            network.parameters(),
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for parameter in network.parameters():  # if the first update is skipped, torch would keep uninitialised memory
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    betas = (config.betas[0], config.betas[1])
    return torch.optim.Adam(
        network.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of the update that follows `step` finished ones: a function of the step, so nothing to save.

    It rises linearly over `warmup_steps`, and is multiplied by `decay_rate` at each of `decay_steps`.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decays = sum(step >= at for at in config.decay_steps)
    return config.learning_rate * warmup * float(config.decay_rate) ** decays


@torch.no_grad()
def guarded_update(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, rate: float
) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
    """Clip and apply the gradients unless one is not finite; the whole gradient's norm, and whether it was skipped.

    The decision is made on the device from the gradients as reduced over all ranks, so every rank
    decides alike and none waits for its host. A skipped update leaves weights and moments as they were.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    skipped = ~norm.isfinite()
    if config.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # as torch's GradScaler does
    optimizer.step()
    return norm, skipped


def averaged_copy(network: nn.Module) -> nn.Module:
    """A copy of the network to hold the exponential moving average of its weights."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, skipped: Bool[Tensor, ""]) -> None:
    """Average <- decay * average + (1 - decay) * network, unless the update was skipped; buffers are copied."""
    for averaged, weight in zip(average.parameters(), network.parameters(), strict=True):
        averaged.lerp_(weight, (1 - decay) * (~skipped).to(weight.dtype))
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


class BufferGuard:
    """Keeps a network's buffers (batch norm's running statistics) finite, and equal on every rank.

    A skipped update takes them back to where they were before its forward pass; so does an overflow.
    """

    def __init__(self, network: nn.Module) -> None:
        self.buffers = dict(network.named_buffers())
        self.before = {name: buffer.clone() for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def settle(self, skipped: Bool[Tensor, ""], size: int) -> None:
        for name, buffer in self.buffers.items():
            if size > 1 and buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer /= size
            buffer.copy_(torch.where(skipped | ~buffer.isfinite(), self.before[name], buffer))


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, `exp_avg/conv1.weight`: no pickle needed to store it."""
    return {
        f"{key}/{name}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; nothing of what the optimiser held before is left."""
    optimizer.state.clear()
    parameters = dict(network.named_parameters())
    for path, value in tensors.items():
        key, name = path.split("/", 1)
        parameter = parameters[name]
        # the fused kernels want step counts in float32, whatever the weights are in
        dtype = torch.float32 if key == "step" else parameter.dtype
        # as the weights lie in memory: the kernels walk through both alike
        held = torch.empty_like(parameter, dtype=dtype) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][key] = held.to(parameter.device, dtype).copy_(value)
