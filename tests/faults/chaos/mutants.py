"""Defects put into the product inside the actors, and for each the run that must show it.

A mutant changes a script's text or replaces a function; if it finds nothing to change, it raises, so that a changed
product cannot pass for a mutant that was caught. Each has a directed plan: a workload and faults under which the defect
bites within seconds; the same plan without the mutant must pass.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from orchestra import _identity, _scripts, task_queue
from orchestra._delivery import DONE, Again
from orchestra._dispatch import running
from orchestra._queue import leases, upkeep
from orchestra._redis import link as _link
from orchestra._redis import wire
from orchestra._scripts import Script
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreUnavailableError
from orchestra.tasks import Cancellation
from tests.faults.chaos.plan import Fault, Plan, Task


@dataclass(frozen=True)
class Mutant:
    """A defect: how it is made, the run that shows it, and the rules of which at least one must say so."""

    name: str
    make: Callable[[], None]
    plan: Callable[[], Plan]
    rules: tuple[str, ...]
    doc: str


GAP = Script("gap", "return 1")
"""Marks the moment between the two halves of what should be one script, for the fault that is to hit it."""
POP = Script(
    "pop",
    "local out = {} "
    "for _, m in ipairs(redis.call('ZRANGEBYSCORE', KEYS[9], '-inf', ARGV[1], 'LIMIT', 0, 200)) do "
    "out[#out + 1] = redis.call('HGET', KEYS[10], m) "
    "redis.call('ZREM', KEYS[9], m) redis.call('HDEL', KEYS[10], m) end return out",
)
PUSH = Script(
    "push",
    "for _, b in ipairs(ARGV) do local p = cmsgpack.unpack(b) "
    "redis.call('XADD', KEYS[p[1] + 1], '*', 't', p[5], 'n', p[2], 'd', p[3], 'g', p[4]) end",
)
BACK = Script("back", "redis.call('XADD', KEYS[1], '*', 't', ARGV[1], 'n', ARGV[2], 'd', ARGV[3], 'g', ARGV[4])")


def scripts(mutant: str | None = None) -> dict[str, str]:
    """sha → name of the product's scripts, and of those that ``mutant`` changes or brings."""
    files = (file.name for file in resources.files("orchestra.lua").iterdir())
    names = [name[:-4] for name in files if name.endswith(".lua")]
    known = {one.sha: one.name for one in (*map(_scripts.script, names), GAP, POP, PUSH, BACK)}
    if mutant is not None:  # in a process of its own: this one stays sound
        program = f"import json; from tests.faults.chaos import mutants as m; m.apply({mutant!r}); print(json.dumps(m.scripts()))"
        known |= json.loads(subprocess.check_output([sys.executable, "-c", program], cwd=Path(__file__).parents[3]))
    return known


def apply(name: str) -> None:
    """Put the defect into this process."""
    MUTANTS[name].make()


# -- tools


def _rewrite(name: str, change: Callable[[str], str]) -> None:
    """Change a script in place: whoever holds it sends the new text."""
    lua = _scripts.script(name)
    text = change(lua.text)
    if text == lua.text:
        raise LookupError(f"{name}.lua has changed: the mutant finds nothing to break")
    lua.text, lua.sha = text, hashlib.sha1(text.encode()).hexdigest()


def _without(name: str, *commands: str) -> None:
    """The script's calls of these commands do nothing."""
    shim = " or ".join(f"c == '{command}'" for command in commands)
    head = (
        "local real = redis\n"
        f"local redis = {{call = function(c, ...) if {shim} then return false end return real.call(c, ...) end,\n"
        "  error_reply = real.error_reply, sha1hex = real.sha1hex}\n"
    )

    def change(text: str) -> str:
        if not any(f"'{command}'" in text for command in commands):
            return text
        first, rest = text.split("\n", 1)
        return f"{first}\n{head}{rest}" if first.startswith("#!") else f"{head}{text}"

    _rewrite(name, change)


def _patch(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute that must be there."""
    getattr(owner, name)
    setattr(owner, name, value)


def _replaced(pattern: str, by: str, name: str) -> None:
    _rewrite(name, lambda text: re.sub(pattern, by, text))


def _plan(tasks: list[Task], *faults: Fault, at: float = 0.0, **settings: Any) -> Plan:
    """One producer, short leases; all tasks are sent ``at`` a time, those that are alike together."""
    settings = {"workers": 2, "producers": 1, "lease": 0.8, "quiet_limit": 12.0, "named": (0, 1)} | settings
    plan = Plan(seed=0, seconds=settings.pop("seconds", 8.0), **settings)
    groups: dict[tuple[bool, bool], list[Task]] = {}
    for number, task in enumerate(tasks):
        full = {"uid": f"d{number}", "own": True, "want": False} | task
        groups.setdefault((full["own"], full["want"]), []).append(full)
    plan.calls = [{"at": at, "producer": 0, "how": "many", "tasks": group} for group in groups.values()]
    plan.faults = [{"at": 0.0, **fault} for fault in faults]
    return plan


def _some(count: int, kind: str, **facts: Any) -> list[Task]:
    return [{"kind": kind, **facts} for _ in range(count)]


def _kill(after: str, count: int = 1) -> Fault:
    return {"kind": "worker_kill", "actor": "w0", "after": [after, count]}


# -- the defects


def _ack_before_run() -> None:
    real = task_queue.RedisStreamTaskQueue.read

    async def read(self: Any, *args: Any, **options: Any) -> Any:
        found = await real(self, *args, **options)
        await self.settle([(delivery, DONE) for delivery in found])
        return found

    _patch(task_queue.RedisStreamTaskQueue, "read", read)


def _no_owner_check() -> None:
    for name in ("complete", "complete_result"):
        _replaced(r"if count ~= expected then", "if false then", name)
    _replaced(r"row and row\[4\] == tonumber\([^)]*\)", "true", "dead_letter")


def _promote_removes_first() -> None:
    real = _link.Link.script

    async def script(self: Any, lua: Any, keys: Any, args: Any, patience: float = 0.0) -> Any:
        if lua.name == "promote":
            seconds, micros = (await self.send(wire.pack((("TIME",),)), 1))[0]
            bodies = await real(self, POP, keys, [int(seconds) * 1000 + int(micros) // 1000], patience)
            if bodies:
                await real(self, GAP, keys, (), patience)
                await asyncio.sleep(0.5)
                await real(self, PUSH, keys, bodies, patience)
        return await real(self, lua, keys, args, patience)

    _patch(_link.Link, "script", script)


def _retry_removes_first() -> None:
    real = task_queue.RedisStreamTaskQueue.settle

    async def settle(self: Any, batch: Any) -> Any:
        again = [delivery for delivery, verdict in batch if type(verdict) is Again]
        stale = await real(self, [(d, DONE if type(v) is Again else v) for d, v in batch])
        if again:
            link = await self._commands()
            await link.script(GAP, self.keys.lanes, ())
            await asyncio.sleep(0.5)
            for d in again:
                args = (d.frame, d.retries + 1, d.before + d.deliveries, d.generation)
                await link.script(BACK, (self.keys.streams[d.stream],), args)
        return stale

    _patch(task_queue.RedisStreamTaskQueue, "settle", settle)


def _renewal_steals() -> None:
    _replaced(r"if row and row\[4\] == tonumber\(ARGV\[i \+ 1\]\) then", "if true then", "renew")
    real = leases.LeaseBook.__init__

    def init(self: Any, lease: float) -> None:
        real(self, lease)
        self._keep = 1e9  # else the own clock ends what the theft would

    _patch(leases.LeaseBook, "__init__", init)


def _renewals_off() -> None:
    _patch(leases.LeaseKeeper, "_renew", lambda self, due: None)


def _no_dedup() -> None:
    _replaced(r"if record or before then return", "if false then return", "produce")
    _replaced(r"and known\[mode\[3\]\] then", "and false then", "produce")
    _replaced(r"    if record then\n", "    if false then\n", "produce_many")
    _replaced(r"if where and not known", "if false and not known", "produce_many")
    _replaced(r"local known = redis", "local known = false and redis", "produce_one")
    _replaced(r"  known = redis", "  known = false and redis", "produce_one")


def _group_at_end() -> None:
    real = wire._pack_command

    def pack(command: Any) -> bytes:
        if tuple(command[:2]) == ("XGROUP", "CREATE"):
            command = (*command[:4], "$", *command[5:])
        return real(command)

    _patch(wire, "_pack_command", pack)


def _forgets_pending() -> None:
    """Dead consumers are deleted with what they held."""

    async def adopt(self: Any, consumer: str, room: int) -> Any:
        link = await self._of.link()
        (names,) = await link.send(wire.pack((("ZRANGE", self._of.keys.consumers, 0, -1),)), 1)
        for name in (raw.decode() for raw in names):
            if name != consumer and _identity.is_dead(name):
                lanes = [("XGROUP", "DELCONSUMER", lane, self._of.group, name) for lane in self._of.keys.streams]
                await link.send(wire.pack(lanes), len(lanes))
        return []

    _patch(upkeep.StreamUpkeep, "_adopt", adopt)


def _settle_forgotten() -> None:
    """A settle whose connection breaks is not sent again."""
    settling: contextvars.ContextVar[bool] = contextvars.ContextVar("settling", default=False)
    real, real_patiently = task_queue.RedisStreamTaskQueue.settle, _link.Link.patiently

    class DroppedError(Exception):
        pass

    async def patiently(self: Any, attempt: Any, patience: float) -> Any:
        try:
            return await real_patiently(self, attempt, 0.0 if settling.get() else patience)
        except StoreUnavailableError:
            if settling.get():
                raise DroppedError from None
            raise

    async def settle(self: Any, batch: Any) -> Any:
        settling.set(True)
        try:
            return await real(self, batch)
        except DroppedError:
            for delivery, _ in batch:
                self.held[delivery.stream].pop(delivery.entry, None)
            return []
        finally:
            settling.set(False)

    _patch(_link.Link, "patiently", patiently)
    _patch(task_queue.RedisStreamTaskQueue, "settle", settle)


def _leaves_connections() -> None:
    async def close(self: Any) -> None:
        return None

    _patch(task_queue.RedisStreamTaskQueue, "close", close)
    _patch(ConnectionManager, "close", close)


def _cancel_lies() -> None:
    async def cancel(self: Any, task_id: str, message_id: str | None = None) -> Cancellation:
        return Cancellation.CANCELLED

    _patch(task_queue.RedisStreamTaskQueue, "cancel", cancel)


# -- the runs that show them


def _stop(after: str, count: int = 1) -> Fault:
    return {"kind": "worker_stop", "actor": "w0", "seconds": 1.8, "after": [after, count]}


_ALL = (
    Mutant(
        "ack_before_run",
        _ack_before_run,
        lambda: _plan(_some(30, "sleep", s=0.6), _kill("complete"), workers=1),
        ("lost", "phantom"),
        "a task is acknowledged before its agent runs",
    ),
    Mutant(
        "no_owner_check",
        _no_owner_check,
        lambda: _plan(_some(10, "stubborn", s=3.0, want=True), _stop("renew", 3)),
        ("terminal", "fence"),
        "a settle does not look whose the delivery is",
    ),
    Mutant(
        "reclaim_ignores_lease",
        lambda: _replaced(r"tonumber\(ARGV\[4\]\)", "0", "reclaim"),
        lambda: _plan(_some(12, "sleep", s=2.5), lease=1.2, quiet_limit=6.0),
        ("duplicate",),
        "reclaiming takes what a live worker holds",
    ),
    Mutant(
        "reclaim_without_cursor",
        lambda: _without("reclaim", "HGET"),
        lambda: _plan(
            _some(75, "sleep", s=5.0),
            _kill("renew", 3),
            concurrency=40,
            scan_rows=20,
            resume_within=4.0,
            may_stall=2,
        ),
        ("stalled",),
        "reclaiming begins at the head of the pending list each time",
    ),
    Mutant(
        "promote_removes_first",
        _promote_removes_first,
        lambda: _plan(_some(20, "quick", delay=0.4), _kill("gap"), workers=1),
        ("lost",),
        "a due task leaves the delayed set before it is in its lane",
    ),
    Mutant(
        "retry_removes_first",
        _retry_removes_first,
        lambda: _plan(_some(20, "flaky", n=1), _kill("gap"), workers=1),
        ("lost",),
        "a failed task leaves its lane before it is in the delayed set",
    ),
    Mutant(
        "renewal_steals",
        _renewal_steals,
        lambda: _plan(_some(10, "sleep", s=5.0), _stop("renew", 3), zombie_slack=0.8),
        ("zombie", "duplicate", "fence"),
        "a renewal takes a delivery back from its new owner",
    ),
    Mutant(
        "renewals_off",
        _renewals_off,
        lambda: _plan(_some(6, "sleep", s=1.8), quiet_limit=3.0, max_deliveries=3),
        ("duplicate",),
        "leases are not renewed",
    ),
    Mutant(
        "no_dedup",
        _no_dedup,
        lambda: _plan(
            [*_some(10, "quick"), *_some(10, "quick", own=False)],
            {"kind": "reply_lost", "actor": "p0", "name": "produce_many", "how": "rst"},
            at=1.0,
        ),
        ("terminal", "duplicate"),
        "a produce call whose reply was lost adds its tasks again",
    ),
    Mutant(
        "group_at_end",
        _group_at_end,
        lambda: _plan(_some(10, "quick"), workers_late=1.0, quiet_limit=2.0),
        ("stuck",),
        "the group begins at the end of the stream",
    ),
    Mutant(
        "fence_stays",
        lambda: _replaced(r"count \+ 1", "count", "reclaim"),
        lambda: _plan(_some(12, "sleep", s=1.0), _kill("renew"), concurrency=6),
        ("fence",),
        "a delivery that is taken over keeps its fence",
    ),
    Mutant(
        "letter_stays",
        lambda: _without("dead_letter", "XACK", "XDEL"),
        lambda: _plan(_some(5, "reject"), quiet_limit=2.5),
        ("terminal", "duplicate", "stuck"),
        "a dead letter stays in its lane as well",
    ),
    Mutant(
        "entry_stays",
        lambda: _without("complete", "XDEL"),
        lambda: _plan(_some(10, "quick"), quiet_limit=1.5),
        ("stuck",),
        "a completed task is acknowledged and not deleted",
    ),
    Mutant(
        "deaf_to_lost_leases",
        lambda: _patch(running.Running, "lease_lost", lambda self, delivery: None),
        lambda: _plan(_some(10, "sleep", s=5.0), _stop("renew", 3), zombie_slack=0.8),
        ("zombie",),
        "an agent goes on after its lease was lost",
    ),
    Mutant(
        "promotes_early",
        lambda: _replaced(r"'-inf', now,", "'-inf', now + 60000,", "promote"),
        lambda: _plan(_some(10, "flaky", n=2)),
        ("backoff",),
        "a delayed task comes before its time",
    ),
    Mutant(
        "forgets_pending",
        _forgets_pending,
        lambda: _plan(_some(12, "sleep", s=1.0), _kill("renew"), named=(), concurrency=6, quiet_limit=4.0),
        ("stuck", "lost"),
        "a dead consumer is deleted with what it held",
    ),
    Mutant(
        "settle_forgotten",
        _settle_forgotten,
        lambda: _plan(
            _some(20, "sleep", s=0.3), {"kind": "refused_command", "actor": "w0", "name": "complete"}, workers=1
        ),
        ("duplicate",),
        "a settle whose connection breaks is not sent again",
    ),
    Mutant(
        "leaves_connections",
        _leaves_connections,
        lambda: _plan(_some(3, "quick")),
        ("leak",),
        "closing closes nothing",
    ),
    Mutant(
        "cancel_lies",
        _cancel_lies,
        lambda: _plan([{"kind": "cancel", "s": 0.0, "delay": 1.0, "want": True, "cancel_after": 0.0}]),
        ("cancelled",),
        "a cancellation is confirmed and not made",
    ),
)
MUTANTS = {mutant.name: mutant for mutant in _ALL}
