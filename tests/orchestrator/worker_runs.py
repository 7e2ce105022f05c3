"""Runs of the worker loop without Ray: tiny settings, functions that recipes name, and what a run left behind."""

import math
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from pyarrow import fs
from torch import nn

from jem import checkpoint
from jem.errors import DataError
from jem.files import Location
from jem.models import small_conv
from jem.world import World
from orchestrator import events
from orchestrator.config import load_run_config
from orchestrator.worker import Job, run, setup

TINY = (
    *("workers=1", "steps=12", "batch_size=8", "model.channels=[4]", "optimizer.learning_rate=0.01"),
    *("optimizer.warmup_steps=2", "sgld.steps=2", "replay.capacity=24", "checkpoint.every=4"),
    *("tracking.every=3", "tracking.images_every=100", "evaluate.every=5", "evaluate.suite=none"),
    *("evaluate.register=false", "name=tiny"),
)
HOOKED = "model.name=worker_runs:hooked"
CPU = torch.device("cpu")


class Death(Exception):  # noqa: N818
    """A worker's death, as far as its loop can tell."""


class Hooks:
    """What happens at a run's training passes: `at[n](network)` before pass n, counted from 1."""

    passes = 0
    at = {}  # noqa: RUF012
    output = staticmethod(lambda out: out)


def tiny(*settings, recipe="digits_uniform"):
    return load_run_config(recipe, [*TINY, *settings])


def fit(folder, *settings, hooks=None, world=None, report=lambda *_: None, attempt=1, recipe="digits_uniform", **job):
    """Run the worker loop in this process, as one attempt on the run in `folder`; its outcome."""
    Hooks.passes, Hooks.at, Hooks.output = 0, hooks or {}, staticmethod(lambda out: out)
    root = folder if isinstance(folder, Location) else Location.of(folder)
    log_path = job.pop("log_path", None) or root.local / "events.jsonl"
    job = Job(tiny(*settings, recipe=recipe), root, log_path, attempt, **job)
    try:
        return run(job, world or World(), CPU, report)
    finally:  # threads outlive a death that is an exception: what they were writing is on the disk, or is not
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()


def prepared(folder, *settings, world=None, **job):
    """The run before its first step."""
    root = Location.of(folder)
    return setup(Job(tiny(*settings), root, root.local / "events.jsonl", **job), world or World(), CPU, lambda *_: None)


def die(_network):
    raise Death


def poison(_network):
    Hooks.output = staticmethod(lambda out: out * math.nan)


def newest(folder):
    root = folder if isinstance(folder, Location) else Location.of(folder)
    return checkpoint.read_manifest(checkpoint.committed(root / "checkpoints")[0])


def steps_kept(folder):
    return sorted(int(d.name) for d in checkpoint.committed(Location.of(folder) / "checkpoints"))


def state_of(folder):
    """The newest checkpoint bit for bit: digests of weights, averages, moments, chains, generators, sums."""
    manifest = newest(folder)
    files = {name: entry["sha256"] for name, entry in manifest.files.items() if name != "events.jsonl"}
    return files | {"step": manifest.step, "best": manifest.info["best"]}


def log_of(folder, kind=None):
    found, _ = events.read(Location.of(folder).local / "events.jsonl")
    return [event for event in found if kind in (None, event["kind"])]


def trace(folder):
    """{(metric, step): value} of the whole log; a step that was run again must have given the same again."""
    points = {}
    for event in log_of(folder, "metrics"):
        for key, value in event["metrics"].items():
            if key != "train/images_per_s":
                assert points.setdefault((key, event["step"]), value) == value, (key, event["step"])
    return points


def object_store(folder):
    """A bucket: a filesystem that is not the local one, as far as its Location says."""
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    return Location(fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem()), "bucket", "store")


class Hooked(nn.Module):
    """A small convolution net whose training passes (one a step) can be interfered with."""

    def __init__(self, config, image_shape, n_classes):
        super().__init__()
        self.net = small_conv(config, image_shape, n_classes)
        self.drop = nn.Dropout(config.options.get("drop", 0.0))

    def forward(self, x):
        if self.training:
            Hooks.passes += 1
            Hooks.at.get(Hooks.passes, lambda _: None)(self)
        return Hooks.output(self.net(self.drop(x)))


def hooked(config, image_shape, n_classes):
    return Hooked(config, image_shape, n_classes)


def bars(config):
    """A data set of one's own: class 0 has a bright left half, class 1 a bright right half."""
    labels = torch.arange(config.options.get("images", 60)) % 2
    images = torch.zeros(len(labels), 1, 6, 6, dtype=torch.uint8)
    images[labels == 0, :, :, :3] = 255
    images[labels == 1, :, :, 3:] = 255
    return {"train": (images, labels), "classes": ("left", "right")}


def missing_on_rank_1(config):
    if dist.is_initialized() and dist.get_rank() == 1:
        raise DataError("the disk of rank 1 has no images")
    return bars(config)


def unfit_on_rank_1(config, image_shape, n_classes):
    if dist.is_initialized() and dist.get_rank() == 1:
        raise DataError("rank 1 cannot make the network")
    return small_conv(config, image_shape, n_classes)


def growing(config):
    """A data set that somebody adds images to."""
    n = int(Path(config.options["count"]).read_text())
    images = torch.arange(n * 64, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(n, 1, 8, 8)
    return {"train": (images, torch.arange(n) % 2)}


def tied(config, image_shape, n_classes):
    """A network two of whose layers are one."""
    shared = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), shared, nn.SiLU(), nn.Sequential(shared), nn.Linear(64, n_classes))
