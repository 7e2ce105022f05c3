"""The training step of the JEM paper's released code, written plainly: what our step is measured against.

Float32, NCHW; chains live in host memory and are copied at each step; each term of the loss has a forward pass of
its own; the graph of each SGLD step is retained until the next; Adam as it comes (Grathwohl et al., ICLR 2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class PaperStep:
    """All there is of such a training run; `step(images, labels)` takes one step and returns the loss."""

    def __init__(
        self,
        network: nn.Module,
        image_shape: tuple[int, int, int],
        device: torch.device,
        *,
        steps: int,
        step_size: float = 1.0,
        noise_scale: float = 0.01,
        capacity: int = 10000,
        reinit_prob: float = 0.05,
        rate: float = 1e-4,
    ) -> None:
        self.network, self.image_shape, self.device = network.to(device), image_shape, device
        self.steps, self.step_size, self.noise_scale, self.reinit_prob = steps, step_size, noise_scale, reinit_prob
        self.buffer = self.fresh(capacity)
        self.optimizer = torch.optim.Adam(self.network.parameters(), rate)

    def fresh(self, n: int) -> Tensor:
        return torch.empty(n, *self.image_shape).uniform_(-1, 1)

    def samples(self, n: int) -> Tensor:
        """`n` chains, some of them anew, moved by SGLD and put back."""
        indices = torch.randint(0, len(self.buffer), (n,))
        kept = (torch.rand(n) > self.reinit_prob).float()[:, None, None, None]
        x = (kept * self.buffer[indices] + (1 - kept) * self.fresh(n)).to(self.device).requires_grad_(True)
        self.network.eval()
        for _ in range(self.steps):
            value = self.network(x).logsumexp(1).sum()
            (gradient,) = torch.autograd.grad(value, [x], retain_graph=True)
            x.data += self.step_size * gradient + self.noise_scale * torch.randn_like(x)
        self.network.train()
        done = x.detach()
        self.buffer[indices] = done.cpu()
        return done

    def step(self, images: Tensor, labels: Tensor) -> float:
        images, labels = images.to(self.device), labels.to(self.device)
        drawn = self.samples(len(images))
        on_data = self.network(images).logsumexp(1).mean()
        on_samples = self.network(drawn).logsumexp(1).mean()
        loss = on_samples - on_data
        loss = loss + F.cross_entropy(self.network(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.item())
