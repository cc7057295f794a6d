"""Fixtures for every test: a private server of our own, started once, and connections to it.

``ORCHESTRA_REDIS_SERVER`` selects the server program, ``ORCHESTRA_TEST_UVLOOP=1`` uvloop's event loop for tests that are
coroutines. Nothing here touches a server it did not start.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio

# For `tests.reference`. At the end, so that an installed orchestra is not hidden by the sources beside this folder.
sys.path.append(str(Path(__file__).parents[1]))

# A deadline tells how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("orchestra", deadline=None)
hypothesis.settings.load_profile("orchestra")

QUICK = ("--save", "", "--appendonly", "no", "--enable-debug-command", "local", "--daemonize", "no")


class PrivateServer:
    """A redis-server in a directory of its own, without persistence. Settings are given as on its command line."""

    def __init__(self, *settings: str, program: str | None = None) -> None:
        from orchestra.embedded import find_server

        self.program = program or find_server().path
        self.settings = settings
        self.dir = Path(tempfile.mkdtemp(prefix="orc-test-"))
        self.socket = str(self.dir / "redis.sock")
        self.process: subprocess.Popen | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> PrivateServer:
        command = [self.program, "--unixsocket", self.socket, "--unixsocketperm", "700", "--dir", str(self.dir), *QUICK]
        with open(self.dir / "log", "ab") as out:
            self.process = subprocess.Popen(
                [*command, *(() if "--port" in self.settings else ("--port", "0")), *self.settings],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        end = time.monotonic() + 10
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.program} does not start: {(self.dir / 'log').read_text()[-1000:]}")
            time.sleep(0.01)
        return self

    def _answers(self) -> bool:
        try:
            return self.ask(b"PING")[:1] in {b"+", b"-"}
        except OSError:
            return False

    def ask(self, line: bytes) -> bytes:
        """The first bytes of the reply to one inline command."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            s.connect(self.socket)
            s.sendall(line + b"\r\n")
            return s.recv(65536)

    def kill(self) -> None:
        """Crash it."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """End it and remove its directory."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if os.environ.get("ORCHESTRA_TEST_UVLOOP", "0") not in ("", "0"):

    @pytest.hookimpl(optionalhook=True)
    def pytest_asyncio_loop_factories(config, item):
        """Every coroutine that is a test runs on uvloop's event loop."""
        import uvloop

        return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def redis_server():
    """One server for the whole session, on a unix socket."""
    server = PrivateServer().start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server, monkeypatch):
    """The address of the session's server, emptied; also in ORCHESTRA_REDIS_URL, for subprocesses."""
    assert redis_server.ask(b"FLUSHALL") == b"+OK\r\n"
    redis_server.ask(b"SCRIPT FLUSH")
    monkeypatch.setenv("ORCHESTRA_REDIS_URL", redis_server.url)
    return redis_server.url


@pytest.fixture
def make_server():
    """A function that starts another server with the settings given, stopped after the test."""
    servers = []

    def make(*settings: str) -> PrivateServer:
        servers.append(PrivateServer(*settings))
        return servers[-1].start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(name="free_port")
def free_port_fixture():
    """A free TCP port of the loopback."""
    return free_port()


@pytest_asyncio.fixture
async def manager(redis_url):
    """A connected ConnectionManager for ``redis_url``."""
    from orchestra.connections import ConnectionManager

    async with ConnectionManager(redis_url) as connected:
        yield connected


@pytest.fixture
def agents():
    """An empty registry, whose threads and processes end with the test."""
    from orchestra.agents import AgentRegistry

    registry = AgentRegistry()
    yield registry
    registry.close()


@pytest.fixture(autouse=True)
def no_leaked_threads():
    """A thread that orchestra started must end with the test that started it."""
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 2
    while left := [t for t in threading.enumerate() if t not in before and t.name.startswith("orchestra")]:
        assert time.monotonic() < end, f"threads left running: {left}"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_stray_address(monkeypatch):
    """No test reaches the user's own server because the environment names it."""
    monkeypatch.delenv("ORCHESTRA_REDIS_URL", raising=False)


@pytest.fixture(scope="session", autouse=True)
def private_state_directory(tmp_path_factory):
    """The embedded server's default directory is not the user's own while tests run."""
    old = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    if old is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = old
