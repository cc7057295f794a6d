"""Keys that are parked in this worker: who comes back when, so that a refused key costs nothing while others go on.

Owns, of each parked key, the places given to those who come back. Refuses to know limits, breakers and Redis: who refuses
and for how long is an argument. Those who are parked wait in the queue's delayed set; what is kept here is a few numbers a
key, and at most :data:`MOST_TURNS` ids of those who came back too early.

Two sorts come: who arrives for the first time goes to the *end* of its key's line without asking; who comes back was
there before, and is only ever put behind others who came back (*turns*). So the order of a key holds, and nobody who is at
his place is sent to the end again. Times are monotonic seconds, given by the caller. One event loop; nothing awaits.
"""

from __future__ import annotations

from collections.abc import Hashable

from orchestra import telemetry

MOST_KEYS = 4096
"""Parked keys that are known at once; the one parked longest ago is forgotten first, which costs it a question."""
MOST_TURNS = 256
LATE = 0.1
"""Seconds that those whose time has come may take to come back without losing their place to a newcomer."""
GRACE = 1.0
"""Seconds after his time for which the place of somebody who came back too early is kept: another worker may have him."""


class Line:
    """Those of one key who come back. ``interval``: seconds between two of them; ``shown``: how events call the key."""

    __slots__ = ("_front", "_number", "_turns", "away", "interval", "shown", "since", "tail", "until")

    def __init__(self, shown: str, interval: float, now: float) -> None:
        self.shown = shown
        self.interval = interval
        self.since = now
        self.until = now
        """Before this moment nobody of the key starts."""
        self.tail = now
        """The place of the last one in the line, as far as this worker knows."""
        self.away = 0
        """How many of the line have not come back yet, as far as they come back here."""
        self._front = now
        self._number = 0
        self._turns: dict[str, tuple[int, float]] = {}

    def over(self, now: float) -> bool:
        """Whether nobody is known to come back any more."""
        return max(self.tail, self.until, self._front) <= now and not self._turns

    # -- a limit that can be asked

    def newcomer(self, now: float, cost: int = 1) -> float | None:
        """The place of one who arrives while others are in the line; None when nobody is, so that he may ask.

        Let in before somebody whose time has come, but who is still on his way, he would make everybody in the line
        come too early.
        """
        if self.tail + (LATE if self.away else 0.0) <= now:
            return None
        self.away += 1
        self.tail = max(self.tail, now) + self.interval * cost
        return self.tail

    def queued(self, at: float) -> float:
        """Somebody was refused and told to come back ``at``, his place in the line that all workers share."""
        self.away += 1
        self.ends_at(at)
        return at

    def ends_at(self, at: float) -> None:
        """The line that all workers share goes on until then at least."""
        self.tail = max(self.tail, at)

    def asks(self, task_id: str, now: float, cost: int = 1) -> tuple[float | None, int]:
        """One who comes back: ``(None, his number)``, and he may ask; or ``(place, 0)`` behind those who go first.

        Who comes back when others have been put off already goes behind all of them. Those who were put off keep their
        order among themselves, unless one of them is late by more than :data:`LATE`.
        """
        turns = self._turns
        while turns:
            first = next(iter(turns))
            if turns[first][1] + GRACE > now:
                break
            del turns[first]
        mine = turns.pop(task_id)[0] if task_id in turns else 0
        if not mine:
            self.away = max(0, self.away - 1)
            if not turns:
                return None, self.number()
            self._front = max(self._front, now) + self.interval * cost
            self._keep(task_id, self.number(), self._front)
            return self._front, 0
        ahead = max([at for other, at in turns.values() if other < mine], default=-LATE)
        if ahead + LATE <= now:
            return None, mine
        return self.refused(task_id, mine, max(ahead, now) + self.interval * cost), 0

    def refused(self, task_id: str, number: int, at: float) -> float:
        """One who came back was refused until ``at``: those behind him do not ask before he has been let in."""
        self._keep(task_id, number, at)
        if len(self._turns) > 1:
            self._turns = dict(sorted(self._turns.items(), key=lambda item: item[1]))
        self._front = max(self._front, at)
        self.tail = max(self.tail, at)
        return at

    def number(self) -> int:
        """The number of one who comes back: who has the smaller one goes first."""
        self._number += 1
        return self._number

    def _keep(self, task_id: str, number: int, at: float) -> None:
        if len(self._turns) < MOST_TURNS:
            self._turns[task_id] = (number, at)

    def hurry(self, interval: float, now: float) -> None:
        """The limit was raised: everybody's place comes closer by what its rate has grown. O(turns)."""

        def closer(at: float) -> float:
            return now + (at - now) * ratio if at > now else at

        ratio, self.interval = interval / self.interval, interval
        self.tail, self._front = closer(self.tail), closer(self._front)
        self._turns = {task_id: (number, closer(at)) for task_id, (number, at) in self._turns.items()}

    # -- somebody outside who has said for how long

    def hold(self, now: float, seconds: float) -> None:
        """Nobody of the key starts for ``seconds``."""
        if self.until <= now:
            self._front = now
        self.until = max(self.until, now + seconds)

    def held(self, now: float, cost: int = 1, *, came_back: bool) -> float | None:
        """The place of one who arrives while the key is held; None when it is not."""
        if self.until <= now:
            return None
        if came_back:
            at = self._front = max(self._front + self.interval * cost, self.until)
        else:
            at = max(self.tail, self._front) + self.interval * cost if self.tail > now else self.until
            at = max(at, self.until)
        self.tail = max(self.tail, at)
        return at

    def spread(self, now: float, wait: float) -> float:
        """The place of one who cannot start for ``wait`` seconds, behind those who were told so before."""
        at = self._front = max(now + wait, self._front + self.interval)
        return at


class Parking:
    """The parked keys of one worker on ``queue``."""

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self._lines: dict[Hashable, Line] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, key: Hashable) -> Line | None:
        """The line of ``key``; None when it is not parked."""
        return self._lines.get(key)

    def park(self, key: Hashable, shown: str, interval: float, now: float, wait: float) -> Line:
        """The line of ``key``, which somebody has just been refused under for ``wait`` seconds."""
        line = self._lines.get(key)
        if line is None:
            self._make_room(now)
            line = self._lines[key] = Line(shown, interval, now)
            if telemetry.wanted("key.parked"):
                telemetry.emit("key.parked", {"retry_after_s": wait}, {"queue": self._queue, "key": shown})
        line.interval = interval
        return line

    def passed(self, key: Hashable, now: float) -> None:
        """Somebody of ``key`` was let in: when nobody is known to come back any more, it is parked no longer."""
        line = self._lines.get(key)
        if line is not None and line.over(now):
            self._resume(key, line, now)

    def sweep(self, now: float) -> None:
        """Forget the keys that nobody is known to come back for. O(keys)."""
        for key in [key for key, line in self._lines.items() if line.over(now)]:
            self._resume(key, self._lines[key], now)

    def _make_room(self, now: float) -> None:
        if len(self._lines) < MOST_KEYS:
            return
        self.sweep(now)
        while len(self._lines) >= MOST_KEYS:
            oldest = next(iter(self._lines))
            self._resume(oldest, self._lines[oldest], now)

    def _resume(self, key: Hashable, line: Line, now: float) -> None:
        del self._lines[key]
        if telemetry.wanted("key.resumed"):
            facts = {"queue": self._queue, "key": line.shown}
            telemetry.emit("key.resumed", {"parked_s": now - line.since}, facts)
