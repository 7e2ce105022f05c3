"""What clusters' tests share: a folder to type commands in, and a bucket behind a door."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import boto3
import pytest
from gate import Gate
from moto.server import ThreadedMotoServer
from ports import free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from ray_faults import bring

SECRET = "the-secret-access-key-of-the-test"

FILES = ("object_storage_cut", "jobs", "cluster_file", "several_nodes", "object_storage", "doctor")
"""An order in which all workers end together: pytest-xdist hands out the next file while two tests are left of one."""


def pytest_collection_modifyitems(items):
    """The cores are busy to the end."""
    items.sort(key=lambda item: FILES.index(item.path.stem.removeprefix("test_")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands are typed."""
    folder = tmp_path_factory.mktemp("typed")
    bring(folder, "slow_net.py")
    return folder


@pytest.fixture(scope="module")
def gate(folder):
    """The door before a server with one bucket; what the environment says of S3 is that server."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # every request
    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    gate = Gate(port)
    told = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    told |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(folder)}
    told |= dict.fromkeys(("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"), f"http://127.0.0.1:{gate.port}")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in told.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield gate
    gate.close()
    server.stop()
