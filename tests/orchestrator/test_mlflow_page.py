"""What a person sees: MLflow's own pages of a run, in a real browser that has no network but this machine.

The run is trained in this process and sent by its driver; what the pages must show is read from the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import aiohttp
import PIL.Image
import pytest
from ports import free_port
from worker_runs import fit, tiny

from jem.files import Location
from orchestrator.events import EventLog
from orchestrator.final_model import write_model
from orchestrator.launch import launch
from orchestrator.report_files import final_report
from orchestrator.runs import RunRecord

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 90
"""The page's first view compiles megabytes of JavaScript, on a machine that may do other things."""


class Page:
    """A browser with one tab, asked over the DevTools protocol."""

    def __init__(self, program: str, folder: Path) -> None:
        self.loop = asyncio.Runner()
        # what a browser asks of its maker stays unasked, and a page that needs the internet fails here
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
        here = ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server", "--disable-quic")
        container = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        port = ("--remote-debugging-port=0", f"--user-data-dir={folder}")
        command = [program, "--headless", *quiet, *here, *container, *port, "--window-size=1400,1100", "about:blank"]
        with (folder / "browser.log").open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        self.told = folder / "DevToolsActivePort"
        self.log = folder / "browser.log"
        self.number = 0
        self.session: aiohttp.ClientSession | None = None

    def connect(self) -> None:
        until(self._listens, lambda: f"the browser does not listen:\n{self.log.read_text()}")
        self.loop.run(self._connect())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        if self.session is not None:
            self.loop.run(self.session.close())
        self.loop.close()

    def open(self, url: str) -> None:
        """From an empty page: only the part behind # differs, and nothing of another page may be left."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def call(self, method: str, **arguments) -> dict:
        return self.loop.run(self._call(method, arguments))

    def js(self, expression: str):
        """The value of an expression, evaluated in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, enough=bool):
        """Its value, as soon as it is enough."""
        found = []

        def is_there() -> bool:
            found[:] = [self.js(expression)]
            return bool(enough(found[0]))

        until(is_there, lambda: f"{expression} is {found}; the page says:\n{self.js('document.body.innerText')}")
        return found[0]

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.told.exists() and len(self.told.read_text().split()) == 2

    async def _connect(self) -> None:
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{self.told.read_text().split()[0]}/json/list") as answer:
            tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
        self.socket = await self.session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0)

    async def _call(self, method: str, arguments: dict) -> dict:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": arguments})
        while True:  # events come in between
            answer = await self.socket.receive_json(timeout=PATIENCE_S)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]


def until(condition, what) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


class Sent:
    """A finished run in MLflow."""

    def __init__(self, storage: Path, run_id: str, last: int) -> None:
        self.storage, self.run_id, self.last = storage, run_id, last
        self.images = storage / "mlartifacts" / run_id / "artifacts" / "images"

    def metrics(self) -> dict[str, float]:
        query = "SELECT key, value FROM latest_metrics WHERE run_uuid = ?"
        with sqlite3.connect(self.storage / "mlflow.db") as db:
            return dict(db.execute(query, (self.run_id,)).fetchall())

    def picture(self, step: int, ending: str) -> Path:
        (found,) = (p for p in self.images.glob(f"samples+step+{step}+*{ending}"))
        return found


@pytest.fixture(scope="module")
def browser():
    """The path of one. First of all the fixtures: without it nothing is trained."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no chromium: apt-get install chromium; MLflow's pages are not looked at")
    return found


@pytest.fixture(scope="module")
def sent(browser, tmp_path_factory):
    """Trained without Ray, as its workers train; MLflow, which was away, got it all from the next `launch`."""
    storage = tmp_path_factory.mktemp("runs")
    settings = ("name=page", f"storage_path={storage}", "tracking.images_every=6", "evaluate.suite=fast")
    settings += ("evaluate.register=true",)
    config, root = tiny(*settings), storage / "page"
    outcome = fit(root, *settings)
    assert outcome["status"] == "finished", outcome["message"]
    log = EventLog(root / "events.jsonl")
    log.append("artifact", path=final_report(root, config, outcome, "page"))
    log.append("model", **write_model(root, config, outcome, {"name": "page", "folder": str(root)}))
    log.append("end", status="finished")
    log.close()
    result = {"name": "page", "step": outcome["step"], "status": "finished", "metrics": outcome["metrics"]}
    record = RunRecord("page", config.science, config.digest, "finished", attempts=[{"number": 1}], result=result)
    record.save(Location.of(root))
    run_id = launch(config).run_id
    assert run_id is not None
    return Sent(storage, run_id, outcome["step"])


@pytest.fixture(scope="module")
def server(sent):
    """`mlflow server` on the run's store, as `make ui` starts it; its address."""
    port = free_port()
    store = ("--backend-store-uri", f"sqlite:///{sent.storage / 'mlflow.db'}")
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    # the workers that run jobs for its pages are not needed, and take half of the start
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = sent.storage / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
        except OSError:
            return False

    try:
        until(answers, log.read_text)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.fixture(scope="module")
def page(browser, server, tmp_path_factory):
    page = Page(browser, tmp_path_factory.mktemp("browser"))
    try:
        page.connect()
        yield page
    finally:
        page.close()


@pytest.fixture(scope="module")
def address(server, sent):
    return f"{server}/#/experiments/1/runs/{sent.run_id}"


TABLES = """[...document.querySelectorAll('[role=row]')].map(
    row => [...row.querySelectorAll('[role=cell]')].map(cell => cell.innerText.trim()))"""


def test_the_runs_page_shows_every_metric_with_its_value(page, address, sent):
    metrics = sent.metrics()
    assert {"train/loss", "val/accuracy", "test/accuracy", "test/ece", "ood/uniform/log_px/auroc"} <= metrics.keys()

    def shown(rows):
        return {row[0]: row[1] for row in rows if row and row[0] in metrics}

    page.open(address)
    found = shown(page.wait(TABLES, lambda rows: len(shown(rows)) == len(metrics)))
    assert {key: float(value) for key, value in found.items()} == metrics
    # The registered model is asked for on its own and comes after the table.
    said = ["Finished", f"Metrics ({len(metrics)})", "jem-digits"]
    page.wait("document.body.innerText", lambda text: all(words in text for words in said))


IMAGES = """[...document.images].filter(image => image.complete && !image.src.startsWith('data:')).map(
    image => [image.src, image.naturalWidth, image.naturalHeight])"""


def test_the_metrics_page_shows_the_sample_grid_of_the_step_that_is_asked_for(page, address, sent):
    """The last chart of the page. It begins at step 0, where there is no image."""
    field = f"document.querySelector('input[type=number][max=\"{sent.last}\"]')"
    end = "[...document.querySelectorAll('button')].filter(b => b.innerText.trim() == 'Add section').at(-1)"
    page.open(f"{address}/model-metrics")
    page.wait(f"{end}?.scrollIntoView(), {field} != null")  # charts are made when they come into view
    for step in (sent.last, 6):
        name = f"images/{sent.picture(step, '+compressed.webp').name}"
        page.js(f"{field}.focus(), {field}.select()")
        page.type(str(step))
        page.js(f"{field}.blur()")

        def is_shown(images, name=name):
            return [parse_qs(urlsplit(src).query).get("path") for src, width, _ in images if width] == [[name]]

        ((_, *size),) = page.wait(IMAGES, is_shown)
        assert size == list(PIL.Image.open(sent.images.parent / name).size)


def test_the_artifacts_page_shows_the_sample_grid_as_it_was_drawn(page, address, sent):
    picture = sent.picture(sent.last, ".png")
    size = list(PIL.Image.open(picture).size)
    assert min(size) > 400, json.dumps(size)
    page.open(f"{address}/artifacts/images/{picture.name}")
    page.wait(IMAGES, lambda images: size in [one[1:] for one in images])
    assert picture.name in page.js("document.body.innerText")
