"""The protocol of one queue on Redis as plain Python: the state, and one method per script with the script's contract.

A script is atomic, so a sequence of these calls is every interleaving there is. What Redis alone determines (entry ids, the
clock) is open until :mod:`tests.conformance.test_model` has seen it: a new entry has the id None, a time is an interval.
Sources: the headers under ``orchestra/lua``, ARCHITECTURE.md "States of a task".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

LANES = 4
STREAMS = 2 * LANES
"""A lane, and with its number and 4 what stands before it."""


@dataclass(eq=False)
class Entry:
    """A task in a lane; ``moved``: it carries its counts, because a script has put it there."""

    task: str
    frame: bytes
    retries: int = 0
    before: int = 0
    generation: int = 0
    moved: bool = False
    id: bytes | None = None

    @property
    def fields(self) -> tuple[bytes, ...]:
        counts = (self.retries, self.before, self.generation)
        numbers = (b"n", b"%d" % counts[0], b"d", b"%d" % counts[1], b"g", b"%d" % counts[2]) if self.moved else ()
        return (b"t", self.frame, *numbers)

    @property
    def ms(self) -> int:
        return int(self.id.partition(b"-")[0])


@dataclass(eq=False)
class Row:
    """A pending entry; ``since``: the interval in which it was handed out, or its lease renewed, ms."""

    consumer: str
    count: int
    since: tuple[int, int]


@dataclass(eq=False)
class Delayed:
    """A delayed task; ``member`` None: a name that the script made up, because the id was taken."""

    member: str | None
    due: tuple[float, float]
    entry: Entry
    lane: int
    front: bool = False

    @property
    def packed(self) -> tuple[int | bytes, ...]:
        e = self.entry
        return (self.lane, e.retries, e.before, e.generation, e.frame, *((1,) if self.front else ()))


@dataclass(eq=False)
class Dead:
    """A dead letter. ``error``: what its error information must at least contain."""

    entry: Entry
    lane: int
    message_id: bytes
    attempts: int
    reason: str
    error: dict[str, Any]
    id: bytes | None = None


@dataclass
class Model:
    """``now`` is the interval in which the present call runs, ms; ``bucket`` the dedup bucket that is current."""

    now: tuple[int, int] = (0, 0)
    bucket: int = 0
    lanes: list[list[Entry]] = field(default_factory=lambda: [[] for _ in range(STREAMS)])
    pending: list[dict[bytes, Row]] = field(default_factory=lambda: [{} for _ in range(STREAMS)])
    waiting: list[list[Entry]] = field(default_factory=lambda: [[] for _ in range(STREAMS)])
    delayed: list[Delayed] = field(default_factory=list)
    dead: list[Dead] = field(default_factory=list)
    dedup: list[dict[str, Any]] = field(default_factory=lambda: [{}, {}])
    tokens: list[list[tuple[int, Entry | None]]] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    cursors: dict[int, bytes] = field(default_factory=dict)
    alive: dict[str, tuple[float, float]] = field(default_factory=dict)
    marks: dict[str, tuple[float, float]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    grouped: bool = False
    consumers: list[set[str]] = field(default_factory=lambda: [set() for _ in range(STREAMS)])
    """Per lane, names that the group may know: it must know those that hold something."""

    # -- helpers

    def add(self, lane: int, entry: Entry) -> Entry:
        self.lanes[lane].append(entry)
        self.waiting[lane].append(entry)
        return entry

    def find(self, lane: int, entry_id: bytes) -> Entry | None:
        return next((entry for entry in self.lanes[lane] if entry.id == entry_id), None)

    def _remove(self, lane: int, entry_id: bytes) -> None:
        self.pending[lane].pop(entry_id, None)
        self.lanes[lane] = [entry for entry in self.lanes[lane] if entry.id != entry_id]

    def holds(self, lane: int, entry_id: bytes, consumer: str, count: int) -> bool:
        row = self.pending[lane].get(entry_id)
        return row is not None and (row.consumer, row.count) == (consumer, count)

    def live(self) -> int:
        gone = sum(1 for lane in range(STREAMS) for entry_id in self.pending[lane] if not self.find(lane, entry_id))
        return sum(map(len, self.lanes)) + len(self.delayed) + gone

    def adds_up(self) -> bool:
        """No task is lost, none is counted twice."""
        c = self.counters
        ended = c["completed"] + c["dead"] + c["cancelled"] + c["lost"]
        return c["produced"] + c["replayed"] == ended + self.live()

    # -- one method a script

    def produce(self, tasks: list[tuple[int, str, bool, float, bytes]], limit: int = 0) -> list[Any] | None:
        """``tasks``: (lane, id, own id, delay ms, frame). Answers the entry, "z" or ("=", first answer); None: full."""
        live = sum(map(len, self.lanes)) + len(self.delayed)
        if limit and live + len(tasks) > limit:
            return None
        known = {**self.dedup[1 - self.bucket], **self.dedup[self.bucket]}
        out: list[Any] = []
        for lane, task_id, own, delay, frame in tasks:
            if own and task_id in known:
                out.append(("=", known[task_id]))
                self.counters["duplicates"] += 1
                continue
            entry = Entry(task_id, frame)
            if delay:
                self._delay(task_id, None, entry, lane, delay)
                answer, where = "z", f"z:{task_id}"
            else:
                answer, where = self.add(lane, entry), (lane, entry)
            out.append(answer)
            if own:
                known[task_id] = self.dedup[self.bucket][task_id] = where
            self.counters["produced"] += 1
        return out

    def _delay(
        self, task_id: str, second: str | None, entry: Entry, lane: int, delay: float, *, front: bool = False
    ) -> None:
        """Under its id, or if that is taken under ``second`` (None: a name that is not known yet)."""
        member = second if any(d.member == task_id for d in self.delayed) else task_id
        self.delayed.append(Delayed(member, (self.now[0] + delay, self.now[1] + delay + 1), entry, lane, front))

    def take(self, consumer: str, count: int, favoured: int | None = None) -> list[tuple[int, Entry]]:
        """Most urgent lanes first, but for one task of the ``favoured`` lane before them; of each first what is before it."""
        turns = [(lane, count) for lane in range(LANES)]
        found: list[tuple[int, Entry]] = []
        for urgent, most in turns if favoured is None else [(favoured, 1), *turns]:
            had = len(found)
            for lane in (urgent + LANES, urgent):
                room = min(most - (len(found) - had), count - len(found))
                if room <= 0:
                    continue
                self.consumers[lane].add(consumer)
                part = self.waiting[lane][:room]
                del self.waiting[lane][: len(part)]
                for entry in part:
                    self.pending[lane][entry.id] = Row(consumer, 1, self.now)
                found += [(lane, entry) for entry in part]
        return found

    def complete(self, lane: int, entry_id: bytes, consumer: str, count: int) -> bool:
        """False: STALE. The same for all that settle: they change nothing then."""
        if not self.holds(lane, entry_id, consumer, count):
            return False
        self._remove(lane, entry_id)
        self.counters["completed"] += 1
        return True

    def complete_result(self, lane: int, entry_id: bytes, consumer: str, count: int, task: str, value: Any) -> bool:
        if not self.complete(lane, entry_id, consumer, count):
            return False
        self.results[task] = {"id": task, "outcome": "completed", "value": value}
        return True

    def cancelled(self, lane: int, entry_id: bytes, consumer: str, count: int, task: str) -> bool:
        if not self.holds(lane, entry_id, consumer, count):
            return False
        self._remove(lane, entry_id)
        self.results[task] = {"id": task, "outcome": "cancelled"}
        self.marks.pop(task, None)
        self.counters["cancelled"] += 1
        return True

    def retry(
        self, lane: int, entry_id: bytes, consumer: str, count: int, task: str, delay: float, counter: str
    ) -> bool | None:
        """None: marked as cancelled, and left alone."""
        if not self.holds(lane, entry_id, consumer, count):
            return False
        entry = self.find(lane, entry_id)
        if entry is None:  # deleted by a stranger: said at once, instead of waiting for it for ever
            del self.pending[lane][entry_id]
            self.counters["lost"] += 1
            return False
        if task in self.marks and entry.ms <= self.marks[task][0]:
            return None
        retries = entry.retries + (counter == "retried")
        front = counter != "retried"
        moved = Entry(task, entry.frame, retries, entry.before + count, entry.generation, True)
        if delay:
            self._delay(task, f"{task} {entry_id.decode()}", moved, lane % LANES, delay, front=front)
        else:
            self.add(lane % LANES + LANES * front, moved)
        self._remove(lane, entry_id)
        self.counters[counter] += 1
        return True

    def dead_letter(
        self,
        lane: int,
        entry_id: bytes,
        consumer: str,
        count: int,
        entry: Entry,
        verdict: tuple[int, str, dict[str, Any]],
        wanted: bool,
    ) -> bool:
        if not self.holds(lane, entry_id, consumer, count):
            return False
        attempts, reason, error = verdict
        kept = self.find(lane, entry_id) or Entry(entry.task, entry.frame)  # the caller's copy has no generation
        self.dead.append(Dead(kept, lane % LANES, entry_id, attempts, reason, error))
        if wanted:
            record = {"id": entry.task, "outcome": "dead", "reason": reason, "attempts": attempts}
            self.results[entry.task] = record
        self._remove(lane, entry_id)
        self.counters["dead"] += 1
        return True

    def replay(self, letters: list[Dead], wanted: set[str]) -> int:
        replayed = 0
        for letter in letters:
            if letter not in self.dead:
                continue
            entry = letter.entry
            self.add(letter.lane, Entry(entry.task, entry.frame, 0, 0, entry.generation + 1, True))
            if entry.task in wanted:
                self.results.pop(entry.task, None)
            self.dead.remove(letter)
            self.counters["replayed"] += 1
            replayed += 1
        return replayed

    def promote(self, consumer: str, most: int) -> int:
        due = sorted((d for d in self.delayed if d.due[1] <= self.now[0]), key=lambda d: (d.due[0], d.member))[:most]
        for delayed in due:
            entry = delayed.entry
            entry.moved = (entry.retries, entry.before, entry.generation) != (0, 0, 0)
            self.add(delayed.lane + LANES * delayed.front, entry)
            self.delayed.remove(delayed)
        self.alive[consumer] = self.now
        return len(due)

    def reclaim(
        self, lane: int, consumer: str, lease: float, scan: int, room: int, dead: str = ""
    ) -> tuple[list[tuple[Entry, int]], bool]:
        """What was taken, with its new delivery count, and whether every row has been looked at."""
        ids = sorted(self.pending[lane], key=order)
        if dead:
            rows = [entry_id for entry_id in ids if self.pending[lane][entry_id].consumer == dead][:scan]
        else:
            cursor = self.cursors.get(lane)
            rows = [entry_id for entry_id in ids if cursor is None or order(entry_id) > order(cursor)][:scan]
        taken: list[tuple[Entry, int]] = []
        last = None
        for entry_id in rows:
            row = self.pending[lane][entry_id]
            if dead or row.since[1] + lease <= self.now[0]:
                if len(taken) >= room:
                    break
                entry = self.find(lane, entry_id)
                if entry is None:
                    del self.pending[lane][entry_id]
                    self.counters["lost"] += 1
                else:
                    self.pending[lane][entry_id] = Row(consumer, row.count + 1, self.now)
                    self.consumers[lane].add(consumer)
                    self.counters["reclaimed"] += 1
                    taken.append((entry, row.count + 1))
            last = entry_id
        seen = len(rows) < scan and (not rows or last == rows[-1])
        if not dead and seen:
            self.cursors.pop(lane, None)
        elif not dead and last is not None:
            self.cursors[lane] = last
        return taken, seen

    def reconcile(self, lane: int, entry_id: bytes, consumer: str, count: int) -> Entry | None:
        """The delivery handed out once more; None when it was not, because it is gone or somebody else's."""
        if not self.holds(lane, entry_id, consumer, count):
            return None
        entry = self.find(lane, entry_id)
        if entry is None:
            del self.pending[lane][entry_id]
            self.counters["lost"] += 1
            return None
        self.pending[lane][entry_id] = Row(consumer, count + 1, self.now)
        return entry

    def renew(self, lane: int, entry_id: bytes, consumer: str, count: int) -> bool:
        if not self.holds(lane, entry_id, consumer, count):
            return False
        if self.find(lane, entry_id) is None:
            del self.pending[lane][entry_id]
            self.counters["lost"] += 1
            return False
        self.pending[lane][entry_id].since = self.now
        return True

    def retire(self, consumer: str) -> int:
        held = 0
        for lane in range(STREAMS):
            rows = sum(row.consumer == consumer for row in self.pending[lane].values())
            if not rows:
                self.consumers[lane].discard(consumer)
            held += rows
        if not held:
            self.alive.pop(consumer, None)
        return held

    def cancel(self, task: str, place: tuple[int, bytes] | None) -> str:
        delayed = next((d for d in self.delayed if d.member == task), None)
        if delayed is not None:
            self.delayed.remove(delayed)
            return self._cancelled_where_it_waited(task)
        known = [self.dedup[bucket].get(task) for bucket in (0, 1)]
        places = [place, *((where[0], where[1].id) for where in known if isinstance(where, tuple))]
        in_flight = False
        for where in places:
            entry = self.find(*where) if where is not None and not in_flight else None
            if entry is None or entry.task != task:
                continue
            in_flight = entry.id in self.pending[where[0]]
            if not in_flight:
                self._remove(where[0], entry.id)
                self.waiting[where[0]].remove(entry)
                return self._cancelled_where_it_waited(task)
        if not in_flight and task in self.results:
            return "ended"
        newest = max((entries[-1].ms for entries in self.lanes if entries), default=0)
        least = max(newest, *(mark[0] for mark in self.marks.values()), 0)
        self.marks[task] = (max(least, self.now[0]), max(least, self.now[1]))
        return "requested"

    def _cancelled_where_it_waited(self, task: str) -> str:
        self.results[task] = {"id": task, "outcome": "cancelled"}
        self.counters["cancelled"] += 1
        return "cancelled"


def order(entry_id: bytes) -> tuple[int, int]:
    """By which entry ids are sorted."""
    ms, _, seq = entry_id.partition(b"-")
    return int(ms), int(seq)
