"""Nothing of the tester's own Ray or MLflow reaches a test."""

import pytest
from spawn import run_ranks


@pytest.fixture(scope="session", autouse=True)
def sealed_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """(folder, what each of two ranks has to tell); see rank_stories.py."""
    from rank_stories import stories

    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(stories, (2,), folder / "meet", str(folder))[2]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that look at the two ranks' stories run in one process, so that the ranks are started once."""
    for item in items:
        if "two_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("two ranks"))
