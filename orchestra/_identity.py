"""Names for consumers by which a process of the same machine can tell that another one is dead.

A name is ``<machine>.<pid>.<start time>.<random>``: the machine by boot and pid namespace, the process by its id and
start time, so neither a reused pid nor another container is mistaken for it. Only on Linux can death be proven.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from pathlib import Path


@functools.cache
def machine() -> str:
    """Eight hex digits for this boot and pid namespace; ``""`` where they cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    return hashlib.sha256(f"{boot}{namespace}".encode()).hexdigest()[:8]


def start_time(pid: int) -> str | None:
    """When process ``pid`` started, in clock ticks since boot; None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the command before it may hold spaces and parentheses
    return None if fields[0] in ("Z", "X") else fields[19]


def consumer_name() -> str:
    """A new name for a consumer of this process."""
    pid = os.getpid()
    return f"{machine() or 'host'}.{pid}.{start_time(pid) or 0}.{secrets.token_hex(4)}"


def is_dead(consumer: str) -> bool:
    """Whether ``consumer`` was a process of this machine that has certainly ended."""
    parts = consumer.split(".")
    if len(parts) != 4 or not machine() or parts[0] != machine() or not parts[1].isdecimal():
        return False
    return start_time(int(parts[1])) != parts[2]
