"""orchestra.serialization: what users see of the codec, NumPy arrays, ids, and the mapping of errors."""

from __future__ import annotations

import ast
import datetime as dt
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from orchestra import errors, serialization
from orchestra.serialization import (
    MAX_TASK_BYTES,
    EncodedTask,
    decode_body,
    decode_header,
    decode_task,
    dumps,
    encode_task,
    encode_tasks,
    loads,
    new_task_id,
)
from orchestra.tasks import TaskPriority

ROOT = pathlib.Path(__file__).parents[2]
TASK = {"id": "task-123", "type": "text_classification", "input": {"text": "Classify this text"}, "priority": 1}


def test_a_task_comes_back():
    encoded = encode_task(TASK)
    assert isinstance(encoded, EncodedTask)
    task_id, lane, frame, own_id, delay = encoded
    assert (task_id, lane, own_id, delay) == ("task-123", 1, True, 0.0)
    assert decode_task(frame) == TASK
    header = decode_header(frame)
    assert (header.id, header.type, header.lane) == ("task-123", "text_classification", 1)
    assert decode_body(frame, header) == {"input": TASK["input"]}


def test_every_key_of_a_task():
    task = {
        **TASK,
        "priority": TaskPriority.LOW,
        "max_retries": 4,
        "timeout": 30,
        "deadline": 2e9,
        "delay": 60,
        "metadata": {"tenant": "acme"},
        "trace": [1, 2],
    }
    before = dict(task)
    encoded = encode_task(task, reply="channel-1", flags=1)
    assert task == before
    assert encoded.delay == 60.0
    header = decode_header(encoded.frame)
    assert (header.max_retries, header.timeout, header.deadline) == (4, 30.0, 2e9)
    assert (header.lane, header.reply, header.flags) == (3, "channel-1", 1)
    assert decode_task(encoded.frame) == {k: v for k, v in task.items() if k != "delay"}


def test_a_task_without_priority_is_normal():
    assert encode_task({"type": "t"}).lane == TaskPriority.NORMAL
    assert decode_task(encode_task({"type": "t"}).frame)["priority"] == TaskPriority.NORMAL


def test_the_frame_is_two_messagepack_values():
    msgpack = pytest.importorskip("msgspec").msgpack
    frame = encode_task(TASK).frame
    at = decode_header(frame).body_at
    assert msgpack.decode(frame[:at]) == [1, "task-123", "text_classification", 1]
    assert msgpack.decode(frame[at:]) == {"input": {"text": "Classify this text"}}


def test_many_tasks_are_encoded_like_one():
    first, second, third = encode_tasks([{"type": "t"}, TASK, {"type": "t"}], reply="channel-1", flags=1)
    assert second == encode_task(TASK, reply="channel-1", flags=1)
    assert not (first.own_id or third.own_id)
    assert first.id < third.id
    assert decode_task(third.frame) == {"id": third.id, "type": "t", "priority": 2}
    assert encode_tasks([]) == []
    with pytest.raises(errors.InvalidTaskTypeError) as refused:
        encode_tasks([TASK, {"type": "t", "input": [{1}]}, 7])
    assert refused.value.path == "input[0]"
    with pytest.raises(errors.TaskTooLargeError):
        encode_tasks([TASK], max_bytes=20)


def test_ids_given_and_made():
    made = encode_task({"type": "t"})
    assert not made.own_id
    assert decode_header(made.frame).id == made.id
    assert encode_task({"type": "t"}, task_id="mine").own_id
    with pytest.raises(errors.InvalidTaskError, match="contradicts"):
        encode_task(TASK, task_id="other")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "error", "path"),
    [
        ({"type": "t", "input": {"when": dt.datetime(2024, 1, 1)}}, errors.InvalidTaskTypeError, "input.when"),
        ({"type": "t", "input": [1 << 64]}, errors.InvalidTaskError, "input[0]"),
        ({"type": "t", "input": {1.5: 1}}, errors.InvalidTaskTypeError, "input[1.5]"),
        ({"type": "t", "priority": 9}, errors.InvalidTaskError, "priority"),
        ({"type": "t", "priority": "high"}, errors.InvalidTaskTypeError, "priority"),
        ({"input": 1}, errors.InvalidTaskError, "type"),
        ("task", errors.InvalidTaskTypeError, ""),
    ],
)
def test_refused_tasks(task, error, path):
    with pytest.raises(error) as caught:
        encode_task(task)
    assert type(caught.value) is error
    assert caught.value.path == path
    assert caught.value.__suppress_context__
    assert isinstance(caught.value, TypeError if error is errors.InvalidTaskTypeError else ValueError)


def test_the_default_limit():
    assert MAX_TASK_BYTES == 1 << 20
    with pytest.raises(errors.TaskTooLargeError) as caught:
        encode_task({"type": "t", "input": "x" * MAX_TASK_BYTES})
    assert caught.value.limit == MAX_TASK_BYTES
    assert caught.value.size > MAX_TASK_BYTES
    assert caught.value.path == "input"
    big = encode_task({"type": "t", "input": "x" * MAX_TASK_BYTES}, max_bytes=1 << 22)
    assert len(decode_task(big.frame)["input"]) == MAX_TASK_BYTES
    with pytest.raises(errors.TaskTooLargeError):
        dumps(b"x" * MAX_TASK_BYTES)
    assert loads(dumps(b"x" * MAX_TASK_BYTES, max_bytes=1 << 22)) == b"x" * MAX_TASK_BYTES


@pytest.mark.parametrize("cut", [0, 1, 5, 20, -1])
def test_corrupt_frames(cut):
    frame = encode_task(TASK).frame
    header = decode_header(frame)
    with pytest.raises(errors.CorruptEntryError, match="not a task: .*at byte"):
        decode_task(frame[:cut])
    with pytest.raises(errors.CorruptEntryError, match="task task-123: "):
        decode_body(frame[:cut], header)
    with pytest.raises(errors.CorruptEntryError, match="not a task: "):
        decode_header(frame[: min(cut, header.body_at - 1)] if cut >= 0 else b"\xc1")
    with pytest.raises(errors.CorruptEntryError):
        loads(frame)


def test_values():
    value = {"score": 0.5, "labels": ["a", None, True], 7: b"\x00"}
    assert loads(dumps(value)) == value
    assert loads(bytearray(dumps((1, 2)))) == [1, 2]
    with pytest.raises(errors.InvalidTaskTypeError, match=r"^result\.rows\[1\]: a set does not travel"):
        dumps({"rows": [1, {2}]}, name="result")


# --- NumPy ------------------------------------------------------------------------------------------------------------

ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.arange(12, dtype=">i2").reshape(3, 4).T,
    np.asfortranarray(np.arange(24, dtype=np.int64).reshape(2, 3, 4)),
    np.arange(10)[::-2],
    np.array(3.5),
    np.zeros((0, 3), np.uint8),
    np.zeros((2, 0, 5), np.complex64),
    np.array([True, False]),
    np.array([1 + 2j, 3]),
    np.array(["2024-01-01", "NaT"], "datetime64[ns]"),
    np.array([1, 2], "timedelta64[25s]"),
    np.array(["a", "longer", ""]),
    np.array([b"a", b"bc"]),
    np.array([np.nan, np.inf, -0.0], np.float16),
    np.broadcast_to(np.int8(5), (4, 4)),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_come_back(array):
    back = loads(dumps([array]))[0]
    assert type(back) is np.ndarray
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable
    assert back.flags.owndata
    assert decode_task(encode_task({"type": "t", "input": array}).frame)["input"].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("scalar", "plain"), [(np.float32(1.5), 1.5), (np.int8(-3), -3), (np.uint64(1 << 63), 1 << 63), (np.True_, True)]
)
def test_scalars_become_plain(scalar, plain):
    back = loads(dumps(scalar))
    assert back == plain
    assert type(back) is type(plain)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.array([object()]), "dtype object does not travel"),
        (np.zeros(2, [("x", "i4"), ("y", "f8")]), "does not travel"),
        (np.zeros(2, "V3"), "does not travel"),
        (np.ma.array([1, 2], mask=[0, 1]), "masked array"),
        (np.longdouble(1), "does not travel"),
        (np.zeros(1, np.longdouble), "does not travel"),
        (np.datetime64("2024-01-01", "ns"), "a datetime64 does not travel"),
        (np.complex64(1), "does not travel"),
        (np.zeros(1, [("x", "i4")])[0], "a void does not travel"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_does_not_travel(value, text):
    with pytest.raises(errors.InvalidTaskTypeError, match=rf"^value\.a\[0\]: .*{text}"):
        dumps({"a": [value]})


def forged(head, payload=b""):
    raw = dumps(head) + payload
    return b"\xc9" + len(raw).to_bytes(4, "big") + b"\x01" + raw


@pytest.mark.parametrize(
    ("head", "payload"),
    [
        (["|O", [1]], b"\x00" * 8),
        (["|V8", [1]], b"\x00" * 8),
        (["<f8", [2]], b"\x00" * 8),
        (["<f8", [1]], b"\x00" * 9),
        (["<f8", [-1]], b"\x00" * 8),
        (["<f8", [True]], b"\x00" * 8),
        (["<f8", [1.0]], b"\x00" * 8),
        (["<f8", [1 << 40, 1 << 40]], b""),
        (["<f8", [0, 1 << 61, 1 << 61]], b""),
        (["<f8", [1 << 63, 0]], b""),
        (["<f8", [1] * 33], b"\x00" * 8),
        (["<U0", [1 << 40]], b""),
        (["<U999999999", [1]], b""),
        (["<M8[parsec]", [1]], b"\x00" * 8),
        (["<f8,<f8", [1]], b"\x00" * 16),
        (["(2,)<f8", [1]], b"\x00" * 16),
        (["float64", [1]], b"\x00" * 8),
        (["<f8"], b"\x00" * 8),
        ("<f8", b""),
        ({"dtype": "<f8"}, b""),
        (None, b""),
    ],
)
def test_forged_arrays_are_refused(head, payload):
    with pytest.raises(errors.CorruptEntryError):
        loads(forged(head, payload))


def test_a_forged_array_that_is_right_is_read():
    assert loads(forged(["<f8", [1]], b"\x00" * 8)).tolist() == [0.0]


@pytest.mark.parametrize("raw", [b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x00\x02", b"\xc7\x00\x01"])
def test_other_extensions_are_refused(raw):
    with pytest.raises(errors.CorruptEntryError):
        loads(raw)
    with pytest.raises(errors.CorruptEntryError):
        decode_task(b"\x94\x01\xa1i\xa1t\x00\x81\xa5input" + raw)


def test_importing_costs_no_numpy_and_no_pickle():
    code = (
        "import sys; from orchestra.serialization import *;"
        "assert encode_task({'type': 't', 'input': [1.5]}).frame;"
        "print([name for name in ('numpy', 'pickle', 'msgspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# --- ids --------------------------------------------------------------------------------------------------------------


def test_new_ids():
    ids = [new_task_id() for _ in range(10_000)]
    assert ids == sorted(set(ids))
    assert {len(made) for made in ids} == {31}
    assert set("".join(ids)) <= set("0123456789abcdef")


def test_new_ids_of_threads():
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.extend([new_task_id() for _ in range(5000)])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 40_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork guard")
def test_new_ids_after_a_fork():
    context = multiprocessing.get_context("fork")
    new_task_id()
    readers = []
    for _ in range(3):
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=lambda w=writer: w.send([new_task_id() for _ in range(100)]))
        child.start()
        readers.append((child, reader))
    seeds = {new_task_id()[11:23]}
    ids = {new_task_id() for _ in range(100)}
    for child, reader in readers:
        got = reader.recv()
        child.join()
        ids.update(got)
        seeds.add(got[0][11:23])
    assert len(ids) == 400
    assert len(seeds) == 4


def test_only_this_module_imports_the_codec():
    importers = set()
    for path in (ROOT / "orchestra").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if any(f"{module}.{name}".strip(".").startswith("orchestra._ext.codec") for name in names):
                importers.add(path.name)
    importers.discard("__init__.py")  # asks only whether the package was compiled
    assert importers == {pathlib.Path(serialization.__file__).name}
