"""Names for consumers by which a process of the same machine can tell that another one is dead.

A name is ``<machine>.<pid>.<start time>.<random>``: the machine by boot, host name and pid namespace, the process by its
id and start time, so neither a reused pid nor another container is mistaken for it. Only on Linux can death be proven.
What cannot be seen is not dead: ``/proc`` may hide the processes of other users (``hidepid``), signal 0 does not.
Clones of one virtual machine snapshot share all of this; where they share a queue, give each its own host name.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import socket
from pathlib import Path


@functools.cache
def machine() -> str:
    """Eight hex digits for this boot, host name and pid namespace; ``""`` where they cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    return hashlib.sha256(f"{boot}{socket.gethostname()}{namespace}".encode()).hexdigest()[:8]


def start_time(pid: int) -> str | None:
    """When process ``pid`` started, in clock ticks since boot; None when that cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    state, *_, start = stat[stat.rindex(")") + 2 :].split()[:20]  # the command before may hold spaces and parentheses
    return "" if state in ("Z", "X") else start  # a zombie runs no more, whatever its parent makes of it


def consumer_name() -> str:
    """A new name for a consumer of this process."""
    pid = os.getpid()
    return f"{machine() or 'host'}.{pid}.{start_time(pid) or 0}.{secrets.token_hex(4)}"


def is_dead(consumer: str) -> bool:
    """Whether ``consumer`` was a process of this machine that has certainly ended."""
    parts = consumer.split(".")
    if len(parts) != 4 or not machine() or parts[0] != machine() or not parts[1].isdecimal():
        return False
    pid = int(parts[1])
    started = start_time(pid)
    return not _exists(pid) if started is None else started != parts[2]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True
