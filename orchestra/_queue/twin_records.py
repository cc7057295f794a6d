"""What an in-memory queue encodes and decodes: verdicts into plans, dead letters into what their readers see. Pure.

A plan holds everything that can fail, so that applying it cannot. Refuses to own the store's state.
"""

from __future__ import annotations

from typing import NamedTuple

from orchestra._delivery import (
    Bury,
    Complete,
    Delivery,
    Verdict,
    cancelled_record,
    completed_record,
    corrupt_verdict,
    dead_record,
)
from orchestra._queue.twin_store import Dead
from orchestra.errors import ConfigurationError, CorruptEntryError, InvalidTaskError
from orchestra.serialization import decode_task, dumps, loads
from orchestra.tasks import DeadLetter, TaskDict


class Plan(NamedTuple):
    """What is to happen to a delivery: the verdict, its terminal record if one is kept, its error encoded."""

    delivery: Delivery
    verdict: Verdict
    record: bytes | None = None
    error: bytes = b""


def plan_end(queue: str, delivery: Delivery, verdict: Verdict, max_bytes: int) -> Plan:
    """Encode what ``verdict`` leaves behind; what cannot be sent as it is becomes a failure of the task.

    Raises:
        InvalidTaskError: the error information of a Bury cannot be encoded.
    """
    if isinstance(verdict, Complete):
        try:
            if not delivery.wants_result:
                return Plan(delivery, verdict)
            return Plan(delivery, verdict, completed_record(delivery.header.id, verdict.value, max_bytes))
        except CorruptEntryError as error:
            verdict = corrupt_verdict(queue, delivery, error)
        except InvalidTaskError as error:
            info = {"error": f"the agent's result cannot travel: {error}", "error_type": type(error).__name__}
            verdict = Bury("bad_result", delivery.attempt, info)
    task_id = task_id_of(delivery)
    if isinstance(verdict, Bury):
        record = dead_record(task_id, verdict) if task_id and delivery.wants_result else None
        return Plan(delivery, verdict, record, dumps(verdict.error))
    try:
        _ = delivery.header
    except CorruptEntryError as error:  # released by somebody who has not tried to read it
        verdict = corrupt_verdict(queue, delivery, error)
        return Plan(delivery, verdict, None, dumps(verdict.error))
    return Plan(delivery, verdict, cancelled_record(task_id))  # a task that is to run again may be marked by then


def task_id_of(delivery: Delivery) -> str:
    """The id of a delivery's task; empty when it cannot be read."""
    try:
        task_id: str = delivery.header.id
    except CorruptEntryError:
        return ""  # nobody can be waiting for what cannot be read
    return task_id


def crashed(delivery: Delivery) -> Bury:
    """The end of a poison pill."""
    times = delivery.deliveries - 1
    info = {"error": f"handed out {times} times and never settled: its worker died or stalled each time"}
    return Bury("crashed", delivery.retries + times, {**info, "error_type": "Crashed", "deliveries": times})


def parse_letter_id(message_id: str) -> tuple[int, int]:
    """The id of a dead letter as the store has it. Raises ConfigurationError."""
    ms, _, seq = message_id.partition("-")
    if not (ms.isdecimal() and seq.isdecimal()):
        raise ConfigurationError(
            f"a dead letter's id looks like 1700000000000-0, got {message_id!r}", field="message_id", value=message_id
        )
    return int(ms), int(seq)


def letter(ident: tuple[int, int], dead: Dead) -> DeadLetter:
    """A dead letter as it is read."""
    raw = b""
    try:
        task_data: TaskDict | None = decode_task(dead.entry.frame)
    except CorruptEntryError:
        task_data, raw = None, dead.entry.frame
    _, reason, attempts, error = dead.why
    return DeadLetter(f"{ident[0]}-{ident[1]}", task_data, loads(error), reason, attempts, dead.died_at, raw)
