"""What ``orchestra doctor`` looks at: each check is a small function from facts to findings.

Owns the judgement: which server versions have known holes, which settings lose tasks. Refuses to own asking the server
and printing. Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from orchestra._redis.server_settings import faults

Level: TypeAlias = Literal["ok", "note", "warning", "problem"]
Version: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``warning`` and ``problem`` count for the exit status."""

    level: Level
    what: str
    value: str
    advice: str = ""


class Hole(NamedTuple):
    """A known vulnerability: the first patched version of every release line that was patched."""

    names: str
    effect: str
    since: Mapping[str, Version]
    patched: Mapping[str, tuple[Version, ...]]


# Sources: the advisories of Redis (6 October and 4 November 2025, 5 May 2026) and the release notes of Valkey.
HOLES: Final = (
    Hole(
        "CVE-2025-49844, CVE-2025-46817, CVE-2025-46818, CVE-2025-46819",
        "who may run scripts can run code on the server",
        {"redis": (2, 6), "valkey": (7, 2)},
        {
            "redis": ((6, 2, 20), (7, 2, 11), (7, 4, 6), (8, 0, 4), (8, 2, 2)),
            "valkey": ((7, 2, 11), (8, 0, 6), (8, 1, 4), (9, 0, 0)),
        },
    ),
    Hole(
        "CVE-2025-62507",
        "XACKDEL may overflow the stack",
        {"redis": (8, 2)},
        {"redis": ((8, 2, 3),)},
    ),
    Hole(
        "CVE-2026-23479, CVE-2026-23631, CVE-2026-25243",
        "an authenticated client may run code on the server",
        {"redis": (7, 2), "valkey": (7, 2)},
        {
            "redis": ((7, 4, 9), (8, 2, 6), (8, 4, 3), (8, 6, 3)),
            "valkey": ((7, 2, 13), (8, 0, 8), (8, 1, 7), (9, 0, 4)),
        },
    ),
)
MINIMUM: Final[dict[str, Version]] = {"redis": (7, 0), "valkey": (8, 0)}
SLOW_PING = 0.005
CLOCK_SKEW = 1.0
FULL = 0.8
AHEAD = 3600.0
"""Seconds that a stream's last id may be ahead of the server's clock."""
_LAST_ID = 2**64 - 1


def check_version(kind: str, version: Version) -> list[Finding]:
    """Whether the server is new enough and free of known holes; unknown is said, not guessed."""
    shown = f"{kind} {'.'.join(map(str, version))}" if version else f"{kind}, version unknown"
    if not version or kind not in MINIMUM:
        return [Finding("note", "server", shown, "its version could not be judged")]
    if version < MINIMUM[kind]:
        needed = ".".join(map(str, MINIMUM[kind]))
        return [Finding("problem", "server", shown, f"orchestra needs {kind} {needed} or newer")]
    findings = [Finding("ok", "server", shown)]
    findings += [found for hole in HOLES if (found := _check_hole(hole, kind, version)) is not None]
    return findings


def _check_hole(hole: Hole, kind: str, version: Version) -> Finding | None:
    lines, since = hole.patched.get(kind, ()), hole.since.get(kind)
    if since is None or version < since or not lines:
        return None
    same = [patched for patched in lines if patched[:2] == version[:2]]
    if same:
        if version >= same[0]:
            return None
        return Finding("warning", "security", hole.names, f"{hole.effect}: update to {_dotted(same[0])} or newer")
    if version > max(lines):
        return None
    later = min(patched for patched in lines if patched > version)
    advice = (
        f"{hole.effect}: this release line is not known to be patched by its makers (some distributions patch it): "
    )
    return Finding(
        "warning", "security", hole.names, f"{advice}ask your package's changelog, or move to {_dotted(later)}"
    )


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def check_settings(info: Mapping[str, Any], *, sentinel: bool) -> list[Finding]:
    """Settings that may cost tasks, in the words of production mode; the append-only file is persistence's."""
    findings = []
    for fault in faults(info, sentinel=sentinel):
        if fault.setting == "appendonly":
            continue
        advice = f"{fault.change}{'; production mode refuses it' if fault.refused else ''}"
        findings.append(Finding("problem" if fault.refused else "warning", fault.setting, fault.value, advice))
    if "maxmemory_policy" not in info:
        findings.append(
            Finding("note", "maxmemory-policy", "unknown", "this user may not read it: noeviction is needed")
        )
    elif info["maxmemory_policy"] == "noeviction":
        findings.append(Finding("ok", "maxmemory-policy", "noeviction"))
    return findings


def check_stream_id(queue: str, lane: int, last_id: str, now: float) -> Finding | None:
    """A lane whose last entry id lies ahead of the server's clock (``now``, unix seconds), or is the last there is."""
    ms, _, seq = last_id.partition("-")
    what = f"stream ids of {queue}"
    if (int(ms), int(seq)) >= (_LAST_ID, _LAST_ID):
        advice = "nothing can be added to it any more: drain the queue, then DEL this stream"
        return Finding("problem", what, f"lane {lane} has used up its ids", advice)
    ahead = int(ms) / 1000 - now
    if ahead <= AHEAD:
        return None
    shown = f"{ahead / 3600:.1f} h" if ahead < 48 * 3600 else f"{ahead / 86_400:.0f} days"
    advice = "the clock was set back, or somebody added an entry by hand: ages of tasks are wrong until it is past"
    return Finding("warning", what, f"lane {lane} is {shown} ahead of the server's clock", advice)


def check_persistence(info: Mapping[str, Any]) -> list[Finding]:
    """What a crash of the server would cost."""
    if "aof_enabled" not in info:
        return [Finding("note", "persistence", "unknown", "this user may not read it")]
    findings = []
    snapshots = bool(info.get("rdb_saves_configured"))
    if info["aof_enabled"]:
        fsync = str(info.get("appendfsync", "everysec"))
        lost = {"always": "nothing is lost", "everysec": "at most about 2 s are lost"}.get(
            fsync, "some seconds are lost"
        )
        findings.append(Finding("ok", "persistence", f"append-only file, fsync {fsync}", f"in a crash {lost}"))
    elif snapshots:
        advice = (
            "a crash loses what came since the last snapshot (production mode refuses it): CONFIG SET appendonly yes"
        )
        findings.append(Finding("warning", "persistence", "snapshots only", advice))
    else:
        advice = "a restart of the server loses every task (production mode refuses it): CONFIG SET appendonly yes"
        findings.append(Finding("warning", "persistence", "none", advice))
    for name, what in (("aof_last_write_status", "append-only file"), ("rdb_last_bgsave_status", "last snapshot")):
        if info.get(name, "ok") != "ok":
            findings.append(
                Finding("problem", "persistence", f"{what}: {info[name]}", "look at the server's disk and log")
            )
    return findings


def check_memory(info: Mapping[str, Any], size: Any) -> Finding:
    """How near the server is to its limit; ``size`` turns bytes into words."""
    if "used_memory" not in info:
        return Finding("note", "memory", "unknown", "this user may not read it")
    used, limit = int(info["used_memory"]), int(info.get("maxmemory", 0))
    if not limit:
        return Finding("ok", "memory", f"{size(used)} used, no limit set")
    share = used / limit
    value = f"{size(used)} of {size(limit)} used ({share:.0%})"
    if share > FULL:
        return Finding(
            "warning", "memory", value, "writes are refused when it is full: raise maxmemory or drain the queues"
        )
    return Finding("ok", "memory", value)


def check_latency(pings: list[float]) -> Finding:
    """The median of some round trips, in seconds."""
    p50 = sorted(pings)[len(pings) // 2]
    value = f"{p50 * 1000:.2f} ms (median of {len(pings)} pings, worst {max(pings) * 1000:.2f} ms)"
    if p50 > SLOW_PING:
        return Finding(
            "warning", "latency", value, "each hand-over of tasks costs a round trip: run workers near the server"
        )
    return Finding("ok", "latency", value)


def check_clock(skew: float) -> Finding:
    """``skew``: seconds that the server's clock is ahead of this machine's."""
    value = f"{abs(skew) * 1000:.0f} ms {'ahead of' if skew > 0 else 'behind'} this machine"
    if abs(skew) > CLOCK_SKEW:
        advice = "deadlines are judged by each worker's clock: run NTP on both"
        return Finding("warning", "server clock", value, advice)
    return Finding("ok", "server clock", value)


def check_exposure(info: Mapping[str, Any], *, remote: bool, encrypted: bool, password: bool) -> Finding | None:
    """A server across a network should ask for a password and be encrypted."""
    del info
    if not remote:
        return None
    if not password:
        return Finding(
            "warning", "access", "no password", "anybody who reaches it can run scripts on it: set one (ACL SETUSER)"
        )
    if not encrypted:
        return Finding(
            "note", "access", "password, not encrypted", "tasks cross the network in clear text: rediss:// encrypts"
        )
    return Finding("ok", "access", "password, encrypted")
