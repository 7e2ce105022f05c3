"""Errors a user can act on. Each carries the exit code that a command ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class JEMError(Exception):
    """A failure with a message written for the person who typed the command."""

    exit_code = 1
    status = "failed"


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: which key, what is wrong with it, and where it was written."""

    key: str
    message: str
    origin: str = ""

    def __str__(self) -> str:
        where = f"{self.origin}: " if self.origin else ""
        return f"{where}{self.key}: {self.message}" if self.key else f"{where}{self.message}"


class ConfigError(JEMError):
    """All mistakes of a configuration at once."""

    exit_code = 2
    status = "bad configuration"

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # it crosses process boundaries


class DataError(JEMError):
    """The data are missing, damaged or not what the configuration says."""

    exit_code = 2
    status = "bad data"


class CheckpointError(JEMError):
    """A checkpoint cannot be trusted, or none can."""

    exit_code = 3
    status = "no good checkpoint"


class StorageError(JEMError, OSError):
    """The storage does not answer, or refuses us: nothing is known of what lies there, and trying again may mend it."""


class DivergedError(JEMError):
    """Training diverged and nothing is left to try."""

    exit_code = 4
    status = "diverged"
