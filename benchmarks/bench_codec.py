"""The codec against msgspec.msgpack on the task of the specification: dict in, dict out, in one run.

``pytest benchmarks/bench_codec.py --benchmark-enable`` prints the times. The two ratio tests need no option: they take
the two sides in turns and compare the best rounds, so that a busy machine slows both alike.
Owed: round trip >= 1.0 x msgspec, header alone >= 4 x msgspec's decoding of the whole task.
"""

from __future__ import annotations

import time

import pytest

from orchestra import serialization
from orchestra._ext import codec

msgspec = pytest.importorskip("msgspec")

TASK = {
    "id": "task-000123",
    "type": "text_classification",
    "input": {"text": "Classify this text please: lorem ipsum dolor"},
    "priority": 2,
}
WITHOUT_ID = {key: value for key, value in TASK.items() if key != "id"}
LARGE = {
    "id": "task-000123",
    "type": "embed",
    "priority": 1,
    "timeout": 30.0,
    "input": {"rows": [{"id": i, "text": "lorem ipsum " * 8, "score": i / 7, "tags": ["a", "b"]} for i in range(50)]},
    "metadata": {"tenant": "acme", "trace": "0123456789abcdef"},
}

CODEC = codec.TaskCodec(serialization.new_task_id)
THEIRS_IN = msgspec.msgpack.Encoder().encode
THEIRS_OUT = msgspec.msgpack.Decoder().decode


def rounds(function, argument, loops):
    start = time.perf_counter()
    for _ in range(loops):
        function(argument)
    return (time.perf_counter() - start) / loops


def best_in_turns(pairs, loops=20_000, turns=25):
    """Seconds per call of each (function, argument), best of `turns`, taken in turns."""
    best = [float("inf")] * len(pairs)
    for _ in range(turns):
        for i, (function, argument) in enumerate(pairs):
            best[i] = min(best[i], rounds(function, argument, loops))
    return best


def report(record_property, **numbers):
    for name, value in numbers.items():
        record_property(name, round(value, 3))
    print("  ".join(f"{name} {value:.3g}" for name, value in numbers.items()))


@pytest.mark.parametrize(("task", "loops"), [(TASK, 20_000), (LARGE, 500)], ids=["typical", "large"])
def test_round_trip_is_no_slower_than_msgspec(task, loops, record_property):
    ours, theirs = CODEC.encode(task)[2], THEIRS_IN(task)
    assert CODEC.decode(ours) == THEIRS_OUT(theirs) == task
    times = best_in_turns(
        [(CODEC.encode, task), (CODEC.decode, ours), (THEIRS_IN, task), (THEIRS_OUT, theirs)], loops=loops
    )
    ratio = (times[2] + times[3]) / (times[0] + times[1])
    names = ("encode_ns", "decode_ns", "msgspec_encode_ns", "msgspec_decode_ns")
    report(record_property, ratio=ratio, **{name: t * 1e9 for name, t in zip(names, times, strict=True)})
    assert ratio >= 1.0


def test_header_is_four_times_as_fast_as_a_whole_task_of_msgspec(record_property):
    frame, theirs = CODEC.encode(TASK)[2], THEIRS_IN(TASK)
    ours_s, theirs_s = best_in_turns([(codec.decode_header, frame), (THEIRS_OUT, theirs)])
    report(record_property, ratio=theirs_s / ours_s, header_ns=ours_s * 1e9, msgspec_decode_ns=theirs_s * 1e9)
    assert theirs_s / ours_s >= 4.0


@pytest.mark.parametrize("task", [TASK, WITHOUT_ID, LARGE], ids=["typical", "without id", "large"])
@pytest.mark.parametrize("side", ["orchestra", "codec", "msgspec"])
@pytest.mark.benchmark(group="encode")
def test_encode(benchmark, side, task):
    encode = {"orchestra": serialization.encode_task, "codec": CODEC.encode, "msgspec": THEIRS_IN}[side]
    assert benchmark(encode, task)


@pytest.mark.parametrize("task", [TASK, LARGE], ids=["typical", "large"])
@pytest.mark.parametrize("side", ["orchestra", "codec", "msgspec"])
@pytest.mark.benchmark(group="decode")
def test_decode(benchmark, side, task):
    raw = THEIRS_IN(task) if side == "msgspec" else CODEC.encode(task)[2]
    decode = {"orchestra": serialization.decode_task, "codec": CODEC.decode, "msgspec": THEIRS_OUT}[side]
    assert benchmark(decode, raw) == task


@pytest.mark.benchmark(group="parts")
def test_decode_header(benchmark):
    assert benchmark(serialization.decode_header, CODEC.encode(TASK)[2]).lane == 2


@pytest.mark.benchmark(group="parts")
def test_decode_body(benchmark):
    frame = CODEC.encode(TASK)[2]
    assert benchmark(serialization.decode_body, frame, serialization.decode_header(frame))


@pytest.mark.benchmark(group="parts")
def test_new_task_id(benchmark):
    assert benchmark(serialization.new_task_id)


@pytest.mark.parametrize("size", [1_000, 1_000_000])
@pytest.mark.benchmark(group="array")
def test_array_round_trip(benchmark, size):
    np = pytest.importorskip("numpy")
    array = np.arange(size, dtype=np.float32)
    assert benchmark(lambda: serialization.loads(serialization.dumps(array, max_bytes=1 << 23))).shape == (size,)
