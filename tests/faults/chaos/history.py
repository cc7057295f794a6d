"""What actors write and the checker reads: one JSON object a line, one file an actor.

A line is one ``os.write`` to a file opened with O_APPEND, so a killed actor leaves whole lines. Times are those of
CLOCK_MONOTONIC, which all processes of a machine share. A line has ``t`` (seconds), ``actor``, ``op``, ``phase`` and the
facts of its op:

``produce``  invoke | ok | fail | info    ``tasks`` [uid, …]; info: it may have happened; fail: it has not
``cancel``   invoke | ok | info           ``uid``, ``result``
``run``      invoke | ok | fail | info    ``uid id fence attempt run``; info: the agent was cancelled
``settled``  ok                           ``uid``-less: ``id outcome dead retry_in_s`` as decided, before Redis knows
``actor``    start | ready | end          end carries what leaked
``starved``  ok                           this process was not scheduled for ``seconds``, until ``t``; of the driver:
                                          it was not, or the server did not answer it
``fault``    invoke | ok                  written by the driver: ``number kind actor weight``; ok ends it
``process``  start | exit                 written by the driver: ``code``
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Self, TypeAlias

Line: TypeAlias = dict[str, Any]


class History:
    """The history of one actor."""

    def __init__(self, path: Path, actor: str) -> None:
        self.actor = actor
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, op: str, phase: str, **facts: Any) -> None:
        """Append a line, with the time now unless ``t`` is given."""
        line = {"t": time.monotonic(), "actor": self.actor, "op": op, "phase": phase, **facts}
        os.write(self._fd, json.dumps(line, separators=(",", ":"), default=str).encode() + b"\n")

    def close(self) -> None:
        """Nothing is written afterwards."""
        os.close(self._fd)


def read_file(path: Path) -> list[Line]:
    """The lines of one actor; what a killed one left unfinished is no line."""
    text = path.read_bytes()
    return [json.loads(row) for row in text[: text.rfind(b"\n") + 1].splitlines()]


def read(directory: Path) -> list[Line]:
    """All lines of all actors, in the order of their times."""
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in read_file(path)]
    return sorted(lines, key=lambda line: line["t"])


BEAT = 0.05
"""Seconds between two beats."""


class Heartbeat:
    """A thread that notes when its process was not scheduled: such a pause excuses what a fault would excuse."""

    def __init__(self, history: History, tolerated: float) -> None:
        self._history, self._tolerated = history, tolerated
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(15)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(BEAT):
            self._beat()
            now = time.monotonic()
            if now - last - BEAT > self._tolerated:
                self._history.write("starved", "ok", seconds=round(now - last, 3))
            last = now

    def _beat(self) -> None:
        """What a beat does besides; its time counts."""
