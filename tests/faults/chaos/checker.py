"""Judges a run: pure functions over what actors wrote and what Redis holds at the end.

Each rule has a name; a violation says which, of which task, and why.

lost        an acknowledged task is neither terminal nor visible; one that was refused exists
stuck       something still waits, runs or is delayed long after the last fault
phantom     a task is completed, or dead as failed, though no execution says so, or under another fence than its own
duplicate   an execution too many, without faults enough to explain it; dead as crashed without a crash
terminal    more or other than one terminal record: two dead letters, completed and dead, counters that say otherwise
fence       a fence used twice, lower than one started before, or a settle accepted of an owner that had lost the task
backoff     a retry before its time, or an attempt that no failure has made
keyspace    the counters do not add up, a key without need or time to live, consumers or connections left over
leak        a process that ended well left tasks, threads or descriptors; one that ended badly by itself
stalled     a killed worker's tasks did not run elsewhere in time
zombie      an agent went on although another execution of its task had started
cancelled   a task ran after its cancellation was confirmed, or is not terminal as it was told
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.faults.chaos.agents import LATER
from tests.faults.chaos.evidence import FATAL, Evidence, Execution, Interval
from tests.faults.chaos.server import Final

CLOCKS = 0.02
"""Seconds by which the Redis clock and CLOCK_MONOTONIC may differ over a backoff."""

UNPROVEN = 700.0
"""Seconds that the name of a consumer may stay which died without a proof of it."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a run broke."""

    rule: str
    text: str
    uid: str | None = None

    def __str__(self) -> str:
        return f"{self.rule}: {f'{self.uid}: ' if self.uid else ''}{self.text}"


def check(evidence: Evidence, final: Final) -> list[Violation]:
    """Everything that is wrong with a run, most telling first."""
    states = states_of(evidence, final)
    found: list[Violation] = []
    for rule in RULES:
        found += rule(evidence, final, states)
    return found


def explained(evidence: Evidence) -> Counter[str]:
    """Executions beyond the first that faults explain, by the kind of what explains them best."""
    counts: Counter[str] = Counter()
    for runs in evidence.executions.values():
        for earlier, later in _repeats(evidence, runs):
            faults = _excuses(evidence, earlier, later)
            if sum(fault.weight for fault in faults) >= 1.0:
                counts[max(faults, key=_telling).kind] += 1
    return counts


def _telling(fault: Interval) -> tuple[float, bool, bool]:
    """What a fault says about an execution too many: its weight, whether it hit the owner alone, whether it ended it."""
    return fault.weight, fault.actors is not None, fault.kind in FATAL


# -- what became of each task


def states_of(evidence: Evidence, final: Final) -> dict[str, str]:
    """uid → completed | dead | cancelled | visible | none, for every task that a producer has tried to send."""
    dead = {letter["uid"] for letter in final.letters}
    visible = _visible(evidence, final)
    states: dict[str, str] = {}
    for uid in evidence.produced:
        record = _record(evidence, final, uid)
        if record is not None:
            states[uid] = str(record["outcome"])
        elif uid in dead:
            states[uid] = "dead"
        elif uid in visible:
            states[uid] = "visible"
        else:
            finished = any(run.how == "ok" for run in evidence.executions.get(uid, ()))
            states[uid] = "completed" if finished else "none"
    return states


def _visible(evidence: Evidence, final: Final) -> set[str]:
    by_id = {task_id: uid for uid, ids in evidence.ids.items() for task_id in ids}
    return {by_id.get(name.partition(" ")[0], name.partition(" ")[0]) for name in final.visible}


def _record(evidence: Evidence, final: Final, uid: str) -> dict[str, Any] | None:
    return next((final.records[name] for name in evidence.ids.get(uid, ()) if name in final.records), None)


# -- rules


def _lost(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    for uid, known in evidence.produced.items():
        runs = evidence.executions.get(uid, [])
        if known == "fail" and (runs or states[uid] != "none"):
            yield Violation("lost", f"its produce was refused, yet it is {states[uid]}", uid)
        if states[uid] == "none" and (known == "ok" or runs) and not _excused_loss(evidence, uid):
            yield Violation("lost", f"produce {known}, {len(runs)} executions, none finished, no record", uid)


def _excused_loss(evidence: Evidence, uid: str) -> bool:
    """With ``everysec``, a kill of the server may take what was done in the two seconds before it."""
    if evidence.plan.fsync == "always":
        return False
    mine = [line for line in evidence.lines if line.get("uid") == uid or uid in line.get("tasks", ())]
    times = [line["t"] for line in mine]
    kills = [fault for fault in evidence.faults if fault.kind == "redis_kill"]
    return any(fault.begin - 2.5 <= t <= fault.begin + 0.5 for fault in kills for t in times)


def _stuck(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    left = sum(final.waiting) + sum(final.pending) + final.delayed
    if not final.quiet or left:
        names = ", ".join(final.visible[:5])
        facts = f"waiting {final.waiting}, in flight {final.pending}, delayed {final.delayed}: {names}"
        yield Violation("stuck", f"not at rest {evidence.plan.quiet_limit:g} s after the last fault: {facts}")


def _phantom(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    reasons = {letter["uid"]: letter for letter in final.letters}
    for uid, state in states.items():
        runs = evidence.executions.get(uid, [])
        done = [run for run in runs if run.how == "ok"]
        record = _record(evidence, final, uid)
        if state == "completed" and not done:
            yield Violation("phantom", "completed, but no execution ended well", uid)
        elif state == "completed" and record is not None:
            fence = record["value"]["fence"]
            if fence not in {run.fence for run in done}:
                yield Violation("phantom", f"its record has fence {fence}, which no finished execution had", uid)
        if state == "dead" and uid in reasons:
            yield from _dead(evidence, uid, reasons[uid], runs)


def _dead(evidence: Evidence, uid: str, letter: dict[str, Any], runs: list[Execution]) -> Iterator[Violation]:
    reason, kind = letter["reason"], evidence.tasks[uid]["kind"]
    if reason in {"failed", "timed_out", "rejected"}:
        if not any(run.how in {"fail", "info"} for run in runs):
            yield Violation("phantom", f"dead as {reason}, but no execution failed", uid)
        if kind in {"quick", "sleep", "long", "thread", "block", "flaky", "later"}:
            yield Violation("phantom", f"dead as {reason}, but its agent never fails: {letter['error']}", uid)
    elif reason == "crashed":
        if not any(fault.weight >= 1.0 for fault in evidence.faults):
            yield Violation("duplicate", "dead as crashed, but nothing has crashed", uid)
    else:
        yield Violation("phantom", f"dead as {reason}: {letter['error']}", uid)


def _repeats(evidence: Evidence, runs: list[Execution]) -> Iterator[tuple[Execution, Execution]]:
    """Pairs of executions, the second of which is no retry of the first."""
    for earlier, later in zip(runs, runs[1:], strict=False):
        timed = evidence.tasks[earlier.uid].get("timeout") is not None
        failed = earlier.how == "fail" or (timed and earlier.how == "info")
        if not (failed and later.attempt == earlier.attempt + 1):
            yield earlier, later


def _excuses(evidence: Evidence, earlier: Execution, later: Execution) -> list[Interval]:
    """What the owner that lost the task suffered, up to the later start."""
    owner = earlier if earlier.fence <= later.fence else later
    begin = min(earlier.start, owner.start) - 2 * evidence.plan.lease * (owner is later or _was_late(evidence, owner))
    faults = evidence.overlapping(owner.actor, begin, later.start)
    # a blocked loop excuses the loss of what it could not read yet, not of what it held (A9)
    return [fault for fault in faults if fault.kind != "blocked" or owner.start > fault.end - evidence.plan.lease]


def _was_late(evidence: Evidence, owner: Execution) -> bool:
    """Whether its worker could not read what it had been handed until just before it began."""
    near = evidence.overlapping(owner.actor, owner.start, owner.start)
    return any(fault.kind == "blocked" and fault.end - evidence.plan.lease <= owner.start for fault in near)


def _duplicate(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    for uid, runs in evidence.executions.items():
        for earlier, later in _repeats(evidence, runs):
            faults = _excuses(evidence, earlier, later)
            if sum(fault.weight for fault in faults) < 1.0:
                seen = ", ".join(f"{fault.kind} ({fault.weight:g})" for fault in faults) or "none"
                text = f"ran again on {later.actor} after {earlier.actor} ({earlier.how}); faults: {seen}"
                yield Violation("duplicate", text, uid)


def _terminal(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    letters = Counter(letter["uid"] for letter in final.letters)
    for uid, count in letters.items():
        if count > 1:
            yield Violation("terminal", f"{count} dead letters", uid)
        record = _record(evidence, final, uid)
        if record is not None and record["outcome"] != "dead":
            yield Violation("terminal", f"a dead letter, and a record that says {record['outcome']}", uid)
    for uid, state in states.items():
        if state == "dead" and not letters[uid]:
            yield Violation("terminal", "its record says dead, but there is no dead letter", uid)
    if evidence.plan.fsync == "always":
        yield from _counted(evidence, final, states)


def _counted(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    """What Redis counted is what the histories know; a task that nobody knows of shows here, or one that ended twice."""
    there = {uid for uid, state in states.items() if state != "none" or evidence.produced[uid] == "ok"}
    known = Counter(states[uid] for uid in there)
    expected = {
        "produced": len(there),
        "completed": known["completed"],
        "dead": known["dead"],
        "cancelled": known["cancelled"],
    }
    for name, count in expected.items():
        if final.counters.get(name, 0) != count:
            text = f"Redis counted {final.counters.get(name, 0)} {name}, the histories know {count}"
            yield Violation("terminal", text)
    if final.counters.get("lost", 0):
        yield Violation("lost", f"Redis counted {final.counters['lost']} lost")


def _fence(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    for uid, runs in evidence.executions.items():
        for i, later in enumerate(runs):
            for earlier in runs[:i]:
                if evidence.destroyed(earlier.start - 2 * evidence.plan.lease, later.start):
                    continue
                if later.fence == earlier.fence:
                    yield Violation("fence", f"{earlier.actor} and {later.actor} both had fence {later.fence}", uid)
                elif later.fence < earlier.fence and not _late_start(evidence, later):
                    text = f"{later.actor} began with fence {later.fence} after {earlier.actor} with {earlier.fence}"
                    yield Violation("fence", text, uid)
        yield from _accepted(evidence, final, uid, runs)


def _late_start(evidence: Evidence, run: Execution) -> bool:
    """One that was kept from going on may begin what it had read before, until it learns that the lease is over."""
    faults = evidence.overlapping(run.actor, run.start - 2 * evidence.plan.lease, run.start)
    return sum(fault.weight for fault in faults) >= 1.0


def _accepted(evidence: Evidence, final: Final, uid: str, runs: list[Execution]) -> Iterator[Violation]:
    """No settle counts of an execution beside which a newer one had started."""
    record = _record(evidence, final, uid)
    if record is None or record["outcome"] != "completed":
        return
    value, outdated = record["value"], []
    for run in runs:
        if run.how == "ok" and run.fence == value["fence"] and run.actor == value.get("actor", run.actor):
            newer = next((other for other in runs if _outdates(evidence, other, run)), None)
            if newer is None:
                return  # this one it was
            outdated.append((run, newer))
    for run, newer in outdated:
        text = f"the settle of {run.actor} (fence {run.fence}) counted after {newer.actor} had {newer.fence}"
        yield Violation("fence", text, uid)


def _outdates(evidence: Evidence, other: Execution, run: Execution) -> bool:
    if other.fence <= run.fence or run.end is None or other.start >= run.end:
        return False
    return not evidence.destroyed(min(run.start, other.start), max(run.start, other.start))


def _backoff(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    for uid, runs in evidence.executions.items():
        task = evidence.tasks[uid]
        timed = task.get("timeout") is not None
        failures = [run for run in runs if run.how == "fail" or (timed and run.how == "info")]
        for run in runs:
            before = [one for one in failures if one.start < run.start]
            if run.attempt > 1 + len(before):
                yield Violation("backoff", f"attempt {run.attempt} after {len(before)} failures", uid)
            ends = [one.end for one in before if one.attempt == run.attempt - 1 and one.end is not None]
            if not ends:
                continue
            least = LATER if task["kind"] == "later" else evidence.plan.retry_base * 2.0 ** (run.attempt - 2)
            if run.start < min(ends) + least - CLOCKS:
                waited = run.start - min(ends)
                yield Violation("backoff", f"attempt {run.attempt} after {waited:.3f} s, due after {least:g} s", uid)


def _keyspace(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    if not final.adds_up:
        yield Violation("keyspace", f"the counters do not add up: {final.counters}")
    if final.no_ttl:
        yield Violation("keyspace", f"without a time to live: {', '.join(final.no_ttl[:5])}")
    if len(left := _consumers_left(evidence, final)) > evidence.plan.workers:
        yield Violation("keyspace", f"{len(left)} consumers are left: {', '.join(sorted(left)[:5])}")
    if final.clients:
        yield Violation("keyspace", f"connections are left: {', '.join(final.clients[:5])}")


def _consumers_left(evidence: Evidence, final: Final) -> set[str]:
    """Names in Redis that nobody needs. One that cannot be proven dead may stay until it is old."""
    end = evidence.lines[-1]["t"] if evidence.lines else 0.0
    crashed = [fault for fault in evidence.faults if fault.kind == "crash" and fault.end > end - UNPROVEN]
    return {name for name in final.consumers if not any(fault.hits(name) for fault in crashed)}


def _leak(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    reports = {line["actor"]: line for line in evidence.lines if line["op"] == "actor" and line["phase"] == "end"}
    for line in evidence.lines:
        if line["op"] == "process" and line["phase"] == "hang":
            yield Violation("leak", f"{line['who']} did not end after SIGTERM")
        elif line["op"] == "process" and line["phase"] == "exit":
            report = reports.get(line["who"])
            if line["code"] == 0 and report is None:
                yield Violation("leak", f"{line['who']} ended without a word")
            elif line["code"] == 0 and report is not None and any(report["leaked"].values()):
                yield Violation("leak", f"{line['who']} left {report['leaked']}")
            elif line["code"] not in {0, 9, -9, -11, -15}:  # killed, crashed by an agent, or ended before it listened
                yield Violation("leak", f"{line['who']} ended with status {line['code']}")
        elif line["op"] == "actor" and line["phase"] == "stop" and not line["asked"]:
            yield Violation("leak", f"the dispatcher of {line['actor']} gave up")


def _stalled(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    limit = evidence.plan.resume_within
    if limit is None:
        return
    found: list[Violation] = []
    for kill in (fault for fault in evidence.faults if fault.kind == "worker_kill"):
        for uid, runs in evidence.executions.items():
            for run, later in zip(runs, [*runs[1:], None], strict=True):
                if not (kill.hits(run.actor) and run.start < kill.begin and run.end is None):
                    continue
                if later is None or later.start > kill.begin + limit:
                    waited = "never" if later is None else f"after {later.start - kill.begin:.2f} s"
                    text = f"killed with {run.actor}, ran again {waited}, owed {limit:g} s"
                    found.append(Violation("stalled", text, uid))
    if len(found) > evidence.plan.may_stall:
        yield from found


def _zombie(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    slack = evidence.plan.lease + evidence.plan.zombie_slack
    last = evidence.lines[-1]["t"] if evidence.lines else 0.0
    for uid, runs in evidence.executions.items():
        if evidence.tasks[uid]["kind"] in {"stubborn", "block", "thread"}:
            continue  # these cannot be cancelled
        for old in runs:
            newer = [run.start for run in runs if run.fence > old.fence and run.start > old.start]
            faults = evidence.overlapping(old.actor, old.start, last) if newer else []
            if not newer or any(fault.kind in {"worker_kill", "crash", "group_destroy"} for fault in faults):
                continue
            known = max([min(newer), *(f.end for f in faults if f.begin <= (old.end or last))])
            if (old.end or last) > known + slack:
                text = f"{old.actor} went on for {(old.end or last) - known:.2f} s beside a newer execution"
                yield Violation("zombie", text, uid)


def _cancelled(evidence: Evidence, final: Final, states: dict[str, str]) -> Iterator[Violation]:
    for uid, lines in evidence.cancels.items():
        for line in lines:
            if line["phase"] != "ok" or line["result"] != "cancelled":
                continue
            late = [run for run in evidence.executions.get(uid, ()) if run.start > line["t"]]
            if late:
                yield Violation("cancelled", f"ran on {late[0].actor} after its cancellation was confirmed", uid)
            if states.get(uid) != "cancelled":
                yield Violation("cancelled", f"told to be cancelled, but it is {states.get(uid)}", uid)


Rule = Callable[[Evidence, Final, dict[str, str]], Iterator[Violation]]
RULES: tuple[Rule, ...] = (
    _lost,
    _stuck,
    _phantom,
    _duplicate,
    _terminal,
    _fence,
    _backoff,
    _keyspace,
    _leak,
    _stalled,
    _zombie,
    _cancelled,
)
