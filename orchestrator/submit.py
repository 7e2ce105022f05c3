"""A command as a job on a Ray cluster: what jobs/submit.py does.

`ray job submit` does the same but for three things: of a folder that is too large it does not say what is large in it,
it leaves the commit of the code at home, and its exit code is 1 whatever the command's was.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jem.errors import ConfigError, JEMError
from orchestrator.facts import COMMIT, ROOT, code_digest, commit
from orchestrator.result import Result

log = logging.getLogger(__name__)

ADDRESS = "http://127.0.0.1:8265"
SHOWN = 10
"""Files that a folder too large to upload is told by."""

OVER = ("SUCCEEDED", "FAILED", "STOPPED")
"""What Ray says of a job that has ended."""

Say = Callable[[str], None]


@dataclass
class Submitted(Result):
    """What the job's command ended with; `job` is its id on the cluster."""

    job: str | None = None
    code: int | None = None  # that the command ended with
    own: dict[str, Any] = field(default_factory=dict, repr=False)  # what its line says beside what all commands say

    @property
    def exit_code(self) -> int:
        return super().exit_code if self.code is None else self.code

    def json(self) -> str:
        """The command's line, as it was but for `job` and `code`."""
        line = json.loads(super().json())
        return json.dumps(line.pop("own") | line)


def submit(
    command: Sequence[str],
    address: str | None = None,
    folder: Path = ROOT,
    wait: bool = True,
    environment: Sequence[str] = (),
    say: Say = print,
) -> Submitted:
    """Upload `folder`, run `command` in it on the cluster, and follow its log up to the last line.

    `address`: of the dashboard; none: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if that is an http:// one, or this
    machine's. `environment`: NAME=VALUE for the job. Raises ConfigError if the folder is too large, and JEMError if the
    cluster cannot be reached.
    """
    if not command:
        raise ConfigError(
            "no command; such as: python jobs/submit.py python jobs/train.py digits storage_path=/shared/runs"
        )
    variables = {COMMIT: commit(folder)} | dict(_variables(environment))
    check_size(folder)
    address = address or _usual_address()
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    client = _reach(address)
    job = str(
        client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"working_dir": str(folder), "env_vars": variables},
            metadata={"git.commit": commit(folder), "code.digest": code_digest(folder)},
        )
    )
    at = "" if address == ADDRESS else f" --address {address}"
    say(f"submitted {job}; ray job logs --follow{at} {job}; ray job stop{at} {job}")
    if not wait:
        return Submitted(status="submitted", job=job, name=job)
    try:
        last = asyncio.run(_follow(client, job, say))
        ended = _ended(client, job, last)
    except KeyboardInterrupt:
        return Submitted(status="submitted", job=job, name=job, message=f"{job} goes on; it is no longer followed here")
    except Exception as error:  # Ray and its HTTP client raise several types for a tunnel that has ended
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        lost = f"the connection was lost ({reason}): {job} goes on; ray job status{at} {job} tells how it ends"
        return Submitted(status="submitted", job=job, name=job, code=1, message=lost)
    return ended


def _variables(environment: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [entry.partition("=") for entry in environment]
    wrong = [name for name, equals, _ in pairs if not (name and equals)]
    if wrong:
        raise ConfigError(f"--env {wrong[0]!r} is not of the form NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


def _usual_address() -> str:
    """RAY_ADDRESS often is that of the cluster itself, host:6379, where no job can be submitted."""
    told = (os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
    return next((address for address in told if address.startswith(("http://", "https://"))), ADDRESS)


def _reach(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError and its own, all about this
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "is the head up and the tunnel open (ray dashboard ray_cluster.yaml)? is RAY_AUTH_TOKEN the cluster's?"
        raise JEMError(f"{address}: no cluster answers there ({reason}); {remedy}") from error


def check_size(folder: Path) -> None:
    """Raises ConfigError with the largest files if Ray would refuse to upload `folder`."""
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    files = uploaded(folder)
    total = sum(size for _, size in files)
    if total <= GCS_STORAGE_MAX_SIZE:
        return
    largest = sorted(files, key=lambda entry: -entry[1])[:SHOWN]
    lines = [f"  {size / 2**20:8.1f} MiB  {path.relative_to(folder)}" for path, size in largest]
    limit = f"{total / 2**20:,.0f} MiB to upload, Ray takes {GCS_STORAGE_MAX_SIZE / 2**20:,.0f}"
    remedy = f"name what the job does not need in {folder / '.rayignore'}, and keep data where all nodes read them"
    raise ConfigError("\n".join([f"{folder}: {limit}. The largest files:", *lines, remedy]))


def uploaded(folder: Path) -> list[tuple[Path, int]]:
    """The files that Ray would upload of a working directory, by its own rules, with their bytes."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    found: list[tuple[Path, int]] = []

    def take(path: Path) -> None:
        if path.is_file():
            found.append((path, path.stat().st_size))

    usual = packaging._get_excludes(folder, get_runtime_env_default_excludes())
    gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder.absolute(), [usual], take, include_gitignore=gitignore, logger=log)
    return found


async def _follow(client: Any, job: str, say: Say) -> str:
    """Say the job's log, all but its last line, which is returned."""
    rest = ""
    async for piece in client.tail_job_logs(job):
        *lines, rest = (rest + piece).rstrip("\n").split("\n")
        for line in lines:
            say(line)
        rest += "\n" if piece.endswith("\n") else ""
    return rest.rstrip("\n")


def _ended(client: Any, job: str, last: str) -> Submitted:
    """The command's own result, where its last line is one; else what Ray says of the job."""
    info = client.get_job_info(job)
    for _ in range(10):
        if info.status in OVER:
            break
        time.sleep(0.5)
        info = client.get_job_info(job)
    else:
        raise ConnectionError("its log ended before the job did")
    known = {entry.name for entry in fields(Result)}
    try:
        line = json.loads(last)
        told = {key: value for key, value in line.items() if key in known}
        told["own"] = {key: value for key, value in line.items() if key not in known}
    except (ValueError, AttributeError):
        told = {"status": "finished" if info.status == "SUCCEEDED" else "failed", "message": f"{info.message}\n{last}"}
    code = 0 if info.status == "SUCCEEDED" else info.driver_exit_code
    return Submitted(**told, job=job, code=code)
