"""MessagePack values: the compiled codec against its oracle and msgspec, and against input made to break it."""

from __future__ import annotations

import ast
import datetime as dt
import decimal
import enum
import gc
import math
import pathlib
import random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra._ext import codec
from orchestra._ext.codec import (
    DecodeError,
    EncodeError,
    EncodeTypeError,
    Ext,
    TaskCodec,
    TooLargeError,
    decode_header,
    packb,
    unpack_first,
    unpackb,
)
from tests.reference import codec as oracle
from tests.reference.codec_values import SCALARS, TEXT, VALUES, attempt, same

ROOT = pathlib.Path(__file__).parents[2]
CODEC = TaskCodec(None)


# --- values -----------------------------------------------------------------------------------------------------------


@given(VALUES)
def test_packs_as_the_oracle_and_comes_back(value):
    data = packb(value)
    assert data == oracle.pack(value)
    assert same(unpackb(data), value)


@given(st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(TEXT, v), max_leaves=30))
def test_agrees_with_msgspec(value):
    msgpack = pytest.importorskip("msgspec").msgpack
    assert packb(value) == msgpack.encode(value)
    assert same(unpackb(msgpack.encode(value)), msgpack.decode(packb(value)))


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused_as_by_the_oracle(data):
    assert same_or_refused(attempt(unpackb, data), attempt(oracle.unpack, data))


def same_or_refused(a, b):
    return a is b if ValueError in (a, b) else same(a, b)


@given(VALUES, st.data())
def test_bit_flips_are_read_or_refused_as_by_the_oracle(value, data):
    """K2: bit flips."""
    raw = bytearray(packb(value))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert same_or_refused(attempt(unpackb, raw), attempt(oracle.unpack, raw))


@given(VALUES)
@settings(max_examples=40)
def test_every_truncation_is_refused(value):
    """K1: every truncation of a value."""
    raw = packb(value)
    for end in range(len(raw)):
        with pytest.raises(DecodeError):
            unpackb(raw[:end])


@pytest.mark.parametrize("tag", [0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xC7, 0xC8, 0xC9])
@pytest.mark.parametrize("length", [1, 100, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80808080, 0xFFFFFFFF])
def test_lying_lengths_are_refused(tag, length):
    """K2: lengths that exceed what follows."""
    width = {0xC4: 1, 0xD9: 1, 0xC7: 1, 0xC5: 2, 0xDA: 2, 0xDC: 2, 0xDE: 2, 0xC8: 2}.get(tag, 4)
    head = bytes([tag]) + (length & ((1 << 8 * width) - 1)).to_bytes(width, "big")
    for tail in (b"", b"\x01"):
        with pytest.raises(DecodeError):
            unpackb(head + tail[: max(0, length - 1)], lambda code, data: bytes(data))


def test_nested_lying_lengths_allocate_no_more_than_the_input():
    """K2: a length is checked before anything is allocated for it."""
    import tracemalloc

    size = 200_000
    raw = b"".join(b"\xdd" + (size - 5 * (i + 1)).to_bytes(4, "big") for i in range(60))
    raw += b"\x00" * (size - len(raw))
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="length exceeds"):
            unpackb(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * size


@pytest.mark.parametrize("depth", [10, 64, 65, 1000, 1_000_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k", b"\xdc\x00\x01", b"\xde\x00\x01\x01"])
def test_depth_is_capped_while_decoding(depth, opening):
    """K3: nesting up to a million levels."""
    raw = opening * depth + b"\xc0"
    if depth <= 64:
        assert unpackb(raw) is not None
    else:
        with pytest.raises(DecodeError, match="nested deeper than 64"):
            unpackb(raw)


@pytest.mark.parametrize("depth", [10, 64, 65, 1000, 100_000])
@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"k": v}])
def test_depth_is_capped_while_encoding(depth, wrap):
    """K3: the same on the way out."""
    value = None
    for _ in range(depth):
        value = wrap(value)
    if depth <= 64:
        assert unpackb(packb(value)) is not None
    else:
        with pytest.raises(EncodeError, match="nested deeper than 64 levels"):
            packb(value)


@pytest.mark.parametrize("depth", [1, 512])
def test_the_cap_can_be_moved(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    raw = packb(value, None, 1000, depth)
    assert packb(unpackb(raw, None, depth), None, 1000, depth) == raw
    with pytest.raises(EncodeError):
        packb([value], None, 1000, depth)
    with pytest.raises(DecodeError):
        unpackb(b"\x91" + packb(value, None, 1000, depth), None, depth)


@pytest.mark.parametrize(
    ("name", "value"), [("max_depth", 0), ("max_depth", 513), ("max_bytes", 0), ("max_bytes", 1 << 31)]
)
def test_limits_have_limits(name, value):
    with pytest.raises(ValueError, match=f"{name} must be 1 to"):
        packb(None, **{name: value})


class Colour(enum.IntEnum):
    RED = 7


class Shape(enum.StrEnum):
    ROUND = "round"


class Pair(NamedTuple):
    a: int
    b: int


class Dict(dict):
    def __iter__(self):
        raise RuntimeError("the base is read, not the subclass")

    items = keys = __len__ = __iter__


class Loud(int):
    def __repr__(self):
        raise RuntimeError("never called")

    __index__ = __int__ = __str__ = __repr__


@pytest.mark.parametrize(
    ("value", "back"),
    [
        (Colour.RED, 7),
        (Shape.ROUND, "round"),
        (Pair(1, 2), [1, 2]),
        (Dict(a=1), {"a": 1}),
        (type("F", (float,), {})(1.5), 1.5),
        (type("L", (list,), {})([1]), [1]),
        (type("B", (bytes,), {})(b"x"), b"x"),
        (bytearray(b"x"), b"x"),
        (memoryview(b"xyz")[1:], b"yz"),
        ({Shape.ROUND: 1, Colour.RED: 2}, {"round": 1, 7: 2}),
        (-0.0, -0.0),
        ("\x00\ufeff\U0001f600é", "\x00\ufeff\U0001f600é"),
        ("é" * 200, "é" * 200),
        ("é" * 40_000, "é" * 40_000),
        ("x" * 70_000, "x" * 70_000),
        (b"x" * 70_000, b"x" * 70_000),
        (list(range(70_000)), list(range(70_000))),
        ({i: i for i in range(70_000)}, {i: i for i in range(70_000)}),
    ],
)
def test_subclasses_travel_as_their_base(value, back):
    assert packb(value) == oracle.pack(back)
    assert same(unpackb(packb(value)), back)


def test_no_code_of_a_subclass_runs():
    """K11: objects whose methods raise."""
    assert packb(Loud(5)) == b"\x05"
    assert CODEC.encode({"type": "t", "id": "i", "priority": Loud(1), "max_retries": Loud(3)})[1] == 1
    with pytest.raises(EncodeError, match="got a Loud"):
        CODEC.encode({"type": "t", "priority": Loud(9)})
    with pytest.raises(EncodeError, match="got a Loud"):
        packb({"x": Loud(1 << 64)})
    with pytest.raises(EncodeTypeError) as caught:
        packb({Loud(3): object()})
    assert caught.value.path == "value[3]"


def test_ints_that_cpython_will_not_print_are_refused_in_words():
    """K4: CVE-2020-10735."""
    for task in ({"input": 10**5000}, {"priority": 10**5000}, {"timeout": 10**5000}):
        with pytest.raises(EncodeError, match="got an int of 16610 bits"):
            CODEC.encode({"type": "t", "id": "i", **task})


CYCLE: list = [1]
CYCLE.append({"again": CYCLE})


@pytest.mark.parametrize(
    ("value", "error", "path", "text"),
    [
        ([0, {"x": 1 << 64}], EncodeError, "value[1].x", "got 18446744073709551616; send str"),
        ({"x": -(1 << 63) - 1}, EncodeError, "value.x", "-2\\*\\*63 to 2\\*\\*64 - 1"),
        ({"x": 10**1000}, EncodeError, "value.x", "an int of 3322 bits"),
        ({1.5: 0}, EncodeTypeError, "value[1.5]", "keys of a dict must be str, int or bytes, got 1.5"),
        ({math.nan: 0}, EncodeTypeError, "value[nan]", "got nan"),
        ({None: 0}, EncodeTypeError, "value[None]", "got None"),
        ({True: 0}, EncodeTypeError, "value[True]", "got True"),
        ({(1, 2): 0}, EncodeTypeError, "value[a tuple]", "got a tuple"),
        ({"a b": ["\ud800"]}, EncodeError, "value['a b'][0]", "lone surrogate"),
        ({"a": {"\udfff" * 300: 1}}, EncodeError, None, "lone surrogate"),
        ((1, {7: {b"k": {2}}}), EncodeTypeError, "value[1][7][a bytes]", "a set does not travel; send list"),
        ([dt.datetime(2024, 1, 1)], EncodeTypeError, "value[0]", "send value.isoformat"),
        (decimal.Decimal(1), EncodeTypeError, "value", r"a Decimal does not travel; send str\(value\)"),
        (object(), EncodeTypeError, "value", "an object does not travel"),
        (enum.Enum("E", "A").A, EncodeTypeError, "value", "send value.value"),
        (memoryview(b"abcd")[::2], EncodeTypeError, "value", "not one contiguous run"),
        (CYCLE, EncodeError, "value[1].again", "contains itself"),
    ],
)
def test_refusals_say_where_and_what(value, error, path, text):
    with pytest.raises(error, match=text) as caught:
        packb(value)
    if path is not None:
        assert caught.value.path == path
        assert str(caught.value).startswith(path + ":")


@pytest.mark.parametrize("size", [0, 1, 1000, 1023, 1024, 1025, 5000, 1 << 20])
def test_max_bytes_is_exact(size):
    """K7: the cap is exact to the byte."""
    data = packb(b"x" * size)
    assert packb(b"x" * size, None, len(data)) == data
    with pytest.raises(TooLargeError) as caught:
        packb(b"x" * size, None, len(data) - 1) if size else packb([b""], None, 2)
    assert caught.value.size > caught.value.limit


@given(VALUES, st.integers(1, 3000))
def test_max_bytes_is_exact_for_any_value(value, limit):
    raw = oracle.pack(value)
    if len(raw) <= limit:
        assert packb(value, None, limit) == raw
    else:
        with pytest.raises(TooLargeError):
            packb(value, None, limit)


def test_too_large_says_where():
    with pytest.raises(TooLargeError, match="exceeds the limit of 5000 bytes") as caught:
        packb({"rows": [["x" * 400] * 4] * 10}, None, 5000)
    assert caught.value.path.startswith("value.rows[3]")
    assert caught.value.limit == 5000
    assert 5000 < caught.value.size < 7000


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_default_replaces_values():
    assert unpackb(packb([{1, 2}, 3j], lambda v: sorted(v) if isinstance(v, set) else str(v))) == [[1, 2], "3j"]


def test_default_may_decline():
    with pytest.raises(EncodeTypeError, match="value\\[0\\]: a set does not travel"):
        packb([{1}], lambda value: NotImplemented)


def test_default_may_not_go_on_for_ever():
    with pytest.raises(EncodeError, match="nested deeper"):
        packb(object(), lambda value: object())


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), MemoryError(), RecursionError("deep")])
def test_what_a_hook_raises_passes(error):
    def hook(value):
        raise error

    with pytest.raises(type(error)) as caught:
        packb({"a": [1, object()]}, hook)
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        unpackb(packb([Ext(5, b"x")]), lambda code, data: hook(data))
    assert caught.value is error


def test_a_refusal_out_of_a_hook_gets_the_path():
    def hook(value):
        raise EncodeTypeError("no")

    with pytest.raises(EncodeTypeError, match=r"^value\.a\[1\]: no$") as caught:
        packb({"a": [1, object()]}, hook)
    assert caught.value.path == "value.a[1]"


def test_hooks_may_call_the_codec():
    nested = packb([object(), object()], lambda value: Ext(3, packb("in" * 500)))
    assert unpackb(nested, lambda code, data: unpackb(data)) == ["in" * 500] * 2


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8, 16, 17, 255, 256, 65535, 65536])
def test_extensions(size):
    msgpack = pytest.importorskip("msgspec").msgpack
    payload = random.Random(size).randbytes(size)
    for code in (-128, -1, 0, 1, 127):
        raw = packb(Ext(code, payload[size // 2 :], payload[: size // 2]))
        assert raw == msgpack.encode(msgpack.Ext(code, payload))
        assert unpackb(raw, lambda code, data: (code, bytes(data))) == (code, payload)
        with pytest.raises(DecodeError, match="extension"):
            unpackb(raw)
        for end in range(0, len(raw), max(1, size // 10)):
            with pytest.raises(DecodeError):
                unpackb(raw[:end], lambda code, data: None)


@pytest.mark.parametrize("bad", [(128, b""), (-129, b"")])
def test_extension_codes_are_bytes(bad):
    with pytest.raises(ValueError, match="-128 to 127"):
        Ext(*bad)


@pytest.mark.parametrize("data", [None, 5, "text", [1]])
def test_extension_payloads_are_buffers(data):
    with pytest.raises(EncodeTypeError, match=r"value\[0\]: .* contiguous"):
        packb([Ext(1, data)])


def test_mutation_while_encoding_is_refused():
    """K11: a list or dict that a hook changes."""

    def shrink(_):
        values.clear()
        gc.collect()

    values: list = [object(), "a" * 100, "b" * 100]
    with pytest.raises(EncodeError, match="value: the list changed while"):
        packb(values, shrink)
    values = {"a": object(), "b": "b" * 100}  # type: ignore[assignment]
    with pytest.raises(EncodeError, match="value: the dict changed while"):
        packb(values, shrink)


def test_mutation_of_the_parent_is_refused():
    """K11: what is being encoded further out changes."""
    outer: dict = {"list": [object(), 1, 2]}

    def grow(_):
        outer["list"].extend(range(1000))
        outer.update({str(i): i for i in range(1000)})

    with pytest.raises(EncodeError, match="changed while"):
        packb(outer, grow)


def test_a_body_is_not_disturbed_by_its_hooks():
    task = {"type": "t", "id": "x" * 50, "input": object(), "later": ["kept"]}

    def clear(_):
        task.clear()
        gc.collect()
        return "done"

    def new_id():
        task.clear()
        gc.collect()
        return "fresh"

    frame = TaskCodec(None, clear).encode(task)[2]
    assert CODEC.decode(frame) == {"id": "x" * 50, "type": "t", "priority": 2, "input": "done", "later": ["kept"]}
    task = {"type": "t" * 50, "input": "kept"}
    assert CODEC.decode(TaskCodec(new_id).encode(task)[2])["type"] == "t" * 50


def test_a_hook_sees_no_half_made_list():
    def hook(code, data):
        for thing in gc.get_objects():
            if type(thing) is list and len(thing) == 7919:
                seen.append(list(thing))
        return "ext"

    seen: list = []
    raw = packb([Ext(1, b"x")] + [0] * 7918)
    assert unpackb(raw, hook)[0] == "ext"
    assert not seen


# --- decoding, the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "cut short"),
        (b"\xc1", "0xc1 is not"),
        (b"\xc0\xc0", "1 bytes follow the value"),
        (b"\xa1\xff", "not valid UTF-8"),
        (b"\xa2\xc0\xaf", "not valid UTF-8"),  # overlong
        (b"\xa3\xed\xa0\x80", "not valid UTF-8"),  # a surrogate
        (b"\x81\xc0\x01", "a map key is not"),
        (b"\x81\xc3\x01", "a map key is not"),
        (b"\x81\x90\x01", "a map key is not"),
        (b"\x81\x80\x01", "a map key is not"),
        (b"\x81\xcb" + b"\x00" * 8 + b"\x01", "a map key is not"),
        (b"\x81\xc7\x00\x01\x01", "a map key is not"),
    ],
)
def test_bad_bytes(raw, text):
    """K5: what is no UTF-8, overlong, or a surrogate; K6: keys that are none."""
    with pytest.raises(DecodeError, match=text):
        unpackb(raw)


def test_the_last_of_equal_keys_wins():
    """K6: duplicate keys."""
    assert unpackb(b"\x82\xa1a\x01\xa1a\x02") == {"a": 2}
    assert CODEC.decode(b"\x94\x01\xa1i\xa1t\x00\x82\xa1a\x01\xa1a\x02")["a"] == 2


def test_unpack_first_says_where_it_ended():
    assert unpack_first(b"\x93\x01\x02\x03rest") == ([1, 2, 3], 4)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(wrap):
    assert unpackb(wrap(b"\x91\xa3abc")) == ["abc"]


@pytest.mark.parametrize("thing", [None, "text", 5, [1]])
def test_only_buffers_are_read(thing):
    with pytest.raises(TypeError):
        unpackb(thing)
    with pytest.raises(TypeError):
        decode_header(thing)


def test_colliding_keys_do_not_mix():
    keys = [f"k{i}" for i in range(5000)] + ["k" * i for i in range(40)] + [f"{i:032d}" for i in range(3000)]
    random.Random(1).shuffle(keys)
    value = dict.fromkeys(keys, 1)
    for _ in range(2):
        assert unpackb(packb(value)) == value


# --- the source -------------------------------------------------------------------------------------------------------


def test_the_codec_imports_nothing():
    assert codec.__name__ == "orchestra._ext.codec"
    for path in (ROOT / "_ext").glob("codec*.p[yx]*"):
        if path.suffix == ".pyi":
            ast.parse(path.read_text())
            continue
        for line in path.read_text().splitlines():
            assert not line.startswith(("import ", "from orchestra")), f"{path.name}: {line}"
