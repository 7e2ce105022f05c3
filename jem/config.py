"""What changes the numbers: every setting of a joint energy model, its data and its training.

Defaults are the paper's (Grathwohl et al., ICLR 2020) and its released code's. Nothing here imports
torch, so that mistakes and --help are instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jem.errors import Problem
from jem.settings import Settings, group, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The network whose logits are the model."""

    name: str = setting("wide_resnet", doc="wide_resnet, small_conv, or package.module:function of your own")
    depth: int = setting(28, ge=10, doc="wide_resnet: layers, 6 n + 4")
    width: int = setting(10, ge=1, doc="wide_resnet: widening factor")
    channels: tuple[int, ...] = setting((16, 32, 64, 64), ge=1, doc="small_conv: channels of each convolution")
    norm: str = setting(
        "none",
        choices=("none", "batch", "instance", "layer", "act"),
        doc="normalisation; batch: a training pass takes the statistics of data and samples together, so that an "
        "image's energy depends on its batch; chains and evaluation take running ones",
    )
    activation: str = setting("leaky_relu", choices=("leaky_relu", "silu"), doc="leaky_relu has slope 0.2")
    options: dict[str, Any] = setting({}, doc="handed to a function of your own, as model.options.KEY=VALUE")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.name == "wide_resnet" and (self.depth - 4) % 6:
            near = (self.depth - 4) // 6 * 6 + 4
            yield "depth", f"is {self.depth}, must be 6 n + 4, such as {near} or {near + 6}"
        if self.name == "small_conv" and not self.channels:
            yield "channels", "is empty, must have an entry for each convolution, one at least"
        yield from _known(self.name, ("wide_resnet", "small_conv"))
        if self.options and ":" not in self.name:
            yield "options", f"are for a function of your own; model.name={self.name} takes none"


DATA_SOURCES = (
    *("digits", "mnist5k", "mnist", "fashion_mnist", "kmnist"),
    *("cifar10", "cifar100", "svhn", "celeba", "imagefolder", "parquet"),
)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The images, how they are split and how a training batch is made of them."""

    name: str = setting("cifar10", doc=f"{', '.join(DATA_SOURCES)}, or package.module:function of your own")
    root: str | None = setting(
        None, doc="folder (parquet: folder or filesystem URI) of the data; none: ~/.cache/jem/data"
    )
    download: bool = setting(True, doc="fetch the data set if it is not under root")
    validation_size: int | None = setting(
        None, ge=1, doc="images carved from train where the source has no validation split; none: 10 %, at most 5000"
    )
    image_size: int = setting(64, ge=4, doc="celeba, imagefolder: side in pixels to resize to")
    channels: int = setting(3, ge=1, le=3, doc="imagefolder: 3 for colour, 1 for greyscale")
    stream: bool = setting(
        False, doc="parquet: read training images while they are needed; for more than memory holds, in an own order"
    )
    noise_std: float = setting(0.03, ge=0, doc="Gaussian noise on training images, on the [-1, 1] scale")
    crop_padding: int = setting(4, ge=0, doc="reflect-pad by this and crop at random; 0 turns it off")
    flip: bool = setting(True, doc="mirror half of the training images left to right")
    augment_p_x: bool = setting(
        True, doc="false (SADA): p(x) sees training images as they are, without noise, crop or flip; one more pass"
    )
    labels_per_class: int | None = setting(
        None, ge=1, doc="semi-supervised: cross-entropy on so many labelled images a class, p(x) on all; none: all"
    )
    labelled_batch_size: int | None = setting(
        None, ge=1, doc="semi-supervised: labelled images a step, over all workers; none: batch_size"
    )
    options: dict[str, Any] = setting({}, doc="handed to a function of your own, as data.options.KEY=VALUE")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from _known(self.name, DATA_SOURCES)
        if self.name in ("imagefolder", "parquet") and self.root is None:
            yield "root", f"is required for data.name={self.name}: the folder that holds the images"
        if self.channels == 2:
            yield "channels", "is 2, must be 1 or 3"
        if self.stream and self.name != "parquet":
            remedy = f"python jobs/prepare.py {self.name} OUT writes data that can be streamed"
            yield "stream", f"is true, must be false unless data.name=parquet; {remedy}"
        if self.stream and self.labels_per_class is not None:
            yield "stream", "does not go with data.labels_per_class, which picks from images in memory; leave one out"
        if not self.augment_p_x and not (self.noise_std or self.crop_padding or self.flip):
            remedy = "set data.noise_std, data.crop_padding or data.flip, or leave this out"
            yield "augment_p_x", f"is false, but no training image has noise, is cropped or mirrored; {remedy}"
        if self.labelled_batch_size is not None and self.labels_per_class is None:
            yield "labelled_batch_size", "has no effect without data.labels_per_class; set that or leave this out"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """How the weights move."""

    name: str = setting("adam", choices=("adam", "sgd"), doc="optimiser")
    learning_rate: float = setting(1e-4, gt=0, doc="learning rate after the warm-up")
    betas: tuple[float, ...] = setting((0.9, 0.999), ge=0, lt=1, doc="adam: decay of the two moments")
    momentum: float = setting(0.9, ge=0, lt=1, doc="sgd: momentum")
    weight_decay: float = setting(0.0, ge=0, doc="L2 penalty on the weights, added to the gradient")
    warmup_steps: int = setting(1000, ge=0, doc="steps over which the learning rate rises linearly from 0")
    decay_steps: tuple[int, ...] = setting((), ge=1, doc="steps at which the learning rate is multiplied by decay_rate")
    decay_rate: float = setting(0.3, gt=0, le=1, doc="factor of each decay")
    clip_norm: float | None = setting(None, gt=0, doc="largest norm of the whole gradient; none: not clipped")
    ema_decay: float = setting(0.0, ge=0, lt=1, doc="decay a step of the averaged weights; 0 keeps none")
    sam_rho: float = setting(
        0.0, ge=0, doc="SAM: the gradient is the loss's so far up from the weights, in a second training pass; 0: none"
    )
    sam_adaptive: bool = setting(False, doc="ASAM: sam_rho counts in units of the weights, whatever their scale")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if len(self.betas) != 2:
            yield "betas", f"has {len(self.betas)} entries, must have two"
        if list(self.decay_steps) != sorted(set(self.decay_steps)):
            yield "decay_steps", f"is {list(self.decay_steps)}, must rise from one entry to the next"
        if self.sam_adaptive and not self.sam_rho:
            yield "sam_adaptive", "has no effect without optimizer.sam_rho; set that, to 0.5 say, or leave this out"


@dataclass(frozen=True, kw_only=True)
class SGLDConfig(Settings):
    """The Langevin chains that draw samples from the model."""

    steps: int = setting(20, ge=1, doc="SGLD steps a training step, K")
    step_size: float = setting(1.0, gt=0, doc="factor of the energy's gradient in a step")
    noise_scale: float = setting(0.01, ge=0, doc="standard deviation of the noise of a step")
    conditional: bool = setting(False, doc="chains keep a class y and follow E(x, y), y ~ uniform; else E(x)")
    clamp: float | None = setting(None, gt=0, doc="positions are kept within +- this after each step; none: free")
    gradient_clamp: float | None = setting(
        None, gt=0, doc="each component of a step's gradient is kept within +- this; with clamp: proximal SGLD (JEM++)"
    )
    normalize_gradient: bool = setting(
        False, doc="DAT: each step is step_size long, in the gradient's direction over the whole image; else as steep"
    )
    inner_steps: int = setting(
        1, ge=1, doc="PYLD (JEM++): moves a step, all but the first through the network's first layer alone"
    )
    final_step_size: float | None = setting(
        None, gt=0, doc="step_size of a visit's last step, reached in equal ratios; none: the same throughout"
    )
    final_noise_scale: float | None = setting(
        None, ge=0, doc="noise_scale of a visit's last step, reached in equal differences; none: the same throughout"
    )
    max_steps: int | None = setting(
        None, ge=2, doc="chains get longer, up to this, while data's energy is below theirs; none: always steps"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.max_steps is not None and self.max_steps <= self.steps:
            yield "max_steps", f"is {self.max_steps}, must be greater than sgld.steps ({self.steps}), or left out"


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Settings):
    """The persistent chains, sharded over the workers."""

    capacity: int = setting(10_000, ge=1, doc="chains over all workers")
    reinit_prob: float = setting(0.05, ge=0, le=1, doc="chance that a drawn chain restarts from the prior")
    prior: str = setting(
        "uniform",
        choices=("uniform", "gaussian", "data"),
        doc="where chains start: uniform on [-1, 1]; gaussian: mean and covariance of a class's training images "
        "(JEM++); data: a training image with noise",
    )
    prior_noise: float = setting(0.3, ge=0, doc="prior=data: standard deviation of that noise, on the [-1, 1] scale")
    prior_rank: int | None = setting(
        None,
        ge=1,
        doc="directions of that covariance that are kept; none: all of images of up to 256 numbers, else 64",
    )
    uniform_share: float = setting(0.0, ge=0, le=1, doc="share of new chains that start uniform whatever the prior")
    dtype: str = setting(
        "float32",
        choices=("float32", "float16", "uint8"),
        doc="how chains are stored: as they move, or in half or a quarter of the bytes; uint8: 256 levels within "
        "+- sgld.clamp, rounded at random so that none drifts",
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """Weights of the terms of the loss."""

    p_y_given_x_weight: float = setting(1.0, ge=0, doc="weight of the cross-entropy, -log p(y|x)")
    p_x_weight: float = setting(1.0, ge=0, doc="weight of the energy gap, whose gradient is that of -log p(x)")
    p_x_y_weight: float = setting(0.0, ge=0, doc="weight of the joint energy gap, -log p(x, y)")
    p_x_loss: str = setting(
        "contrastive",
        choices=("contrastive", "bce"),
        doc="what p_x_weight weighs: the energy gap; bce (DAT): cross-entropy of a detector of samples whose logit is "
        "the energy, whose gradient is bounded; E(x) is then no estimate of -log p(x)",
    )
    p_x_given_y_weight: float = setting(
        0.0,
        ge=0,
        doc="weight of a contrastive -log p(x|y) (HDGE): a step's labelled images in place of chains",
    )
    mass_weight: float = setting(
        0.0, ge=0, doc="weight of the mean norm of d log p(x)/dx at data (NG-EBM); needs no chains: p_x_weight=0"
    )
    energy_l2: float = setting(0.0, ge=0, doc="weight of mean E(x)^2 over data plus mean E(x)^2 over samples")
    kl_weight: float = setting(
        0.0, ge=0, doc="weight of the KL term of improved contrastive divergence, through the chains' last step"
    )
    kl_samples: int | None = setting(
        None, ge=1, doc="chains of a step that the KL term is a mean over, over all workers; none: all"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not (self.p_y_given_x_weight or self.p_x_weight or self.p_x_y_weight or self.p_x_given_y_weight):
            yield "p_x_weight", "all weights of p are 0: nothing would be trained; give one of them a positive value"
        if self.p_x_loss == "bce" and not self.p_x_weight:
            yield "p_x_loss", "is bce, which has no effect without objective.p_x_weight; set that, or leave this out"
        if self.kl_weight and not self.samples_needed:
            yield "kl_weight", "is positive, but no chains are run; set objective.p_x_weight, or leave this out"
        if self.kl_samples is not None and not self.kl_weight:
            yield "kl_samples", "has no effect without objective.kl_weight; set that, to 0.3 say, or leave this out"

    @property
    def samples_needed(self) -> bool:
        """Whether a step runs chains: a plain classifier does not."""
        return self.p_x_weight > 0 or self.p_x_y_weight > 0


def _must_rise(settings: Settings, key: str) -> Iterator[tuple[str, str]]:
    values = list(getattr(settings, key))
    if not values or values != sorted(set(values)):
        yield key, f"is {values}, must have entries that rise from one to the next"


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Settings):
    """Suites full and paper: how hard the model is attacked. Norms and eps are on the [0, 1] pixel scale."""

    images: int | None = setting(None, ge=1, doc="attacked test images, evenly spaced; none: 100, paper 1000")
    linf: tuple[float, ...] = setting((0.01, 0.03, 0.05, 0.1, 0.2), gt=0, le=1, doc="eps of the largest change")
    l2: tuple[float, ...] = setting((0.25, 0.5, 1.0, 2.0), gt=0, doc="eps of the Euclidean norm of the change")
    refine: tuple[int, ...] = setting((0, 1, 10), ge=0, doc="JEM-k: SGLD steps down the energy before it classifies")
    copies: int = setting(5, ge=1, doc="JEM-k: noisy copies of an image whose logits are averaged")
    copy_noise: float = setting(0.03, ge=0, doc="JEM-k: Gaussian noise of these copies, on the [-1, 1] scale")
    steps: int | None = setting(None, ge=1, doc="steps of PGD; none: 20, paper 40")
    restarts: int | None = setting(None, ge=1, doc="starts of PGD: the image, then random points; none: 2, paper 20")
    min_norm_steps: int | None = setting(None, ge=1, doc="steps of foolbox's FMN, DDN and CW; none: 50, paper 500")
    queries: int | None = setting(None, ge=1, doc="tries of the square attack; none: 200, paper 5000")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for key in ("linf", "l2", "refine"):
            yield from _must_rise(self, key)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Settings):
    """Suites full and paper: the samples that are scored."""

    samples: int | None = setting(None, ge=10, doc="images of each sampler; none: 1000, paper 10,000")
    steps: int | None = setting(
        None, ge=1, doc="SGLD steps of a fresh chain; none: sgld.steps * sgld.inner_steps / replay.reinit_prob"
    )
    inception: str | None = setting(
        None, doc="torch-fidelity's Inception weights, for data without an extractor of ours (colour images)"
    )
    chains: int = setting(16, ge=2, doc="chains that are watched")
    lengths: tuple[int, ...] = setting(
        (1, 10, 100),
        ge=1,
        doc="after so many times the steps of a chain in training; the last is their end",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from _must_rise(self, "lengths")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """What is measured, when, and on which weights."""

    suite: str = setting(
        "fast",
        choices=("none", "fast", "full", "paper"),
        doc="fast: calibration, AUROC against few sets; full: every set and score, attacks and samples; "
        "paper: full with the paper's counts",
    )
    sets: tuple[str, ...] = setting(
        (),
        doc="out-of-distribution sets, by name or folder; empty: interp and uniform, full and paper: all that need no "
        "download",
    )
    max_images: int = setting(10_000, ge=1, doc="images of an out-of-distribution set, evenly spaced")
    every: int = setting(500, ge=1, doc="steps between measurements on the validation split")
    final: str = setting("last", choices=("last", "best"), doc="weights that are final: last, or best on validation")
    ema: bool = setting(False, doc="evaluate and keep the averaged weights (optimizer.ema_decay > 0)")
    noise_std: float = setting(0.0, ge=0, doc="Gaussian noise on evaluated images; the paper's code used 0.03")
    attack: AttackConfig = group(AttackConfig)
    generate: GenerateConfig = group(GenerateConfig)

    @property
    def complete(self) -> bool:
        """Whether every set and score is measured, and attacks and samples are."""
        return self.suite in ("full", "paper")


@dataclass(frozen=True, kw_only=True)
class JEMConfig(Settings):
    """A joint energy model: two runs with equal `JEMConfig` and workers give equal numbers."""

    seed: int = setting(doc="seed of everything random", ge=0, lt=2**31)
    batch_size: int = setting(64, ge=1, doc="images a step, over all workers; as many chains run beside them")
    precision: str = setting(
        "float32",
        choices=("float32", "bf16", "float64"),
        doc="of the network (float32 on CUDA: TF32 convolutions, as PyTorch ships it); chains stay in float32",
    )
    compile: bool = setting(
        False, doc="compile the chains' gradient: pays for large networks; needs a C++ compiler, else it is not done"
    )
    init_from: str | None = setting(
        None, doc="start from a checkpoint, a registered model (models:/NAME@ALIAS) or a state_dict (.safetensors, .pt)"
    )
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    sgld: SGLDConfig = group(SGLDConfig)
    replay: ReplayConfig = group(ReplayConfig)
    objective: ObjectiveConfig = group(ObjectiveConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.objective.samples_needed and self.replay.capacity < self.batch_size:
            yield (
                "replay.capacity",
                f"is {self.replay.capacity}, must be at least batch_size ({self.batch_size}): "
                "a step draws that many distinct chains",
            )
        if self.objective.samples_needed and self.replay.dtype == "uint8" and self.sgld.clamp is None:
            yield (
                "replay.dtype",
                "is uint8, whose levels lie within +- sgld.clamp, and chains without a clamp have no range: "
                "set sgld.clamp=1, or take replay.dtype=float16",
            )
        if self.replay.prior == "data" and self.data.stream:
            yield "replay.prior", "is data, whose images must be in memory, and data.stream=true: take gaussian"
        if self.compile and self.sgld.inner_steps > 1:
            yield "compile", "is true, must be false with sgld.inner_steps > 1, whose gradients are in parts"
        if self.objective.kl_weight and self.sgld.inner_steps > 1:
            message = "is positive, must be 0 with sgld.inner_steps > 1: it differentiates a step of SGLD, not of PYLD"
            yield "objective.kl_weight", message
        if self.objective.kl_weight and self.sgld.normalize_gradient:
            message = "is positive, must be 0 with sgld.normalize_gradient: it differentiates a step that is as steep"
            yield "objective.kl_weight", message
        if self.objective.p_x_loss == "bce" and self.sgld.max_steps is not None:
            message = "does not go with objective.p_x_loss=bce, whose energy gap says nothing of chains; leave one out"
            yield "sgld.max_steps", message
        if self.sgld.normalize_gradient and self.sgld.inner_steps > 1:
            yield "sgld.inner_steps", "must be 1 with sgld.normalize_gradient: a step is of one length; leave one out"
        if (self.objective.kl_samples or 1) > self.batch_size:
            yield (
                "objective.kl_samples",
                f"is {self.objective.kl_samples}, must be at most batch_size ({self.batch_size}): a step's chains",
            )
        yield from self._conflicts_of_p_x()
        if self.objective.p_x_y_weight > 0 and not self.sgld.conditional:
            yield (
                "sgld.conditional",
                "is false, must be true when objective.p_x_y_weight is positive: its samples are pairs (x, y)",
            )

    def shards_suffice(self, workers: int) -> bool:
        """Whether each of so many ranks holds as many chains as its share of the batch (`World.share`)."""

        def share(n: int, rank: int) -> int:
            return n * (rank + 1) // workers - n * rank // workers

        return all(share(self.replay.capacity, r) >= share(self.batch_size, r) for r in range(workers))

    def _conflicts_of_p_x(self) -> Iterator[tuple[str, str]]:
        if self.data.augment_p_x:
            return
        if not (self.objective.samples_needed or self.objective.mass_weight):
            yield (
                "data.augment_p_x",
                "is false, but no term sees those images; set objective.p_x_weight, or leave this out",
            )
        if self.objective.p_x_y_weight > 0 and self.data.labels_per_class is not None:
            yield (
                "data.augment_p_x",
                "is false, must be true with objective.p_x_y_weight and data.labels_per_class, whose images with "
                "labels are augmented; leave one of the three out",
            )


SCIENCE = (
    *("seed", "batch_size", "precision", "compile", "init_from"),
    *("model", "data", "optimizer", "sgld", "replay", "objective"),
)
"""The fields that name a run: all of `JEMConfig`."""


def too_few_chains(config: JEMConfig, n_classes: int) -> list[Problem]:
    """Chains that keep a class each must be at least one of each."""
    if config.replay.capacity >= n_classes:
        return []
    message = f"is {config.replay.capacity}, must be at least {n_classes} with sgld.conditional: a chain for each class"
    return [Problem("replay.capacity", message)]


def _known(name: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    import difflib

    module, colon, function = name.partition(":")
    if name in names or (colon and module and function.isidentifier()):
        return
    close = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    yield "name", f"is {name!r}, must be one of {', '.join(names)}, or package.module:function{hint}"
