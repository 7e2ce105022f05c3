"""Random streams named by what they are for, so that no draw depends on who draws it or when."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed for the stream that `parts` name; other parts give an unrelated stream."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A new generator on `device` at the start of the stream that `parts` name."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
