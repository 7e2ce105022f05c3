"""How far a run is, on stderr: a live bar on a terminal, plain lines elsewhere. Fed with the run's events."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from orchestrator import events
from orchestrator.events import Event

_POLL_S = 0.2
_LINE_EVERY_MS = 5000
_WINDOW = 20  # metrics events over which the rate is taken

# metric -> what it is called on the screen
_SHOWN = {
    "train/loss": "loss",
    "train/energy_gap": "gap",
    "train/accuracy": "acc",
    "val/accuracy": "val acc",
}


class _View(Protocol):
    def show(self, step: int, text: str, now: int) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Progress:
    """Takes a run's events in their order and shows where it stands."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        self._total = total_steps
        self._view: _View = _LiveBar(total_steps, stream) if stream.isatty() else _Lines(total_steps, stream)
        self._pace: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # (time in ms, step)
        self._latest: dict[str, float] = {}

    def update(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "metrics":
            self._latest |= event["metrics"]
            if not self._pace or event["step"] > self._pace[-1][1]:
                self._pace.append((event["time"], event["step"]))
            self._view.show(event["step"], self._text(event["step"]), event["time"])
        elif kind == "attempt":
            self._pace.clear()  # the step may go back, and the pause says nothing about the pace
            if event["step"] > 0 or event.get("attempt", 1) > 1:
                workers = f", {event['workers']} workers" if "workers" in event else ""
                why = f" ({event['why']})" if event.get("why") else ""
                self._view.say(f"attempt {event.get('attempt', '?')}: going on from step {event['step']}{workers}{why}")
            self._view.show(event["step"], self._text(event["step"]), event["time"])
        elif kind == "rollback":
            self._pace.clear()
            about = f"diverged at step {event['from_step']} ({event['reason']})"
            self._view.say(f"{about}: rollback {event['number']} to step {event['step']}, with {event['remedy']}")
        elif kind == "failed_checkpoint":
            newest = f"the newest is {event['newest']}" if event.get("newest") else "there is none yet"
            self._view.say(f"CHECKPOINT of step {event['step']} NOT WRITTEN ({event['reason']}); {newest}")
        elif kind == "note":
            self._view.say(event["text"])

    def close(self) -> None:
        self._view.close()

    def _text(self, step: int) -> str:
        parts = []
        rate = self._steps_per_s()
        if rate:
            parts.append(f"{rate:.3g} steps/s")
        if "train/images_per_s" in self._latest:
            parts.append(f"{self._latest['train/images_per_s']:,.0f} images/s")
        if rate:
            parts.append(f"ETA {timedelta(seconds=round(max(0, self._total - step) / rate))}")
        parts += [f"{name} {self._latest[key]:.3g}" for key, name in _SHOWN.items() if key in self._latest]
        return "  ".join(parts)

    def _steps_per_s(self) -> float | None:
        if len(self._pace) < 2:
            return None
        (first_time, first), (last_time, last) = self._pace[0], self._pace[-1]
        return (last - first) * 1000 / (last_time - first_time) if last_time > first_time else None


class _Lines:
    """One line every few seconds; the last one is never swallowed."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._stream = total, stream
        self._last = -_LINE_EVERY_MS
        self._held_back: str | None = None

    def show(self, step: int, text: str, now: int) -> None:
        line = f"step {step}/{self._total}  {text}".rstrip()
        if text and now - self._last >= _LINE_EVERY_MS:
            self.say(line)
            self._last, self._held_back = now, None
        elif text:
            self._held_back = line

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._held_back:
            self.say(self._held_back)
        self._held_back = None


class _LiveBar:
    def __init__(self, total: int, stream: TextIO) -> None:
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
        )
        # rich would carry what is printed on stdout over to stderr
        self._bar = Bar(*columns, console=Console(file=stream), redirect_stdout=False)
        self._task = self._bar.add_task("", total=total, text="")
        self._bar.start()

    def show(self, step: int, text: str, now: int) -> None:  # noqa: ARG002
        self._bar.update(self._task, completed=step, text=text)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def follow(path: Path, from_offset: int, callback: Callable[[Event], None], stop: threading.Event) -> None:
    """Hand every event after `from_offset` to `callback` as it is written, until `stop`; then the rest."""
    offset = from_offset
    while True:
        stopping = stop.wait(_POLL_S)  # asked before reading: what was written before the stop is still read
        found, offset = events.read(path, offset)
        for event in found:
            callback(event)
        if stopping:
            return
