"""Which settings of a server may cost tasks: facts from INFO in, faults out.

Owns what a server says of itself, the judgement that production mode (:mod:`orchestra.connections`) and ``orchestra
doctor`` share, and how it is told. Refuses to own asking the server. INFO alone is enough, because CONFIG is often forbidden. Pure functions but
for "this server was warned about".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from orchestra.errors import ConfigurationError, UnsafeServerError

logger = logging.getLogger("orchestra.connections")

INFO_SECTIONS = ("server", "replication", "memory", "persistence")
_warned: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says about itself. None means that this user may not ask."""

    kind: str = "redis"
    version: tuple[int, ...] = ()
    run_id: str | None = None
    role: str | None = None
    maxmemory_policy: str | None = None
    aof_enabled: bool | None = None

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Self:
        """From the reply to INFO."""
        valkey, aof = info.get("valkey_version"), info.get("aof_enabled")
        return cls(
            kind="valkey" if valkey else "redis",
            version=version_of(valkey or info.get("redis_version", "")),
            run_id=info.get("run_id"),
            role=info.get("role"),
            maxmemory_policy=info.get("maxmemory_policy"),
            aof_enabled=None if aof is None else bool(aof),
        )


def version_of(text: str) -> tuple[int, ...]:
    """``"7.0.15"`` as numbers."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


class Fault(NamedTuple):
    """One setting that may cost tasks. ``refused``: production mode does not connect; ``loud``: others are warned."""

    setting: str
    value: str
    expected: str
    change: str
    refused: bool = True
    loud: bool = True

    def __str__(self) -> str:
        return f"{self.setting} is {self.value}, expected {self.expected}: {self.change}"


def faults(info: Mapping[str, Any], *, sentinel: bool = False) -> list[Fault]:
    """What of ``info`` (replication, memory and persistence of INFO) may cost tasks.

    What this user may not see is no fault. ``sentinel``: a replica may be promoted.
    """
    found = []
    policy = info.get("maxmemory_policy")
    if policy is not None and policy != "noeviction":
        what = "keys with a time to live" if str(policy).startswith("volatile") else "whole queues"
        change = f"it deletes {what} when memory is short; CONFIG SET maxmemory-policy noeviction"
        found.append(Fault("maxmemory-policy", str(policy), "noeviction", change))
    if info.get("role") in ("slave", "replica"):
        change = "a replica refuses writes; connect to its master"
        found.append(Fault("role", "replica", "master", change))
    if "aof_enabled" in info and not int(info["aof_enabled"]):
        change = "a crash loses what came since the last snapshot; CONFIG SET appendonly yes"
        found.append(Fault("appendonly", "no", "yes", change, loud=False))
    if sentinel and "role" in info and "min_slaves_good_slaves" not in info:
        change = (
            "a master that lost its replicas goes on accepting tasks, which a failover then drops; "
            "CONFIG SET min-replicas-to-write 1"
        )
        found.append(Fault("min-replicas-to-write", "0", "1 or more", change, refused=False))
    return found


def judge(info: Mapping[str, Any] | None, where: str, *, production: bool, sentinel: bool = False) -> None:
    """Refuse or tell the faults of the server at ``where``; ``info`` is None where this user may not ask.

    Outside production mode, and for what it does not refuse, one warning per server and process.

    Raises:
        UnsafeServerError: production mode, and a fault that it refuses.
    """
    if info is None:
        if production:
            raise UnsafeServerError(
                f"production mode cannot check the settings of {where}: let this user use INFO (ACL SETUSER … +info)",
                field="INFO",
                value="forbidden",
                expected="allowed",
            )
        return
    found = faults(info, sentinel=sentinel)
    refused = [fault for fault in found if fault.refused]
    if production and refused:
        raise UnsafeServerError(
            f"production mode refuses {where}: {'. '.join(map(str, refused))}",
            field=refused[0].setting,
            value=refused[0].value,
            expected=refused[0].expected,
            faults=tuple(map(str, refused)),
        )
    server = str(info.get("run_id") or where)
    told = [str(fault) for fault in found if fault.loud]
    if told and server not in _warned:
        _warned.add(server)
        logger.warning("%s: %s", where, ". ".join(told))


def production_by_environment() -> bool:
    """Whether ``ORCHESTRA_PRODUCTION`` says so. Raises ConfigurationError for what is neither yes nor no."""
    text = os.environ.get("ORCHESTRA_PRODUCTION", "").strip().lower()
    if text in ("", "0", "false", "no"):
        return False
    if text in ("1", "true", "yes"):
        return True
    raise ConfigurationError(
        f"ORCHESTRA_PRODUCTION must be 1 or 0, got {text!r}", field="ORCHESTRA_PRODUCTION", value=text
    )
