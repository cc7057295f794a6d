"""What must hold for any bytes: one function a target. An exception other than the ones it expects is a finding."""

from __future__ import annotations

import asyncio
import atexit
import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import hiredis

from orchestra import serialization
from orchestra._delivery import Delivery, read_record
from orchestra._ext import codec
from orchestra._keys import QueueKeys
from orchestra._queue.read import GroupMissingError, StreamReader
from orchestra._redis.wire import Endpoint, ReplyError, Wire
from orchestra.errors import CorruptEntryError, InvalidTaskError, OrchestraError, StoreUnavailableError
from tests.fuzz.draw import Bytes, reply, task, value
from tests.reference import codec as oracle
from tests.reference.codec_values import same

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}
REFUSED = object()
CODEC = codec.TaskCodec(lambda: "made-up")
NAME = re.compile(r"[!-~]{1,128}")
HEADER_KEYS = frozenset(oracle.HEADER_KEYS)


def target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


def attempt(refusal, function, *args):
    """What ``function`` returns, or REFUSED when it raises ``refusal``."""
    try:
        return function(*args)
    except refusal:
        return REFUSED


def agree(ours, theirs) -> None:
    assert (ours is REFUSED) == (theirs is REFUSED), (ours, theirs)
    assert ours is REFUSED or same(ours, theirs), (ours, theirs)


@target
def unpack(data: bytes) -> None:
    """Bytes → value: as the oracle reads them, or refused by both; what was read can be written and read again."""
    ours = attempt(codec.DecodeError, codec.unpackb, data)
    agree(ours, attempt((ValueError, RecursionError), oracle.unpack, data))
    if ours is REFUSED:
        return
    again = codec.packb(ours)
    assert again == oracle.pack(ours)
    assert same(codec.unpackb(memoryview(again)), ours)
    first, end = codec.unpack_first(data + b"\xc1")
    assert end == len(data)
    assert same(first, ours)


@target
def frame(data: bytes) -> None:
    """Bytes → task: header and body agree with the whole, and with the oracle."""
    header = attempt(codec.DecodeError, codec.decode_header, data)
    whole = attempt(codec.DecodeError, CODEC.decode, data)
    known = attempt(ValueError, naive_header, data)
    if header is REFUSED:
        assert whole is REFUSED
        assert known is REFUSED or not known[2], "the header is canonical and good, yet refused"
        return
    assert known is not REFUSED
    fields, body_at, _ = known
    assert header.body_at == body_at
    assert fields == [
        *(header.id, header.type, header.lane, header.max_retries),
        *(header.timeout, header.deadline, header.reply, header.flags),
    ]
    body = attempt(codec.DecodeError, CODEC.decode_body, data, header)
    theirs = attempt(ValueError, naive_body, data, body_at)
    agree(body, theirs)
    assert (whole is REFUSED) == (body is REFUSED)
    if whole is REFUSED:
        return
    assert same({k: v for k, v in whole.items() if k not in HEADER_KEYS}, body)
    again = CODEC.encode(whole, None, 1 << 30, header.reply, header.flags)[2]
    assert same(CODEC.decode(again), whole)
    assert again == oracle.frame(whole, header.id, header.reply, header.flags)


def naive_header(data: bytes) -> tuple[list, int, bool]:
    """The fields of a header, where it ends, and whether it is written in the shortest way."""
    reader = oracle.Reader(data)
    head = reader.value()
    if type(head) is not list or not 4 <= len(head) <= 9 or type(head[0]) is not int or head[0] != 1:
        raise ValueError("no header")
    fields = head[1:] + [None] * (9 - len(head))
    fields[7] = 0 if fields[7] is None else fields[7]
    for place, top in ((2, 3), (3, 1000), (7, 2**31 - 1)):
        if not (place == 3 and fields[3] is None) and not (type(fields[place]) is int and 0 <= fields[place] <= top):
            raise ValueError("out of range")
    for place in (0, 1, 6):
        if not (place == 6 and fields[6] is None) and not (
            type(fields[place]) is str and NAME.fullmatch(fields[place])
        ):
            raise ValueError("no name")
    for place in (4, 5):
        if fields[place] is not None:
            if type(fields[place]) not in (int, float) or not 0 < fields[place] < math.inf:
                raise ValueError("no seconds")
            fields[place] = float(fields[place])
    return fields, reader.at, oracle.pack(head) == data[: reader.at]


def naive_body(data: bytes, at: int) -> dict:
    reader = oracle.Reader(data)
    reader.at = at
    body = reader.value(-1)
    if type(body) is not dict or reader.at != len(data):
        raise ValueError("no body")
    if any(type(key) is not str or key in HEADER_KEYS for key in body):
        raise ValueError("a key of the header")
    return body


@target
def entry(data: bytes) -> None:
    """Bytes that lie in a lane or in a result: the layers above refuse them with CorruptEntryError and nothing else."""
    attempt(CorruptEntryError, serialization.loads, data)
    attempt(CorruptEntryError, read_record, data)
    attempt(CorruptEntryError, serialization.decode_task, data)
    source = Bytes(data)
    names = (b"t", b"n", b"d", b"g", b"x", b"")
    fields = (
        [b"t", data] if source.byte() & 1 else [part for _ in range(source.below(6)) for part in _field(source, names)]
    )
    use(Delivery(source.below(4), b"1-1", fields, "c", 1 + source.below(3)))


def _field(source: Bytes, names: tuple[bytes, ...]) -> tuple[bytes, bytes]:
    return source.pick(names), source.take(source.below(60))


def use(delivery: Delivery) -> None:
    """Everything that the engine does with a delivery before it knows that it is good."""
    assert delivery.attempt == delivery.retries + 1
    header = attempt(CorruptEntryError, lambda: delivery.header)
    dicts = attempt(CorruptEntryError, delivery.task_dict)
    tasks = attempt(CorruptEntryError, delivery.task)
    assert (dicts is REFUSED) == (tasks is REFUSED)
    if tasks is not REFUSED:
        assert header is not REFUSED
        assert (tasks.id, tasks.type, int(tasks.priority)) == (dicts["id"], dicts["type"], dicts["priority"])
    repr(delivery)


@target
def encode(data: bytes) -> None:
    """Objects → bytes: as the oracle writes them and back again, or refused with the path, whatever they do."""
    source = Bytes(data)
    given = value(source)
    limit = 1 << 30 if source.byte() & 1 else 1 + source.byte() * 4
    ours = attempt((codec.EncodeError, codec.EncodeTypeError), codec.packb, given, None, limit)
    theirs = attempt((ValueError, OverflowError, RecursionError, RuntimeError), oracle.pack, given)
    if ours is not REFUSED:
        assert len(ours) <= limit
        assert theirs is REFUSED or ours == theirs
        assert codec.packb(codec.unpackb(ours)) == ours
    elif theirs is not REFUSED:
        assert len(theirs) > limit
    offered = task(source)
    made = attempt(InvalidTaskError, serialization.encode_task, offered)
    if made is not REFUSED:
        back = serialization.decode_task(made.frame)
        assert (back["id"], back["priority"]) == (made.id, made.lane)
        assert serialization.encode_task(back).frame == made.frame
    unfaithful(source)


def unfaithful(source: Bytes) -> None:
    """A hook that changes what is being encoded."""
    outer: dict = {"list": [object(), 1, "two"], "rest": value(source)}
    deed = source.below(5)

    def hook(_):
        if deed == 0:
            outer["list"].clear()
        elif deed == 1:
            outer.clear()
        elif deed == 2:
            outer["list"].extend(range(100))
        elif deed == 3:
            outer.update({str(n): n for n in range(50)})
        return source.pick((None, [1], {"a": object()}, "text"))

    attempt((codec.EncodeError, codec.EncodeTypeError), codec.packb, outer, hook, 1 << 16)


class _Transport(asyncio.Transport):
    """Swallows what is written."""

    def write(self, data) -> None:
        pass

    def abort(self) -> None:
        pass

    def set_write_buffer_limits(self, high=None, low=None) -> None:
        pass


_LOOP = asyncio.new_event_loop()
atexit.register(_LOOP.close)
_HUGE = re.compile(rb"[*~>%|]\+?0*[0-9]{6,}")  # hiredis makes room for what is announced, which takes gigabytes


@target
def replies(data: bytes) -> None:
    """Bytes from the socket: each batch gets its replies or an error, and the same replies however the bytes are cut.

    The last one may be withheld because of what follows it, and that depends on what has arrived.
    """
    source = Bytes(data)
    counts = [1 + source.below(3) for _ in range(source.below(5))]
    cuts = [1 + source.below(40) for _ in range(source.below(8))]
    stream = data[source.at :]
    if _HUGE.search(stream):
        return
    whole, pieces = fed(counts, stream, [len(stream)]), fed(counts, stream, cuts)
    assert whole[-1] == pieces[-1]
    for one, other in zip(whole, pieces, strict=True):
        assert one == other or repr("gone") in (one, other), (whole, pieces)


def fed(counts: list[int], stream: bytes, cuts: list[int]) -> list[str]:
    """What the callers of a wire see when ``stream`` arrives in pieces, and how the wire ended."""

    async def run() -> list[str]:
        wire = Wire(Endpoint(label="fuzz"), 1000.0)
        wire.connection_made(_Transport())
        batches = [wire.send_nowait(b"", count) for count in counts]
        at = turn = 0
        while at < len(stream) and not wire.closed:
            piece = stream[at : at + (cuts[turn % len(cuts)] if cuts else 7)]
            buffer = wire.get_buffer(-1)
            buffer[: len(piece)] = piece
            wire.buffer_updated(len(piece))
            at, turn = at + len(piece), turn + 1
        stray = wire.closed
        wire.close()
        assert wire.in_flight == 0
        seen = [repr(outcome(batch, count)) for batch, count in zip(batches, counts, strict=True)]
        return [*seen, f"closed early: {stray}"]

    return _LOOP.run_until_complete(run())


def outcome(batch: asyncio.Future, count: int) -> object:
    assert batch.done()
    error = batch.exception()
    if error is None:
        assert len(batch.result()) == count
        return batch.result()
    assert type(error) is StoreUnavailableError
    return "gone"


KEYS = QueueKeys("q")
_LINK = SimpleNamespace(manager=SimpleNamespace(address=SimpleNamespace(safe="fuzz")))


@target
def deliveries(data: bytes) -> None:
    """Replies of any shape to a read: deliveries, or a typed error."""
    source = Bytes(data)
    kind = source.below(3)
    answer = _parsed(source.take(source.left)) if kind == 0 else reply(source) if kind == 1 else _nearly(source)
    for read in (_read_blocking, _read_exactly):
        found = attempt((GroupMissingError, OrchestraError), read, answer)
        if found is not REFUSED:
            for delivery in found:
                if _is_of_strings(delivery):
                    use(delivery)


def _is_of_strings(delivery: Delivery) -> bool:
    """Redis makes the ids, and the fields of an entry are strings whatever was added: no need to look at each."""
    return isinstance(delivery.entry, bytes) and delivery.entry.isascii() and isinstance(delivery.frame, bytes)


def _parsed(raw: bytes) -> object:
    if _HUGE.search(raw):
        return None
    reader = hiredis.Reader(notEnoughData=REFUSED)
    reader.feed(raw)
    try:
        answer = reader.gets()
    except (hiredis.ProtocolError, TypeError):
        return None
    return None if answer is REFUSED else answer


def _nearly(source: Bytes) -> object:
    """The shape of XREADGROUP's reply, with a part of another shape here and there."""

    def part(good):
        return reply(source) if source.below(12) == 11 else good()

    def fields():
        return [
            source.pick((b"t", b"n", b"d", b"g")) if n % 2 == 0 else source.take(20) for n in range(source.below(7))
        ]

    def entries():
        return [part(lambda: [b"1-%d" % n, part(fields)]) for n in range(source.below(5))]

    if source.below(9) == 8:
        return ReplyError(source.pick(("NOGROUP x", "UNBLOCKED y", "ERR z", "", "LOADING", "NOAUTH", "x" * 500)))
    return [part(lambda: [source.pick(KEYS.streams).encode(), part(entries)]) for _ in range(source.below(5))]


def _read_blocking(answer: object) -> list[Delivery]:
    reader = StreamReader(KEYS, "g", "c", _LINK)  # type: ignore[arg-type]
    return [delivery for found in reader._collect([answer]).values() for delivery in found]


def _read_exactly(answer: object) -> list[Delivery]:
    """take.lua answers with numbers in place of keys."""
    streams = {key.encode(): number for number, key in enumerate(KEYS.streams)}
    if isinstance(answer, list):
        answer = [
            [streams.get(pair[0], pair[0]), pair[1]]
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], bytes)
            else pair
            for pair in answer
        ]

    async def run(calls):
        return [answer]

    link = SimpleNamespace(manager=_LINK.manager, run=run)
    reader = StreamReader(KEYS, "g", "c", link)  # type: ignore[arg-type]
    coroutine = reader._read_exactly(10, None)
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("nothing here waits")
