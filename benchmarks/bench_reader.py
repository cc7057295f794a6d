"""The reply reader: bytes of an XREADGROUP of 500 tasks to deliveries, beside redis-py on the same parser.

redis-py's side parses with hiredis too and builds its usual lists of (id, fields). ``parse only`` is the floor: hiredis
without anything around it.
"""

from __future__ import annotations

import hiredis

from benchmarks import _raw
from benchmarks._beside import Rival, beside
from orchestra._queue.read import StreamReader
from orchestra.serialization import encode_task

COUNT = 500


def reply():
    """What Redis answers to one read of ``COUNT`` tasks."""
    frame, key = encode_task(_raw.task(0)).frame, _raw.LANE.encode()
    entries = []
    for number in range(COUNT):
        entry = b"1000000000000-%06d" % number
        entries.append(b"*2\r\n$%d\r\n%s\r\n*2\r\n$1\r\nt\r\n$%d\r\n%s\r\n" % (len(entry), entry, len(frame), frame))
    return b"*1\r\n*2\r\n$%d\r\n%s\r\n*%d\r\n" % (len(key), key, COUNT) + b"".join(entries)


def parsed(reader, data):
    reader.feed(data)
    return reader.gets()


def test_reply_to_deliveries(benchmark):
    data, reader = reply(), hiredis.Reader()
    stream = StreamReader(_raw.KEYS, _raw.GROUP, _raw.CONSUMER, None)

    def ours():
        ((place, deliveries),) = stream._collect([parsed(reader, data)]).items()
        assert len(deliveries) == COUNT
        return place

    def redis_py(module):
        parser, parse = hiredis.Reader(), module.parse_xread
        return lambda: parse(parsed(parser, data))

    def floor(module):
        parser = module.Reader()
        return lambda: parsed(parser, data)

    rivals = [
        Rival("redis-py on hiredis", "redis._parsers.helpers", "redis", redis_py, COUNT),
        Rival("parse only", "hiredis", "hiredis", floor, COUNT),
    ]
    beside(benchmark, "reader: one delivery of a reply of 500", ours, rivals, COUNT)
