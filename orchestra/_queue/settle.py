"""Turns verdicts into script calls. Pure: no I/O, no state; :mod:`orchestra._queue.settler` sends them.

Deliveries of one stream and one kind of verdict travel in one script call, and all calls of a batch in one round trip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestra._delivery import (
    DONE,
    Again,
    Bury,
    Cancel,
    Complete,
    Delivery,
    Verdict,
    by_rank,
    cancelled_record,
    completed_record,
    corrupt_verdict,
    dead_record,
    sift,
    with_ids,
)
from orchestra._keys import QueueKeys
from orchestra._redis.link import Call
from orchestra._scripts import Arg, script
from orchestra.errors import CorruptEntryError, InvalidTaskError
from orchestra.serialization import dumps
from orchestra.tasks import LANES

RANGE_WORTH = 4
"""One range check is used while it reads at most so many pending rows for each id it saves looking up."""


class _WithIds(Call):
    """A call whose last arguments are the entry ids of ``deliveries``, packed without a Python object for each."""

    deliveries: list[Delivery]

    def pack(self) -> bytes:
        return with_ids(super().pack(), self.deliveries)

    def pack_with_text(self) -> bytes:
        return with_ids(super().pack_with_text(), self.deliveries)


@dataclass(frozen=True, slots=True)
class _Result:
    """A task is done, and its sender wants this record."""

    record: bytes


def _first_then_rank(pair: tuple[Delivery, Any]) -> tuple[bool, int]:
    return pair[0].deliveries != 1, by_rank(pair[0])


class Settling(NamedTuple):
    """One script call and the deliveries it ends."""

    call: Call
    deliveries: Sequence[Delivery]


class SettlePlanner:
    """Plans the calls that settle a batch for one group of one queue. Results live ``result_ttl`` seconds."""

    def __init__(self, queue: str, keys: QueueKeys, group: str, result_ttl: float, max_bytes: int) -> None:
        self._queue = queue
        self._keys = keys
        self._group = group
        self._ttl_ms = int(result_ttl * 1000)
        self._max_bytes = max_bytes
        self._complete = script("complete")
        self._complete_result = script("complete_result")
        self._retry = script("retry")
        self._dead = script("dead_letter")
        self._cancelled = script("cancelled")

    def plan(self, batch: Sequence[tuple[Delivery, Verdict]], held: Sequence[int]) -> list[Settling]:
        """The calls for ``batch``; ``held[lane]`` bounds how many entries of a lane this process has pending."""
        plain, others = sift(batch, DONE)
        calls = [self._plain(number, consumer, *group, held[number]) for (number, consumer), group in plain.items()]
        return calls + self._others(others, held) if others else calls

    def _others(self, batch: Sequence[tuple[Delivery, Verdict]], held: Sequence[int]) -> list[Settling]:
        """The calls for verdicts that say more than that a task is done."""
        done: list[tuple[Delivery, Verdict]] = []
        rest: dict[tuple[int, str, type], list[tuple[Delivery, Any]]] = {}
        for delivery, verdict in batch:
            final = self._as_sendable(delivery, verdict)
            if isinstance(final, Complete):
                done.append((delivery, DONE))
            else:
                rest.setdefault((delivery.stream, delivery.consumer, type(final)), []).append((delivery, final))
        calls = self.plan(done, held) if done else []
        planners: dict[type, Callable[..., Settling]] = {
            _Result: functools.partial(self._with_result, held=held),
            Again: self._again,
            Bury: self._bury,
            Cancel: self._cancel,
        }
        calls += [planners[kind](number, consumer, group) for (number, consumer, kind), group in rest.items()]
        return calls

    def _as_sendable(self, delivery: Delivery, verdict: Verdict) -> Verdict | _Result:
        """What is sent; what cannot be sent as it is, is a failure of the task, known before anything is settled.

        A value that cannot travel; or an entry that nobody has tried to read before it was released or acknowledged.
        """
        if isinstance(verdict, Bury):
            return verdict
        try:
            if isinstance(verdict, Complete) and delivery.wants_result:
                return _Result(completed_record(delivery.header.id, verdict.value, self._max_bytes))
            _ = delivery.header
        except CorruptEntryError as error:
            return corrupt_verdict(self._queue, delivery, error)
        except InvalidTaskError as error:
            info = {"error": f"the agent's result cannot travel: {error}", "error_type": type(error).__name__}
            return Bury("bad_result", delivery.attempt, info)
        return verdict

    def _plain(self, number: int, consumer: str, first: list[Delivery], again: list[Delivery], held: int) -> Settling:
        """``first``: handed out once, by rank; ``again``: handed out before."""
        args = self._range(consumer, first, held)
        keys = (self._keys.streams[number], self._keys.counters)
        if not again:
            call = _WithIds(self._complete, keys, args)
            call.deliveries = first
            return Settling(call, first)
        args += [d.entry for d in first]
        for delivery in again:
            args += (delivery.entry, delivery.deliveries)
        return Settling(Call(self._complete, keys, args), [*first, *again])

    def _range(self, consumer: str, first: list[Delivery], held: int) -> list[Arg]:
        room = held if first and held <= RANGE_WORTH * len(first) else 0
        low, high = (first[0].entry, first[-1].entry) if room else (b"-", b"+")
        return [self._group, consumer, room, low, high, len(first)]

    def _with_result(
        self, number: int, consumer: str, group: list[tuple[Delivery, _Result]], held: Sequence[int]
    ) -> Settling:
        group.sort(key=_first_then_rank)
        first = [delivery for delivery, _ in group if delivery.deliveries == 1]
        args = self._range(consumer, first, held[number])
        args += [delivery.entry for delivery in first]
        for delivery, _ in group[len(first) :]:
            args += (delivery.entry, delivery.deliveries)
        keys = [self._keys.streams[number], self._keys.counters]
        for delivery, result in group:
            header = delivery.header
            keys.append(self._keys.result(header.id))
            args += (self._ttl_ms, result.record, self._channel(header.reply))
        return Settling(Call(self._complete_result, keys, args), [d for d, _ in group])

    def _again(self, number: int, consumer: str, group: list[tuple[Delivery, Again]]) -> Settling:
        names, lane = self._keys, number % LANES
        keys = (
            *(names.streams[number], names.delayed, names.bodies, names.counters, names.cancels),
            *(names.lanes[lane], names.fronts[lane]),
        )
        args: list[Arg] = [self._group, consumer, lane]
        for delivery, verdict in group:
            delay_ms = max(0, math.ceil(verdict.left() * 1000))
            args += (delivery.entry, delivery.deliveries, delivery.header.id, delay_ms, verdict.counter)
        return Settling(Call(self._retry, keys, args), [d for d, _ in group])

    def _cancel(self, number: int, consumer: str, group: list[tuple[Delivery, Cancel]]) -> Settling:
        keys = [self._keys.streams[number], self._keys.counters, self._keys.cancels, self._keys.cancelled_steps]
        args: list[Arg] = [self._group, consumer, self._ttl_ms]
        for delivery, _ in group:
            header = delivery.header
            keys.append(self._keys.result(header.id))
            record = cancelled_record(header.id)
            args += (delivery.entry, delivery.deliveries, header.id, record, self._channel(header.reply))
        return Settling(Call(self._cancelled, keys, args), [d for d, _ in group])

    def _bury(self, number: int, consumer: str, group: list[tuple[Delivery, Bury]]) -> Settling:
        keys = [self._keys.streams[number], self._keys.dlq, self._keys.counters]
        args: list[Arg] = [self._group, consumer, number % LANES]
        for delivery, verdict in group:
            ttl, record, channel, key = 0, b"", "", self._keys.dlq
            try:
                header = delivery.header
            except CorruptEntryError:
                pass  # nobody can be waiting for what cannot be read
            else:
                if delivery.wants_result:
                    ttl, record = self._ttl_ms, dead_record(header.id, verdict)
                    channel, key = self._channel(header.reply), self._keys.result(header.id)
            keys.append(key)
            error = dumps(verdict.error)
            args += (delivery.entry, delivery.deliveries, verdict.attempts, verdict.reason, error, delivery.frame)
            args += (ttl, record, channel)
        return Settling(Call(self._dead, keys, args), [d for d, _ in group])

    def _channel(self, client: str | None) -> str:
        return self._keys.replies(client) if client else ""
