"""ray_cluster.yaml: accepted by Ray and by AWS's client, and every shell line of it run on a machine of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from machine import Machine
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler._private.util import prepare_config
from ray_faults import TINY
from seed import seed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
SECRET = "the-secret-access-key-of-the-test"
PLAIN = " ".join(argument for argument in TINY if not argument.startswith("model."))
SERVE = "from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', {port}); s.start(); s._thread.join()"
S3 = 9000
GPU_MACHINE = {"CPU": 4, "GPU": 1}
"""Of a g5.xlarge, as Ray asks AWS for it."""


def cluster_file():
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text().replace("YOUR-BUCKET", "bucket"))


def test_ray_accepts_the_file_and_awss_client_what_becomes_of_it(monkeypatch, tmp_path):
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import validate_config

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    config = prepare_config(cluster_file())
    validate_config(config)
    assert {kind: t["min_workers"] for kind, t in config["available_node_types"].items()} == dict.fromkeys(
        ("head", "gpu", "spot"), 0
    ), "nothing is paid for without work but the head"
    with mock_aws():
        client = boto3.client("ec2", config["provider"]["region"])
        image = client.describe_images()["Images"][0]["ImageId"]  # the mock does not resolve the newest one's name
        for kind in config["available_node_types"].values():
            assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/")
            kind["node_config"]["ImageId"] = image
        profile = config["available_node_types"]["gpu"]["node_config"]["IamInstanceProfile"]["Arn"]
        boto3.client("iam").create_instance_profile(InstanceProfileName=profile.rpartition("/")[2])
        config = bootstrap_aws(config)
        provider = AWSNodeProvider(config["provider"], "jem")
        for name, kind in config["available_node_types"].items():
            provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
        made = [i for r in client.describe_instances()["Reservations"] for i in r["Instances"]]
    kinds = {next(t["Value"] for t in i["Tags"] if t["Key"] == "ray-user-node-type"): i for i in made}
    assert {name: i["InstanceType"] for name, i in kinds.items()} == {
        "head": "m6i.xlarge",
        "gpu": "g5.xlarge",
        "spot": "g5.xlarge",
    }
    assert [name for name, i in kinds.items() if i.get("InstanceLifecycle") == "spot"] == ["spot"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    told = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    told |= dict.fromkeys(("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"), f"http://127.0.0.1:{S3}")
    told |= {"AWS_EC2_METADATA_DISABLED": "true", "PIP_NO_COMPILE": "1"}  # no time for bytecode that nothing imports
    machine = Machine(tmp_path_factory.mktemp("machine"), told)
    if not machine.works:
        pytest.skip("a machine of its own cannot be made here (no root, or a container without CAP_SYS_ADMIN)")
    yield machine
    machine.end()


@pytest.fixture(scope="module")
def head(machine, tmp_path_factory):
    """Brought up as `ray up` does it: files, set-up, start; with an autoscaler whose machines are processes."""
    config = cluster_file()
    laptop = tmp_path_factory.mktemp("laptop")
    generate = [Path(sys.executable).with_name("ray"), "get-auth-token", "--generate"]
    subprocess.run(generate, env={"HOME": str(laptop), "PATH": "/usr/bin:/bin"}, check=True, capture_output=True)
    for there, here in config["file_mounts"].items():
        source = Path(here.replace("~", str(laptop)))
        source = source if source.is_absolute() else ROOT / here
        target = machine.home / Path(there).relative_to("/home")
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)
    store = [sys.executable, "-c", f'"{SERVE.format(port=S3)}"']
    machine.start(" ".join(store), tmp_path_factory.mktemp("store") / "log")
    make = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"
    machine.until(f'{sys.executable} -c "{make}" && echo made', lambda out: "made" in out, 300)
    shutil.copy(Path(__file__).with_name("processes.py"), machine.home / "ubuntu")
    fake = {"type": "external", "module": "processes.Processes"}
    bootstrap = prepare_config(cluster_file())
    kinds = bootstrap["available_node_types"]
    kinds["ray.head.default"] = kinds.pop("head")  # as that provider calls it
    for kind in kinds.values():
        kind["node_config"] = {}
        kind["resources"] = kind["resources"] or GPU_MACHINE
    kinds["spot"]["resources"] |= GPU_MACHINE
    bootstrap |= {
        "provider": fake,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.2,
        "file_mounts": {},
    }
    (machine.home / "ubuntu" / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(bootstrap))
    token, environment, install = config["setup_commands"]
    machine.run(token, network=False)
    machine.run(environment, network=False)
    seed(machine.home / "ubuntu" / "jem-env", "/home/ubuntu/jem-env", "jem-orchestrator[cluster]")
    for line in (install, *config["head_setup_commands"]):
        machine.run(line, network=False)
    *lines, start = config["head_start_ray_commands"]
    told = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "PYTHONPATH": "/home/ubuntu"}
    told |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_NODE_TYPE_NAME": "ray.head.default"}
    for line in (*lines, f"{start} --num-cpus=0"):  # as `ray up` says by a variable, which fake machines would heed too
        machine.run(line, **told)
    return config


def jobs(machine, command, code=0):
    """As from a laptop with a tunnel; the JSON line and everything that was said."""
    line = f"cd {ROOT}; RAY_AUTH_MODE=token {sys.executable} jobs/submit.py {command}"
    ended = machine.run(line, check=False)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stdout + ended.stderr


def active(out):
    """How many machines of each kind `ray status` names, those without work included."""
    told = out.partition("Active:")[2].partition("Pending:")[0].split("\n")
    counted = [line.split() for line in told if line.startswith(" ") and line.split()[0].isdecimal()]
    return {kind: sum(int(n) for n, k, *_ in counted if k == kind) for _, kind, *_ in counted}


STATUS = "source ~/jem-env/bin/activate; RAY_AUTH_MODE=token ray status"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_secret_is_its_owners_alone_and_nothing_listens_to_others(machine, head):
    home = machine.home / "ubuntu"
    secret = (".ray/auth_token", ".mlflow/credentials", "mlflow/auth.ini", "mlflow/secret")
    assert {mode(home / name) for name in secret} == {0o600}
    health = "curl --silent --output /dev/null --write-out '%{http_code}' http://127.0.0.1:5000"
    machine.until(f"{health}/health", lambda out: out == "200", 400)
    search = f"{health}/api/2.0/mlflow/experiments/search?max_results=1"
    assert machine.run(search).stdout == "401"
    password = (home / ".mlflow" / "credentials").read_text().split()[-1]
    assert machine.run(f"{search} --user admin:{password}").stdout == "200"
    result, said = jobs(machine, "python jobs/doctor.py storage_path=s3://bucket/runs")
    assert {c["state"] for c in result["checks"] if c["what"] in ("MLflow", "storage", "authentication")} == {"ok"}, (
        said
    )
    listening = machine.run("cat /proc/net/tcp").stdout.splitlines()[1:]
    addresses = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    for port in (5000, 8265):
        assert {a.split(":")[0] for a in addresses if int(a.split(":")[1], 16) == port} == {"0100007F"}
    before = {name: (home / name).read_bytes() for name in secret}
    for line in head["setup_commands"][:2] + head["head_setup_commands"]:
        machine.run(line, network=False)
    assert {name: (home / name).read_bytes() for name in secret} == before, "a second `ray up` changes no password"


def test_a_machine_joins_by_the_workers_own_lines(machine, head, tmp_path):
    out = tmp_path / "worker"
    lines = "; ".join(head["worker_start_ray_commands"])
    worker = machine.start(f"({lines} --num-cpus=1) && sleep infinity", out, apart=True, RAY_HEAD_IP="127.0.0.1")
    try:
        machine.until(STATUS, lambda out: "/1.0 CPU" in out, 300)
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def test_a_training_brings_the_machine_it_needs_which_goes_when_it_is_done(machine, head):
    assert not {"gpu", "spot"} & set(active(machine.run(STATUS).stdout))
    run = "name=one steps=20 workers=2 device=cpu storage_path=s3://bucket/runs"
    result, said = jobs(machine, f"python jobs/train.py {PLAIN} {run}")
    assert (result["status"], result["checkpoint"]) == ("finished", "s3://bucket/runs/one/checkpoints/20")
    assert result["tracking_uri"] == "http://127.0.0.1:5000"
    password = (machine.home / "ubuntu" / ".mlflow" / "credentials").read_text().split()[-1]
    token = (machine.home / "ubuntu" / ".ray" / "auth_token").read_text()
    assert not [secret for secret in (password, token, SECRET) if secret in said]
    keys = "import boto3; print([e['Key'] for e in boto3.client('s3').list_objects(Bucket='bucket')['Contents']])"
    there = machine.run(f'{sys.executable} -c "{keys}"').stdout
    assert f"mlflow/1/{result['run_id']}/artifacts/curves.png" in there
    told = machine.run("cat /tmp/ray/session_latest/logs/monitor.log").stdout
    assert re.findall(r"Adding (\d+) node\(s\) of type (\w+)", told) == [("1", "gpu")], "not one that may be taken away"
    machine.until(STATUS, lambda out: "gpu" not in active(out), 400)


SWEEP = """
base: digits_uniform
objective: val/nll
budget: {trials: 2, steps: 20}
finalists: 0
concurrency: 2
resources: {cpu: 3, label: spot}
space: {sgld.step_size: {uniform: [0.5, 1.0]}}
settings: {workers: 1, batch_size: 8, optimizer.warmup_steps: 2, sgld.steps: 2, replay.capacity: 200, device: cpu}
"""


def test_a_sweep_brings_a_machine_of_its_kind_for_each_trial_and_they_go(machine, head):
    (machine.home / "ubuntu" / "small.yaml").write_text(SWEEP)
    before = machine.run("cat /tmp/ray/session_latest/logs/monitor.log").stdout
    command = "python jobs/sweep.py /home/ubuntu/small.yaml storage_path=s3://bucket/runs name=small"
    result, said = jobs(machine, command)
    assert result["trials"] == {"finished": 2}, said
    told = machine.run("cat /tmp/ray/session_latest/logs/monitor.log").stdout.removeprefix(before)
    added = re.findall(r"Adding (\d+) node\(s\) of type (\w+)", told)
    assert {kind for _, kind in added} == {"spot"}
    assert sum(int(n) for n, _ in added) == 2
    machine.until(STATUS, lambda out: not {"gpu", "spot"} & set(active(out)), 400)
