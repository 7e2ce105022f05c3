"""Where images come from: `load` gives a whole data set in memory, as uint8; `describe` says what it would be."""

from __future__ import annotations

from collections.abc import Callable

from jem.config import DataConfig
from jem.data import embedded, folder, parquet, vision
from jem.data.carve import Source, assemble
from jem.data.catalog import SPLITS, DataSpec, check_options, describe
from jem.data.custom import load_custom
from jem.data.manifest import location_of
from jem.data.splits import DataSet, Split, check

__all__ = ["SPLITS", "DataSet", "DataSpec", "Split", "check", "describe", "load"]

SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "digits": embedded.digits,
    "mnist5k": embedded.mnist5k,
    "mnist": vision.mnist_like,
    "fashion_mnist": vision.mnist_like,
    "kmnist": vision.mnist_like,
    "cifar10": vision.cifar,
    "cifar100": vision.cifar,
    "svhn": vision.svhn,
    "celeba": vision.celeba,
    "imagefolder": folder.imagefolder,
}


def load(config: DataConfig, splits: tuple[str, ...] = SPLITS, in_memory: bool = True) -> DataSet:
    """The data set that `config` names; `splits` that are not wanted are left empty, and unread where possible.

    With data.stream the training split stays on the disk. Unless `in_memory`, so do images that files or archives hold
    one by one, until they are asked for.

    Which image is in which split depends on the source and `validation_size` alone, never on a seed.
    Raises DataError where data are missing, damaged or not what they should be, with the remedy.
    """
    check_options(config)
    if config.name == "parquet":
        return parquet.read(location_of(config), splits, config.stream)
    if config.name in SOURCES:
        dataset = assemble(config.name, SOURCES[config.name](config), config.validation_size, splits, in_memory)
    else:
        dataset = load_custom(config, splits)
    return check(dataset, f"data.name={config.name}", splits)
