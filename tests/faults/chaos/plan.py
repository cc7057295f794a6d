"""One seed → a workload and a list of faults; saved as JSON before the run, so that it can be replayed.

A fault has a trigger: ``at`` seconds after the producers began, or ``after`` [name, count]: when so many replies to a
command or script have passed the workers' proxies. Pure: no I/O but :meth:`Plan.save` and :meth:`Plan.load`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Task: TypeAlias = dict[str, Any]
Fault: TypeAlias = dict[str, Any]


@dataclass(kw_only=True)
class Plan:
    """A run. Times are seconds."""

    seed: int
    seconds: float
    lease: float = 1.5
    workers: int = 3
    producers: int = 2
    concurrency: int = 20
    max_deliveries: int = 8
    drain: float = 1.0
    timeout: float = 1.5
    """Seconds a reply may take before its connection is given up."""
    retry_base: float = 0.2
    fsync: str = "always"
    named: tuple[int, ...] = (1,)
    """Workers under names that no other process can prove dead: what they held waits for its lease."""
    workers_late: float = 0.0
    """Seconds that workers start after the producers."""
    quiet_limit: float = 45.0
    """Seconds after the last fault within which everything must have ended."""
    resume_within: float | None = None
    """Seconds within which the tasks of a killed worker must run elsewhere."""
    scan_rows: int | None = None
    """Pending rows that one reclaim of a lane looks at, instead of the product's own number."""
    may_stall: int = 0
    """Tasks for which that need not hold: a full worker may have fetched one ahead."""
    zombie_slack: float = 3.0
    """Seconds beyond one lease that an agent may go on after a newer execution has started."""
    mutant: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    """What producers do: ``at producer op`` and for ``produce``: ``how tasks``; tasks have ``uid own kind`` and more."""
    faults: list[Fault] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what :meth:`save` wrote."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "named": tuple(fields["named"])})

    def tasks(self) -> dict[str, Task]:
        """uid → task."""
        return {task["uid"]: task for call in self.calls for task in call.get("tasks", ())}


KINDS = {
    # kind: share of the workload
    "quick": 50,
    "sleep": 15,
    "flaky": 10,
    "later": 4,
    "doomed": 4,
    "reject": 2,
    "long": 3,
    "thread": 4,
    "timeout": 2,
    "stubborn": 1,
    "cancel": 5,
}
CRASHES = {"segv": 0.4, "exit": 0.4, "block": 0.2}
"""Shares of the tasks that hurt their worker; few, because each takes a process down."""


def _task(rng: random.Random, uid: str, kind: str, lease: float) -> Task:
    task: Task = {"uid": uid, "kind": kind, "own": rng.random() < 0.7}
    if kind == "sleep":
        task["s"] = round(rng.uniform(0.01, 0.4), 3)
    elif kind in {"flaky", "later"}:
        task["n"] = rng.randint(1, 2)
    elif kind == "doomed":
        task["max_retries"] = rng.randint(0, 1)
    elif kind == "long":
        task["s"] = round(rng.uniform(1.3, 2.5) * lease, 3)
    elif kind == "timeout":
        task |= {"s": 5.0, "timeout": 0.3, "max_retries": 1}
    elif kind == "stubborn":
        task |= {"s": 0.8, "timeout": 0.3}
    elif kind == "cancel":
        task |= {"s": rng.choice([0.0, 0.5, 2.0]), "own": rng.random() < 0.8, "want": True}
        task |= {"cancel_after": rng.choice([0.0, 0.0, 0.3, 1.0]), "delay": rng.choice([0, 0, 1.5])}
    elif kind in {"segv", "exit"}:
        task["n"] = rng.choice([1, 1, 2])
    elif kind == "block":
        task["s"] = round(rng.uniform(0.8, 1.3) * lease, 3)
    if kind != "cancel":
        if rng.random() < 0.15:
            task["delay"] = round(rng.uniform(0.05, 2.0), 3)
        task["want"] = rng.random() < 0.3
    task["priority"] = rng.choices([0, 1, 2, 3], [1, 2, 6, 2])[0]
    return task


def make_calls(rng: random.Random, plan: Plan, rate: float, crashes: float) -> list[dict[str, Any]]:
    """What producers do in ``plan.seconds`` at ``rate`` tasks a second, ``crashes`` of them a minute hurting a worker."""
    calls: list[dict[str, Any]] = []
    kinds, shares = list(KINDS), list(KINDS.values())
    harm = crashes / 60.0 / rate
    number, at = 0, 0.0
    while at < plan.seconds:
        size = rng.choice([1, 1, 1, 2, 5, 20])
        how = "one" if size == 1 else "many"
        tasks = []
        for _ in range(size):
            kind = rng.choices(kinds, shares)[0]
            if rng.random() < harm:
                kind = rng.choices(list(CRASHES), list(CRASHES.values()))[0]
            tasks.append(_task(rng, f"u{plan.seed}-{number}", kind, plan.lease))
            number += 1
        for own in (True, False):  # a call is alike: what it says of a failure holds for all of it
            for want in (True, False):
                alike = [task for task in tasks if task["own"] is own and task["want"] is want]
                if alike:
                    producer = rng.randrange(plan.producers)
                    calls.append({"at": round(at, 3), "producer": producer, "how": how, "tasks": alike})
        at += size / rate
    return calls


def _seconds(rng: random.Random, plan: Plan) -> float:
    """Below and beyond what a lease bears."""
    return round(rng.choice([rng.uniform(0.15, 0.35), rng.uniform(1.2, 2.5)]) * plan.lease, 3)


def make_fault(rng: random.Random, plan: Plan, kind: str) -> Fault:
    """One fault of a kind, without its trigger."""
    slot = rng.choice([f"w{n}" for n in range(plan.workers)])
    producer = f"p{rng.randrange(plan.producers)}"
    anyone = rng.choice([slot, slot, producer])
    settling, adding = (
        ["complete", "complete_result", "retry", "dead_letter", "renew"],
        ["produce", "produce_one", "produce_many"],
    )
    script = rng.choice([*settling, "promote", *adding, "*"])
    facts: dict[str, Any] = {
        "worker_kill": {"actor": slot},
        "worker_stop": {"actor": slot, "seconds": _seconds(rng, plan)},
        "worker_term": {"actor": slot},
        "producer_kill": {"actor": producer},
        "producer_stop": {"actor": producer, "seconds": round(rng.uniform(0.2, 2.0), 3)},
        "redis_kill": {"seconds": round(rng.uniform(0.0, 1.5), 3)},
        "redis_stop": {"seconds": _seconds(rng, plan)},
        "client_kill": {"which": rng.choice(["all", "reader", "commands"])},
        "client_pause": {"seconds": _seconds(rng, plan), "mode": rng.choice(["ALL", "WRITE"])},
        "script_flush": {},
        "group_destroy": {"lane": rng.randrange(4)},
        "maxmemory": {"seconds": round(rng.uniform(0.3, 2.0), 3)},
        "reply_lost": {"actor": anyone, "name": script, "how": rng.choice(["rst", "fin", "stay"])},
        "reply_late": {"actor": anyone, "name": script, "seconds": round(plan.timeout + 0.7, 3)},
        "truncated": {"actor": anyone, "count": rng.randrange(1, 4000), "how": rng.choice(["rst", "fin"])},
        "reset": {"actor": anyone},
        "half_close": {"actor": anyone, "direction": rng.choice(["up", "down"])},
        "black_hole": {
            "actor": anyone,
            "direction": rng.choice(["up", "down", "both"]),
            "seconds": _seconds(rng, plan),
        },
        "refused": {"actor": anyone, "seconds": round(rng.uniform(0.2, 1.0), 3)},
        "latency": {"actor": anyone, "delay": round(rng.uniform(0.005, 0.06) * plan.lease, 3), "seconds": 2.0},
    }
    return {"kind": kind, **facts[kind]}


FAULTS = (
    "worker_kill worker_stop worker_term producer_kill producer_stop redis_kill redis_stop client_kill client_pause "
    "script_flush group_destroy maxmemory reply_lost reply_late truncated reset half_close black_hole refused latency"
).split()


def make_faults(rng: random.Random, plan: Plan, kinds: list[str], every: float) -> list[Fault]:
    """Faults about ``every`` seconds, every kind in turn before one comes again; a third of them with logical triggers."""
    faults: list[Fault] = []
    bag: list[str] = []
    at = 0.5
    while at < plan.seconds:
        if not bag:
            bag = rng.sample(kinds, len(kinds))
        fault = make_fault(rng, plan, bag.pop())
        fault["at"] = round(at, 3)
        if rng.random() < 0.35:
            name = rng.choice(["complete", "complete_result", "retry", "promote", "take"])
            fault["after"] = [name, rng.randint(1, 20)]  # counted from `at` on
        faults.append(fault)
        at += rng.expovariate(1.0 / every)
    return faults


def make_plan(
    seed: int,
    seconds: float,
    *,
    rate: float = 60.0,
    kinds: list[str] | None = None,
    every: float = 0.7,
    crashes: float = 6.0,
    **settings: Any,
) -> Plan:
    """The plan of a seed. ``kinds``: faults to draw from (None: all, empty: none)."""
    plan = Plan(seed=seed, seconds=seconds, **settings)
    kinds = FAULTS if kinds is None else kinds
    plan.calls = make_calls(random.Random(f"{seed} tasks"), plan, rate, crashes if kinds else 0.0)
    plan.faults = make_faults(random.Random(f"{seed} faults"), plan, kinds, every) if kinds else []
    return plan
