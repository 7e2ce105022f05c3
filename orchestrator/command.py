"""What all commands share: errors as text on stderr, one JSON line last on stdout, the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from jem.errors import JEMError
from orchestrator.result import Result


def run_command(function: Callable[[], Result], name: str | None = None) -> int:
    """Call `function`, end stdout with its result, and return the exit code; a JEMError is a result too."""
    try:
        result = function()
    except JEMError as error:
        result = Result(name=name, status=error.status, message=str(error))
    except KeyboardInterrupt:
        result = Result(name=name, status="stopped", message="interrupted")
    if result.message:
        print(f"{result.status}: {result.message}", file=sys.stderr)
    sys.stderr.flush()
    print(result.json(), flush=True)
    return result.exit_code
