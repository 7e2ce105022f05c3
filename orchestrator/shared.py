"""Whether a folder is the same one on every node: the driver leaves a word in it, and whoever works for it looks."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from jem.errors import DataError, JEMError
from jem.files import Location

NAME = "same-folder"

NOT_SHARED = "is not the folder that the driver"

REMEDY = "make room or make it writable, then give the same command again"


@dataclass(frozen=True)
class Word:
    """What was left, and on which host."""

    word: str
    host: str


@contextmanager
def word_in(folder: Location) -> Iterator[Word | None]:
    """Leave a word in `folder` as long as the context lives; none in an object store, which is the same for all."""
    if not folder.is_local:
        yield None
        return
    path, left = folder / NAME, Word(uuid.uuid4().hex, socket.gethostname())
    try:
        path.write(left.word.encode())
    except OSError as error:
        raise JEMError(f"{folder.uri}: cannot be written ({error}); {REMEDY}") from error
    try:
        yield left
    finally:
        with suppress(OSError):
            if sees(folder, left):  # and not that of who has taken the run over
                path.remove()


def sees(folder: Location, left: Word | None) -> bool:
    """Whether the word is there, read from here."""
    path = folder / NAME
    return left is None or (path.exists() and path.read().decode() == left.word)


def apart(folder: Location, hosts: Sequence[str], left: Word) -> DataError:
    """The error for hosts that do not see the word."""
    remedy = "storage_path must be a folder that all nodes share, or an object store"
    return DataError(f"{folder.uri} on {', '.join(hosts)} {NOT_SHARED} on {left.host} has: {remedy}")
