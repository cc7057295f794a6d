"""A delivery: what it reads from an entry's fields, and the records that end a task."""

from __future__ import annotations

import pytest

from orchestra._delivery import (
    DONE,
    WANTS_RESULT,
    Again,
    Bury,
    Complete,
    Delivery,
    completed_record,
    dead_record,
    frame_of,
    read_record,
)
from orchestra.errors import CorruptEntryError, InvalidTaskError, TaskTooLargeError
from orchestra.serialization import decode_task, dumps, encode_task

TASK = {"id": "t", "type": "work", "input": {"x": 1}, "priority": 1, "metadata": {"m": 1}, "timeout": 2.0, "odd": [3]}
FRAME = encode_task(TASK).frame


def delivery(*more, frame=FRAME, deliveries=1):
    return Delivery(1, b"17-3", (b"t", frame, *more), "me", deliveries)


def test_a_fresh_entry():
    d = delivery()
    assert (d.message_id, d.consumer, d.attempt, d.retries, d.before, d.generation) == ("1:17-3", "me", 1, 0, 0, 0)
    assert not d.lost
    assert d.frame is FRAME
    assert d.header is d.header
    assert (d.header.id, d.header.type, d.header.lane) == ("t", "work", 1)
    assert "1:17-3" in repr(d)


def test_a_moved_entry():
    d = delivery(b"n", b"2", b"d", b"5", b"g", b"1", deliveries=3)
    assert (d.attempt, d.retries, d.before, d.generation) == (3, 2, 5, 1)
    assert d.fence == (1 << 40) + 8


def test_the_order_of_fields_does_not_matter():
    d = Delivery(1, b"17-3", (b"g", b"4", b"t", FRAME, b"n", b"1"), "me")
    assert (d.generation, d.retries, d.header.id) == (4, 1, "t")


def test_fences_grow_over_deliveries_moves_and_replays():
    moments = [
        delivery(),
        delivery(deliveries=2),
        delivery(b"n", b"1", b"d", b"2"),
        delivery(b"n", b"1", b"d", b"2", deliveries=9),
        delivery(b"n", b"0", b"d", b"0", b"g", b"1"),
    ]
    fences = [d.fence for d in moments]
    assert fences == sorted(set(fences))


def test_what_the_agent_is_handed():
    d = delivery(b"n", b"1", b"d", b"1")
    task = d.task()
    assert (task.id, task.type, task.input, task.priority) == ("t", "work", {"x": 1}, 1)
    assert (task.attempt, task.metadata, task.timeout, task.fence, task.extra) == (
        2,
        {"m": 1},
        2.0,
        d.fence,
        {"odd": [3]},
    )
    assert (task.max_retries, task.deadline) == (None, None)
    assert d.task() is not task


def test_the_least_task():
    d = delivery(frame=encode_task({"type": "work", "id": "x", "metadata": None}).frame)
    task = d.task()
    assert (task.input, task.metadata, task.extra) == (None, {}, {})
    assert d.task_dict() == {"id": "x", "type": "work", "priority": 2, "metadata": None}


def test_the_task_as_it_was_produced():
    assert delivery().task_dict() == TASK


def test_who_wants_a_result():
    assert not delivery().wants_result
    assert not delivery(frame=encode_task(TASK, flags=2).frame).wants_result
    wanted = delivery(frame=encode_task(TASK, reply="client-1", flags=WANTS_RESULT).frame)
    assert wanted.wants_result
    assert wanted.header.reply == "client-1"


@pytest.mark.parametrize(
    "fields",
    [
        (),
        (b"t", b""),
        (b"t", b"\xc1"),
        (b"x", b"y"),
        (b"t", FRAME, b"n"),
        (b"t", FRAME, b"n", b"many"),
        (b"t", FRAME, b"n", b"1", b"d", b"x"),
    ],
)
def test_an_entry_that_is_no_task(fields):
    d = Delivery(1, b"17-3", fields, "me")
    if fields == (b"t", FRAME, b"n"):
        assert d.header.id == "t", "a field without a value counts as absent"
        return
    for look in (lambda: d.header, d.task, d.task_dict, lambda: d.wants_result):
        with pytest.raises(CorruptEntryError):
            look()
    assert d.message_id == "1:17-3", "it can still be settled"


def test_verdicts_are_values():
    assert Complete(1) == Complete(1) != Complete(2)
    assert Complete() == DONE
    assert Again(1.0) == Again(1.0, "retried")
    assert Bury("a", 1, {}) == Bury("a", 1, {})


def test_records():
    record = read_record(completed_record("t", {"answer": [1]}, 1000))
    assert record == {"id": "t", "outcome": "completed", "value": {"answer": [1]}}
    record = read_record(dead_record("t", Bury("failed", 3, {"error": "boom"})))
    assert record == {"id": "t", "outcome": "dead", "reason": "failed", "attempts": 3, "error": {"error": "boom"}}


def test_a_record_that_is_none():
    assert read_record(dumps([1, 2])) == {"outcome": "corrupt"}
    with pytest.raises(CorruptEntryError):
        read_record(b"\xc1")


def test_values_that_cannot_be_recorded():
    with pytest.raises(InvalidTaskError):
        completed_record("t", object(), 1000)
    with pytest.raises(TaskTooLargeError):
        completed_record("t", "x" * 2000, 1000)


def test_the_frame_of_a_task_in_flight():
    assert frame_of(TASK) == FRAME
    assert decode_task(frame_of({**TASK, "delay": 60})) == TASK
