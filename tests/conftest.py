"""For all tests: the shapes in annotations are executed, and torch has one thread."""

import fcntl
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# a busy machine is no failure, and what passes today passes tomorrow
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.load_profile("any machine")

# tests/ comes first on the path, and tests/jem would be taken for the package; so the root goes before it.
sys.path.insert(0, str(Path(__file__).parents[1]))

TENSOR_MODULES = (
    *("energy", "sgld", "replay", "objective", "kl", "models", "optim"),
    *("sam", "train", "meter", "world", "evaluate"),
)
# Before any of them is imported. From here on a tensor of the wrong shape raises.
install_import_hook([f"jem.{name}" for name in TENSOR_MODULES], "shapes.once")

import torch  # noqa: E402

torch.set_num_threads(1)  # small tensors, and other tests beside these


HEAVY = (
    *("train_on_ray", "evaluation", "score_command", "compiled", "data_parallel", "worker", "density", "generation"),
    *("tracking", "sweep_upload", "mlflow_page", "pyfunc_model", "recovery"),
)
"""The files that take longest, the longest first."""


def pytest_collection_modifyitems(items):
    """Files are begun in this order (--dist loadfile --no-loadscope-reorder): none that takes minutes is the last."""
    place = {f"test_{name}": number for number, name in enumerate(HEAVY)}
    items.sort(key=lambda item: place.get(item.path.stem, len(HEAVY)))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory, sealed_environment):
    """A database of MLflow with its tables and nothing in them: making these takes seconds, copying the file does not.

    One for all of pytest's processes, and made only if a test wants it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of this run, and common to its workers
    database = folder / "migrated.db"
    with (folder / "migrated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            from mlflow import MlflowClient

            made = folder / "made.db"
            MlflowClient(f"sqlite:///{made}", f"sqlite:///{made}").search_experiments()
            with closing(sqlite3.connect(made)) as connection:
                connection.execute("VACUUM INTO ?", (f"{database}.part",))
            os.replace(f"{database}.part", database)
    return database


@pytest.fixture(scope="session", autouse=True)
def sealed_environment():
    """Nothing of the tester's own Ray or MLflow reaches a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield
