"""Oracle of ``orchestra._ext.wire``: entries as deliveries and deliveries as arguments, in plain Python."""

from __future__ import annotations

from typing import Any


class Arrival:
    """As the compiled one; a subclass says how unusual fields are read, and a header is decoded."""

    def __init__(self, stream, entry, fields, consumer, deliveries=1, rank=0):
        if type(entry) is not bytes or type(consumer) is not str:
            raise TypeError("entry must be bytes, consumer str")
        self.stream, self.entry, self.consumer = stream, entry, consumer
        self.deliveries, self.rank = deliveries, rank
        self.retries = self.before = self.generation = 0
        self.lost = self.abandoned = self.foreign = False
        self.frame: Any = None
        self._header: Any = None
        if isinstance(fields, list | tuple) and len(fields) == 2 and fields[0] == b"t" and type(fields[1]) is bytes:
            self.frame = fields[1]
        else:
            self._read_fields(fields)

    @property
    def lane(self):
        return self.stream if self.stream < 4 else self.stream - 4

    @property
    def attempt(self):
        return self.retries + 1

    @property
    def fence(self):
        return self.generation << 40 | (self.before + self.deliveries)

    @property
    def header(self):
        if self._header is None:
            self._header = self._decoded()
        return self._header


def arrivals(kind, stream, entries, consumer, rank):
    if not issubclass(kind, Arrival):
        raise TypeError("kind must be a subclass of Arrival")
    if not 0 <= stream < 8:
        raise ValueError("stream must be 0 to 7")
    for item in entries:
        if type(item) is not list or len(item) != 2 or type(item[0]) is not bytes:
            raise TypeError("an entry must be a list of its id and its fields")
    return [kind(stream, entry, fields, consumer, 1, rank + i) for i, (entry, fields) in enumerate(entries)]


def hold(held, found):
    for delivery in found:
        held[delivery.stream][delivery.entry] = delivery


def sift(batch, done):
    groups: dict[Any, Any] = {}
    for delivery, verdict in batch:
        if verdict is done:
            first, again = groups.setdefault((delivery.stream, delivery.consumer), ([], []))
            (first if delivery.deliveries == 1 else again).append(delivery)
    for first, _ in groups.values():
        first.sort(key=lambda delivery: delivery.rank)
    return groups, [(delivery, verdict) for delivery, verdict in batch if verdict is not done]


def with_ids(command, deliveries):
    head, _, rest = command.partition(b"\r\n")
    if head[:1] != b"*" or not head[1:].isdigit():
        raise ValueError("a packed command begins with its number of arguments")
    ids = b"".join(b"$%d\r\n%b\r\n" % (len(delivery.entry), delivery.entry) for delivery in deliveries)
    return b"*%d\r\n" % (int(head[1:]) + len(deliveries)) + rest + ids
