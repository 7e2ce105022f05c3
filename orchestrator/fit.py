"""Whether this machine, or the cluster at RAY_ADDRESS, is fit to train on: what jobs/doctor.py prints and returns."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jem.errors import ConfigError, JEMError
from jem.files import Location, existing
from orchestrator import fit_node
from orchestrator.config import RunConfig, load_run_config, shown
from orchestrator.result import Result
from orchestrator.runs import planned_storage

GIB = 2**30
ROOM = 5 * GIB
"""Free bytes below which a disk is told of; below a tenth of it, it fails."""

SHM = 1 * GIB
SKEW_S = (1.0, 30.0)
"""A clock that is off by so much is told of, and fails: locks and logs compare the times of machines."""

OLD_DRIVER = (
    "there is an NVIDIA driver, and torch cannot use it",
    "the driver is older than this torch needs: update it, or install the torch of its CUDA version",
)

JOIN_S, NODE_S, ASK_S = 30.0, 60.0, 5.0
OK, WARNING, FAILED = "ok", "warning", "failed"


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, where, what came of it, and what to do about it."""

    what: str
    where: str
    state: str
    found: str
    remedy: str = ""


@dataclass
class Diagnosis(Result):
    """`checks` has an entry a row of the table; `status` is fit or unfit."""

    checks: list[dict[str, Any]] = field(default_factory=list)


def diagnose(settings: Sequence[str]) -> Diagnosis:
    """Look at everything, print it, and say whether it is fit. `settings` are those of a run."""
    config = load_run_config("digits", ["workers=1", *settings])
    checks: list[Check] = []
    here = socket.gethostname()
    for what, look in (
        ("Python and torch", lambda: _software(config, here)),
        ("MLflow", lambda: _mlflow(config, here)),
        ("token", lambda: _token(here)),
    ):
        checks += _safely(what, here, look)
    probe = f".doctor-{uuid.uuid4().hex[:12]}"
    try:
        storage = planned_storage(config)
    except ConfigError as error:
        checks.append(Check("storage", here, FAILED, str(error), "give storage_path=/an/absolute/path or a URI"))
    else:
        checks += _safely("storage and nodes", here, lambda: _with_probe(config, storage, probe, here))
    return _told(checks)


def _safely(what: str, where: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """A look that breaks is a check that fails; what it had found before counts."""
    found: list[Check] = []
    try:
        found.extend(look())
    except JEMError as error:
        found.append(Check(what, where, FAILED, str(error), "mend what it names, then ask again"))
    except Exception as error:  # the doctor says what it is instead of ending with it
        lines = str(error).strip().splitlines() or [""]
        remedy = "mend what it names, then ask again: this was not looked at to its end"
        found.append(Check(what, where, FAILED, f"{type(error).__name__}: {lines[0]}", remedy))
    return found


def _software(config: RunConfig, here: str) -> Iterator[Check]:
    import importlib.metadata

    import torch

    version = sys.version.split()[0]
    state = OK if sys.version_info >= (3, 11) else FAILED
    yield Check("Python", here, state, version, "" if state == OK else "install Python 3.11 or newer; make clean; make")
    for name in ("torch", "ray", "mlflow"):
        yield Check(name, here, OK, importlib.metadata.version(name))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        x = torch.ones(64, 64, device="cuda")
        good = bool((x @ x == 64).all())
        yield Check("CUDA", here, OK if good else FAILED, f"{torch.version.cuda}: {', '.join(names)}", "see nvidia-smi")
    elif fit_node.NVIDIA.exists():
        yield Check("CUDA", here, FAILED, *OLD_DRIVER)
    elif config.device == "cuda" and "RAY_ADDRESS" not in os.environ:
        yield Check("CUDA", here, FAILED, "device=cuda, and there is no GPU", "leave device= out to train on the CPU")
    else:
        yield Check("CUDA", here, OK, "no GPU: training is on the CPU")


def _token(here: str) -> Iterator[Check]:
    from orchestrator.ray_cluster import TOKEN

    if TOKEN.exists():
        mode = stat.S_IMODE(TOKEN.stat().st_mode)
        if mode & 0o077:
            yield Check("token file", here, FAILED, f"{TOKEN} has mode {mode:04o}", f"chmod 600 {TOKEN}")
        else:
            yield Check("token file", here, OK, f"mode {mode:04o}")
    if "RAY_ADDRESS" in os.environ:
        held = TOKEN.exists() or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        on = os.environ.get("RAY_AUTH_MODE") == "token"
        remedy = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN for `ray start` on every node and for this command"
        found = "token" if held and on else "off: whoever reaches the cluster's ports can run code on it"
        yield Check("authentication", here, OK if held and on else WARNING, found, "" if held and on else remedy)


def _mlflow(config: RunConfig, here: str) -> Iterator[Check]:
    from orchestrator.tracking import default_uri

    path = config.storage_path
    storage = Location.of(path)
    uri, _ = default_uri(storage, config.tracking.uri)
    told = shown(uri)
    if uri.startswith(("http://", "https://")):
        yield _server(uri, told, here)
        return
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Check("MLflow", here, OK, f"{told} is made by the first run")
        return
    import sqlalchemy
    from mlflow.store.db.utils import _get_latest_schema_revision

    remote = uri.startswith(("postgresql", "mysql"))
    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": int(ASK_S)} if remote else {})
    try:
        with engine.connect() as connection:
            is_at = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
            tables = sqlalchemy.inspect(connection).get_table_names()
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or type(error).__name__)
        yield Check("MLflow", here, FAILED, f"{told}: {reason}", "is tracking.uri an MLflow database?")
        return
    finally:
        engine.dispose()
    newest = _get_latest_schema_revision()
    halfway = [name for name in tables if name.startswith("_alembic_tmp_")]
    if halfway and uri.startswith("sqlite:///"):
        remedy = "move the file away, then: python jobs/sync.py"
        yield Check("MLflow", here, FAILED, f"{told} was left half made (table {halfway[0]})", remedy)
    elif is_at == newest:
        yield Check("MLflow", here, OK, f"{told}, schema {newest}")
    else:
        remedy = f"make a copy, then: mlflow db upgrade {told}"
        yield Check("MLflow", here, FAILED, f"{told} has schema {is_at}, this MLflow needs {newest}", remedy)


def _server(uri: str, told: str, here: str) -> Check:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    creds = get_default_host_creds(uri)  # of the environment or ~/.mlflow/credentials, as MLflow has it
    asked = {"timeout": ASK_S, "max_retries": 0, "raise_on_status": False}
    try:
        version = http_request(creds, "/version", "GET", **asked)
        search = "/api/2.0/mlflow/experiments/search"
        answer = http_request(creds, search, "POST", json={"max_results": 1}, **asked)
    except MlflowException as error:
        remedy = "is the server up, and tracking.uri or MLFLOW_TRACKING_URI its address?"
        reason = type(error.__cause__ or error.__context__ or error).__name__
        return Check("MLflow", here, FAILED, f"{told} does not answer ({reason})", remedy)
    if answer.status_code in (401, 403):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials"
        return Check("MLflow", here, FAILED, f"{told} refuses us ({answer.status_code})", remedy)
    if answer.status_code != 200:
        remedy = "its log says why; a database of an older MLflow needs `mlflow db upgrade`"
        return Check("MLflow", here, FAILED, f"{told} answers {answer.status_code}", remedy)
    return Check("MLflow", here, OK, f"{told}, version {version.text.strip()[:20]}")


def _with_probe(config: RunConfig, storage: str, probe: str, here: str) -> Iterator[Check]:
    """Everything that needs a file in the storage, which is removed at the end."""
    root = Location.of(storage)
    made = root.is_local and not root.exists()
    if made:
        above = existing(root.local)
        yield Check("storage", here, OK, f"{storage} is not there yet, {above} is looked at instead")
        root, storage = Location.of(above), str(above)
    try:
        (root / probe / fit_node.DRIVER).write(probe.encode())
    except OSError as error:
        reason = str(error).splitlines()[0]
        remedy = (
            "make it writable, or set storage_path to a folder or URI that is; for s3:// see AWS_* and the endpoint"
        )
        yield Check("storage", here, FAILED, f"{shown(storage)} cannot be written: {reason}", remedy)
        return
    try:
        if "RAY_ADDRESS" in os.environ:
            yield from _cluster(config, storage, probe)
        else:
            yield from judge(fit_node.examine(storage, probe, "here"), here, storage)
            cores = os.cpu_count() or 1
            if config.min_workers > cores:
                found = f"workers={config.workers} share {cores} cores"
                yield Check("workers", here, WARNING, found, f"they would be slow; workers={cores} or fewer")
    finally:
        with suppress(OSError):
            (root / probe).remove()


def judge(facts: dict[str, Any], where: str, storage: str, driver: dict[str, Any] | None = None) -> Iterator[Check]:
    """What the facts of a machine mean; `driver`: those of the driver's, with which others must agree."""
    for key, what, remedy in (
        ("python", "Python", "the same Python (first two numbers) on every node"),
        ("versions", "versions", "install the project with constraints.txt on every node"),
        ("code", "code", "submit it as a job (python jobs/submit.py ...): that brings the code to every node"),
    ):
        if driver is not None and facts[key] != driver[key]:
            yield Check(what, where, FAILED, f"{facts[key]}, the driver has {driver[key]}", remedy)
    if driver is not None and facts["nvidia"] and not facts["gpus"]:
        remedy = f"give the container its GPUs if it should have any; else {OLD_DRIVER[1]}"
        yield Check("CUDA", where, WARNING, OLD_DRIVER[0], remedy)
    gpus = ", ".join(facts["gpus"]) or "no GPU"
    yield Check("machine", where, OK, f"{facts['cores']} cores, {facts['memory'] / GIB:.0f} GiB, {gpus}")
    yield _room("/tmp", where, facts["temporary"], ROOM, "free some: Ray keeps its session and spilled objects there")
    if facts["shm"] is not None:
        remedy = "give the container more, such as docker run --shm-size=4g: Ray's object store lives there"
        yield _room("/dev/shm", where, facts["shm"], SHM, remedy)
    told = facts["storage"]
    if told["error"]:
        yield Check(
            "storage", where, FAILED, f"{shown(storage)}: {told['error']}", "make it readable and writable there"
        )
    elif not told["shared"]:
        remedy = "mount the same folder on every node, or use an object store: storage_path=s3://bucket/runs"
        yield Check("storage", where, FAILED, f"{shown(storage)} is not the folder that the driver has", remedy)
    else:
        yield Check("storage", where, OK, f"{shown(storage)}: read, written, renamed")
    if told["free"] is not None:
        yield _room(storage, where, told["free"], ROOM, "free some, or set storage_path to a larger disk")


def _room(what: str, where: str, free: int, enough: int, remedy: str) -> Check:
    state = OK if free >= enough else WARNING if free >= enough / 10 else FAILED
    return Check(f"room in {what}", where, state, f"{free / GIB:.1f} GiB free", "" if state == OK else remedy)


def _cluster(config: RunConfig, storage: str, probe: str) -> Iterator[Check]:
    """All nodes, each asked by itself: one that hangs is named, and holds up nobody."""
    address = os.environ["RAY_ADDRESS"]
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    remedy = "is the head up (ray status), and RAY_ADDRESS its HOST:PORT?"
    if parts.port is not None:
        try:
            socket.create_connection((parts.hostname or "", parts.port), timeout=ASK_S).close()
        except OSError as error:
            yield Check("cluster", address, FAILED, f"nobody answers there: {error}", remedy)
            return
    answer: list[Any] = []
    done = threading.Event()
    thread = threading.Thread(target=_join, args=(config, answer, done), daemon=True, name="join Ray")
    thread.start()
    deadline = time.monotonic() + JOIN_S
    while not answer and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    if not answer or isinstance(answer[0], BaseException):
        reason = str(answer[0]).strip().splitlines()[0] if answer else f"no answer within {JOIN_S:.0f} s"
        told = "RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN must be set here; " + remedy
        yield Check("cluster", address, FAILED, f"it cannot be joined: {reason}", told)
        return
    try:
        yield from _nodes(config, storage, probe, address, answer[0])
    finally:
        done.set()
        thread.join(10)


def _join(config: RunConfig, answer: list[Any], done: threading.Event) -> None:
    from orchestrator.ray_cluster import ray_session

    try:
        with ray_session(config.max_workers) as cluster:
            answer.append(cluster)
            done.wait()
    except BaseException as error:  # handed over to who waits
        answer.append(error)


def _nodes(config: RunConfig, storage: str, probe: str, address: str, cluster: Any) -> Iterator[Check]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    found = f"{len(alive)} nodes, {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs, {cluster.memory:.0f} GiB"
    yield Check("cluster", address, OK, found)
    has, what = (cluster.gpus, "GPUs") if config.device == "cuda" else (cluster.cpus, "CPUs")
    if has < config.min_workers:
        told = f"workers={config.workers}, the cluster has {has:g} {what}"
        yield Check("workers", address, WARNING, told, "a run waits until an autoscaler brings more, or lower workers")
    actor = ray.remote(num_cpus=0)(fit_node.Examiner)
    asked = []
    for node in alive:
        pinned = actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        name = f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
        asked.append((name, node["NodeID"], pinned, pinned.now.remote()))
    driver = fit_node.examine(storage, probe, fit_node.DRIVER + "-itself")
    looking: list[tuple[str, str, tuple[float, float], Any]] = []
    deadline = time.monotonic() + NODE_S
    for name, node_id, pinned, ready in asked:  # the clock before torch is imported there
        try:
            ray.get(ready, timeout=max(1.0, deadline - time.monotonic()))
            clock = min((_offset(pinned) for _ in range(5)), key=lambda pair: pair[1])
        except Exception as error:  # of Ray, of many types, with a stack trace of the node's as its text
            yield _silent(name, error)
        else:
            looking.append((name, node_id, clock, pinned.examine.remote(storage, probe, node_id)))
    deadline = time.monotonic() + NODE_S  # all look at the same time
    for name, node_id, (offset, half), pending in looking:
        try:
            facts = ray.get(pending, timeout=max(1.0, deadline - time.monotonic()))
        except Exception as error:
            yield _silent(name, error)
            continue
        yield from judge(facts, name, storage, driver)
        late = abs(offset) - half
        state = OK if late < SKEW_S[0] else WARNING if late < SKEW_S[1] else FAILED
        told = f"{offset:+.3f} s (to within {half:.3f} s)"
        yield Check("clock", name, state, told, "" if state == OK else "set it by NTP: systemctl enable --now chrony")
        if facts["storage"]["shared"] and not (Location.of(storage) / probe / node_id).exists():
            remedy = "mount the same folder on every node, or use an object store"
            yield Check("storage", name, FAILED, "what it wrote is not seen by the driver", remedy)


def _silent(name: str, error: Exception) -> Check:
    remedy = "see ray status, and the logs of that node in Ray's session folder; start it again"
    found = f"does not do what it is asked within {NODE_S:.0f} s ({type(error).__name__})"
    return Check("node", name, FAILED, found, remedy)


def _offset(pinned: Any) -> tuple[float, float]:
    """How far that node's clock is ahead of ours, and how uncertain that is: half the way there and back."""
    import ray

    before = time.time()
    there = ray.get(pinned.now.remote(), timeout=ASK_S)
    after = time.time()
    return there - (before + after) / 2, (after - before) / 2


def _told(checks: list[Check]) -> Diagnosis:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    table = Table()
    for column in ("check", "where", "state", "found"):
        table.add_column(column, overflow="fold")
    colours = {OK: "green", WARNING: "yellow", FAILED: "red"}
    for check in checks:
        table.add_row(check.what, check.where, f"[{colours[check.state]}]{check.state}[/]", check.found)
    console.print(table)
    for state in (FAILED, WARNING):
        for check in checks:
            if check.state == state:
                text = f"{check.state}: {check.what} on {check.where}: {check.found}\n  remedy: {check.remedy}"
                console.print(text, soft_wrap=True, highlight=False, markup=False)
    failed = sum(check.state == FAILED for check in checks)
    message = f"{failed} of {len(checks)} checks failed" if failed else ""
    return Diagnosis(status="unfit" if failed else "fit", message=message, checks=[asdict(c) for c in checks])
