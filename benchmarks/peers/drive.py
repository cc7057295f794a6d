"""Runs the program of one peer through the workloads, beside a server of our own.

Owns the peer's processes (each in a session of its own, killed as one), their time limits, and when a queue counts as
drained: every task handled *and* the queue's own structures empty. Refuses to own medians and tables.
Concurrency: one thread. Every wait has a limit; whatever goes wrong is a :class:`WorkloadError` with the peer's own words.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hiredis

import orchestra
from benchmarks._server import Server
from benchmarks.peers.catalogue import Peer

ENTRY = struct.Struct("<qqq")
PROGRAMS = Path(__file__).parent / "programs"
OURS = str(Path(orchestra.__file__).parents[1])
"""What this process imports is what is measured, installed or not."""
START_SECONDS = 30.0
STEP_SECONDS = 90.0
POLL = 0.001


class WorkloadError(Exception):
    """A workload did not end well; the text says why."""


class Contender:
    """A peer that is installed: its command, its facts, its processes."""

    def __init__(self, peer: Peer, command: list[str], cwd: Path, server: Server, limit: float) -> None:
        self.peer, self.command, self.cwd, self.server, self.limit = peer, command, cwd, server, limit
        self.weight: float | None = None
        self.home = Path(tempfile.mkdtemp(prefix="orc-peer-"))
        os.mkfifo(self.home / "pipe")
        try:
            self.facts: dict[str, Any] = self.ask("facts", "facts")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.home, ignore_errors=True)

    def settings(self, workload: str) -> dict[str, Any]:
        """The peer's settings for one workload."""
        chosen = {key: value for key, value in self._settings().items() if not isinstance(value, dict)}
        return {**chosen, **(self._settings().get(workload) or {})}

    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.facts["settings"] if hasattr(self, "facts") else {}
        return found

    def _environment(self, role: str, workload: str, tasks: int) -> dict[str, str]:
        own = {
            "BENCH_ROLE": role,
            "BENCH_WORKLOAD": workload,
            "BENCH_TASKS": str(tasks),
            "BENCH_PORT": str(self.server.port),
            "BENCH_SERVER": str(self.server.process.pid),
            "BENCH_SETTINGS": json.dumps(self.settings(workload)),
            "BENCH_PROGRESS": str(self.home / "progress"),
            "BENCH_PIPE": str(self.home / "pipe"),
            "BENCH_LIMIT": str(self.limit),
            "PYTHONPATH": os.pathsep.join([str(PROGRAMS), *([OURS] if self.peer.own else [])]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return {**os.environ, **own}

    def _start(self, role: str, workload: str, *arguments: object, tasks: int = 0) -> subprocess.Popen[bytes]:
        with (self.home / "stderr").open("wb") as errors:
            return subprocess.Popen(
                [*self.command, role, *map(str, arguments)],
                cwd=self.cwd,
                env=self._environment(role, workload, tasks),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if role == "worker" else subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def ask(self, role: str, workload: str, *arguments: object) -> Any:
        """The last line that a role prints, parsed."""
        process = self._start(role, workload, *arguments)
        try:
            out, _ = process.communicate(timeout=STEP_SECONDS + self.limit)
        except subprocess.TimeoutExpired as error:
            raise WorkloadError(f"{role} did not end within {STEP_SECONDS + self.limit:.0f} s") from error
        finally:
            _end(process)
        if process.returncode:
            raise WorkloadError(f"{role} ended with status {process.returncode}: {self.last_words()}")
        return json.loads(out.strip().splitlines()[-1])

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.home / "stderr").read_text(errors="replace").strip().splitlines()
            return " / ".join(line.strip() for line in lines[-3:])[-400:] or "no words"
        return "no words"

    @contextlib.contextmanager
    def worker(self, workload: str, tasks: int = 0) -> Iterator[subprocess.Popen[bytes]]:
        """A worker process while the block runs."""
        shutil.rmtree(self.home / "progress", ignore_errors=True)
        (self.home / "progress").mkdir()
        process = self._start("worker", workload, tasks=tasks)
        try:
            yield process
        finally:
            _end(process)

    def enqueue(self, mode: str, count: int) -> tuple[float, int]:
        """Tasks a second, and how many are queued in the end."""
        self.server.flush()
        found = self.ask("enqueue", mode, mode, count)
        return found["count"] / found["seconds"], found["count"] + 1

    def latency(self, samples: int) -> list[float]:
        """Microseconds from before the call that sends until the agent's first line."""
        self.server.flush()
        with self.worker("latency") as process:
            try:
                return [nanoseconds / 1000 for nanoseconds in self.ask("latency", "latency", samples)]
            except WorkloadError as error:
                if process.poll() is not None:
                    raise WorkloadError(f"the worker ended with status {process.returncode}") from error
                raise

    def drain(self, workload: str, queued: int) -> dict[str, float]:
        """Start a worker on what is queued; see :class:`Watch`."""
        if not self.backlog():
            raise WorkloadError("the check of the backlog sees nothing of what was queued")
        before = self.server.cpu_seconds()
        with self.worker(workload, queued) as process:
            watch = Watch(self, process, queued)
            found = watch.run()
            found["server_us"] = (self.server.cpu_seconds() - before) / max(1.0, found["handled"]) * 1e6
            found["worker_mib"] = _peak_mib(process.pid)
            return found

    def backlog(self) -> int:
        """What the queue's own structures still hold."""
        return sum(self._count(check) for check in self.facts["backlog"])

    def _count(self, check: list[str]) -> int:
        if check[0] != "GROUP":
            answer = self.server.raw.ask(*check)
            return answer if isinstance(answer, int) else 0
        try:
            groups = self.server.raw.ask("XINFO", "GROUPS", check[1])
        except hiredis.ReplyError:
            return 0  # the stream does not exist
        if not groups:
            return int(self.server.raw.ask("XLEN", check[1]))
        facts = [dict(zip(group[::2], group[1::2], strict=True)) for group in groups]
        return sum(group[b"pending"] + (group.get(b"lag") or 0) for group in facts)

    def progress(self) -> tuple[int, int, int]:
        """Tasks handled, and the first and last moment, over all processes of the worker."""
        rows = [ENTRY.unpack(path.read_bytes()) for path in self._records() if path.stat().st_size == ENTRY.size]
        rows = [row for row in rows if row[0]]
        return sum(row[0] for row in rows), min((r[1] for r in rows), default=0), max((r[2] for r in rows), default=0)

    def _records(self) -> list[Path]:
        return list((self.home / "progress").iterdir())


class Watch:
    """Waits until a worker has drained a queue, or until the limit, which rates it by what it has done until then."""

    def __init__(self, contender: Contender, process: subprocess.Popen[bytes], queued: int) -> None:
        self.contender, self.process, self.queued = contender, process, queued

    def run(self) -> dict[str, float]:
        """``rate`` (tasks/s from the first agent call), ``handled``, and ``cut`` (1 when the limit came first)."""
        if not self._until(lambda: self.contender.progress()[0] > 0, START_SECONDS):
            raise WorkloadError(f"no task was handled within {START_SECONDS:.0f} s: {self.contender.last_words()}")
        first = self.contender.progress()[1]
        left = self.contender.limit - (time.monotonic_ns() - first) / 1e9
        done = self._until(lambda: self.contender.progress()[0] >= self.queued, left)
        empty = done and self._until(lambda: not self.contender.backlog(), 5.0)
        handled, first, last = self.contender.progress()
        if done and not empty:
            raise WorkloadError(
                f"all tasks were handled, but {self.contender.backlog()} are still in the queue after 5 s"
            )
        end = time.monotonic_ns() if done else last
        if end <= first:
            raise WorkloadError(f"only {handled} of {self.queued} tasks were handled")
        return {"rate": handled * 1e9 / (end - first), "handled": handled, "cut": float(not done)}

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            if self.process.poll() is not None:
                raise WorkloadError(
                    f"the worker ended with status {self.process.returncode}: {self.contender.last_words()}"
                )
            time.sleep(POLL)
        return condition()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, with its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _peak_mib(session: int) -> float:
    """Peak resident MiB of all processes of a session together; Linux only, else 0."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(folder.name)) == session:
                lines = (folder / "status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return total / 1024
