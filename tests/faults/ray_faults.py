"""What the fault tests with Ray share: a tiny run, its log and its checkpoints, and a cluster of several nodes."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from commands import ROOT, Command, Tracked, bring, log_of, train
from ports import free_port

from jem import checkpoint
from jem.files import Location
from jem.world import World

__all__ = ["ROOT", "Command", "Tracked", "bring", "log_of", "train"]

CHAINS = 400
TINY = (
    *("digits_uniform", "batch_size=8", "model.name=slow_net:slow", "model.channels=[4]", "optimizer.warmup_steps=2"),
    *("optimizer.ema_decay=0.9", "sgld.steps=2", f"replay.capacity={CHAINS}", "checkpoint.every=10"),
    *("checkpoint.keep=100", "tracking.every=5", "tracking.images_every=1000", "evaluate.every=1000"),
    "evaluate.suite=none",
)


def attempts(run):
    """[(the step it began at, its workers)] of each time that the workers began."""
    return [(event["step"], event["workers"]) for event in log_of(run, "attempt")]


def seconds_until_back(run, since):
    """From `since` to the moment that the last workers began."""
    return log_of(run, "attempt")[-1]["time"] / 1000 - since


def manifest_at(run, step):
    return checkpoint.read_manifest(Location.of(run) / "checkpoints" / step)


def state_at(run, step):
    """Digests of weights, average, moments, chains and generators."""
    return {n: entry["sha256"] for n, entry in manifest_at(run, step).files.items() if n != "events.jsonl"}


def chains_kept(run, before, after):
    """How many chains of a checkpoint are in a later one bit by bit, at the same place."""
    one, other = (checkpoint.read_chains(manifest_at(run, step), World(), CHAINS).chains for step in (before, after))
    return int((one == other).flatten(1).all(dim=1).sum())


def tracked_once(folder, result, steps, every=5):
    """Whether MLflow holds every point of the training curves once, and the run's status."""
    tracked = Tracked(folder / "runs" / "mlflow.db", result["run_id"])
    places = [step for key, step, _ in tracked.points if key == "train/loss"]
    return sorted(places) == list(range(every, steps + 1, every)), tracked.status


def rank_1(command, run):
    """The worker that does not write the log."""
    log = str(run / "events.jsonl")
    workers = command.train_workers()
    assert len(workers) == 2
    (found,) = [p for p in workers if log not in {file.path for file in p.open_files()}]
    return found


class Cluster:
    """Ray nodes of one CPU each on this machine, with ports, a token and a folder of their own."""

    def __init__(self, settings=()):
        # a short one: Ray's sockets lie below it, and a path of more than 107 bytes ends the dashboard (not the head)
        self.folder, self.nodes = Path(tempfile.mkdtemp(prefix="r", dir="/tmp")), []
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | dict(settings)

    def head(self, *options):
        ports = f"--port={self.address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}"
        options = options or ("--include-dashboard=false",)
        return self.node("--head", *ports, f"--temp-dir={self.folder}", "--node-ip-address=127.0.0.1", *options)

    def node(self, *options, before=()):
        """`before`: a command that starts the node, instead of this process."""
        options = options or (f"--address={self.address}",)
        ray = Path(sys.executable).with_name("ray")
        command = [*before, ray, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
        out = self.folder / f"node-{len(self.nodes)}.out"
        with out.open("w") as file:
            process = subprocess.Popen(command, env=os.environ | self.environment, stdout=file, stderr=file)
        self.nodes.append(process)
        deadline = time.monotonic() + 200
        while "Ray runtime started" not in out.read_text():
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < deadline, "the node did not come up"
            time.sleep(0.2)
        return process

    def kill(self, node):
        """As if the machine were gone."""
        if node.poll() is None:
            me = psutil.Process(node.pid)
            for process in [me, *me.children(recursive=True)]:
                if process.is_running():
                    process.kill()
            node.wait(20)

    def close(self):
        for node in reversed(self.nodes):
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)
