"""The files of a job: results as JSON lines, and the sidecar that says which job they belong to.

Owns: one line per task id, whatever happens; a torn last line is cut, a killed writer costs at most that line. The
sidecar ``<output>.job`` is also the lock: one process writes at a time. Refuses to own what a line means.

One thread (the event loop) uses these objects; :meth:`ResultsFile.sync` alone may run in another.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestra.errors import ConfigurationError, OrchestraError

try:
    import fcntl
except ImportError:  # Windows: the lock is left out
    fcntl = None  # type: ignore[assignment]

CHUNK = 1 << 16


class JobBusyError(OrchestraError):
    """Another process works on the same output file."""

    code = "job_busy"


class ResultsFile:
    """The lines of one output file, found by task id. Memory: about 150 bytes per line, not the lines themselves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dead: set[str] = set()
        """Ids whose line says that the task is dead."""
        self._offsets: dict[str, int] = {}
        self._fd = -1
        self._size = 0

    def open(self) -> None:
        """Read what is there, cut a torn last line, and be ready to append. O(size of the file).

        Raises:
            ConfigurationError: the file cannot be written, or holds something else than results.
        """
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigurationError(
                f"the output {self.path} cannot be written: {error.strerror}; name another with --output",
                field="output",
                value=str(self.path),
            ) from error
        self._offsets.clear()
        self.dead.clear()
        self._size = 0
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._learn(line, number)
        os.ftruncate(self._fd, self._size)

    def _learn(self, line: bytes, number: int) -> None:
        try:
            fields = json.loads(line)
            task_id, outcome = str(fields["id"]), str(fields["outcome"])
        except (ValueError, TypeError, KeyError):
            raise ConfigurationError(
                f"{self.path} line {number} is not a result of `orchestra run`; name another file with --output, or "
                "start over it with --fresh",
                field="output",
                value=str(self.path),
            ) from None
        self._note(task_id, outcome, len(line))

    def _note(self, task_id: str, outcome: str, length: int) -> None:
        self._offsets[task_id] = self._size
        self._size += length
        if outcome != "completed":
            self.dead.add(task_id)
        else:
            self.dead.discard(task_id)

    def append(self, fields: dict[str, Any]) -> None:
        """Write one line; it survives the death of this process, and after :meth:`sync` that of the machine.

        Raises:
            OSError: the disk is full, for instance; nothing of the line is left.
        """
        line = (_dumps(fields) + "\n").encode("utf-8", "backslashreplace")
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._note(fields["id"], fields["outcome"], len(line))

    def sync(self) -> None:
        """Have everything that was appended reach the disk."""
        with contextlib.suppress(OSError):  # a pipe or a file system without fsync
            os.fsync(self._fd)

    def read(self, task_id: str) -> dict[str, Any]:
        """The line of ``task_id``. Raises: KeyError."""
        at, parts = self._offsets[task_id], list[bytes]()
        while not parts or b"\n" not in parts[-1]:
            os.lseek(self._fd, at, os.SEEK_SET)  # appending does not care where the file stands
            part = os.read(self._fd, CHUNK if parts else 2048)
            if not part:
                break
            parts.append(part)
            at += len(part)
        line: dict[str, Any] = json.loads(b"".join(parts).partition(b"\n")[0])
        return line

    def drop(self, task_ids: Iterable[str]) -> None:
        """Rewrite the file without the lines of ``task_ids``, in one atomic step."""
        gone = set(task_ids)
        if not gone:
            return
        fresh = self.path.with_name(self.path.name + ".new")
        with self.path.open("rb") as old, fresh.open("wb") as new:
            new.writelines(line for line in old if json.loads(line)["id"] not in gone)
            new.flush()
            os.fsync(new.fileno())
        fresh.replace(self.path)
        self.close()
        self.open()

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every line as a dict, in the order they came; may be iterated several times."""
        with self.path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        """Give the file back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _dumps(fields: dict[str, Any]) -> str:
    try:
        return json.dumps(fields, ensure_ascii=False, default=_as_json)
    except TypeError:  # a key that JSON does not have
        return json.dumps(_text_keys(fields), ensure_ascii=False, default=_as_json)


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _as_json(value: Any) -> Any:
    """What MessagePack carries and JSON does not: bytes as base64, arrays as lists."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobIdentity:
    """What the sidecar holds. ``asked`` is everything that decides which tasks there are."""

    job: str
    queue: str
    redis: str
    target: str
    asked: list[str]
    created: str


class Sidecar:
    """The file beside the output: which job it is, and the lock that keeps others out while it is open."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".job")
        self._fd = -1

    def lock(self) -> JobIdentity | None:
        """Take the lock; returns the identity that is there, None when there is none.

        Raises:
            JobBusyError: another process holds it.
            ConfigurationError: the directory cannot be written.
        """
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be written: {error.strerror}; name another place with --output",
                field="output",
                value=str(self.output),
            ) from error
        if fcntl is not None:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise JobBusyError(
                    f"another process is running the job of {self.output}; wait for it, or use another --output"
                ) from None
        return self._read()

    def _read(self) -> JobIdentity | None:
        os.lseek(self._fd, 0, os.SEEK_SET)
        text = os.read(self._fd, CHUNK)
        try:
            return JobIdentity(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def write(self, identity: JobIdentity) -> None:
        """Make ``identity`` the job of the output file."""
        text = json.dumps(asdict(identity), indent=2).encode() + b"\n"
        os.lseek(self._fd, 0, os.SEEK_SET)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, text)
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def new_identity(app: str, redis: str, target: str, asked: list[str]) -> JobIdentity:
    """A job that did not exist before, with a queue of its own."""
    job = secrets.token_hex(4)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return JobIdentity(job=job, queue=f"{app[:50]}.{job}", redis=redis, target=target, asked=asked, created=created)
