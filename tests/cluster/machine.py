"""A machine of one's own on this one, with its own home, processes and network: shell lines run there as they are.

Linux namespaces; root is needed, or the right to make them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

OWN = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
BEGIN = 'mount --bind "$0" /home && mkdir -p /tmp/ray && mount --bind "$1" /tmp/ray && ip link set lo up'
DROPPED = ("VIRTUAL_ENV", "PYTHONPATH", "RAY_", "MLFLOW_", "AWS_", "PYTEST_", "COV_")


class Machine:
    """`run` runs a line as `ray up` does by ssh; what it leaves running ends with the machine."""

    def __init__(self, folder, variables):
        self.home, temporary = folder / "home", folder / "ray"
        (self.home / "ubuntu").mkdir(parents=True)
        temporary.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(DROPPED)}
        self.environment = kept | {"HOME": "/home/ubuntu", "USER": "ubuntu"} | variables
        command = [*OWN, "sh", "-c", f"{BEGIN} && echo ready && exec sleep infinity", self.home, temporary]
        self.holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.works = self.holder.stdout.readline() == "ready\n"

    @property
    def within(self):
        """The process in the machine that has the number 1 there."""
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        return children[0]

    def command(self, line, network=True, apart=False):
        enter = ["nsenter", "--target", self.within, "--mount", "--pid", *(["--net"] if network else [])]
        enter += ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"] if apart else []
        return [*enter, "bash", "--login", "-c", f"cd; {line}"]

    def run(self, line, network=True, check=True, timeout=1500, **variables):
        """`network=False`: with that of this machine, which knows where packages are."""
        command, environment = self.command(line, network), self.environment | variables
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert ended.returncode == 0 or not check, f"{line}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def start(self, line, out, apart=False, **variables):
        """Without waiting for its end. `apart`: as another machine of the same network, with processes of its own."""
        with out.open("w") as file:
            options = {"stdout": file, "stderr": file, "start_new_session": True}
            return subprocess.Popen(self.command(line, apart=apart), env=self.environment | variables, **options)

    def until(self, line, wanted, timeout):
        """Run `line` again and again until `wanted(stdout)`; that output."""
        deadline = time.monotonic() + timeout
        while not wanted((ended := self.run(line, check=False)).stdout):
            assert time.monotonic() < deadline, f"{line}\n{ended.stdout}\n{ended.stderr}"
            time.sleep(0.5)
        return ended.stdout

    def end(self):
        self.holder.kill()
        self.holder.communicate()
        shutil.rmtree(self.home.parent, ignore_errors=True)  # with an environment of gigabytes
