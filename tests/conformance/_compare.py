"""Compares a whole keyspace with the model of the queue, and tells the model what only Redis determines."""

from __future__ import annotations

from typing import Any

from orchestra._keys import QueueKeys
from orchestra.serialization import loads
from tests.reference.keyspace import Plain
from tests.reference.queue_model import STREAMS, Delayed, Model

SLACK = 2
"""Milliseconds by which the clocks of two commands of one call may differ."""
TOKEN_WINDOW = 60_000


def _pairs(flat: list[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


class Seen:
    """Everything that is on the server, in two round trips."""

    def __init__(self, client: Plain, keys: QueueKeys, group: str) -> None:
        self.keys = keys
        names = client("KEYS", "*")
        commands: list[tuple[Any, ...]] = [("TIME",)]
        for lane in keys.streams:
            commands += [("XRANGE", lane, "-", "+"), ("XPENDING", lane, group, "-", "+", 10_000)]
            commands.append(("XINFO", "CONSUMERS", lane, group))
        commands += [
            ("ZRANGE", keys.delayed, 0, -1, "WITHSCORES"),
            ("HGETALL", keys.bodies),
            ("HGETALL", keys.counters),
        ]
        commands += [("HGETALL", key) for key in (*keys.dedup, *keys.tokens)]
        commands += [("XRANGE", keys.dlq, "-", "+"), ("ZRANGE", keys.consumers, 0, -1, "WITHSCORES")]
        commands += [("ZRANGE", keys.cancels, 0, -1, "WITHSCORES"), ("TIME",)]
        commands += [("PTTL", name) for name in names]
        prefix = keys.result("").encode()
        self.result_names = [name for name in names if name.startswith(prefix)]
        commands += [("GET", name) for name in self.result_names]
        replies = iter(client.many(commands))
        first = next(replies)
        self.entries, self.rows, self.members = [], [], []
        for _ in range(STREAMS):
            self.entries.append([(entry, tuple(fields)) for entry, fields in next(replies)])
            rows, members = next(replies), next(replies)
            self.rows.append([] if isinstance(rows, Exception) else rows)
            self.members.append(set() if isinstance(members, Exception) else {m[1].decode() for m in members})
        self.due, self.bodies, self.counters = _pairs(next(replies)), _pairs(next(replies)), _pairs(next(replies))
        self.dedup = [_pairs(next(replies)) for _ in range(2)]
        self.tokens = {k: v for _ in range(2) for k, v in _pairs(next(replies)).items()}
        self.dead = [(entry, _pairs(fields)) for entry, fields in next(replies)]
        self.alive, self.marks = _pairs(next(replies)), _pairs(next(replies))
        self.time = (_ms(first), _ms(next(replies)))
        self.ttl = {name.decode(): next(replies) for name in names}
        self.results = {name[len(prefix) :].decode(): next(replies) for name in self.result_names}


def _ms(time: list[bytes]) -> int:
    return int(time[0]) * 1000 + int(time[1]) // 1000


def compare(model: Model, seen: Seen, started: int) -> None:
    """Raises AssertionError where they differ."""
    for lane in range(STREAMS):
        _lane(model, seen, lane)
    _delayed(model, seen)
    _dead(model, seen)
    _small_ones(model, seen)
    _tokens(model, seen, started)
    _keys(model, seen)


def _lane(model: Model, seen: Seen, lane: int) -> None:
    expected, found = model.lanes[lane], seen.entries[lane]
    assert len(found) == len(expected), f"lane {lane} holds {found}"
    for entry, (entry_id, fields) in zip(expected, found, strict=True):
        assert fields == entry.fields, f"lane {lane}: {entry_id!r}"
        entry.id = entry.id or entry_id
        assert entry.id == entry_id
    rows = {entry_id: (holder.decode(), count) for entry_id, holder, _, count in seen.rows[lane]}
    assert rows == {i: (row.consumer, row.count) for i, row in model.pending[lane].items()}, f"pending in lane {lane}"
    for entry_id, _, idle, _ in seen.rows[lane]:
        row = model.pending[lane][entry_id]
        handed = (seen.time[0] - idle, seen.time[1] - idle)
        early, late = row.since[0] - handed[1], handed[0] - row.since[1]
        assert max(early, late) <= SLACK, f"lane {lane}: {entry_id!r} handed out at {handed}, not {row.since}"
        row.since = (max(row.since[0], handed[0] - SLACK), min(row.since[1], handed[1] + SLACK))
    holders = {row.consumer for row in model.pending[lane].values()}
    assert holders <= seen.members[lane] <= model.consumers[lane], f"consumers of lane {lane}"
    assert len(found) - len(rows) == len(model.waiting[lane]) - _deleted(model, lane)


def _deleted(model: Model, lane: int) -> int:
    """Entries in flight that somebody has deleted: pending, but not in the lane."""
    return sum(model.find(lane, entry_id) is None for entry_id in model.pending[lane])


def _delayed(model: Model, seen: Seen) -> None:
    assert set(seen.due) == set(seen.bodies)
    found = {member.decode(): (float(score), unpacked(seen.bodies[member])) for member, score in seen.due.items()}
    assert len(found) == len(model.delayed), f"delayed: {found}"
    for delayed in model.delayed:
        if delayed.member is None:
            delayed.member = _made_up(model, delayed, found)
        assert delayed.member in found, f"{delayed.member} is not delayed"
        due, packed = found[delayed.member]
        assert packed == delayed.packed, delayed.member
        assert delayed.due[0] - 1 <= due <= delayed.due[1] + 1, f"{delayed.member} is due at {due}, not {delayed.due}"
        delayed.due = (due, due)


def _made_up(model: Model, delayed: Delayed, found: dict[str, Any]) -> str:
    """The member of a task whose id was taken: the id, a space, and something that makes it unique."""
    known = {other.member for other in model.delayed}
    start = f"{delayed.entry.task} "
    names = [m for m in found if m not in known and m.startswith(start) and found[m][1] == delayed.packed]
    assert names, f"no member for another {delayed.entry.task}"
    return names[0]


def _dead(model: Model, seen: Seen) -> None:
    assert len(seen.dead) == len(model.dead), f"dead: {seen.dead}"
    known = {letter.id: letter for letter in model.dead if letter.id is not None}
    fresh = [letter for letter in model.dead if letter.id is None]
    for entry_id, fields in seen.dead:
        letter = known.get(entry_id) or next(
            letter for letter in fresh if (b"%d" % letter.lane, letter.message_id) == (fields[b"l"], fields[b"m"])
        )
        letter.id = entry_id
        numbers = [int(fields[name]) for name in (b"n", b"g", b"l")]
        assert numbers == [letter.attempts, letter.entry.generation, letter.lane]
        assert (fields[b"t"], fields[b"r"]) == (letter.entry.frame, letter.reason.encode())
        assert letter.error.items() <= loads(fields[b"e"]).items()
    assert all(letter.id is not None for letter in model.dead)
    order = [entry_id for entry_id, _ in seen.dead]
    model.dead.sort(key=lambda letter: order.index(letter.id))


def _small_ones(model: Model, seen: Seen) -> None:
    counters = {name.decode(): int(value) for name, value in seen.counters.items() if b":" not in name}
    assert counters == {name: count for name, count in model.counters.items() if count}
    cursors = {int(name[7:]): value for name, value in seen.counters.items() if name.startswith(b"cursor:")}
    assert cursors == model.cursors
    for bucket in range(2):
        expected = {task.encode(): _place(where) for task, where in model.dedup[bucket].items()}
        assert seen.dedup[bucket] == expected, f"dedup bucket {bucket}"
    for found, expected in ((seen.alive, model.alive), (seen.marks, model.marks)):
        assert {name.decode() for name in found} == set(expected)
        for name, score in found.items():
            low, high = expected[name.decode()]
            assert low - 1 <= float(score) <= high + 1, f"{name!r}: {score!r} is not in {low}..{high}"
            expected[name.decode()] = (float(score), float(score))
    assert set(seen.results) == set(model.results)
    for task, record in seen.results.items():
        assert model.results[task].items() <= loads(record).items(), task


def _place(where: Any) -> bytes:
    return where.encode() if isinstance(where, str) else b"%d:%s" % (where[0], where[1].id)


def _tokens(model: Model, seen: Seen, started: int) -> None:
    """Each call that was covered by a token has left what it added; a record may be forgotten after its window."""
    found = sorted(_expanded(record) for record in seen.tokens.values())
    expected = sorted(sorted((lane, entry.id) for lane, entry in call if entry is not None) for call in model.tokens)
    if seen.time[1] - started < TOKEN_WINDOW:
        assert found == expected, "tokens"


def _expanded(record: bytes) -> list[tuple[int, bytes]]:
    parts = record.split()
    entries = []
    for lane, first, count in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        ms, _, seq = first.partition(b"-")
        entries += [(int(lane), b"%s-%d" % (ms, int(seq) + i)) for i in range(int(count))]
    return sorted(entries)


def _keys(model: Model, seen: Seen) -> None:
    """No key that does not belong there; a time to live on those, and only those, that end by themselves."""
    k = seen.keys
    ends = {key for key, content in zip(k.dedup, model.dedup, strict=True) if content}
    ends |= {key for key in k.tokens if key in seen.ttl}
    ends |= {k.result(task) for task in model.results} | ({k.cancels} if model.marks else set())
    stays = ({k.delayed, k.bodies} if model.delayed else set()) | ({k.consumers} if model.alive else set())
    stays |= {k.counters} if any(model.counters.values()) or model.cursors else set()
    streams = {*k.streams, k.dlq}
    assert set(seen.ttl) - streams == ends | stays
    if model.grouped:
        assert set(k.streams) <= set(seen.ttl)
    for name, ttl in seen.ttl.items():
        assert (ttl > 0) == (name in ends), f"{name} has a time to live of {ttl} ms"


def unpacked(body: bytes) -> tuple[int | bytes, ...]:
    """The MessagePack array of four whole numbers and a string, perhaps another number, that a delayed task is."""
    assert body[0] in (0x95, 0x96)
    numbers, at = [], 1
    for _ in range(4):
        number, at = _integer(body, at)
        numbers.append(number)
    length, at = _string_length(body, at)
    end = len(body) - (body[0] == 0x96)
    assert at + length == end
    return (*numbers, body[at:end], *body[end:])


_SIZES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_LENGTHS = {0xD9: 1, 0xDA: 2, 0xDB: 4}


def _integer(body: bytes, at: int) -> tuple[int, int]:
    if body[at] < 0x80:
        return body[at], at + 1
    size = _SIZES[body[at]]
    return int.from_bytes(body[at + 1 : at + 1 + size], "big"), at + 1 + size


def _string_length(body: bytes, at: int) -> tuple[int, int]:
    if 0xA0 <= body[at] < 0xC0:
        return body[at] & 0x1F, at + 1
    size = _LENGTHS[body[at]]
    return int.from_bytes(body[at + 1 : at + 1 + size], "big"), at + 1 + size
