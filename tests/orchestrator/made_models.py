"""Portable models of random weights, as a run leaves them for MLflow."""

import hashlib

import numpy as np
import torch

from jem.models import make_network
from jem.predict import Card, save
from orchestrator.config import RunConfig
from orchestrator.final_model import EXAMPLES

SHAPE, CLASSES = (3, 4, 6), ("cat", "dog", "ant")
SETTINGS = RunConfig(seed=0, workers=1, steps=1).science | {"model.name": "small_conv", "model.channels": (4,)}
FIGURES = {"accuracy": 0.9, "nll": 0.5, "ece": 0.1}


def portable(folder, seed=0, layout="NHWC", dtype="uint8", data="d" * 64, **figures):
    """A model in `folder`; its card. `figures`: of validation."""
    from jem.config import ModelConfig

    torch.manual_seed(seed)
    network = make_network(ModelConfig(name="small_conv", channels=(4,)), SHAPE, len(CLASSES))
    digest = hashlib.sha256(str(seed).encode()).hexdigest()
    info = {"name": "run", "step": 7, "weights": "model", "data": "toys", "data_digest": data}
    info["validation"] = FIGURES | figures
    card = Card(SETTINGS, SHAPE, CLASSES, 2.0, 1.1, layout, dtype, digest, info)
    save(folder, card, network.state_dict())
    np.save(folder / EXAMPLES, np.random.default_rng(seed).integers(0, 256, (3, *SHAPE), dtype=np.uint8))
    return card
