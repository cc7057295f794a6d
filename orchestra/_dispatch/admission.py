"""Whether a task may start here and now: its limits, and the keys that are parked in this worker.

Given a task, the gate admits it or says when it is to come back. All limits of a task that live in one place are asked in
one atomic call; what is asked in one turn of the event loop shares a round trip. A refusal parks the *key* that refused:
further tasks of it are put behind it without a question, while other keys go on. Owns that decision; refuses to run
tasks, to choose replicas and to keep what it refused: that waits in the queue's delayed set.

Order within a key: one worker starts tasks in the order in which they first reached it, but for tasks of one
millisecond and for those of another priority; neighbours may change places when it is late by more than the burst.
Several workers share one line (``queue=True``, :mod:`orchestra._limiting.line_teller`), so each key comes back at its limit's rate in nearly that order: two that were refused within one round trip may change
places. One event loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from orchestra import _backoff
from orchestra._delivery import Again, Delivery, Sooner
from orchestra._dispatch.parking import GRACE, MOST_KEYS, Line, Parking
from orchestra._dispatch.turnstile import Turnstiles
from orchestra._limiting.line_teller import LineTeller
from orchestra._limiting.use import Limiter, LimitUse
from orchestra.agents import AgentOptions
from orchestra.errors import BackpressureRejectedError, ConfigurationError, StoreError, Throttled
from orchestra.flow_control import get_flow_controller, try_acquire_all
from orchestra.tasks import BaseTask

AWAY_DELAY = 1.0
"""Seconds that a task waits when its limits cannot be asked, and say to refuse then."""
MOST_PLACES = 16_384
"""Tasks put off by a limit whose places are known here: about two megabytes."""
SPACING = 0.001, 0.01
"""Least and most seconds between two tasks that come back after somebody outside has refused: a hundredth of his time."""


class BadLimitError(Exception):
    """The key or cost of a task could not be told, or can never be admitted; ``__cause__`` says why."""


class _Limited(Protocol):
    @property
    def uses(self) -> tuple[LimitUse, ...]:
        """The limits that an attempt uses."""


class _Ask(NamedTuple):
    limiter: Any
    key: str | None
    cost: int

    @property
    def place(self) -> Hashable:
        """What tells limits apart that are not asked together."""
        address = getattr(self.limiter, "address", None)
        return id(self.limiter) if address is None else (address.safe, self.limiter.scope)

    @property
    def name(self) -> str:
        return str(getattr(self.limiter, "name", "limit"))


class Gate:
    """Admission to the agents of one worker on ``queue``. ``limiter``: asked for every task."""

    def __init__(self, queue: str, limiter: Limiter | None) -> None:
        self._limiter = limiter
        self._lines = Parking(queue)
        self._held = Parking(queue)
        self._waits = Parking(queue)
        self._held_until = 0.0
        self._tellers: dict[Hashable, LineTeller] = {}
        self._doors = Turnstiles()
        self._places: dict[str, tuple[Hashable, float]] = {}
        self.sooner: list[Sooner] = []
        """Tasks whose limit was raised since they were told when to come back; the dispatcher tells the queue."""
        self.always = limiter is not None
        """Whether tasks without limits of their own have to pass, too."""

    # -- coming in

    async def refusal(self, delivery: Delivery, task: BaseTask, options: AgentOptions) -> Again | None:
        """None: it may start. Else when it is to come back; no attempt is consumed.

        Raises:
            BadLimitError: it can never be admitted.
        Cost: at most one round trip for each place its limits live in; none while its key is known to be parked.
        """
        came_back = delivery.before + delivery.deliveries > 1
        try:
            asks = self._asks(task, options)
            now = time.monotonic()
            if len(self._held):
                held = self._is_held(task, options, asks, now, came_back=came_back)
                if held is not None:
                    return held
            if not asks:
                return None
            urgency = 3 - task.priority  # a limiter's larger number is more urgent, a task's smaller one
            return await self._ask_all(asks, task.id, urgency, came_back=came_back)
        except StoreError:
            return Again(AWAY_DELAY, "throttled")
        except (ConfigurationError, _KeyFailedError) as error:
            raise BadLimitError from (error.__cause__ or error)

    def _asks(self, task: BaseTask, options: AgentOptions) -> list[_Ask]:
        asks = [] if self._limiter is None else [_Ask(_here(self._limiter), None, 1)]
        try:
            asks += _uses(task, options)
        except Exception as error:
            raise _KeyFailedError from error
        return asks

    async def _ask_all(self, asks: Sequence[_Ask], task_id: str, urgency: int, *, came_back: bool) -> Again | None:
        keys = [_line_key(ask, urgency) for ask in asks]
        doors = sorted({(*key, came_back) for key in keys}, key=repr) if len(keys) > 1 else [(*keys[0], came_back)]
        await self._doors.enter(doors)
        try:
            numbers: dict[Hashable, int] = {}
            placed = self._placed(asks, keys, task_id, numbers, came_back=came_back)
            if placed is not None:
                return placed
            for group in _groups(asks):
                admission = await _ask(group, urgency, queue=not came_back)
                if not admission.allowed:
                    return self._park(group, admission, task_id, urgency, numbers if came_back else None)
        finally:
            self._doors.leave(doors)
        self._passed(asks, keys)
        return None

    def _placed(
        self,
        asks: Sequence[_Ask],
        keys: Sequence[Hashable],
        task_id: str,
        numbers: dict[Hashable, int],
        *,
        came_back: bool,
    ) -> Again | None:
        """The place of a task behind others of one of its keys; None when it may ask."""
        if not len(self._lines):
            return None
        now = time.monotonic()
        self._places.pop(task_id, None)
        for ask, key in zip(asks, keys, strict=True):
            line = self._lines.get(key)
            if line is None:
                continue
            self._follow(ask, key, line, now)
            if came_back:
                at, numbers[key] = line.asks(task_id, now, ask.cost)
            else:
                at = line.newcomer(now, ask.cost)
                if at is not None and (teller := self._tellers.get(key)) is not None:
                    teller.add(ask.cost)
            if at is not None:
                if (refusals := getattr(ask.limiter, "refusals", None)) is not None:
                    refusals.add()
                return self._noted(key, task_id, at, now, None)
        return None

    def _noted(self, key: Hashable, task_id: str, at: float, now: float, wait: float | None) -> Again:
        """The answer to a task whose place is ``at``; that is remembered, lest its limit be raised before."""
        places = self._places
        while len(places) >= MOST_PLACES and places[first := next(iter(places))][1] + GRACE < now:
            del places[first]  # it came back to another worker
        if len(places) < MOST_PLACES:
            places[task_id] = (key, at)
        return _again(at, now, wait)

    def _follow(self, ask: _Ask, key: Hashable, line: Line, now: float) -> None:
        """When the limit of ``line`` was raised, those in it that are known here come back as much sooner."""
        interval, before = ask.limiter.interval, line.interval
        if interval >= before:
            return
        line.hurry(interval, now)
        for task_id, (own, at) in self._places.items():
            if own == key and at > now:
                closer = now + (at - now) * interval / before
                self._places[task_id] = (key, closer)
                self.sooner.append(Sooner(task_id, at, closer))

    def _passed(self, asks: Sequence[_Ask], keys: Sequence[Hashable]) -> None:
        if len(self._lines):
            now = time.monotonic()
            for ask, key in zip(asks, keys, strict=True):
                if (line := self._lines.get(key)) is not None:
                    self._follow(ask, key, line, now)
                self._lines.passed(key, now)
                if key in self._tellers and self._lines.get(key) is None:
                    del self._tellers[key]

    def _park(
        self, group: Sequence[_Ask], admission: Any, task_id: str, urgency: int, numbers: dict[Hashable, int] | None
    ) -> Again:
        ask = _refuser(group, admission)
        key = _line_key(ask, urgency)
        now = time.monotonic()
        wait = admission.retry_after
        if wait == math.inf:
            raise BackpressureRejectedError(f"no permit of cost {ask.cost} is ever given", retry_after=math.inf)
        if (known := self._lines.get(key)) is not None:
            self._follow(ask, key, known, now)
        line = self._lines.park(key, _shown(ask), ask.limiter.interval, now, wait)
        if key not in self._tellers and hasattr(ask.limiter, "cell"):
            self._add_teller(key, ask, urgency, line)
        if numbers is None:
            return self._noted(key, task_id, line.queued(now + wait), now, wait)
        number = numbers.get(key) or line.number()
        return self._noted(key, task_id, line.refused(task_id, number, now + wait), now, wait)

    def _add_teller(self, key: Hashable, ask: _Ask, urgency: int, line: Line) -> None:
        limiter = ask.limiter

        def learn(end: float) -> None:
            self._follow(ask, key, line, time.monotonic())
            tolerance = limiter.setting.tolerances_us[min(max(urgency, 0), 3)] / 1e6
            line.ends_at(time.monotonic() + end - tolerance + line.interval * teller.untold)

        if len(self._tellers) >= MOST_KEYS:
            self._tellers = {known: each for known, each in self._tellers.items() if self._lines.get(known)}
        teller = self._tellers[key] = LineTeller(limiter, limiter.cell(ask.key), learn)

    # -- somebody outside refuses: a provider, a breaker

    def throttled(self, task: BaseTask, error: Throttled) -> Again:
        """An agent was refused outside: nobody of its key, or of its type, starts before the time it was told."""
        wait = _backoff.wanted(error.retry_after)
        if wait <= 0.0:  # not at once: it goes before its lane, and would keep out whatever is behind it
            return Again(SPACING[0], "throttled")
        now = time.monotonic()
        key = ("type", task.type) if error.key is None else ("key", error.key)
        line = self._held.park(key, key[1], _spacing(wait), now, wait)
        line.hold(now, wait)
        self._held_until = max(self._held_until, line.until)
        self.always = True
        return _again(line.held(now, came_back=True) or now + wait, now, wait)

    def later(self, key: str, wait: float, interval: float | None = None) -> Again:
        """A task of ``key`` cannot start for ``wait`` seconds; those told so come back one after the other."""
        now = time.monotonic()
        line = self._waits.park(key, key, _spacing(wait) if interval is None else interval, now, wait)
        return _again(line.spread(now, wait), now, wait)

    def started(self, key: str) -> None:
        """A task of ``key`` can start again."""
        if len(self._waits):
            self._waits.passed(key, time.monotonic())

    def _is_held(
        self, task: BaseTask, options: AgentOptions, asks: Sequence[_Ask], now: float, *, came_back: bool
    ) -> Again | None:
        try:
            keys = _held_keys(task, options, asks)
        except Exception as error:
            raise _KeyFailedError from error
        for key in keys:
            line = self._held.get(key)
            at = None if line is None else line.held(now, came_back=came_back)
            if at is not None:
                return _again(at, now)
        for key in keys:
            self._held.passed(key, now)
        if now > self._held_until:
            self._held.sweep(now)
            self.always = self._limiter is not None or len(self._held) > 0
        return None


class _KeyFailedError(Exception):
    pass


async def ask_once(task: BaseTask, options: _Limited) -> float | None:
    """Ask the limits of ``task`` without a gate, for whoever calls an agent himself: None, or seconds until it may again.

    Raises:
        BackpressureRejectedError: no limit ever gives so much.
        Exception: what telling its key or cost raised.
    """
    for group in _groups(_uses(task, options)):
        admission = await _ask(group, 3 - task.priority, queue=False)
        if not admission.allowed:
            if admission.retry_after == math.inf:
                raise BackpressureRejectedError("no permit of this cost is ever given", retry_after=math.inf)
            return float(admission.retry_after)
    return None


def _uses(task: BaseTask, options: _Limited) -> list[_Ask]:
    asks = []
    for use in options.uses:
        limiter = get_flow_controller(use.limiter) if isinstance(use.limiter, str) else _here(use.limiter)
        asks.append(_Ask(limiter, use.key_for(task), use.cost_for(task)))
    return asks


def _here(limiter: Any) -> Any:
    return limiter.here() if hasattr(limiter, "here") else limiter  # of an App, which has one for each event loop


def _held_keys(task: BaseTask, options: AgentOptions, asks: Sequence[_Ask]) -> list[Hashable]:
    keys: list[Hashable] = [("type", task.type)]
    own = options.key_for(task)
    if own is not None:
        keys.append(("key", own))
    for ask in asks:
        keys.append(("key", ask.name if ask.key is None else ask.key))
        if ask.key is not None:
            keys.append(("key", f"{ask.name}:{ask.key}"))
    return keys


def _groups(asks: Sequence[_Ask]) -> list[list[_Ask]]:
    if len(asks) == 1:
        return [[asks[0]]]
    groups: dict[Hashable, list[_Ask]] = {}
    for ask in asks:
        groups.setdefault(ask.place, []).append(ask)
    return list(groups.values())


async def _ask(group: Sequence[_Ask], urgency: int, *, queue: bool) -> Any:
    limiter, key, cost = group[0]
    if not hasattr(limiter, "cell"):  # a limiter of somebody's own
        return await limiter.try_acquire(priority=urgency, cost=cost)
    if len(group) > 1:
        return await try_acquire_all(group, urgency, queue=queue)
    return await limiter.try_acquire(urgency, cost, key=key, queue=queue and not limiter.config.lease)


def _refuser(group: Sequence[_Ask], admission: Any) -> _Ask:
    if len(group) > 1:
        for ask in group:
            if ask.name == admission.limiter and ask.key == admission.key:
                return ask
    return group[0]


def _line_key(ask: _Ask, urgency: int) -> tuple[int, str | None, int]:
    return (id(ask.limiter), ask.key, urgency)


def _shown(ask: _Ask) -> str:
    return ask.name if ask.key is None else f"{ask.name}:{ask.key}"


def _spacing(wait: float) -> float:
    least, most = SPACING
    return min(max(wait / 100, least), most)


def _again(at: float, now: float, wait: float | None = None) -> Again:
    delay = wait if wait is not None and at == now + wait else at - now
    return Again(max(0.001, delay), "throttled", due=at)
