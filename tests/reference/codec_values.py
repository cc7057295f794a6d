"""Values and tasks to draw from, and an equality as strict as the wire format."""

from __future__ import annotations

import math
import struct

from hypothesis import strategies as st

from tests.reference import codec as oracle

INTS = st.integers(-(1 << 63), (1 << 64) - 1)
EDGES = st.sampled_from(
    [s * (1 << b) + d for b in (5, 7, 8, 15, 16, 31, 32, 63) for s in (1, -1) for d in (-1, 0, 1)]
).filter(lambda v: -(1 << 63) <= v < 1 << 64)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
SCALARS = (
    st.none() | st.booleans() | INTS | EDGES | st.floats() | TEXT | st.binary(max_size=40) | st.integers(-130, 260)
)
KEYS = TEXT | INTS | st.binary(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(KEYS, inner, max_size=20),
    max_leaves=60,
)
NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=128)
SECONDS = st.floats(0, 1e300, exclude_min=True, allow_nan=False) | st.integers(1, 10**9)
EXTRA_KEYS = TEXT.filter(lambda key: key not in oracle.HEADER_KEYS)
TASKS = st.builds(
    lambda fixed, extra: {**extra, **fixed},
    st.fixed_dictionaries(
        {"type": NAMES},
        optional={
            "id": NAMES,
            "priority": st.none() | st.integers(0, 3),
            "max_retries": st.none() | st.integers(0, 1000),
            "timeout": st.none() | SECONDS,
            "deadline": st.none() | SECONDS,
            "delay": st.none() | st.floats(0, 3e8),
            "input": VALUES,
            "metadata": st.none() | st.dictionaries(TEXT, VALUES, max_size=4),
        },
    ),
    st.dictionaries(EXTRA_KEYS, VALUES, max_size=12),
)


def same(a, b):
    """Equality that tells 1 from True and 1.0, -0.0 from 0.0, and finds NaN equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        pairs = list(zip(a.items(), b.items(), strict=False))
        return len(a) == len(b) and all(same(k, q) and same(v, w) for (k, v), (q, w) in pairs)
    return a == b


def attempt(function, *args):
    try:
        return function(*args)
    except ValueError:
        return ValueError
