"""Turns bytes into values, so that a fuzzer which mutates bytes mutates values. Deterministic; never runs dry.

The first bytes decide first, so that a small mutation of the input is a small mutation of the value.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple


class Pair(NamedTuple):
    a: object
    b: object


class Word(enum.StrEnum):
    ONE = "one"
    TYPE = "type"


class Angry(str):
    """A subclass whose methods must not be called."""

    __slots__ = ()

    def __repr__(self):
        raise RuntimeError("called")

    __str__ = __hash__ = encode = __len__ = __iter__ = __repr__  # type: ignore[assignment]


class AngryInt(int):
    def __repr__(self):
        raise RuntimeError("called")

    __str__ = __index__ = __int__ = __float__ = __repr__  # type: ignore[assignment]


TEXTS = (
    *("", "a", "type", "id", "input", "é", "\x00", "\ufeff", "\U0001f600", "\ud800", "\udfffx", "__proto__"),
    *("k" * 31, "k" * 32, "k" * 33, "k" * 255, "k" * 256, "\u20ac" * 90, " ", "a b", "\x7f"),
)
NUMBERS = (
    *(0, 1, -1, -32, -33, 127, 128, 255, 256, 65535, 65536, -128, -129, -32768, -32769, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**5000, 1000, 1001),
)
FLOATS = (0.0, -0.0, 1.5, math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 3e8, 4e8)


class Bytes:
    """A source of decisions; zeros when it is empty."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def below(self, top: int) -> int:
        return self.byte() % top

    def take(self, count: int) -> bytes:
        out = self.data[self.at : self.at + count]
        self.at += len(out)
        return out

    def pick(self, choices):
        return choices[self.below(len(choices))]


def text(source: Bytes) -> str:
    if source.byte() & 1:
        return source.pick(TEXTS)
    return source.take(source.below(40)).decode("utf-8", "surrogateescape" if source.byte() & 1 else "replace")


def number(source: Bytes) -> int:
    if source.byte() & 1:
        return source.pick(NUMBERS)
    return int.from_bytes(source.take(source.below(12)), "little", signed=True)


def leaf(source: Bytes) -> object:
    kind = source.below(14)
    if kind < 2:
        return number(source)
    if kind < 5:
        return text(source)
    if kind == 5:
        return source.pick(FLOATS)
    if kind == 6:
        return source.take(source.below(60)) * source.below(9)
    if kind == 7:
        return Angry("quiet")
    if kind == 8:
        return AngryInt(source.byte())
    if kind == 9:
        return source.pick((Word.ONE, bytearray(b"ba"), memoryview(b"abcd")[1:]))
    if kind == 10:
        return source.pick((object(), {1, 2}, 1j, Word, ValueError, Ellipsis))
    return source.pick((None, True, False))


def value(source: Bytes, depth: int = 0) -> object:
    """A value that may travel, or may not; at most about as many parts as the source has bytes."""
    kind = source.below(8)
    if kind < 4 or source.left <= 0 or depth > 90:
        return leaf(source)
    if kind == 7:
        out: object = leaf(source)
        for _ in range(min(source.below(80), 90 - depth)):
            out = source.pick(([out], {"k": out}, (out,), Pair(1, out)))
        return out
    count = source.below(20)
    if kind == 4:
        return {_key(source): value(source, depth + 1) for _ in range(count) if source.left > 0}
    items = [value(source, depth + 1) for _ in range(count) if source.left > 0]
    return tuple(items) if kind == 5 else items


def _key(source: Bytes) -> object:
    kind = source.below(10)
    if kind < 6:
        return text(source)
    if kind < 8:
        return number(source)
    return source.pick((b"bytes", None, True, 1.5, math.nan, (1, 2), Word.TYPE, b""))


def task(source: Bytes) -> object:
    """A task dict, or nearly one."""
    if not source.byte():
        return value(source)
    out: dict = {"type": "t" if source.byte() & 3 else value(source)}
    for name in ("id", "priority", "max_retries", "timeout", "deadline", "delay", "input", "metadata"):
        if source.byte() & 1:
            out[name] = source.pick(("i", 2, 1, 0.5, None)) if source.byte() & 1 else value(source)
    for _ in range(source.below(12)):
        out[text(source)] = value(source)
    return out


def reply(source: Bytes, depth: int = 0) -> object:
    """What a Redis of another version, or no Redis at all, may answer."""
    kind = source.below(10)
    if kind < 3 and depth < 4:
        return [reply(source, depth + 1) for _ in range(source.below(6))]
    if kind < 7:
        return source.take(source.below(30))
    return source.pick((None, 0, 1, -1, 2**63 - 1, b"", b"1-1", b"orc:{q}:s:2", [], True, 1.5))
