"""A redis-server of the benchmarks' own: started, asked and flushed here, never one that somebody else runs.

Owns the process, its directory and a blocking socket to it. Refuses to own what is measured. Listens on a unix socket
and on a free port of the loopback; ``ORCHESTRA_BENCH_TRANSPORT=tcp`` lets both sides of a comparison use the port.
Concurrency: one thread; every :class:`Raw` has a socket of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis

from orchestra.embedded import find_server

TRANSPORT = os.environ.get("ORCHESTRA_BENCH_TRANSPORT", "unix")
SOCKET_BUFFER = 4 << 20
SPIN = """
import os, sys
os.nice(19)
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def resp(*parts: Any) -> bytes:
    """One command as bytes."""
    packed: bytes = hiredis.pack_command(parts)
    return packed


def cpu_seconds(pid: int) -> float:
    """CPU seconds that all living threads of a process have used, to the nanosecond; Linux only."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


class Raw:
    """A blocking socket that speaks precomputed bytes; :meth:`ask` parses, the rest does not."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
        else:
            self.socket = socket.socket()
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        self.socket.settimeout(30)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        self._reader: Any = hiredis.Reader()
        self._buffer = memoryview(bytearray(SOCKET_BUFFER))

    def ask(self, *parts: Any) -> Any:
        """The reply to one command; an error reply is raised."""
        self.socket.sendall(resp(*parts))
        return self.reply()

    def reply(self) -> Any:
        """The next reply."""
        while (answer := self._reader.gets()) is False:
            self._reader.feed(self.socket.recv(1 << 20))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def skip(self, count: int) -> None:
        """Receive exactly ``count`` bytes and forget them."""
        while count:
            got = self.socket.recv_into(self._buffer, min(count, len(self._buffer)))
            if not got:
                raise ConnectionError("the server closed the connection")
            count -= got

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class Server:
    """A private redis-server without persistence; :meth:`stop` ends it and removes its directory."""

    def __init__(self, transport: str = TRANSPORT) -> None:
        self.program = find_server().path
        self.dir = Path(tempfile.mkdtemp(prefix="orc-bench-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        path = str(self.dir / "s")
        self.port = port
        self.address: str | tuple[str, int] = path if transport == "unix" else ("127.0.0.1", port)
        self.url = f"unix://{path}" if transport == "unix" else f"redis://127.0.0.1:{port}"
        options = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path, "--unixsocketperm", "700"]
        quiet = ["--save", "", "--appendonly", "no", "--dir", str(self.dir), "--loglevel", "warning"]
        self.process = subprocess.Popen([self.program, *options, *quiet], stdout=subprocess.DEVNULL)
        self.raw = self._first_connection()
        self.version = self.info("server").get("redis_version", "?")

    def _first_connection(self) -> Raw:
        end = time.monotonic() + 10
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError, hiredis.HiredisError):
                raw = Raw(self.address)
                pid = next(line for line in raw.ask("INFO", "server").split(b"\r\n") if line.startswith(b"process_id:"))
                if int(pid.split(b":")[1]) == self.process.pid:
                    return raw
                raise SystemExit("another server answers on the port that was chosen; refusing to touch it")
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"{self.program} does not start")

    def connect(self) -> Raw:
        """Another connection."""
        return Raw(self.address)

    def flush(self) -> None:
        """Forget all data (scripts stay)."""
        self.raw.ask("FLUSHALL")

    def info(self, section: str) -> dict[str, str]:
        """``INFO section`` as a dict."""
        lines = self.raw.ask("INFO", section).decode().split("\r\n")
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def memory(self) -> int:
        """Bytes that keys and their overhead take, without the buffers of clients."""
        info = self.info("memory")
        return int(info["used_memory"]) - int(info["mem_clients_normal"])

    def cpu_seconds(self) -> float:
        """CPU that the server has used since its start, in seconds."""
        if sys.platform == "linux":
            return cpu_seconds(self.process.pid)
        info = self.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def stop(self) -> None:
        """End the process that was started here."""
        if hasattr(self, "raw"):
            self.raw.close()
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        shutil.rmtree(self.dir, ignore_errors=True)


@contextlib.contextmanager
def awake_cores(wanted: bool) -> Iterator[None]:
    """Keep every core from halting, with a loop that runs only when nothing else wants the core.

    Waking a halted core of a virtual machine costs 100 to 500 µs and varies, which drowns what is bound by round trips.
    """
    cores = os.sched_getaffinity(0) if wanted and hasattr(os, "SCHED_IDLE") else ()
    loops = [subprocess.Popen([sys.executable, "-c", SPIN, str(core)]) for core in cores]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
