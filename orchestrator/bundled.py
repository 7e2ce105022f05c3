"""Models that come with this project: jobs/models/NAME, the folder of a portable model with its card and pictures."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from orchestrator.config import MODEL_CARD, MODELS


def bundled_models() -> list[str]:
    """Their names."""
    return sorted(card.parent.name for card in MODELS.glob(f"*/{MODEL_CARD}"))


def place_of(source: str, storage: str = "./runs") -> str:
    """The folder of the bundled model `source`, or of the run of that name in `storage`.

    `source` itself where it is neither, or is there as a path.
    """
    if "/" in source or Path(source).exists():
        return source
    if source in bundled_models():
        return str(MODELS / source)
    from jem.files import Location
    from orchestrator.runs import below

    run = below(storage, source)
    with suppress(ValueError, OSError):
        if (Location.of(run) / "run.json").exists():
            return run
    return source
