"""Cancel marks: what they cover, and that they stay few."""

from __future__ import annotations

import pytest

from orchestra._delivery import Delivery, cancelled_record, corrupt_verdict, frame_ident, read_record
from orchestra._queue import cancellation
from orchestra._queue.cancellation import MARK_TTL_MS, CancelMarks
from orchestra.errors import CorruptEntryError
from orchestra.serialization import encode_task

NOW = 1_763_808_000_000


def delivery(task_id, ms=NOW, seq=0):
    frame = encode_task({"id": task_id, "type": "work"}).frame
    return Delivery(2, b"%d-%d" % (ms, seq), (b"t", frame), "me")


def flat(*marks):
    """As the tick's reply has them."""
    return [part for task_id, ms in marks for part in (task_id.encode(), b"%d" % ms)]


def test_nothing_is_marked_at_first():
    marks = CancelMarks()
    assert not marks
    assert marks.newest == 0
    assert marks.add([]) is False
    assert marks.covers(delivery("t")) is False


@pytest.mark.parametrize(
    ("ms", "seq", "covered"), [(NOW - 1, 9, True), (NOW, 0, True), (NOW, 1 << 40, True), (NOW + 1, 0, False)]
)
def test_a_mark_covers_entries_that_are_not_newer(ms, seq, covered):
    """H12: to the millisecond; the one who cancels waits until it has passed."""
    marks = CancelMarks()
    assert marks.add(flat(("t", NOW))) is True
    assert marks
    assert marks.covers(delivery("t", ms, seq)) is covered
    assert marks.covers(delivery("u", ms, seq)) is False


def test_what_is_known_is_no_news():
    """H12: the tick asks from the newest mark on, so the newest comes again."""
    marks = CancelMarks()
    assert marks.add(flat(("t", NOW - 5), ("u", NOW)))
    assert marks.newest == NOW
    assert not marks.add(flat(("u", NOW)))
    assert marks.add(flat(("u", NOW), ("v", NOW)))
    assert marks.add(flat(("t", NOW + 7))), "asked for again: it covers what is newer now"
    assert marks.covers(delivery("t", NOW + 7))
    assert marks.newest == NOW + 7


def test_marks_are_forgotten_after_a_day():
    marks = CancelMarks()
    marks.add(flat(("older", NOW - 1), ("old", NOW)))
    marks.add(flat(("new", NOW + MARK_TTL_MS)))
    assert len(marks) == 2, "exactly a day old is kept"
    marks.add(flat(("newer", NOW + MARK_TTL_MS + 1)))
    assert [marks.covers(delivery(task_id)) for task_id in ("old", "older", "new", "newer")] == [
        False,
        False,
        True,
        True,
    ]


def test_marks_are_bounded(monkeypatch):
    monkeypatch.setattr(cancellation, "MOST_MARKS", 3)
    marks = CancelMarks()
    for n in range(10):
        marks.add(flat((f"t{n}", NOW + n)))
    assert len(marks) == 3
    assert [n for n in range(10) if marks.covers(delivery(f"t{n}"))] == [7, 8, 9]
    marks.add(flat(("t7", NOW + 20)))
    marks.add(flat(("t10", NOW + 21)))
    assert [n for n in range(11) if marks.covers(delivery(f"t{n}"))] == [7, 9, 10], "asked for again is young again"


def test_an_unreadable_entry_is_not_covered():
    marks = CancelMarks()
    marks.add(flat(("t", NOW)))
    assert marks.covers(Delivery(2, b"1-1", (b"t", b"garbage"), "me")) is False


@pytest.mark.parametrize("task_id", ["t", "x" * 31, "x" * 32, "x" * 128, "a:b/c{d}"])
def test_an_id_stands_in_its_frame_where_scripts_look_for_it(task_id):
    for task in ({"id": task_id, "type": "w"}, {"id": task_id, "type": "w", "timeout": 1.0, "input": [1] * 100}):
        frame = encode_task(task, reply="client", flags=1).frame
        assert frame[2:].startswith(frame_ident(task_id))


def test_the_record_of_a_cancelled_task():
    assert read_record(cancelled_record("t")) == {"id": "t", "outcome": "cancelled"}


FRAME = encode_task({"id": "t", "type": "w"}).frame


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((b"x", b"y"), "foreign"),
        ((), "foreign"),
        ((b"t", b""), "corrupt"),
        ((b"t", b"\x94"), "corrupt"),
        ((b"t", b"\x94\x00"), "corrupt"),
        ((b"t", b"\x93\x02"), "corrupt"),
        ((b"t", FRAME[:4]), "corrupt"),
        ((b"t", FRAME, b"n", b"many"), "corrupt"),
        ((b"t", b"\x94\x02"), "unknown_version"),
        ((b"t", b"\x9f\x7f"), "unknown_version"),
        ((b"t", b"\x9a\x01"), "unknown_version"),
        ((b"t", b"\x94\x80"), "corrupt"),
    ],
)
def test_why_an_entry_is_no_task(fields, reason):
    """A19, K10: what nobody will read, what another program wrote, what a newer release may read."""
    entry = Delivery(1, b"17-3", fields, "me")
    with pytest.raises(CorruptEntryError) as caught:
        entry.task()
    assert corrupt_verdict("tasks", entry, caught.value).reason == reason
