"""What all commands share: errors as text on stderr, one JSON line last on stdout, the exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

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
        message = message.replace(", key=value", "").replace(", KEY=VALUE", "")  # settings may be left out
        raise ConfigError(f"{message}; see --help")


class Lasting(io.TextIOWrapper):
    """A standard stream whose reader may go, as in `... | head`: what is said from then on is lost, and no run.

    Its bytes are written by the interpreter's own code: an interrupt between a write and its return would repeat them.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._to_nobody()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._to_nobody()

    def _to_nobody(self) -> None:
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, self.fileno())
        os.close(nobody)


def outlast_readers() -> None:
    """Make stdout and stderr such streams, where they are the process's own."""
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is own and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            lines, through = stream.line_buffering, stream.write_through
            setattr(sys, name, Lasting(stream.buffer, stream.encoding, stream.errors, None, lines, through))


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
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "ray", "mlflow", "pyarrow"):
            remedy = "is the project's environment active? After `make demo`: source .venv/bin/activate"
            message = f"{sys.executable} has no module {error.name}; {remedy}"
        else:
            traceback.print_exc()
        result = Result(status="failed", message=message)
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
