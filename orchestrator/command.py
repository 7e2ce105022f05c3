"""What all commands share: errors as text on stderr, one JSON line last on stdout, the exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from jem.errors import ConfigError, JEMError
from orchestrator.result import Result
from orchestrator.signals import deaf, interruptible

RAY_THREAD = "ray-train"
"""The thread that waits for Ray Train or Tune."""

LEAVE_S = 3.0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end as all others do, with the JSON line."""

    def __init__(self, description: str | None, epilog: str = "") -> None:
        super().__init__(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


class Pipe(io.FileIO):
    """A standard stream whose reader may go, as in `... | head`: what is said from then on is lost, and no run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def outlast_readers() -> None:
    """Make stdout and stderr such streams, where they are the process's own."""
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is own and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            buffer = io.BufferedWriter(Pipe(stream.fileno(), "w", closefd=False))
            style = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, **style))


def run_command(function: Callable[[], Result]) -> int:
    """Call `function`, end stdout with its result, and return the exit code. An exception is a result too."""
    outlast_readers()
    try:
        with interruptible():
            result = function()
    except JEMError as error:
        result = Result(status=error.status, message=str(error))
    except KeyboardInterrupt:
        result = Result(status="stopped", message="interrupted")
    except Exception as error:
        traceback.print_exc()
        result = Result(status="failed", message=f"{type(error).__name__}: {error}")
    with deaf():
        if result.message:
            print(f"{result.status}: {result.message}", file=sys.stderr)
        sys.stderr.flush()
        print(result.json(), flush=True)
    if any(thread.name == RAY_THREAD and thread.is_alive() for thread in threading.enumerate()):
        if sys.platform != "linux":  # where the processes of a private Ray do not end with this one
            from orchestrator.ray_cluster import leave_ray

            leave_ray(LEAVE_S)
        os._exit(result.exit_code)  # it waits for workers that are gone, and would make the interpreter abort
    return result.exit_code
