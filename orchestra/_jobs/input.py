"""Tasks from JSON lines: reading without blocking the loop, checking each line, naming each task.

A task without an id gets one from its content (and from how often the same content came before), so that a second run
over the same or a longer file recognises it. A bad line is a :class:`BadLine`, not an exception: the rest goes on.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestra.errors import ConfigurationError, InvalidTaskError
from orchestra.serialization import encode_task
from orchestra.tasks import TaskDict, TaskPriority

BLOCK = 1 << 18
MAX_LINE = 64 << 20
"""Bytes after which a line without an end is refused, so that a wrong file does not fill the memory."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A task that cannot be sent: where it came from and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class TaskChecker:
    """Makes tasks of what one source gives: id, priority by name, known agent, everything that would fail when sent."""

    def __init__(self, knows: Callable[[str], bool], names: Callable[[], list[str]], max_bytes: int) -> None:
        self._knows = knows
        self._names = names
        self._max_bytes = max_bytes
        self._seen: Counter[str] = Counter()
        self._ids: set[str] = set()

    def check(self, given: Any) -> TaskDict:
        """A copy of ``given`` that can be sent. Raises: InvalidTaskError."""
        if not isinstance(given, dict):
            raise InvalidTaskError(f"a task is an object with a type and an input, got {type(given).__name__}")
        task: TaskDict = dict(given)
        task_type = task.get("type")
        if not isinstance(task_type, str) or not self._knows(task_type):
            names = ", ".join(self._names()) or "none"
            raise InvalidTaskError(f"no agent for type {task_type!r}; there is: {names}", path="type")
        if isinstance(task.get("priority"), str):
            task["priority"] = _priority(task["priority"])
        if task.get("id") is None:
            task["id"] = self._content_id(task)
        encode_task(task, max_bytes=self._max_bytes)
        if task["id"] in self._ids:
            raise InvalidTaskError(f"the id {task['id']!r} was given before", path="id")
        self._ids.add(task["id"])
        return task

    def _content_id(self, task: TaskDict) -> str:
        facts = [task["type"], task.get("input"), task.get("metadata")]
        try:
            content = json.dumps(facts, sort_keys=True, default=repr)
        except (TypeError, ValueError) as error:
            raise InvalidTaskError(f"the input cannot be told apart from others, give an id: {error}") from None
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:20]
        self._seen[digest] += 1
        again = f".{self._seen[digest]}" if self._seen[digest] > 1 else ""
        return f"{task['type'][:100]}:{digest[:20]}{again}"


def _priority(name: str) -> TaskPriority:
    try:
        return TaskPriority[name.upper()]
    except KeyError:
        names = ", ".join(priority.name for priority in TaskPriority)
        raise InvalidTaskError(f"priority must be 0 to 3 or one of {names}, got {name!r}", path="priority") from None


def parse_line(line: bytes) -> Any:
    """The JSON value of one line. Raises: InvalidTaskError."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidTaskError(
            f"not UTF-8: byte {error.object[error.start]:#04x} in column {error.start + 1}"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidTaskError(f"not JSON: {error.msg} in column {error.colno}") from None
    except RecursionError:
        raise InvalidTaskError("not JSON that can be read: nested too deeply") from None


def _no_constant(name: str) -> Any:
    raise InvalidTaskError(f"not JSON: {name} is not a number")


async def read_lines(source: str) -> AsyncIterator[tuple[int, bytes]]:
    """``(number, line)`` of every line that is not blank of the file ``source``, ``-`` for standard input.

    Lines come as soon as they can be read. A thread reads, a few blocks ahead of the caller.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    fd = open_input(source)
    blocks: asyncio.Queue[bytes | OSError] = asyncio.Queue(4)
    loop = asyncio.get_running_loop()
    # Daemon: a read of a terminal cannot be interrupted, and must not keep a cancelled program alive.
    threading.Thread(target=_pump, args=(fd, loop, blocks), name="job-input", daemon=True).start()
    number, rest, bom = 0, b"", b"\xef\xbb\xbf"
    while True:
        block = await blocks.get()
        if isinstance(block, OSError):
            raise ConfigurationError(f"{source} cannot be read: {block.strerror}", field="input", value=source)
        lines = (rest + block).split(b"\n")
        rest = lines.pop() if block else b""
        for line in lines:
            number += 1
            if text := line.removeprefix(bom if number == 1 else b"").strip():
                yield number, text
        if len(rest) > MAX_LINE:
            raise ConfigurationError(
                f"{source} line {number + 1} is longer than {MAX_LINE} bytes: is it JSON lines?",
                field="input",
                value=source,
            )
        if not block:
            return


def open_input(source: str) -> int:
    """A descriptor to read ``source`` from, ``-`` for standard input. Raises: ConfigurationError."""
    if source == "-":
        return os.dup(sys.stdin.fileno())
    try:
        if Path(source).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return os.open(source, os.O_RDONLY)
    except OSError as error:
        raise ConfigurationError(
            f"the input {source} cannot be read: {error.strerror}", field="input", value=source
        ) from None


def _pump(fd: int, loop: asyncio.AbstractEventLoop, blocks: asyncio.Queue[bytes | OSError]) -> None:
    try:
        more = True
        while more:
            block: bytes | OSError
            try:
                block = os.read(fd, BLOCK)
            except OSError as error:
                block = error
            more = bool(block) and isinstance(block, bytes)
            asyncio.run_coroutine_threadsafe(blocks.put(block), loop).result()
    except RuntimeError:
        return  # the loop has ended: nobody wants the rest
    finally:
        os.close(fd)
