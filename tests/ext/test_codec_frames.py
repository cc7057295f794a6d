"""Frames of tasks and ids: against the oracle, against forgeries; and what the codec leaves behind in memory."""

from __future__ import annotations

import datetime as dt
import enum
import gc
import math
import pathlib
import subprocess
import sys
import textwrap
import weakref
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestra._ext.codec import (
    DecodeError,
    EncodeError,
    EncodeTypeError,
    Ext,
    IdMaker,
    TaskCodec,
    TaskHeader,
    TooLargeError,
    decode_header,
    packb,
)
from tests.reference import codec as oracle
from tests.reference.codec_values import NAMES, TASKS, attempt, same

ROOT = pathlib.Path(__file__).parents[2]
TASK = {
    "id": "task-000123",
    "type": "text_classification",
    "input": {"text": "Classify this text please: lorem ipsum dolor"},
    "priority": 2,
}


class Record(NamedTuple):
    id: str
    lane: int
    frame: bytes
    own_id: bool
    delay: float


CODEC = TaskCodec(lambda: "made-up-id", None, None, Record)

# --- tasks ------------------------------------------------------------------------------------------------------------


@given(TASKS, NAMES, st.none() | NAMES, st.integers(0, (1 << 31) - 1))
def test_frames_are_as_the_oracle_makes_them(task, argument, reply, flags):
    chosen = task.get("id") or argument
    made = CODEC.encode(task, chosen, 1 << 20, reply, flags)
    assert made.frame == oracle.frame(task, chosen, reply, flags)
    assert (made.id, made.own_id, made.delay) == (chosen, True, task.get("delay") or 0.0)
    back = CODEC.decode(made.frame)
    assert same(back, oracle.unframe(made.frame))
    header = decode_header(made.frame)
    assert (header.id, header.type, header.lane, header.reply, header.flags) == (
        chosen,
        task["type"],
        made.lane,
        reply,
        flags,
    )
    for key in ("max_retries", "timeout", "deadline"):
        assert getattr(header, key) == task.get(key) == back.get(key)
    body = CODEC.decode_body(made.frame, header)
    assert {"id", "type", "priority", *body} <= set(back)
    assert "delay" not in back


@given(st.lists(TASKS, max_size=6), st.none() | NAMES, st.integers(0, (1 << 31) - 1))
def test_many_are_as_one_after_the_other(tasks, reply, flags):
    ids = IdMaker("0123456789ab")
    one_by_one = TaskCodec(lambda: ids.make(1e9), None, None, Record)
    expected = [attempt(one_by_one.encode, task, None, 1 << 20, reply, flags) for task in tasks]
    made = attempt(CODEC.encode_many, tasks, IdMaker("0123456789ab"), 1e9, 1 << 20, reply, flags)
    refused = [each for each in expected if not isinstance(each, Record)]
    assert same(made, refused[0] if refused else expected)


@pytest.mark.parametrize(("tasks", "error"), [([TASK, 1], EncodeTypeError), ([TASK, {"id": "x"}], EncodeError)])
def test_many_stop_at_the_first_that_cannot_be_encoded(tasks, error):
    with pytest.raises(error):
        CODEC.encode_many(tasks, IdMaker("0123456789ab"), 1e9)
    for wrong in ((iter(tasks), IdMaker("0123456789ab"), 1e9), (tasks, None, 1e9)):
        with pytest.raises(TypeError):
            CODEC.encode_many(*wrong)
    with pytest.raises(ValueError, match="unix seconds"):
        CODEC.encode_many([{"type": "a"}], IdMaker("0123456789ab"), -1.0)


def test_a_hook_may_change_the_list_that_is_encoded():
    def shorten(value):
        del tasks[1:]
        return 1

    tasks = [{"type": "a", "input": object()} for _ in range(3)]
    made = TaskCodec(None, shorten, None, Record).encode_many(tasks, IdMaker("0123456789ab"), 1e9)
    assert [each.frame[-7:] for each in made] == [b"\xa5input\x01"]


@given(TASKS, st.data())
@settings(max_examples=60)
def test_frames_cut_or_lengthened_are_refused(task, data):
    """K1: every truncation of a frame, and bytes behind it."""
    frame = CODEC.encode(task).frame
    header = decode_header(frame)
    for end in range(header.body_at) if len(frame) > 2000 else range(len(frame)):
        with pytest.raises(DecodeError):
            CODEC.decode(frame[:end])
        if end < header.body_at:
            with pytest.raises(DecodeError):
                decode_header(frame[:end])
        with pytest.raises(DecodeError):
            CODEC.decode_body(frame[:end], header)
    with pytest.raises(DecodeError, match="bytes follow the body"):
        CODEC.decode(frame + data.draw(st.binary(min_size=1)))


@given(TASKS, st.data())
def test_flipped_frames_never_break_anything(task, data):
    """K2: bit flips in header and body."""
    raw = bytearray(CODEC.encode(task).frame)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    back = attempt(CODEC.decode, bytes(raw))
    if back is not ValueError:
        assert type(back["id"]) is str
        assert back["priority"] in (0, 1, 2, 3)
        if not isinstance(back.get("metadata"), dict | None):
            with pytest.raises(EncodeTypeError, match="metadata must be a dict"):
                CODEC.encode(back, None, 1 << 20)
            return
        again = CODEC.encode(back, None, 1 << 20)
        assert same(CODEC.decode(again.frame), back)


def test_ids():
    assert CODEC.encode({"type": "t"})[:4:3] == ("made-up-id", False)
    assert CODEC.encode({"type": "t", "id": None})[:4:3] == ("made-up-id", False)
    assert CODEC.encode({"type": "t", "id": "a"})[:4:3] == ("a", True)
    assert CODEC.encode({"type": "t"}, "a")[:4:3] == ("a", True)
    assert CODEC.encode({"type": "t", "id": "a"}, "a")[:4:3] == ("a", True)
    with pytest.raises(EncodeError, match="task_id 'b' contradicts the id in the task, 'a'"):
        CODEC.encode({"type": "t", "id": "a"}, "b")
    name = enum.StrEnum("Name", "ROUND").ROUND
    assert type(CODEC.encode({"type": name}, name).id) is str


@pytest.mark.parametrize(
    "name", ["", "a b", "a\n", "é", "a" * 129, "\x7f", "\ud800", "a" * 20 + " ", " " + "a" * 8, "a\x00b"]
)
def test_names_have_a_grammar(name):
    for task, task_id, reply, path in [
        ({"type": name}, None, None, "type"),
        ({"type": "t", "id": name}, None, None, "id"),
        ({"type": "t"}, name, None, "task_id"),
        ({"type": "t"}, None, name, "reply"),
    ]:
        with pytest.raises(EncodeError, match=f"^{path} must be 1 to 128 printable ASCII") as caught:
            CODEC.encode(task, task_id, 1 << 20, reply)
        assert caught.value.path == path
    if "\ud800" not in name:
        for header in ([1, name, "t", 0], [1, "i", name, 0], [1, "i", "t", 0, None, None, None, name]):
            with pytest.raises(DecodeError, match="header: (id|type|reply) must be"):
                decode_header(oracle.pack(header) + b"\x80")


@pytest.mark.parametrize("char", [chr(c) for c in range(0x21, 0x7F)])
def test_every_printable_character_may_be_in_a_name(char):
    for n in (1, 7, 8, 9, 128):
        assert decode_header(CODEC.encode({"type": char * n}).frame).type == char * n


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        *[("priority", v, EncodeError) for v in (-1, 4, 1 << 70, -(1 << 70))],
        *[("priority", v, EncodeTypeError) for v in (True, False, 1.0, "1", [])],
        *[("max_retries", v, EncodeError) for v in (-1, 1001, 10**4000)],
        *[("max_retries", v, EncodeTypeError) for v in (True, 1.5, "3")],
        *[("timeout", v, EncodeError) for v in (0, -1, 0.0, math.nan, math.inf, 10**400)],
        *[("timeout", v, EncodeTypeError) for v in (True, "3", dt.timedelta(1))],
        *[("delay", v, EncodeError) for v in (-1, -0.001, math.nan, math.inf, 4e8, 10**400)],
        *[("delay", v, EncodeTypeError) for v in (True, "3")],
        *[("deadline", v, EncodeError) for v in (0, -5, math.nan, math.inf)],
        *[("deadline", v, EncodeTypeError) for v in (False, "3", dt.datetime(2024, 1, 1))],
        *[("type", v, EncodeTypeError) for v in (5, b"t", ["t"])],
        *[("id", v, EncodeTypeError) for v in (5, b"t", 0)],
        *[("metadata", v, EncodeTypeError) for v in (5, [1], "text", b"")],
    ],
)
def test_fields_have_ranges(key, value, error):
    with pytest.raises(error, match=f"^{key} must be .*, got ") as caught:
        CODEC.encode({"type": "t", key: value})
    assert caught.value.path == key


@pytest.mark.parametrize("task", [{}, {"type": None}])
def test_a_task_needs_a_type(task):
    with pytest.raises(EncodeError, match="type is missing"):
        CODEC.encode(task)


@pytest.mark.parametrize("task", [None, [], "task", 5, {"type": "t", 1: 2}, {"type": "t", b"k": 2}])
def test_a_task_is_a_dict_of_str(task):
    with pytest.raises(EncodeTypeError, match="a task must be a dict|keys of a task must be str"):
        CODEC.encode(task)


def test_a_path_begins_with_the_key_of_the_task():
    with pytest.raises(EncodeTypeError) as caught:
        CODEC.encode({"type": "t", "input": {"rows": [0, 1, 2, {"x": {1}}]}})
    assert caught.value.path == "input.rows[3].x"
    task: dict = {"type": "t"}
    task["input"] = {"parent": task}
    with pytest.raises(EncodeError, match=r"^input\.parent: the container contains itself"):
        CODEC.encode(task)


@given(TASKS, st.integers(1, 2000))
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # large values are the point
def test_max_bytes_bounds_the_frame(task, limit):
    size = len(CODEC.encode(task).frame)
    if size <= limit:
        assert len(CODEC.encode(task, None, limit).frame) == size
    else:
        with pytest.raises(TooLargeError):
            CODEC.encode(task, None, limit)


def test_many_keys_travel():
    task = {"type": "t", "id": "i", "priority": 0} | {f"key{i}": i for i in range(1000)}
    assert CODEC.decode(CODEC.encode(task).frame) == task


def test_keys_need_not_be_interned():
    task = {"".join(key): value for key, value in [("type", "t"), ("i" + "d", "x"), ("prio" + "rity", 1)]}
    task = {bytes(key, "ascii").decode(): value for key, value in task.items()}
    assert CODEC.decode(CODEC.encode(task).frame) == {"type": "t", "id": "x", "priority": 1}


@pytest.mark.parametrize("key", [*oracle.HEADER_KEYS])
def test_a_body_cannot_shadow_the_header(key):
    frame = oracle.pack([1, "i", "t", 0]) + oracle.pack({key: "forged"})
    with pytest.raises(DecodeError, match="do not belong to the header"):
        CODEC.decode(frame)
    with pytest.raises(DecodeError, match="do not belong to the header"):
        CODEC.decode_body(frame, decode_header(frame))


@pytest.mark.parametrize("body", [b"\xc0", b"\x90", b"\x81\x01\x02", b"\xdf\xff\xff\xff\xff", b"\xde\x00", b""])
def test_bad_bodies(body):
    with pytest.raises(DecodeError):
        CODEC.decode(oracle.pack([1, "i", "t", 0]) + body)


@pytest.mark.parametrize(
    "header",
    [
        [],
        [1, "i", "t"],
        [2, "i", "t", 0],
        [None, "i", "t", 0],
        [1, 5, "t", 0],
        [1, "i", None, 0],
        [1, "i", "t", 4],
        [1, "i", "t", -1],
        [1, "i", "t", None],
        [1, "i", "t", 1.0],
        [1, "i", "t", 300],
        [1, "i", "t", 0, 1001],
        [1, "i", "t", 0, -1],
        [1, "i", "t", 0, True],
        [1, "i", "t", 0, 1 << 40],
        [1, "i", "t", 0, None, 0],
        [1, "i", "t", 0, None, -1.0],
        [1, "i", "t", 0, None, math.nan],
        [1, "i", "t", 0, None, math.inf],
        [1, "i", "t", 0, None, "1"],
        [1, "i", "t", 0, None, None, -3],
        [1, "i", "t", 0, None, None, [1]],
        [1, "i", "t", 0, None, None, None, 5],
        [1, "i", "t", 0, None, None, None, None, -1],
        [1, "i", "t", 0, None, None, None, None, 1 << 31],
        [1, "i", "t", 0, None, None, None, None, 0, None],
        {"id": "i"},
        None,
        7,
    ],
)
def test_bad_headers(header):
    with pytest.raises(DecodeError):
        decode_header(oracle.pack(header) + b"\x80")


def test_a_header_of_another_language_may_use_ints_for_seconds():
    header = decode_header(oracle.pack([1, "i", "t", 3, 1000, 30, 2_000_000_000, None, None]) + b"\x80")
    assert (header.max_retries, header.timeout, header.deadline, header.flags) == (1000, 30.0, 2e9, 0)
    assert type(header.timeout) is float


def test_a_header_is_bound_to_its_frame():
    header = decode_header(CODEC.encode(TASK).frame)
    with pytest.raises(DecodeError):
        CODEC.decode_body(b"\x80", header)
    assert repr(header) == "<TaskHeader task-000123 text_classification lane=2>"
    assert TaskHeader().id is None
    with pytest.raises(DecodeError):
        CODEC.decode_body(CODEC.encode(TASK).frame, TaskHeader())


def test_nothing_can_be_pickled():
    import pickle

    for thing in (decode_header(CODEC.encode(TASK).frame), CODEC, Ext(1, b""), IdMaker("a" * 12)):
        with pytest.raises(TypeError):
            pickle.dumps(thing)


def test_records_are_tuples():
    assert type(CODEC.encode(TASK)) is Record
    assert type(TaskCodec(None).encode(TASK)) is tuple
    with pytest.raises(TypeError, match="record must be tuple"):
        TaskCodec(None, record=list)


def test_a_new_id_must_be_an_id():
    with pytest.raises(EncodeError, match="^id is missing"):
        TaskCodec(None).encode({"type": "t"})
    for bad in (lambda: "a b", lambda: 5, lambda: None):
        with pytest.raises((EncodeError, EncodeTypeError), match="^id must be"):
            TaskCodec(bad).encode({"type": "t"})


# --- ids --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 17592186043.0), min_size=1, max_size=20))
def test_ids_are_ordered_whatever_the_clock_does(times):
    maker = IdMaker("abcdef012345")
    ids = [maker.make(now) for now in times]
    assert ids == sorted(set(ids))
    for made, now, n in zip(ids, times, range(len(ids)), strict=True):
        assert (len(made), made[11:]) == (31, f"abcdef012345{n:08x}")
        assert int(made[:11], 16) >= int(now * 1000)
    assert int(ids[0][:11], 16) == int(times[0] * 1000)


@pytest.mark.parametrize("now", [-1.0, math.nan, math.inf, 1e300])
def test_ids_need_a_time(now):
    with pytest.raises(ValueError, match="now must be"):
        IdMaker("a" * 12).make(now)


@pytest.mark.parametrize("seed", ["", "a" * 11, "a" * 13, "é" * 12, "a b" * 4])
def test_seeds_have_a_form(seed):
    with pytest.raises(ValueError, match="seed must be"):
        IdMaker(seed)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_references_balance():
    """K12: references, also where encoding fails."""

    class Thing(str):
        __slots__ = ("__weakref__",)

    thing = Thing("a name that nobody else has")
    values = [thing, {thing: thing}, (thing,), [thing] * 100]
    before = sys.getrefcount(thing)
    for _ in range(100):
        packb(values)
        CODEC.encode({"type": thing[:1], "id": "x", "input": values, "k" * 20: thing})
        for bad in (object(), 1 << 70, "\ud800"):
            attempt_any(packb, [*values, bad])
            attempt_any(CODEC.encode, {"type": "t", "input": [*values, bad], "later": thing})
        attempt_any(packb, values, None, 200)
        attempt_any(packb, [object()], lambda _, thing=thing: [thing, object()])
    assert sys.getrefcount(thing) == before
    dead = weakref.ref(thing)
    del thing, values
    gc.collect()
    assert dead() is None


def attempt_any(function, *args):
    try:
        function(*args)
    except (ValueError, TypeError):
        return


LEAK = """
import gc, random, sys
from orchestra._ext import codec
from orchestra._ext.codec import *

C = TaskCodec(lambda: "id", lambda v: Ext(1, b"x" * 2000) if isinstance(v, set) else NotImplemented,
              lambda code, data: bytes(data) if code == 1 else 1 / 0)
good = {"type": "t", "input": [{"k%d" % i: ["v" * i, i, 1.5 * i, {1}]} for i in range(20)], "é": "ü" * 300, "n": 1 << 63}
frame = C.encode(good)[2]
rng = random.Random(7)
bad = [{"type": "t", "input": [good, x]} for x in (object(), 1 << 64, "\\ud800" * 400, {1.5: 2}, "x" * (1 << 20), 1j)]
cycle = []; cycle.append(cycle)
bad += [{"type": "t", "input": cycle}, {"type": "a b"}, {"type": "t", "timeout": -1}, {"type": "t", "id": 5}, {}]
flipped = []
for _ in range(300):
    raw = bytearray(frame); raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8); flipped.append(bytes(raw))
flipped += [frame[:n] for n in range(0, len(frame), 7)]

def once():
    C.encode(good); C.decode(frame); C.decode_body(frame, decode_header(frame))
    unpackb(packb(good, C.default), C.ext_hook)
    for task in bad:
        try: C.encode(task)
        except (ValueError, TypeError): pass
    for raw in flipped:
        try: C.decode(raw)
        except (ValueError, ZeroDivisionError): pass

def blocks():
    gc.collect()
    return sys.getallocatedblocks()

for _ in range(5): once()
before = blocks()
for _ in range(60): once()
print(blocks() - before)
"""


def test_nothing_leaks():
    """K12: about 24,000 good and bad calls leave no object behind."""
    done = subprocess.run(
        [sys.executable, "-c", LEAK], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    assert int(done.stdout) < 50, "blocks left behind by 60 rounds of about 400 calls"


def test_raw_memory_does_not_grow():
    """What malloc holds (error paths, task dicts of many keys) is outside of the count of blocks."""
    script = textwrap.dedent("""
        import resource
        from orchestra._ext.codec import *
        C = TaskCodec(lambda: "id")
        many = {"type": "t", **{f"key{i}": i for i in range(2000)}}
        wrong = {**many, "bad": [[[object()]]]}
        def once():
            C.encode(many)
            try: C.encode(wrong)
            except TypeError: pass
            try: packb([["x" * 100_000, object()]])
            except TypeError: pass
        for _ in range(50): once()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2000): once()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    grown = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert grown < 8_000, "KiB; a leak of either array would be 60,000 or more"
