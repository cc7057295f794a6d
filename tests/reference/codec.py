"""A naive MessagePack and the frame of a task, as plainly as the specification can be written down.

Shares no code with `_ext/codec`; slow, recursive, and written to be read. Raises ValueError for whatever it refuses.
"""

from __future__ import annotations

import struct

HEADER_KEYS = ("id", "type", "priority", "max_retries", "timeout", "deadline", "delay")


def _sized(n, tags):
    """The tag and big-endian length for `n`, from (limit, tag, struct code) in ascending order."""
    for limit, tag, code in tags:
        if n < limit:
            return bytes([tag]) + struct.pack(">" + code, n)
    raise ValueError("too long")


def pack(value, depth=0, max_depth=64):
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return _pack_int(value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode()
        if len(raw) < 32:
            return bytes([0xA0 | len(raw)]) + raw
        return _sized(len(raw), [(1 << 8, 0xD9, "B"), (1 << 16, 0xDA, "H"), (1 << 32, 0xDB, "I")]) + raw
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        return _sized(len(raw), [(1 << 8, 0xC4, "B"), (1 << 16, 0xC5, "H"), (1 << 32, 0xC6, "I")]) + raw
    if isinstance(value, list | tuple | dict):
        if depth >= max_depth:
            raise ValueError("too deep")
        return _pack_container(value, depth + 1, max_depth)
    raise ValueError(f"{type(value)} does not travel")


def _pack_int(value):
    if 0 <= value < 128 or -32 <= value < 0:
        return struct.pack(">b", value)
    if value >= 0:
        for bits, tag, code in [(8, 0xCC, "B"), (16, 0xCD, "H"), (32, 0xCE, "I"), (64, 0xCF, "Q")]:
            if value < 1 << bits:
                return bytes([tag]) + struct.pack(">" + code, value)
    else:
        for bits, tag, code in [(8, 0xD0, "b"), (16, 0xD1, "h"), (32, 0xD2, "i"), (64, 0xD3, "q")]:
            if value >= -(1 << (bits - 1)):
                return bytes([tag]) + struct.pack(">" + code, value)
    raise ValueError("int out of range")


def _pack_container(value, depth, max_depth):
    n = len(value)
    if isinstance(value, dict):
        head = bytes([0x80 | n]) if n < 16 else _sized(n, [(1 << 16, 0xDE, "H"), (1 << 32, 0xDF, "I")])
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int | bytes):
                raise ValueError("key")
        return head + b"".join(pack(k) + pack(v, depth, max_depth) for k, v in value.items())
    head = bytes([0x90 | n]) if n < 16 else _sized(n, [(1 << 16, 0xDC, "H"), (1 << 32, 0xDD, "I")])
    return head + b"".join(pack(v, depth, max_depth) for v in value)


class Reader:
    def __init__(self, data, max_depth=64):
        self.data = bytes(data)
        self.at = 0
        self.max_depth = max_depth

    def take(self, n):
        if self.at + n > len(self.data):
            raise ValueError("cut short")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code):
        return struct.unpack(">" + code, self.take(struct.calcsize(code)))[0]

    def value(self, depth=0):
        tag = self.number("B")
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 256
        if tag < 0x90:
            return self.map(tag & 15, depth)
        if tag < 0xA0:
            return self.array(tag & 15, depth)
        if tag < 0xC0:
            return self.take(tag & 31).decode()
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if 0xC4 <= tag <= 0xC6:
            return self.take(self.number("BHI"[tag - 0xC4]))
        if 0xCA <= tag <= 0xD3:
            return self.number("fdBHIQbhiq"[tag - 0xCA])
        if 0xD9 <= tag <= 0xDB:
            return self.take(self.number("BHI"[tag - 0xD9])).decode()
        if tag in (0xDC, 0xDD):
            return self.array(self.number("HI"[tag - 0xDC]), depth)
        if tag in (0xDE, 0xDF):
            return self.map(self.number("HI"[tag - 0xDE]), depth)
        raise ValueError("0xC1, or an extension")

    def array(self, n, depth):
        if depth >= self.max_depth:
            raise ValueError("too deep")
        if n > len(self.data) - self.at:
            raise ValueError("cut short")
        return [self.value(depth + 1) for _ in range(n)]

    def map(self, n, depth):
        if depth >= self.max_depth:
            raise ValueError("too deep")
        if n > len(self.data) - self.at:
            raise ValueError("cut short")
        out = {}
        for _ in range(n):
            key = self.key()
            out[key] = self.value(depth + 1)
        return out

    def key(self):
        if self.data[self.at : self.at + 1] and self.data[self.at] in (*range(0x80, 0xA0), *range(0xDC, 0xE0)):
            raise ValueError("key")
        key = self.value()
        if key is None or isinstance(key, bool | float):
            raise ValueError("key")
        return key


def unpack(data, max_depth=64):
    reader = Reader(data, max_depth)
    value = reader.value()
    if reader.at != len(reader.data):
        raise ValueError("trailing bytes")
    return value


def frame(task, task_id, reply=None, flags=0):
    """What a valid task with a chosen id must be turned into."""
    lane = 2 if task.get("priority") is None else int(task["priority"])
    seconds = [None if task.get(k) is None else float(task[k]) for k in ("timeout", "deadline")]
    header = [1, task_id, task["type"], lane, task.get("max_retries"), *seconds, reply, flags or None]
    while header[-1] is None:
        header.pop()
    return pack(header) + pack({k: v for k, v in task.items() if k not in HEADER_KEYS})


def unframe(data, max_depth=64):
    """The task dict of a frame whose header is known to be good."""
    reader = Reader(data, max_depth)
    header = reader.value()
    body = reader.value(-1)
    if reader.at != len(reader.data):
        raise ValueError("trailing bytes")
    names = ("id", "type", "priority", "max_retries", "timeout", "deadline")
    return {k: v for k, v in zip(names, header[1:7], strict=False) if v is not None} | body
