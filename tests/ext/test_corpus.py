"""Inputs that fuzzing kept or found, and short walks from them, through the normal build; the rows left of group K.

The search itself is ``python -m tests.fuzz``.
"""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from orchestra._ext.codec import DecodeError, EncodeError, TaskCodec, TooLargeError, packb, unpackb
from tests.fuzz import corpus
from tests.fuzz.__main__ import NAMES
from tests.fuzz.targets import TARGETS
from tests.reference import codec as oracle
from tests.reference.codec_values import same

ROOT = Path(__file__).parents[2]
CODEC = TaskCodec(None)


def test_every_target_is_run():
    assert tuple(TARGETS) == NAMES
    assert all(corpus.load(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs(name):
    """K2: what has once broken a target, or reached new code, holds."""
    for data in corpus.load(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", NAMES)
def test_mutated_inputs(name):
    """K1, K2, K11: seeded mutations of them: truncations, flips, splices, lying lengths."""
    rng = random.Random(name)
    seeds = corpus.load(name)
    for _ in range(2000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(data) + 1)
            deed = rng.randrange(5)
            if deed == 0:
                del data[at:]
            elif deed == 1:
                data[at:at] = rng.randbytes(rng.randrange(5))
            elif deed == 2:
                data[at : at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00" * 4, b"\xdd\xdf\xc9\x91"))
            elif deed == 3:
                data[at:] = rng.choice(seeds)[-rng.randrange(1, 40) :]
            elif data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
        TARGETS[name](bytes(data))


@pytest.mark.parametrize(
    "value",
    [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 2**63 - 1, 2**64 - 1, -(2**63), [math.nan] * 3],
)
def test_odd_numbers_travel_exactly(value):
    """K4: NaN, infinities, −0 and the ends of the integer range; as the oracle, sign and all."""
    raw = packb(value)
    assert raw == oracle.pack(value)
    assert same(unpackb(raw), value)
    assert math.copysign(1, unpackb(packb(-0.0))) == -1


@pytest.mark.parametrize("digits", [20, 4300, 4301, 100_000])
def test_long_ints_are_refused_in_little_time(digits):
    """K4: no quadratic printing of an int that does not fit (CVE-2020-10735)."""
    with pytest.raises(EncodeError, match="-2\\*\\*63 to 2\\*\\*64 - 1"):
        packb({"n": 10**digits})


@pytest.mark.parametrize(
    "text", ["\x00", "a\x00b", "\ufeff", "\ufeffx", "\u202e", "\ufffd", "\U0010ffff", "e\u0301", "\u00e9"]
)
def test_odd_text_travels_as_it_is(text):
    """K5: NUL, byte order marks, direction marks: nothing is stripped or normalised, in values and keys."""
    assert unpackb(packb({text: text})) == {text: text}
    assert CODEC.decode(CODEC.encode({"type": "t", "id": "i", text: text})[2])[text] == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc80", "\ud83d\ude00"])
def test_lone_surrogates_do_not_travel(text):
    """K5: refused on the way out, since no other language could read them."""
    for value in (text, {text: 1}, [[text]]):
        with pytest.raises(EncodeError, match="lone surrogate"):
            packb(value)


@pytest.mark.parametrize(
    "raw", [b"\xa1\x80", b"\xa2\xc0\x80", b"\xa3\xe0\x80\xaf", b"\xa4\xf0\x80\x80\xaf", b"\xa4\xf5\x80\x80\x80"]
)
def test_malformed_utf8_is_refused_in_values_and_keys(raw):
    """K5: stray continuation bytes, every overlong form, beyond U+10FFFF."""
    for data in (raw, b"\x91" + raw, b"\x81" + raw + b"\x01"):
        with pytest.raises(DecodeError, match="UTF-8"):
            unpackb(data)


@pytest.mark.parametrize("name", ["__proto__", "constructor", "__class__", "__init__", "toString", ""])
def test_names_with_a_meaning_elsewhere_are_plain_keys(name):
    """K6: they are data, in both codecs."""
    assert unpackb(oracle.pack({name: {name: 1}})) == {name: {name: 1}} == oracle.unpack(packb({name: {name: 1}}))


@pytest.mark.parametrize("size", [0, 1, 2, 31, 32, 255, 256, 65_535, 65_536, 512 << 10])
def test_sizes_around_every_form_of_length(size):
    """K7: each width of a length, and the cap one byte below."""
    for value in ("x" * size, b"x" * size, [0] * size):
        raw = packb(value)
        assert unpackb(raw) == value
        assert packb(value, None, len(raw)) == raw
        if len(raw) > 1:
            with pytest.raises(TooLargeError):
                packb(value, None, len(raw) - 1)


SLOPE = """
    import random, resource, sys
    from orchestra._ext.codec import *

    C = TaskCodec(lambda: "id")
    rng = random.Random(3)
    frame = C.encode({"type": "t", "input": {"k": [1, "two", b"3", {"x": None}] * 5}})[2]
    bad = [frame[:n] for n in range(len(frame))] + [b"\\xc1", b"\\xdd\\xff\\xff\\xff\\xff", b"\\x91" * 70, b"\\xa3\\xed\\xa0\\x80"]
    for _ in range(200):
        raw = bytearray(frame); raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8); bad.append(bytes(raw))
    wrong = [{"type": "t", "input": x} for x in (object(), 1 << 64, "\\ud800", {1.5: 2})] + [{}, {"type": ""}]
    sizes = []

    def once(raw):
        for read in (C.decode, decode_header, unpackb):
            try: read(raw)
            except ValueError: pass
        try: C.encode(wrong[len(raw) % len(wrong)])
        except (ValueError, TypeError): pass

    rounds = int(sys.argv[1]) // 4
    for n in range(rounds):
        once(bad[n % len(bad)])
        if n == rounds // 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.getallocatedblocks()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[0], sys.getallocatedblocks() - before[1])
"""


def test_errors_cost_no_memory():
    """K12: 400,000 refusals (a million have been run); the highest resident size does not grow after the first quarter."""
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SLOPE), "400000"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    grown, blocks = map(int, done.stdout.split())
    assert grown // (1024 if sys.platform == "darwin" else 1) < 4_000, "KiB: 10 bytes a refusal"
    assert blocks < 100


def test_only_the_build_turns_checks_off():
    """K13: no source switches its own bounds checks; the checked builds (debug, sanitizers) switch them all on."""
    for path in [*ROOT.glob("_ext/*.pyx"), *ROOT.glob("_ext/*.pxi")]:
        assert not re.search(r"boundscheck|wraparound|initializedcheck|with nogil", path.read_text("utf-8")), path.name
    build = (ROOT / "setup.py").read_text("utf-8")
    assert '"boundscheck": checked' in build
    assert '"initializedcheck": checked' in build
