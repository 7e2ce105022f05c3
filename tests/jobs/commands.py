"""jobs/train.py as a process: what it prints, how it ends, what it leaves behind."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "jobs" / "train.py"


class Ended:
    """A command that has ended; `result` is the last line of its stdout."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def result(self):
        lines = self.out.splitlines()
        assert lines, self.err
        content = json.loads(lines[-1])
        assert {"run_id", "name", "checkpoint", "step", "metrics", "status"} <= content.keys()
        return content


class Command:
    """`python jobs/train.py ARGUMENTS` in `folder`, running; it collects the processes it starts."""

    def __init__(self, folder, *arguments, flags=()):
        self.out, self.err = (folder / f"std{name}-{time.monotonic_ns()}" for name in ("out", "err"))
        command = [sys.executable, *flags, str(TRAIN), *map(str, arguments)]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
        self.descendants = set()

    def look(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            self.descendants |= set(psutil.Process(self.process.pid).children(recursive=True))

    def train_workers(self):
        """The processes in which Ray Train runs the worker function."""
        self.look()
        found = []
        for process in self.descendants:
            try:
                if "TrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def heard_by_others(self):
        """Processes that listen on more than the loopback, and the names they have."""
        self.look()
        found = []
        for process in self.descendants:
            with contextlib.suppress(psutil.Error):
                open_to = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
                if [ip for ip in open_to if ip != "::1" and not ip.removeprefix("::ffff:").startswith("127.")]:
                    found.append(" ".join(process.cmdline()))
        return found

    def wait_until(self, condition, timeout=400):
        deadline = time.monotonic() + timeout
        while not condition():
            self.look()
            assert self.process.poll() is None, self.end().err
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.1)

    def end(self, timeout=600):
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            self.look()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the command did not end within {timeout} s:\n{self.err.read_text()}")
            time.sleep(0.2)
        return Ended(self.process.returncode, self.out.read_text(), self.err.read_text())

    def left(self, patience=15):
        """Processes of it that are still there; they are given a few seconds to go."""
        alive = psutil.wait_procs(self.descendants, timeout=patience)[1]
        return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self):
        self.look()
        for process in [*self.descendants, psutil.Process(self.process.pid) if self.process.poll() is None else None]:
            if process is not None and process.is_running():
                process.kill()
        self.process.wait(20)


def train(folder, *arguments, flags=()):
    """The command, ended."""
    command = Command(folder, *arguments, flags=flags)
    try:
        return command.end()
    finally:
        command.kill()


def imported(folder, *arguments):
    """(The command, ended; the names of all modules that it imported)."""
    ended = train(folder, *arguments, flags=("-X", "importtime"))
    lines = [line for line in ended.err.splitlines() if line.startswith("import time:")]
    return ended, {line.rsplit("|", 1)[1].strip() for line in lines}


def log_of(run, kind=None):
    """A run's events."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [event for event in found if kind in (None, event["kind"])]


class Tracked:
    """A run as MLflow's database has it."""

    def __init__(self, database, run_id):
        self.database, self.run_id = database, run_id

    def rows(self, query):
        with sqlite3.connect(self.database) as connection:
            return connection.execute(query, (self.run_id,)).fetchall()

    @property
    def status(self):
        return self.rows("SELECT status FROM runs WHERE run_uuid = ?")[0][0]

    @property
    def params(self):
        return dict(self.rows("SELECT key, value FROM params WHERE run_uuid = ?"))

    @property
    def tags(self):
        return dict(self.rows("SELECT key, value FROM tags WHERE run_uuid = ?"))

    @property
    def points(self):
        return self.rows("SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY key, step")


def bring(folder, *names):
    """Copy modules that lie beside this one to where a command is typed."""
    for name in names:
        shutil.copy(Path(__file__).with_name(name), folder / name)
