"""What keeps an embedded server alive and ends it: four locks in its directory, and one waiting process.

Owns the locks, the state file, the launch and the shutdown of the server of one directory. Refuses to own who may use
it, its settings, and waiting for it to answer (all in :mod:`orchestra.embedded`).
Also a program: ``python -I -S watchdog.py DIR SOCKET [SERVER CONF]`` launches SERVER and the watchdog, prints the
server's pid and exits. It therefore imports the standard library only: a watchdog costs 9 MiB and no processor time.

The kernel drops a lock when its holder dies, by ``kill -9`` too; no pid is ever trusted to tell who is alive:
``start.lock``   whoever starts, joins or stops the server; held for moments; guards every change of the rest
``users.lock``   shared by each user for as long as it uses the server
``server.lock``  inherited by the server itself: free means that it is dead
``watch.lock``   the watchdog; it sleeps in a request for ``users.lock`` and gives up its own only under ``start.lock``
"""

# No pathlib: it would double the start time of the program.
# ruff: noqa: PTH105, PTH106, PTH108, PTH118, PTH119, PTH120, PTH123
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time

if sys.platform != "win32":
    import fcntl

START, USERS, SERVER, WATCH = "start.lock", "users.lock", "server.lock", "watch.lock"
STATE = "state.json"
LOG = "redis.log"
_SHUTDOWN_WAIT = 10.0  # s for the server to write its last data, then once more after SIGTERM


def open_lock(directory: str, name: str) -> int:
    """A file descriptor of the lock file ``name``, made if missing; not inherited by children."""
    return os.open(os.path.join(directory, name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def try_lock(fd: int) -> bool:
    """Take the lock exclusively unless somebody else holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share_lock(fd: int) -> None:
    """Take the lock together with others; waits for an exclusive holder."""
    fcntl.flock(fd, fcntl.LOCK_SH)


def is_held(fd: int) -> bool:
    """Whether another open file holds the lock. Only ask under ``start.lock``: the test takes it for a moment."""
    if not try_lock(fd):
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def read_state(directory: str) -> dict[str, str | int]:
    """What the last starter wrote (``socket``, ``pid``, ``server``); empty when missing or damaged."""
    try:
        with open(os.path.join(directory, STATE), encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(directory: str, state: dict[str, str | int]) -> None:
    """Replace the state file in one step."""
    target = os.path.join(directory, STATE)
    fd = os.open(target + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        json.dump(state, file)
    os.replace(target + ".new", target)


def shut_down(server_fd: int, state: dict[str, str | int]) -> bool:
    """Stop the server that holds ``server.lock`` and wait until it is gone; True unless it survived.

    Only call under ``start.lock``. SHUTDOWN writes and syncs the append-only file; a server that does not take the
    command gets SIGTERM, which does the same.
    """
    path, pid = str(state.get("socket", "")), int(state.get("pid", 0) or 0)
    if is_held(server_fd) and not (_send_shutdown(path) and _wait_free(server_fd)):
        if pid > 1:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        if not _wait_free(server_fd):
            return False
    with contextlib.suppress(OSError):
        os.unlink(path)
    if os.path.basename(os.path.dirname(path)).startswith("orchestra-"):  # made for a directory with a long name
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))
    return True


def _send_shutdown(path: str) -> bool:
    """Whether the server took the command; it answers with the end of the connection."""
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            s.connect(path)
            s.sendall(b"SHUTDOWN NOSAVE\r\n")
            return not s.recv(256)
    except ConnectionResetError:
        return True
    except OSError:
        return False


def _wait_free(fd: int) -> bool:
    end = time.monotonic() + _SHUTDOWN_WAIT
    while is_held(fd):
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def _spawn_server(directory: str, server: str, conf: str) -> int:
    """Start the server in a session of its own (no Ctrl-C reaches it), holding ``server.lock``."""
    lock = open_lock(directory, SERVER)
    if not try_lock(lock):
        sys.exit("another server already runs in this directory")
    pid = os.fork()
    if pid:
        os.close(lock)
        return pid
    try:
        os.setsid()
        os.set_inheritable(lock, True)
        _redirect(os.path.join(directory, LOG))
        os.chdir(directory)
        os.execv(server, [server, conf])  # noqa: S606 - no shell is wanted
    except BaseException as exc:  # noqa: BLE001 - a forked child must not run its parent's code
        sys.stderr.write(f"cannot run {server}: {exc}\n")
        sys.stderr.flush()
    os._exit(127)


def _redirect(log: str) -> None:
    null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _spawn_watchdog(directory: str) -> None:
    """Fork the watchdog unless one lives."""
    watch_lock = open_lock(directory, WATCH)
    if not try_lock(watch_lock):
        return
    if os.fork():
        os.close(watch_lock)
        return
    try:
        os.setsid()
        _redirect(os.path.join(directory, LOG))
        _watch(directory, watch_lock)
    except BaseException as exc:  # noqa: BLE001 - as above
        sys.stderr.write(f"watchdog of {directory} failed: {exc!r}\n")
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _watch(directory: str, watch_lock: int) -> None:
    """Sleep until nobody uses the server, then stop it. Works on after its directory was deleted."""
    start, users, server = (open_lock(directory, name) for name in (START, USERS, SERVER))
    state = read_state(directory)
    os.chdir("/")
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_UN)  # a starter holds start.lock and may be waiting for users.lock
        fcntl.flock(start, fcntl.LOCK_EX)
        if try_lock(users):
            shut_down(server, read_state(directory) or state)
            os.close(watch_lock)
            return
        state = read_state(directory) or state
        fcntl.flock(start, fcntl.LOCK_UN)


def main(argv: list[str]) -> int:
    """Launch what is asked for; the caller holds ``start.lock`` and ``users.lock``."""
    directory, path, *program = argv
    os.umask(0o077)
    state = read_state(directory)
    if program:
        state = {"socket": path, "pid": _spawn_server(directory, *program), "server": program[0]}
        write_state(directory, state)
    _spawn_watchdog(directory)
    sys.stdout.write(f"{state.get('pid', 0)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
