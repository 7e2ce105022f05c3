"""One training step of a joint energy model, and the loop around it. No I/O, no Ray: callers log and save."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jem.compiled import Compiled
from jem.config import JEMConfig, SGLDConfig, too_few_chains
from jem.data.batches import Batch
from jem.energy import Logits, energy_fn, split_energy_fn
from jem.errors import ConfigError, Problem
from jem.kl import kl_energies, live_and_held
from jem.models import ImageShape, initialize_act_norm, make_network
from jem.objective import Counts, Loss, class_pool, gradient_norms, jem_loss
from jem.optim import BufferGuard, averaged_copy, guarded_update, learning_rate, make_optimizer, update_average
from jem.pages import keep_freed_pages
from jem.prior import Prior
from jem.randomness import derive_seed, generator
from jem.replay import ReplayBuffer, class_counts
from jem.sam import sharpness_aware
from jem.sgld import Differentiate, Transition, adapted_length, along, differentiate, sgld_chain
from jem.world import World

ALONE = World()


@dataclass
class TrainState:
    """Everything that changes while training: all of it, and nothing else, goes into a checkpoint."""

    network: nn.Module
    average: nn.Module | None  # exponential moving average of the weights
    optimizer: torch.optim.Optimizer
    replay: ReplayBuffer | None  # none where no term of the objective needs samples
    generator: torch.Generator  # of this rank's chains
    step: int = 0  # optimiser steps done
    world_epoch: int = 0  # how often the number of workers or the kind of device changed
    chain_length: Tensor | None = None  # float32 [], of chains that adapt it (sgld.max_steps); the same on every rank
    differentiate: Differentiate = differentiate  # how, not what: in no checkpoint


class StepInfo(NamedTuple):
    """What a step saw, as tensors on the device. Fields sum over the ranks to the step's figure.

    `chain_grad_norm` is the mean norm of the energy's gradient at the chains' last position but one,
    `reinit_share` the share of chains that restarted, `lost_chains` the number that were not finite;
    `chain_saturation`, `chain_contrast` and `data_contrast` are those of `looks` after the step's chains moved.
    """

    loss: Loss
    chain_grad_norm: Float[Tensor, ""]
    reinit_share: Float[Tensor, ""]
    chain_saturation: Float[Tensor, ""]
    chain_contrast: Float[Tensor, ""]
    data_contrast: Float[Tensor, ""]
    lost_chains: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]
    skipped: Bool[Tensor, ""]  # the same on every rank
    step: int
    learning_rate: float


class Samples(NamedTuple):
    """What the chains gave for one step."""

    images: Tensor
    labels: Tensor
    chain_grad_norm: Tensor
    reinit_share: Tensor
    chain_saturation: Tensor
    chain_contrast: Tensor
    data_contrast: Tensor
    lost_chains: Tensor
    before: Tensor  # where the images stood before the chains' last step
    last: SGLDConfig  # of that step


def start(
    config: JEMConfig,
    shape: ImageShape,
    n_classes: int,
    world: World = ALONE,
    device: torch.device | str = "cpu",
    prior: Prior | None = None,
) -> TrainState:
    """A state at step 0; weights are the same on every rank, chains are each rank's own.

    `prior`: of `make_prior`, the same on every rank; none: a uniform one, which needs no images.
    Raises ConfigError for a network of the user's own that has no halves where they are needed, and where a prior that
    is fitted to images is due and not given.
    """
    keep_freed_pages()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        network = make_network(config.model, shape, n_classes).to(device, dtype_of(config))
    if config.objective.samples_needed and config.sgld.inner_steps > 1 and not hasattr(network, "halves"):
        message = (
            f"is {config.sgld.inner_steps}: the network of {config.model.name} needs a method `halves` (jem.models)"
        )
        raise ConfigError([Problem("sgld.inner_steps", message)])
    if config.objective.samples_needed:
        check_chains(config, n_classes, world)
    average = averaged_copy(network) if config.optimizer.ema_decay else None
    chain_generator = generator(device, config.seed, "chains", world.rank, world.size, 0)
    replay, length = None, None
    if config.objective.samples_needed:
        if prior is None and config.replay.prior != "uniform":
            message = (
                f"is {config.replay.prior}, fitted to the training images: give start() what jem.prior.make_prior gives"
            )
            raise ConfigError([Problem("replay.prior", message)])
        prior = prior or Prior(config.replay, shape)
        replay = ReplayBuffer.start(prior, n_classes, world, chain_generator, dtype_of(config), config.sgld.clamp)
        if config.sgld.max_steps is not None:
            length = torch.tensor(float(config.sgld.steps), device=device)
    optimizer = make_optimizer(network, config.optimizer)
    how = Compiled() if config.compile else differentiate
    return TrainState(network, average, optimizer, replay, chain_generator, chain_length=length, differentiate=how)


def check_chains(config: JEMConfig, n_classes: int, world: World) -> None:
    """Raises ConfigError where there are too few for the ranks' shares of the batch, or for the classes they keep."""
    problems = too_few_chains(config, n_classes) if config.sgld.conditional else []
    if not config.shards_suffice(world.size):
        least = config.batch_size + world.size
        message = (
            f"is {config.replay.capacity}, must be at least {least} so that each of {world.size} ranks holds its own"
        )
        problems.append(Problem("replay.capacity", message))
    if problems:
        raise ConfigError(problems)


def prepare_first_step(state: TrainState, images: Float[Tensor, "n c h w"]) -> None:
    """What must see data before step 0: act norm. `images` is the whole first global batch, on every rank."""
    initialize_act_norm(state.network, images)
    if state.average is not None:
        state.average.load_state_dict(state.network.state_dict())


def data_parallel(network: nn.Module, images: Float[Tensor, "n c h w"], world: World) -> nn.Module | None:
    """The network in DistributedDataParallel where there are several ranks. Buffers are averaged by the step.

    It lays out its buckets anew after the first backward pass, and the layout is the order in which gradients
    are summed. That pass is spent here, on zeros like `images`: a run that goes on sums as one never stopped.
    """
    if world.size == 1:
        return None
    devices = [images.device.index] if images.device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    network.eval()
    wrapped(torch.zeros_like(images[:1])).sum().backward()
    network.zero_grad()
    return wrapped


def train(
    state: TrainState,
    batch_at: Callable[[int], Batch],
    config: JEMConfig,
    steps: int,
    world: World = ALONE,
    wrapped: nn.Module | None = None,
) -> Iterator[StepInfo]:
    """Train `state` until `steps` optimiser steps are done, yielding what each saw.

    `batch_at(step)` gives this rank's part of that step's batch. `wrapped` is what `data_parallel` made of
    `state.network`.
    """
    while state.step < steps:
        # what a network of the user's own draws (dropout) is a function of the step, too: there is nothing to save
        torch.manual_seed(derive_seed(config.seed, "network", world.rank, state.step))
        yield train_step(state, batch_at(state.step), config, world, wrapped)


def train_step(
    state: TrainState, batch: Batch, config: JEMConfig, world: World, wrapped: nn.Module | None = None
) -> StepInfo:
    """Draw samples from the model, take one step down the loss; `state` moves on in place."""
    network = state.network
    samples = sample(state, config, batch.images, batch.n_global)
    guard = BufferGuard(network)
    backward = functools.partial(loss_and_gradient, network, guard.before, batch, samples, config, world, wrapped)
    loss = sharpness_aware(backward, network, config.optimizer) if config.optimizer.sam_rho else backward()
    rate = learning_rate(config.optimizer, state.step)
    grad_norm, skipped = guarded_update(state.optimizer, config.optimizer, rate)
    guard.settle(skipped, world.size)
    if state.average is not None:
        update_average(state.average, network, config.optimizer.ema_decay, skipped)
    if state.chain_length is not None:
        gap = world.sum(loss.energy_data - loss.energy_samples)
        state.chain_length = adapted_length(state.chain_length, gap, config.sgld)
    state.step += 1
    return StepInfo(
        loss,
        samples.chain_grad_norm,
        samples.reinit_share,
        samples.chain_saturation,
        samples.chain_contrast,
        samples.data_contrast,
        samples.lost_chains,
        grad_norm / world.size,
        skipped,
        state.step,
        rate,
    )


def loss_and_gradient(
    network: nn.Module,
    buffers: dict[str, Tensor],
    batch: Batch,
    samples: Samples,
    config: JEMConfig,
    world: World,
    wrapped: nn.Module | None = None,
) -> Loss:
    """The loss; its gradient, reduced over all ranks, is left in the weights. `buffers`: as the chains saw them.

    The chains went through the bare network: they are each rank's own and communicate nothing. Data,
    samples and labelled images go through the wrapped network in ONE forward pass, because
    DistributedDataParallel reduces the gradients of one forward and one backward pass. It divides them
    by the world size, hence the factor. The KL term and the approximate mass go through the bare network,
    too: all of a weight's gradient has come together when DistributedDataParallel sees it.
    """
    energy_kl, mass = None, None
    if config.objective.kl_weight:
        energy_kl = energies_of_last_step(network, buffers, samples, config, world, batch.n_global)
    if config.objective.mass_weight:
        network.eval()  # with batch norm's running statistics no image's gradient depends on the others
        with autocast(config, batch.images.device):
            mass = gradient_norms(live_and_held(network, buffers, None)[0], batch.images)
    labelled = batch.images[:0] if batch.labelled_images is None else batch.labelled_images
    network.train()
    with autocast(config, batch.images.device):
        logits = (wrapped or network)(torch.cat([batch.images, samples.images, labelled]))
    if logits.dtype != torch.float64:
        logits = logits.float()
    of_data, of_samples, of_labelled = logits.split([len(batch.images), len(samples.images), len(labelled)])
    given = batch.labelled_images is None  # labels go with the data, and nothing else has any
    labels = batch.labels if given else batch.labelled_labels
    assert labels is not None
    objective, n, classified = config.objective, batch.n_global, of_data if given else of_labelled
    pool = class_pool(classified, labels, world) if objective.p_x_given_y_weight else None
    keep_class = config.sgld.conditional and objective.samples_needed
    weights = class_weights(batch, config.replay.capacity, of_data) if keep_class else None
    chains, of_kl = n if objective.samples_needed else 0, objective.kl_samples or n
    loss = jem_loss(
        of_data,
        of_samples,
        classified,
        labels,
        samples.labels,
        objective,
        Counts(n, chains, batch.n_labelled_global, of_kl),
        logits_joint=of_labelled if batch.labels is None else of_data,  # p(x, y) sees the images that p(x) does
        energy_kl=energy_kl,
        mass=mass,
        pool=pool,
        class_weights=weights,
    )
    network.zero_grad()
    torch.autograd.backward(loss.total * world.size)
    return loss._replace(total=loss.total.detach())


def class_weights(batch: Batch, capacity: int, logits: Float[Tensor, "n c"]) -> Float[Tensor, " c"]:
    """Of `jem_loss`: how frequent each class is among the images with labels, over how frequent among the chains."""
    n_classes = logits.shape[1]
    chains = class_counts(capacity, n_classes, logits.device).to(logits.dtype) / capacity
    if batch.class_shares is None:
        return 1 / (n_classes * chains)
    shares = torch.zeros_like(chains)
    shares[: len(batch.class_shares)] = batch.class_shares
    return shares / chains


def energies_of_last_step(
    network: nn.Module,
    buffers: dict[str, Tensor],
    samples: Samples,
    config: JEMConfig,
    world: World,
    n_global: int,
) -> Float[Tensor, " kl"]:
    """`kl_energies` of this rank's share of `kl_samples` chains: the network is as it was while they moved."""
    rows, wanted = world.share(n_global), config.objective.kl_samples or n_global
    mine = slice(rows.stop * wanted // n_global - rows.start * wanted // n_global)
    if mine.stop == 0:
        return samples.images.new_zeros(0)
    network.eval()
    with autocast(config, samples.images.device):
        energies = live_and_held(network, buffers, samples.labels[mine] if config.sgld.conditional else None)
        return kl_energies(*energies, samples.before[mine], samples.images[mine], samples.last)


def sample(state: TrainState, config: JEMConfig, like: Float[Tensor, "n c h w"], n_global: int) -> Samples:
    """Move as many of this rank's chains as `like` holds images, and put them back.

    The network is in eval mode meanwhile, as in JEM's released code. With batch norm chains then follow the running
    statistics, which are those of data, samples and labelled images together (one training pass sees them all, and
    the ranks' are averaged) and which sampling leaves as they are: no chain depends on the others of its batch.
    """
    if state.replay is None:
        none = like.new_zeros(())
        labels = torch.zeros(0, dtype=torch.int64, device=like.device)
        return Samples(like[:0], labels, none, none, none, none, none, none, like[:0], config.sgld)
    drawn = state.replay.draw(len(like), state.generator)
    state.network.eval()
    with autocast(config, like.device):
        make_energy = split_energy_fn if config.sgld.inner_steps > 1 else energy_fn
        energy = make_energy(state.network, drawn.labels if config.sgld.conditional else None)
        steps = config.sgld.steps
        if state.chain_length is not None:
            steps = round(state.chain_length.item())  # the one wait for the device, where chains adapt
        images, transition = sgld_chain(energy, drawn.x, config.sgld, state.generator, state.differentiate, steps)
    lost = state.replay.write(drawn.slots, images, state.generator)
    shares = *_shares(transition, drawn.restarted, n_global), *looks(images, like, config, n_global)
    last = along(config.sgld, steps - 1, steps)
    return Samples(images, drawn.labels, *shares, lost.to(like.dtype), transition.before, last)


def _shares(transition: Transition, restarted: Tensor, n_global: int) -> tuple[Tensor, Tensor]:
    return transition.grad_norm.sum() / n_global, restarted.sum().to(transition.grad_norm.dtype) / n_global


WIDE = 2.0
"""Where a chain without a clamp counts as saturated: twice as far out as data, which live on [-1, 1]."""


def looks(
    chains: Float[Tensor, "n c h w"], data: Float[Tensor, "n c h w"], config: JEMConfig, n_global: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """This rank's part of what chains look like beside data: saturation, and the contrast of each.

    Saturation: the share of the chains' pixels with |x| >= the clamp (or 2 where there is none), less the
    share of the data's, which counts from two standard deviations of their noise below that: many data
    are black over most of an image, and a chain that has learnt so sits at the clamp rightly. In [-1, 1];
    about 0 or below while the chains are well.

    Contrast: the mean over images of the variance of an image's pixels. 0: each is of one grey.
    """
    at = config.sgld.clamp or WIDE
    noise = config.data.noise_std if config.data.augment_p_x else 0.0
    excess = (chains.abs() >= at).sum() - (data.abs() >= at - 2 * noise).sum()
    saturation = excess.to(chains.dtype) / (n_global * chains.shape[1:].numel())
    contrasts = [x.flatten(1).var(dim=1, correction=0).sum() / n_global for x in (chains, data)]
    return saturation, contrasts[0], contrasts[1]


def frozen_logits(network: nn.Module, config: JEMConfig) -> Logits:
    """The network as a plain function for evaluation: eval mode, in the precision it was trained in."""
    network.eval()

    def logits(x: Tensor) -> Tensor:
        with autocast(config, x.device):
            out: Tensor = network(x)
        return out if out.dtype == torch.float64 else out.float()

    return logits


def dtype_of(config: JEMConfig) -> torch.dtype:
    """Of weights, images and chains; bf16 concerns the network's arithmetic only."""
    return torch.float64 if config.precision == "float64" else torch.float32


def autocast(config: JEMConfig, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 arithmetic inside the network where `precision` says so."""
    if config.precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
