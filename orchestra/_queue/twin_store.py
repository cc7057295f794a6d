"""The queue protocol of ``lua/*.lua`` as plain functions over dicts: the state behind :class:`InMemoryTaskQueue`.

One method stands for one script and keeps its invariants: a task is in exactly one of lane, in flight, delayed, dead or
terminal; only the holder of a delivery, at its delivery count, ends it; every task ends with one terminal record.
Owns the state and its arithmetic; refuses to wait, to decode frames and to emit events: that is the queue's part.
Every method is atomic because nothing here awaits; all handles of one store belong to one event loop.
Due times and leases are durations by ``clock.monotonic()``; entry ids and times of death are ``clock.time()``.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestra._delivery import OFF_MS
from orchestra.tasks import LANES, Cancellation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestra._clock import Clock
    from orchestra._delivery import Sooner
    from orchestra.serialization import EncodedTask

MARK_TTL, MOST_MARKS = 86_400.0, 100_000
"""Seconds a cancel mark is kept, and how many at most."""
COUNTERS = (
    "produced",
    "completed",
    "dead",
    "cancelled",
    "retried",
    "throttled",
    "released",
    "reclaimed",
    "replayed",
    "duplicates",
    "lost",
)


class Entry(NamedTuple):
    """A task where it waits: its frame, retries consumed, deliveries before this entry, and its generation.

    ``front``: it was in its lane before, and goes before those that were not.
    """

    frame: bytes
    retries: int = 0
    before: int = 0
    generation: int = 0
    front: bool = False

    def fields(self) -> tuple[bytes, ...]:
        """As a stream entry's fields, the form in which a delivery takes them."""
        if not (self.retries or self.before or self.generation):
            return (b"t", self.frame)
        return (
            *(b"t", self.frame, b"n", b"%d" % self.retries),
            *(b"d", b"%d" % self.before, b"g", b"%d" % self.generation),
        )


@dataclass(slots=True)
class Held:
    """An entry in flight: who holds it, how often it was handed out, and since when."""

    entry: Entry
    consumer: str
    deliveries: int
    since: float


@dataclass(slots=True)
class Lane:
    """One priority level. ``front`` goes before ``waiting``; ``pending`` is ordered by ``since``: a reclaim may stop at the first fresh lease."""

    front: deque[tuple[bytes, Entry]] = field(default_factory=deque)
    waiting: deque[tuple[bytes, Entry]] = field(default_factory=deque)
    pending: dict[bytes, Held] = field(default_factory=dict)


class Why(NamedTuple):
    """Why a task is dead. ``task_id`` is empty for an entry that cannot be read; ``error`` is encoded."""

    task_id: str
    reason: str
    attempts: int
    error: bytes


class Dead(NamedTuple):
    """A dead letter as it is kept; ``died_at`` is unix seconds."""

    lane: int
    entry: Entry
    why: Why
    died_at: float


class MemoryStore:
    """All state of one queue."""

    def __init__(self, clock: Clock, *, max_length: int, dedup_window: float, result_ttl: float) -> None:
        self.clock = clock
        self.max_length = max_length
        self.dedup_window = dedup_window
        self.result_ttl = result_ttl
        self.lanes = tuple(Lane() for _ in range(LANES))
        self.due: list[tuple[float, int, str]] = []
        self.delayed: dict[str, tuple[int, Entry]] = {}
        self.dead: dict[tuple[int, int], Dead] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.consumers: dict[str, float] = {}
        self.kept: dict[str, int] = {}
        self._known: dict[str, tuple[str, float]] = {}
        self._results: dict[str, tuple[bytes, float]] = {}
        self._marks: dict[str, tuple[tuple[int, int], float]] = {}
        self.marked_times = 0
        """Cancel marks made so far."""
        self._steps: dict[str, bytes] = {}
        self._last_id = (0, -1)
        self._order = 0
        self._locks: dict[str, tuple[str, float]] = {}
        self._fences: dict[str, int] = {}

    @property
    def depth(self) -> int:
        """Live tasks: waiting, in flight and delayed."""
        return len(self.delayed) + sum(len(lane.front) + len(lane.waiting) + len(lane.pending) for lane in self.lanes)

    def new_id(self) -> tuple[int, int]:
        """The next entry id, as ``XADD *`` draws it: strictly increasing even when the wall clock goes back."""
        ms, last = int(self.clock.time() * 1000), self._last_id
        self._last_id = (ms, 0) if ms > last[0] else (last[0], last[1] + 1)
        return self._last_id

    def add(self, lane: int, entry: Entry) -> str:
        """Append to a lane; returns the message id."""
        ms, number = self.new_id()
        ident = f"{ms}-{number}"
        there = self.lanes[lane]
        (there.front if entry.front else there.waiting).append((ident.encode(), entry))
        return f"{lane}:{ident}"

    # -- in: produce.lua, produce_one.lua, promote.lua

    def fits(self, count: int) -> bool:
        """Whether ``count`` more tasks are within the length limit."""
        return not self.max_length or self.depth + count <= self.max_length

    def produce(self, tasks: Sequence[EncodedTask]) -> list[tuple[str, bool]]:
        """Add tasks that fit; returns ``(message id, whether it was added)`` in order."""
        now = self.clock.monotonic()
        _expire(self._known, now)
        out = []
        for task in tasks:
            known = self._known.get(task.id) if task.own_id else None
            if known is not None:
                self.counters["duplicates"] += 1
                out.append((known[0], False))
                continue
            if task.delay > 0:
                self._delay(task.id, task.lane, Entry(task.frame), now + task.delay)
                where = f"z:{task.id}"
            else:
                where = self.add(task.lane, Entry(task.frame))
            if task.own_id:
                self._known[task.id] = (where, now + self.dedup_window)
            self.counters["produced"] += 1
            out.append((where, True))
        return out

    def _delay(self, task_id: str, lane: int, entry: Entry, due: float) -> None:
        self._order += 1
        member = task_id if task_id not in self.delayed else f"{task_id} {self._order}"
        self.delayed[member] = (lane, entry)
        heapq.heappush(self.due, (due, self._order, member))

    def promote(self, consumer: str) -> int:
        """Note that ``consumer`` is alive and move due tasks to their lanes, earliest first; returns how many."""
        moved, now = 0, self.clock.monotonic()
        self.consumers[consumer] = now
        while self.due and self.due[0][0] <= now:
            member = heapq.heappop(self.due)[2]
            self.add(*self.delayed.pop(member))
            moved += 1
        return moved

    async def hasten(self, moves: Sequence[Sooner]) -> int:
        """See :class:`~orchestra._queue.base.Delays`. O(delayed)."""
        moved, wanted = 0, {each.task_id: each for each in moves}
        ahead = self.clock.monotonic() - time.monotonic()
        for place, (due, order, member) in enumerate(self.due):
            each = wanted.get(member)
            if each is None or not self.delayed[member][1].front:
                continue  # a retry, or a delay that its sender wished for
            if each.at + ahead < due and abs(due - each.was - ahead) <= OFF_MS / 1000:
                self.due[place] = (each.at + ahead, order, member)
                moved += 1
        heapq.heapify(self.due)
        return moved

    def next_due_in(self) -> float | None:
        """Seconds until the next delayed task is due, 0 if it is already; None without one."""
        return max(0.0, self.due[0][0] - self.clock.monotonic()) if self.due else None

    # -- out: take.lua, reclaim.lua, retire.lua

    def take(self, consumer: str, count: int) -> list[tuple[int, bytes, Held]]:
        """Hand out up to ``count`` waiting tasks, most urgent lane first."""
        now = self.clock.monotonic()
        out: list[tuple[int, bytes, Held]] = []
        for number, lane in enumerate(self.lanes):
            while (line := lane.front or lane.waiting) and len(out) < count:
                ident, entry = line.popleft()
                held = lane.pending[ident] = Held(entry, consumer, 1, now)
                out.append((number, ident, held))
        return out

    def reclaim(self, consumer: str, lease: float, room: int) -> list[tuple[int, bytes, Held]]:
        """Take over up to ``room`` deliveries that were handed out ``lease`` seconds ago or earlier."""
        now = self.clock.monotonic()
        out: list[tuple[int, bytes, Held]] = []
        for number, lane in enumerate(self.lanes):
            for ident in [*self._expired(lane, now - lease, room - len(out))]:
                old = lane.pending.pop(ident)
                # A new object: the delivery that was handed out before keeps the count that makes it stale.
                held = lane.pending[ident] = Held(old.entry, consumer, old.deliveries + 1, now)
                out.append((number, ident, held))
        self.counters["reclaimed"] += len(out)
        return out

    def _expired(self, lane: Lane, latest: float, room: int) -> Iterator[bytes]:
        for ident, held in lane.pending.items():
            if held.since > latest or room <= 0:
                return
            if held.consumer not in self.kept:
                room -= 1
                yield ident

    def next_expiry_in(self, lease: float) -> float | None:
        """Seconds until the first lease runs out that nobody renews; None without one."""
        now = self.clock.monotonic()
        first = (
            next((held.since for held in lane.pending.values() if held.consumer not in self.kept), None)
            for lane in self.lanes
        )
        return min((max(0.0, since + lease - now) for since in first if since is not None), default=None)

    def keep(self, consumer: str) -> None:
        """From now on no lease of ``consumer`` runs out; nests."""
        self.kept[consumer] = self.kept.get(consumer, 0) + 1

    def unkeep(self, consumer: str) -> None:
        """Undo one :meth:`keep`; after the last, every lease of ``consumer`` starts anew."""
        self.kept[consumer] -= 1
        if self.kept[consumer]:
            return
        del self.kept[consumer]
        now = self.clock.monotonic()
        for lane in self.lanes:
            for ident in [ident for ident, held in lane.pending.items() if held.consumer == consumer]:
                held = lane.pending.pop(ident)  # reinserted behind the others: the order by ``since`` holds
                held.since = now
                lane.pending[ident] = held

    def holds(self, lane: int, ident: bytes, consumer: str, deliveries: int) -> bool:
        """Whether ``consumer`` holds this entry at this delivery count."""
        held = self.lanes[lane].pending.get(ident)
        return held is not None and held.consumer == consumer and held.deliveries == deliveries

    def retire(self, consumer: str) -> bool:
        """Forget a consumer that holds nothing; False when it does."""
        if any(held.consumer == consumer for lane in self.lanes for held in lane.pending.values()):
            return False
        self.consumers.pop(consumer, None)
        return True

    # -- ends: complete.lua, complete_result.lua, retry.lua, dead_letter.lua; the caller has checked holds()

    def complete(self, lane: int, ident: bytes) -> None:
        """End a delivery whose task is done."""
        del self.lanes[lane].pending[ident]
        self.counters["completed"] += 1

    def retry(self, lane: int, ident: bytes, task_id: str, delay: float, counter: str) -> bool:
        """Move a delivery to the delayed set, or straight back to its lane; True when it can be taken at once."""
        held = self.lanes[lane].pending.pop(ident)
        entry = held.entry._replace(
            retries=held.entry.retries + (counter == "retried"),
            before=held.entry.before + held.deliveries,
            front=counter != "retried",
        )
        if delay > 0:
            self._delay(task_id, lane, entry, self.clock.monotonic() + delay)
        else:
            self.add(lane, entry)
        self.counters[counter] += 1
        return delay <= 0

    def bury(self, lane: int, ident: bytes, why: Why) -> None:
        """Move a delivery to the dead letters."""
        entry = self.lanes[lane].pending.pop(ident).entry
        self.dead[self.new_id()] = Dead(lane, entry, why, self.clock.time())
        self.counters["dead"] += 1

    # -- cancel.lua, cancelled.lua

    def cancel(self, task_id: str, ident: bytes, message_id: str | None, record: bytes) -> Cancellation:
        """Cancel a task where it waits, else mark it. ``ident``: the id as it stands in a frame. O(tasks of its lane)."""
        if task_id in self.delayed:
            self.keep_result(task_id, record)
            self._keep_step(task_id, self.delayed[task_id][1].frame)
            del self.delayed[task_id]
            self.due = [item for item in self.due if item[2] != task_id]
            heapq.heapify(self.due)
            self.counters["cancelled"] += 1
            return Cancellation.CANCELLED
        in_flight = False
        for place in (message_id, self._known.get(task_id, ("", 0.0))[0]):
            number, _, entry = str(place).partition(":")
            if len(number) != 1 or number not in "01234567":
                continue
            lane, name = self.lanes[int(number) % LANES], entry.encode()
            held = lane.pending.get(name)
            in_flight = in_flight or (held is not None and held.entry.frame.startswith(ident, 2))
            frame = None if in_flight else self._remove_waiting(lane, name, ident)
            if frame is not None:
                self.keep_result(task_id, record)
                self._keep_step(task_id, frame)
                self.counters["cancelled"] += 1
                return Cancellation.CANCELLED
        if not in_flight and self.result(task_id) is not None:
            return Cancellation.ENDED
        self._mark(task_id)
        return Cancellation.REQUESTED

    @staticmethod
    def _remove_waiting(lane: Lane, name: bytes, ident: bytes) -> bytes | None:
        for line in (lane.front, lane.waiting):
            for at, (waiting, entry) in enumerate(line):
                if waiting == name and entry.frame.startswith(ident, 2):
                    del line[at]
                    return entry.frame
        return None

    def _keep_step(self, task_id: str, frame: bytes) -> None:
        if b"orchestra.step" in frame:
            self._steps[task_id] = frame

    async def steps(self, count: int) -> list[tuple[str, bytes]]:
        """See :class:`~orchestra._queue.base.CancelledSteps`."""
        return list(itertools.islice(self._steps.items(), count))

    async def forget_steps(self, task_ids: Sequence[str]) -> None:
        """See :class:`~orchestra._queue.base.CancelledSteps`."""
        for task_id in task_ids:
            self._steps.pop(task_id, None)

    def _mark(self, task_id: str) -> None:
        now = self.clock.monotonic()
        self._marks.pop(task_id, None)  # reinserted at the end: the order by expiry holds
        _expire(self._marks, now)
        while len(self._marks) >= MOST_MARKS:
            del self._marks[next(iter(self._marks))]
        self._marks[task_id] = (self._last_id, now + MARK_TTL)
        self.marked_times += 1

    def is_marked(self, task_id: str, ident: bytes) -> bool:
        """Whether the task of this entry is to be cancelled: a mark covers the entries that existed when it was made."""
        mark = self._marks.get(task_id)
        if mark is None or mark[1] <= self.clock.monotonic():
            return False
        ms, _, number = ident.partition(b"-")
        return (int(ms), int(number)) <= mark[0]

    def end_cancelled(self, lane: int, ident: bytes, task_id: str) -> None:
        """End a delivery whose task was cancelled."""
        self._keep_step(task_id, self.lanes[lane].pending[ident].entry.frame)
        del self.lanes[lane].pending[ident]
        self._marks.pop(task_id, None)
        self.counters["cancelled"] += 1

    # -- dead letters: replay.lua

    def replay(self, ident: tuple[int, int]) -> bool:
        """Put a dead letter back into its lane as a new generation; False when it is not there."""
        dead = self.dead.pop(ident, None)
        if dead is None:
            return False
        self.add(dead.lane, Entry(dead.entry.frame, 0, 0, dead.entry.generation + 1))
        self._results.pop(dead.why.task_id, None)
        self.counters["replayed"] += 1
        return True

    # -- results

    def keep_result(self, task_id: str, record: bytes) -> None:
        """Keep a terminal record for ``result_ttl`` seconds."""
        now = self.clock.monotonic()
        self._results.pop(task_id, None)  # reinserted at the end: the order by expiry holds
        _expire(self._results, now)
        self._results[task_id] = (record, now + self.result_ttl)

    def result(self, task_id: str) -> bytes | None:
        """The terminal record of a task, while it is kept."""
        _expire(self._results, self.clock.monotonic())
        kept = self._results.get(task_id)
        return kept[0] if kept else None

    # -- locks: lock_*.lua

    def lock(self, name: str, token: str, ttl: float) -> tuple[int, float]:
        """``(fence, 0.0)`` when held by ``token`` now, else ``(0, seconds until it may be free)``."""
        now = self.clock.monotonic()
        holder = self._locks.get(name)
        if holder is not None and holder[1] > now and holder[0] != token:
            return 0, holder[1] - now
        if holder is None or holder[1] <= now:
            self._fences[name] = self._fences.get(name, 0) + 1
        self._locks[name] = (token, now + ttl)
        return self._fences[name], 0.0

    def holds_lock(self, name: str, token: str) -> bool:
        """Whether ``token`` holds the lock."""
        holder = self._locks.get(name)
        return holder is not None and holder[0] == token and holder[1] > self.clock.monotonic()

    def extend_lock(self, name: str, token: str, ttl: float) -> bool:
        """Prolong a lock that ``token`` holds."""
        held = self.holds_lock(name, token)
        if held:
            self._locks[name] = (token, self.clock.monotonic() + ttl)
        return held

    def unlock(self, name: str, token: str) -> bool:
        """Release a lock that ``token`` holds."""
        held = self.holds_lock(name, token)
        if held:
            del self._locks[name]
        return held


def _expire(table: dict[str, tuple[Any, float]], now: float) -> None:
    """Drop what has expired from a table whose insertion order is its order of expiry; O(dropped)."""
    while table:
        key = next(iter(table))
        if table[key][1] > now:
            return
        del table[key]
