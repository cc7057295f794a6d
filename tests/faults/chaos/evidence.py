"""What histories say, put in order: executions, faults and their weights, what producers know. Pure functions.

The weight of a fault is what it can excuse. A lease survives one failed renewal, so a fault that costs at most that weighs
a half: two of them together explain a lost lease, one does not. What keeps a worker from renewing for longer, or ends it,
weighs one. What must not matter at all (a script cache that was flushed, a full memory) weighs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.faults.chaos.history import Line
from tests.faults.chaos.plan import Plan, Task

BEARABLE = 0.4
"""Share of a lease that may pass without renewals: the first comes up to half a lease after the read."""
HARMLESS = {"script_flush", "maxmemory", "producer_kill", "producer_stop"}
STANDSTILLS = {"worker_stop", "producer_stop", "redis_kill", "redis_stop", "client_pause"}
FATAL = {"worker_kill", "worker_term", "group_destroy", "crash"}
LASTING = {"worker_stop", "redis_kill", "redis_stop", "client_pause", "black_hole", "refused", "starved", "reply_late"}


@dataclass(slots=True)
class Execution:
    """An agent was handed a task."""

    uid: str
    task_id: str
    actor: str
    fence: int
    attempt: int
    start: float
    end: float | None = None
    how: str | None = None
    """ok | fail | info (cancelled) | None (it has not come to an end)."""


@dataclass(slots=True)
class Interval:
    """A fault, from when to when it was felt."""

    kind: str
    actors: frozenset[str] | None
    begin: float
    end: float
    weight: float
    facts: dict[str, Any] = field(default_factory=dict)

    def hits(self, actor: str) -> bool:
        """Whether ``actor`` felt it."""
        return self.actors is None or actor in self.actors


@dataclass(slots=True)
class Evidence:
    """All that the checker looks at, by task and by fault."""

    plan: Plan
    tasks: dict[str, Task]
    executions: dict[str, list[Execution]]
    """uid → executions in the order of their starts."""
    produced: dict[str, str]
    """uid → ok | info | fail."""
    faults: list[Interval]
    cancels: dict[str, list[Line]]
    ids: dict[str, set[str]]
    """uid → the task ids it goes by; one, or none that is known."""
    lines: list[Line]

    def overlapping(self, actor: str, begin: float, end: float) -> list[Interval]:
        """The faults that ``actor`` felt within a time."""
        return [fault for fault in self.faults if fault.hits(actor) and fault.begin <= end and fault.end >= begin]

    def destroyed(self, begin: float, end: float) -> bool:
        """Whether a group was destroyed within a time: its deliveries, and with them their fences, begin anew."""
        return any(f.kind == "group_destroy" and f.begin <= end and f.end >= begin for f in self.faults)


def weight_of(kind: str, facts: dict[str, Any], seconds: float, lease: float) -> float:
    """What a fault can excuse: 0, a half or 1."""
    if kind in HARMLESS:
        return 0.0
    if kind in FATAL:
        return 1.0
    if kind == "reply_lost" and facts.get("how") == "stay":
        return 1.0  # a connection that stays silent is given up after a timeout, which may be beyond the lease
    if kind in LASTING:
        return 1.0 if seconds >= BEARABLE * lease else 0.5
    return 0.5


def gather(plan: Plan, lines: list[Line]) -> Evidence:
    """Read the histories of one run."""
    executions, produced = _executions(lines), _produced(lines)
    cancels: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line["op"] == "cancel":
            cancels[line["uid"]].append(line)
    ids = _ids(lines, executions)
    faults = _faults(plan, lines) + _blocked(plan, executions)
    return Evidence(plan, plan.tasks(), executions, produced, faults, dict(cancels), ids, lines)


def _ids(lines: list[Line], executions: dict[str, list[Execution]]) -> dict[str, set[str]]:
    found = {uid: {run.task_id for run in runs} for uid, runs in executions.items()}
    for line in lines:
        if line["op"] == "produce":
            for uid, task_id in zip(line["tasks"], line.get("ids", line["tasks"]), strict=True):
                if task_id != "?":
                    found.setdefault(uid, set()).add(task_id)
    return found


def _executions(lines: list[Line]) -> dict[str, list[Execution]]:
    found: dict[str, list[Execution]] = defaultdict(list)
    running: dict[tuple[Any, ...], Execution] = {}
    for line in lines:
        if line["op"] != "run":
            continue
        key = (line["actor"], line["uid"], line["fence"], line.get("run"))
        if line["phase"] == "invoke":
            one = Execution(line["uid"], line["id"], line["actor"], line["fence"], line["attempt"], line["t"])
            running[key] = one
            found[line["uid"]].append(one)
        elif key in running:
            one = running.pop(key)
            one.end, one.how = line["t"], line["phase"]
    return dict(found)


def _produced(lines: list[Line]) -> dict[str, str]:
    """The best that is known of each task's produce: ok beats info beats fail; an open invoke is info."""
    rank = {"fail": 0, "info": 1, "ok": 2}
    known: dict[str, str] = {}
    pending: dict[tuple[str, str], int] = defaultdict(int)
    for line in lines:
        if line["op"] != "produce":
            continue
        for uid in line["tasks"]:
            if line["phase"] == "invoke":
                pending[line["actor"], uid] += 1
                continue
            pending[line["actor"], uid] -= 1
            known[uid] = max(known.get(uid, "fail"), line["phase"], key=rank.__getitem__)
    for (_, uid), count in pending.items():
        if count > 0:
            known[uid] = max(known.get(uid, "fail"), "info", key=rank.__getitem__)
    return known


def _faults(plan: Plan, lines: list[Line]) -> list[Interval]:
    injected = _injected(plan, lines)
    stopped = [fault for fault in injected if fault.kind in STANDSTILLS]
    return injected + _crashes(plan, lines) + _starved(plan, lines, stopped)


def _injected(plan: Plan, lines: list[Line]) -> list[Interval]:
    begun: dict[int, Line] = {}
    found: list[Interval] = []
    last = lines[-1]["t"] if lines else 0.0
    for line in lines:
        if line["op"] != "fault":
            continue
        if line["phase"] == "invoke":
            begun[line["number"]] = line
        else:
            found.append(_interval(plan, begun.pop(line["number"]), line["t"]))
    return found + [_interval(plan, line, last) for line in begun.values()]


def _interval(plan: Plan, line: Line, end: float) -> Interval:
    actors = None if line["actors"] is None else frozenset(line["actors"])
    seconds = end - line["t"]
    weight = weight_of(line["kind"], line["fault"], seconds, plan.lease)
    # after an outage of the server nothing is reclaimed for one lease: what it did shows later
    aftermath = plan.lease * (2.0 if actors is None else 1.0)
    return Interval(line["kind"], actors, line["t"], end + aftermath, weight, line["fault"])


def _crashes(plan: Plan, lines: list[Line]) -> list[Interval]:
    """A process that ended otherwise than well; it did so after its last line."""
    last: dict[str, float] = {}
    found: list[Interval] = []
    for line in lines:
        last[line["actor"]] = line["t"]
        if line["op"] == "process" and line["phase"] == "exit" and line["code"] != 0:
            begin = last.get(line["who"], line["t"])
            found.append(Interval("crash", frozenset({line["who"]}), begin, line["t"] + plan.lease, 1.0, dict(line)))
    return found


def _blocked(plan: Plan, executions: dict[str, list[Execution]]) -> list[Interval]:
    """Agents that blocked their event loop. What is held then keeps its lease; what was handed out and not read cannot."""
    kinds = {uid: task["kind"] for uid, task in plan.tasks().items()}
    found: list[Interval] = []
    for run in (run for uid, runs in executions.items() if kinds.get(uid) == "block" for run in runs):
        if run.end is not None:
            weight = 1.0 if run.end - run.start >= BEARABLE * plan.lease else 0.5
            found.append(Interval("blocked", frozenset({run.actor}), run.start, run.end + plan.lease, weight))
    return found


def _starved(plan: Plan, lines: list[Line], stopped: list[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for line in lines:
        if line["op"] != "starved":
            continue
        actor, end, begin = line["actor"], line["t"], line["t"] - line["seconds"]
        actors = None if actor == "driver" else frozenset({actor})  # the driver carries everybody's traffic
        alike = [fault for fault in stopped if (fault.actors is None) == (actors is None)]
        if any(fault.hits(actor) and fault.begin <= end and fault.end >= begin for fault in alike):
            continue  # that is what being stopped looks like from within
        weight = weight_of("starved", {}, line["seconds"], plan.lease)
        found.append(Interval("starved", actors, begin, end + plan.lease, weight))
    return found
