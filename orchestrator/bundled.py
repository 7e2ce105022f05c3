"""Models that come with this project: jobs/models/NAME, the folder of a portable model with its card and pictures."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config import MODEL_CARD, MODELS


def bundled_models() -> list[str]:
    """Their names."""
    return sorted(card.parent.name for card in MODELS.glob(f"*/{MODEL_CARD}"))


def place_of(source: str) -> str:
    """The folder of the bundled model `source`; `source` itself where it is none, or is there as a path."""
    return str(MODELS / source) if source in bundled_models() and not Path(source).exists() else source
