"""A data set of the user's own: `data.name=package.module:function`.

`function(config: DataConfig)` returns a `DataSet`, or a mapping such as

    {"train": (images, labels), "test": (images, labels), "classes": ("cat", "dog")}

with images uint8 [n, c, h, w] and integer labels [n], as arrays or tensors. "validation" and "test" are carved
from train when left out; "classes" defaults to the label numbers. `config.options` holds `data.options.KEY=VALUE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jem.config import DataConfig
from jem.data.carve import Pool, Source, assemble
from jem.data.catalog import SPLITS
from jem.data.splits import DataSet, complete
from jem.errors import DataError
from jem.plugins import load_function


def load_custom(config: DataConfig, wanted: tuple[str, ...] = SPLITS) -> DataSet:
    """Call the function that `config.name` names and make a `DataSet` of what it returns."""
    made = load_function(config.name, "data.name")(config)
    if isinstance(made, DataSet):
        return complete(made.name, {split: made.splits[split] for split in wanted}, made.classes)
    if not isinstance(made, Mapping):
        raise DataError(f"{config.name} returned {type(made).__name__}, must return a DataSet or a mapping of splits")
    if unknown := set(made) - {*SPLITS, "classes"}:
        keys = ", ".join(sorted(map(repr, unknown)))
        raise DataError(f"{config.name} returned the key {keys}; known are {', '.join(SPLITS)}, classes")
    if "train" not in made:
        raise DataError(f"{config.name} returned no split 'train'")
    pools = {split: _pool(made[split], f"{config.name}: split {split}") for split in SPLITS if split in made}
    top = max(int(pool.labels.max(initial=0)) for pool in pools.values())
    classes = tuple(str(name) for name in made.get("classes", range(top + 1)))
    source = Source(classes, {split: lambda pool=pool: pool for split, pool in pools.items()})  # type: ignore[misc]
    return assemble(config.name, source, config.validation_size, wanted)


def _pool(pair: Any, where: str) -> Pool:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{where}: is {type(pair).__name__}, must be a pair (images, labels)")
    images, labels = (_tensor(item, f"{where}: {what}") for item, what in zip(pair, ("images", "labels"), strict=True))
    if images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise DataError(f"{where}: images are {found}, must be torch.uint8 of shape [n, channels, height, width]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{where}: labels are {labels.dtype}, must be integers")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{where}: labels are {list(labels.shape)}, must be [{len(images)}], one an image")
    if not len(images):
        raise DataError(f"{where}: is empty; it needs at least one image")
    return Pool.of(images, labels.numpy())


def _tensor(values: Any, where: str) -> Tensor:
    """Of whatever numpy takes, in any order of axes or bytes."""
    try:
        array = np.asarray(values)
        return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} cannot be made a tensor: {error}; give one array, or a tensor on the CPU") from error
