"""Tiny data sets in the exact formats that torchvision reads."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from jem.data.splits import DataSet, Split


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def dataset(n: int = 40, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 4, name: str = "fake") -> DataSet:
    """n training images, half as many for validation and test."""

    def split(count: int, seed: int) -> Split:
        images = torch.from_numpy(pixels(count, *shape, seed=seed))
        return Split(images, torch.arange(count) % classes)

    parts = split(n, 1), split(n // 2, 2), split(n // 2, 3)
    return DataSet(name, *parts, classes=tuple(f"class {c}" for c in range(classes)))


def numbered(n: int, classes: int = 2, side: int = 4) -> Split:
    """Image i has the value i in every pixel (n <= 256), so that a batch tells which images it holds."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, side, side).contiguous()
    return Split(images, torch.arange(n) % classes)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path, n: int = 60, zipped: bool = False) -> dict[str, np.ndarray]:
    """Four idx files; returns the arrays by file name."""
    folder.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", n), ("t10k", n // 2)):
        arrays[f"{part}-images-idx3-ubyte"] = pixels(count, 28, 28, seed=count)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        raw = idx_bytes(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw, 1))
        else:
            (folder / name).write_bytes(raw)
    return arrays


def cifar(root: Path, name: str, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR pickles whose checksums torchvision is told; returns the training images [n, 3, 32, 32] and labels."""
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key, n_classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    n = 300 // len(cls.train_list)
    images, labels = [], []
    for number, (file, _) in enumerate(cls.train_list + cls.test_list):
        data, targets = pixels(n, 3072, seed=number), [i % n_classes for i in range(n)]
        (folder / file).write_bytes(pickle.dumps({"data": data, key: targets}))
        images.append(data.reshape(-1, 3, 32, 32))
        labels += targets
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: [f"c{i}" for i in range(n_classes)]}))
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(cls, attribute, [[file, md5(folder / file)] for file, _ in getattr(cls, attribute)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(folder / cls.meta["filename"])})
    train = len(cls.train_list)
    return np.concatenate(images[:train]), np.array(labels[: n * train])


def svhn(root: Path, monkeypatch) -> np.ndarray:
    """SVHN's .mat files, where the digit 0 has the label 10; returns the test images [n, 3, 32, 32]."""
    root.mkdir(parents=True, exist_ok=True)
    listed = {}
    for part, n in (("train", 60), ("test", 30)):
        images = pixels(n, 3, 32, 32, seed=n)
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": (np.arange(n) % 10 + 1).reshape(-1, 1).astype(np.uint8)})
        listed[part] = ["", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    return images


def celeba(root: Path, monkeypatch, n: int = 12) -> list[Path]:
    """CelebA's lists and images: red left and right of a square whose grey is 20 x the image's number."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(n)]
    for i, name in enumerate(names):
        image = Image.new("RGB", (178, 218), (255, 0, 0))
        image.paste((20 * i,) * 3, (0, 20, 178, 198))
        image.save(folder / "img_align_celeba" / name, quality=95)
    signs = [1 if i % 2 else -1 for i in range(n)]
    lists = {
        "list_attr_celeba.txt": [
            str(n),
            "Bald Smiling",
            *(f"{f}  {-s:2d} {s:2d}" for f, s in zip(names, signs, strict=True)),
        ],
        "identity_CelebA.txt": [f"{f} {i}" for i, f in enumerate(names)],
        "list_bbox_celeba.txt": [str(n), "image_id x y w h", *(f"{f} 0 0 9 9" for f in names)],
        "list_landmarks_align_celeba.txt": [str(n), "a b c d", *(f"{f} 1 2 3 4" for f in names)],
        "list_eval_partition.txt": [f"{f} {i * 3 // n}" for i, f in enumerate(names)],
    }
    for file, lines in lists.items():
        (folder / file).write_text("\n".join(lines) + "\n")
    checked = [(a, md5(folder / f) if f in lists else b, f) for a, b, f in datasets.CelebA.file_list]
    monkeypatch.setattr(datasets.CelebA, "file_list", checked)
    return [folder / "img_align_celeba" / name for name in names]


def folder(root: Path, layout: dict[str, int], size: tuple[int, int] = (10, 8)) -> None:
    """`layout`: "train/cat" to how many PNG files; their grey level is the number of the file."""
    for where, n in layout.items():
        (root / where).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", size, (i, i, i)).save(root / where / f"{i:03d}.png")
