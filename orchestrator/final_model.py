"""The final model of a run: what its workers measure for it, and the folder that the driver makes of its checkpoint.

RUN/models/DIGEST/model.safetensors, model.json   see jem.predict; DIGEST: the first digits of that of the weights
                  examples.npy                    a few images that it takes, uint8 [n, c, h, w]
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from jem import checkpoint
from jem.errors import JEMError
from jem.evaluate import calibration, classification, ood, scores
from jem.evaluate.temperature import fit_temperature
from jem.files import Location
from jem.predict import Card, read_card, save
from orchestrator.config import RunConfig

FOLDER, EXAMPLES = "models", "examples.npy"
N_EXAMPLES = 3


def calibrate(logits: Tensor, labels: Tensor, images: Tensor) -> dict[str, Any]:
    """What the model needs besides its weights, from its logits on the validation split (images without noise).

    `validation` is {accuracy, nll, ece} of the probabilities that it answers with, so after temperature scaling.
    Raises DivergedError if a logit is not finite.
    """
    logits, labels = logits.cpu(), labels.cpu()
    fitted = fit_temperature(logits, labels)
    scaled = logits.double() / fitted.value
    return {
        "temperature": fitted._asdict(),
        "threshold": ood.threshold_at_tpr(scores.log_px(logits)),
        "validation": {
            "accuracy": classification.accuracy(scaled, labels),
            "nll": classification.nll(scaled, labels),
            "ece": calibration.ece(calibration.confidence_bins(scaled, labels)),
        },
        "examples": images[:N_EXAMPLES].cpu().numpy(),
    }


def write_model(folder: Path, config: RunConfig, outcome: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Make the final model's folder below `folder` from the run's last checkpoint; the `model` event that tells of it.

    `outcome`: what the workers say of a run that is finished. `run`: what else the card is to say.
    Raises CheckpointError or OSError.
    """
    manifest = checkpoint.read_manifest(Location.of(outcome["checkpoint"]))
    file = f"{outcome['weights']}.safetensors"
    digest, found, info = manifest.files[file]["sha256"], outcome["calibrated"], manifest.info
    c, h, w = info["image_shape"]
    card = Card(
        config=config.science,
        image_shape=(c, h, w),
        classes=tuple(info["classes"]),
        temperature=found["temperature"]["value"],
        threshold=found["threshold"],
        layout=config.evaluate.input_layout,
        dtype=config.evaluate.input_dtype,
        digest=digest,
        info={
            **run,
            "step": manifest.step,
            "weights": outcome["weights"],
            "data": config.data.name,
            "data_digest": info["data_digest"],
            "validation": found["validation"],
            "temperature": found["temperature"],
            "source": manifest.directory.uri,
            "checkpoint": manifest.directory.uri,
            "facts": info["facts"],
        },
    )
    path = f"{FOLDER}/{digest[:12]}"
    if _is_there(folder / path) is None:
        examples = io.BytesIO()
        np.save(examples, found["examples"], allow_pickle=False)
        Location.of(folder / path / EXAMPLES).write(examples.getvalue())
        save(folder / path, card, manifest.tensors(file), checkpoint.prior_tensors(manifest))
    return {"step": manifest.step, "path": path, "digest": digest, "name": config.registered_name} | {
        "champion": config.evaluate.champion
    }


def examples(folder: Path, card: Card) -> np.ndarray:
    """The images kept with a model, in the layout and dtype that it takes."""
    images = np.load(folder / EXAMPLES, allow_pickle=False)
    images = images.transpose(0, 2, 3, 1) if card.layout == "NHWC" else images
    return np.ascontiguousarray(images if card.dtype == "uint8" else (images / 255).astype(np.float32))


def summary(card: Card) -> str:
    """A model in a few lines."""
    info, figures = card.info, card.info.get("validation", {})
    measured = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    return (
        f"Joint energy model of run {info.get('name')}, step {info.get('step')}, weights: {info.get('weights')}; "
        f"data: {info.get('data')}.\n\nTakes {card.expects}. Validation, after temperature scaling "
        f"(T = {card.temperature:.4g}): {measured}. in_distribution: log_density >= {card.threshold:.4f}, "
        "which 95 % of the validation images reach."
    )


def _is_there(folder: Path) -> Card | None:
    with suppress(JEMError):
        return read_card(folder)
    return None
