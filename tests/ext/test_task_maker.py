"""``TaskMaker`` against the task dict of the same frame: a task made without its constructor is the task it would make."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra._ext.codec import DecodeError, TaskCodec, TaskMaker, decode_header, packb
from orchestra.tasks import BaseTask

CODEC = TaskCodec(None, None, lambda code, payload: NoTruth())
MAKER = TaskMaker(CODEC, BaseTask)
HEADER = packb([1, "id", "type", 2])

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=8), st.floats(allow_nan=False)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
keys = st.text(max_size=6).filter(
    lambda key: (
        key not in {"id", "type", "input", "priority", "metadata", "max_retries", "timeout", "deadline", "delay"}
    )
)
tasks = st.fixed_dictionaries(
    {"id": st.just("a-task"), "type": st.sampled_from(["t", "another"])},
    optional={
        "input": values,
        "metadata": st.none() | st.dictionaries(st.text(max_size=4), values, max_size=3),
        "priority": st.integers(0, 3),
        "max_retries": st.integers(0, 1000),
        "timeout": st.floats(0.1, 1e6),
        "deadline": st.floats(0.1, 1e12),
    },
)


class NoTruth:
    """What a hook may make: neither true nor false."""

    def __bool__(self):
        raise ValueError("ambiguous")


def expected(frame, attempt, fence):
    fields = CODEC.decode(frame)
    head = {name: fields.pop(name, None) for name in ("id", "type", "priority", "max_retries", "timeout", "deadline")}
    given_input, metadata = fields.pop("input", None), fields.pop("metadata", None) or {}
    return BaseTask(**head, input=given_input, metadata=metadata, attempt=attempt, fence=fence, extra=fields)


@given(tasks, st.dictionaries(keys, values, max_size=3), st.integers(1, 2000), st.integers(0, 2**70))
def test_a_task_is_the_one_its_constructor_would_make(task, extra, attempt, fence):
    frame = CODEC.encode({**extra, **task})[2]
    header, made = MAKER.make(frame, None, attempt, fence)
    assert made == expected(frame, attempt, fence)
    assert type(made) is BaseTask
    assert (header.id, header.type) == (made.id, made.type)
    again, same = MAKER.make(frame, header, attempt, fence)
    assert again is header
    assert same == made


@given(st.binary(max_size=60))
def test_bytes_that_are_no_body_are_refused_as_decode_refuses_them(body):
    frame = HEADER + body
    try:
        theirs = expected(frame, 1, 0)
    except DecodeError:
        with pytest.raises(DecodeError):
            MAKER.make(frame, None, 1, 0)
        return
    if type(theirs.metadata) is dict:
        assert MAKER.make(frame, None, 1, 0)[1] == theirs
    else:
        with pytest.raises(DecodeError, match="metadata must be a map"):
            MAKER.make(frame, None, 1, 0)


@pytest.mark.parametrize("metadata", [1, "text", [1], True, 1.5], ids=repr)
def test_metadata_must_be_a_map(metadata):
    with pytest.raises(DecodeError, match="metadata must be a map, not"):
        MAKER.make(HEADER + packb({"metadata": metadata}), None, 1, 0)


@pytest.mark.parametrize("metadata", [None, 0, "", [], False], ids=repr)
def test_metadata_that_are_nothing_are_empty(metadata):
    assert MAKER.make(HEADER + packb({"metadata": metadata}), None, 1, 0)[1].metadata == {}


def test_metadata_without_a_truth_are_a_mistake_too():
    with pytest.raises(DecodeError, match="NoTruth"):
        MAKER.make(HEADER + b"\x81\xa8metadata\xd4\x07x", None, 1, 0)


def test_the_last_of_a_repeated_key_wins_and_nothing_leaks():
    value = packb(["kept", 2])
    body = b"\x84" + b"".join(packb(key) + inner for key in ("input", "metadata") for inner in (value, packb({"a": 1})))
    made = MAKER.make(HEADER + body, None, 1, 0)[1]
    assert (made.input, made.metadata) == ({"a": 1}, {"a": 1})
    count = sys.getrefcount(made.input)
    assert count == 2


def test_a_header_of_another_frame_is_refused():
    long = decode_header(packb([1, "i" * 100, "t", 2]) + b"\x80")
    with pytest.raises(DecodeError, match="not of this frame"):
        MAKER.make(HEADER + b"\x80", long, 1, 0)


def test_tasks_can_be_collected():
    made = MAKER.make(HEADER + b"\x80", None, 1, 0)[1]
    assert gc.is_tracked(made)
    made.extra["itself"] = made
    del made
    gc.collect()


def test_references_stay():
    attempt, fence = 123456, 2**65
    frame = HEADER + packb({"input": {"a": [1]}, "metadata": {"k": "v"}, "more": 1})
    before = [sys.getrefcount(each) for each in (attempt, fence, frame, BaseTask)]
    for _ in range(200):
        MAKER.make(frame, None, attempt, fence)
        with pytest.raises(DecodeError):
            MAKER.make(frame + b"\x01", None, attempt, fence)
    after = [sys.getrefcount(each) for each in (attempt, fence, frame, BaseTask)]
    assert after == before


class NoSlots:
    id: str


@dataclass(slots=True)
class Few:
    id: str


@pytest.mark.parametrize("kind", [NoSlots, Few, int, type("Sub", (BaseTask,), {})])
def test_only_a_class_with_the_slots_of_a_task(kind):
    with pytest.raises(TypeError):
        TaskMaker(CODEC, kind)


def test_slots_of_another_class_lie_elsewhere():
    far = type("Far", (), {"__slots__": tuple(f"s{n}" for n in range(4000))})
    places = {name: far.__dict__[f"s{3900 + n}"] for n, name in enumerate(BaseTask.__slots__)}
    with pytest.raises(TypeError, match="must be a slot of its own"):
        TaskMaker(CODEC, type("Borrowed", (), {"__slots__": (), **places}))
