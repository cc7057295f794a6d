"""One or more situations for each script in which it has work to do on every key it is given.

A :class:`World` is one queue on an empty server, filled by plain commands. A case fills it and returns the call, as the
product would make it, for ``n`` tasks. ``tests/faults/test_scripts.py`` runs every case against every fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from orchestra import _keys
from orchestra._delivery import STEP, cancelled_record, frame_ident
from orchestra._keys import QueueKeys, WorkflowKeys
from orchestra._scripts import script
from orchestra.serialization import dumps, encode_task
from tests.reference.keyspace import Plain

GROUP, ME, OTHER = "workers", "me", "other"
HOUR = 3_600_000
RECORD = b"\x81\xa7outcome\xa4dead"


class Case(NamedTuple):
    """A script call. ``replaced``: numbers of keys that it overwrites or deletes whatever they are."""

    keys: list[str]
    args: list[Any]
    replaced: frozenset[int] = frozenset()
    untouched: frozenset[int] = frozenset()
    """Numbers of keys that this case, unlike another of the same script, does not look at."""


class World:
    """One queue on a server that the test owns."""

    def __init__(self, client: Plain, queue: str = "tasks") -> None:
        self.client = client
        self.keys = QueueKeys(queue)
        self.queue = queue
        client("FLUSHALL")
        client.many([("XGROUP", "CREATE", lane, GROUP, "0", "MKSTREAM") for lane in self.keys.streams])

    def frame(self, number: int, lane: int = 2) -> bytes:
        return encode_task({"id": f"t{number}", "type": "x", "priority": lane % 4}).frame

    def add(self, count: int, lane: int = 2, first: int = 0) -> list[bytes]:
        """Tasks that wait."""
        key, numbers = self.keys.streams[lane], range(first, first + count)
        return self.client.many([("XADD", key, "*", "t", self.frame(number, lane)) for number in numbers])

    def read(self, count: int, consumer: str = ME, lane: int = 2) -> list[bytes]:
        """Hand out tasks that wait."""
        key = self.keys.streams[lane]
        ((_, rows),) = self.client("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "STREAMS", key, ">")
        assert len(rows) == count
        return [entry for entry, _ in rows]

    def held(self, count: int, consumer: str = ME, lane: int = 2, first: int = 0) -> list[bytes]:
        """Tasks that are in flight."""
        self.add(count, lane, first)
        return self.read(count, consumer, lane)

    def claim(self, ids: list[bytes], consumer: str, *options: Any) -> None:
        key = self.keys.lanes[2]
        self.client.many([("XCLAIM", key, GROUP, consumer, 0, entry, *options, "JUSTID") for entry in ids])

    def delay(self, count: int, lane: int = 2, first: int = 0) -> None:
        """Tasks that are delayed and due."""
        args: list[Any] = [lane % 4, lane // 4]
        for number in range(first, first + count):
            args += (f"t{number}", self.frame(number, lane))
        self.client("EVAL", DELAY, 2, self.keys.delayed, self.keys.bodies, *args)

    def bury(self, count: int, lane: int = 2) -> list[bytes]:
        """Dead letters."""
        rest = ("n", 1, "g", 0, "l", lane, "m", "1-1", "r", "failed", "e", b"\x80")
        return self.client.many([("XADD", self.keys.dlq, "*", "t", self.frame(i, lane), *rest) for i in range(count)])

    def call(self, name: str, case: Case, client: Plain | None = None) -> Any:
        """Run a script; an error reply is returned, not raised."""
        command = ("EVAL", script(name).text, len(case.keys), *case.keys, *case.args)
        return (client or self.client).many([command])[0]


DELAY = """for i = 3, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 1, ARGV[i])
  local packed = {tonumber(ARGV[1]), 0, 0, 0, ARGV[i + 1]}
  if ARGV[2] == '1' then packed[6] = 1 end
  redis.call('HSET', KEYS[2], ARGV[i], cmsgpack.pack(packed))
end"""


CASES: dict[str, dict[str, Callable[[World, int], Case]]] = {}


def case(name: str, situation: str) -> Callable[[Callable[[World, int], Case]], Callable[[World, int], Case]]:
    def note(build: Callable[[World, int], Case]) -> Callable[[World, int], Case]:
        CASES.setdefault(name, {})[situation] = build
        return build

    return note


def _produce_keys(w: World) -> list[str]:
    k = w.keys
    return [*k.lanes, k.delayed, k.bodies, *k.dedup, *k.tokens, k.counters, k.dlq, *k.fronts]


@case("produce", "everything")
def _(w: World, n: int) -> Case:
    args: list[Any] = ["1000000 1000000", HOUR, 60_000, "token"]
    for number in range(n):
        for lane, mode in enumerate(("", "i{}", "d60000:{}", "e60000:{}")):
            args += (lane, mode.format(f"t{number}.{lane}"), w.frame(number, lane))
    args += (2, "", w.frame(n, 2), 3, "", w.frame(n, 3))
    return Case(_produce_keys(w), args)


@case("produce", "own ids")
def _(w: World, n: int) -> Case:
    args: list[Any] = [0, HOUR, 60_000, ""]
    for number in range(n):
        args += (2, f"it{number}", w.frame(number))
    return Case(_produce_keys(w), args, untouched=frozenset({1, 2, 4, 5, 6, 9, 10, *range(12, 17)}))


@case("produce", "one")
def _(w: World, n: int) -> Case:
    untouched = frozenset({1, 2, 4, 5, 6, 7, 8, *range(12, 17)})
    return Case(_produce_keys(w), [0, HOUR, 60_000, "t", 2, "", w.frame(0)], untouched=untouched)


@case("produce_one", "an own id")
def _(w: World, n: int) -> Case:
    return Case([w.keys.lanes[2], *w.keys.dedup, w.keys.counters], [HOUR, 2, "id", "t0", w.frame(0)])


@case("produce_one", "a token")
def _(w: World, n: int) -> Case:
    return Case([w.keys.lanes[2], *w.keys.tokens, w.keys.counters], [60_000, 2, "token", "token", w.frame(0)])


@case("produce_many", "own ids")
def _(w: World, n: int) -> Case:
    ids, frames = [f"t{number}" for number in range(n)], [w.frame(number) for number in range(n)]
    return Case([w.keys.lanes[2], *w.keys.dedup, w.keys.counters], [HOUR, 2, "", *frames, *ids])


@case("produce_many", "a token")
def _(w: World, n: int) -> Case:
    frames = [w.frame(number) for number in range(n)]
    return Case([w.keys.lanes[2], *w.keys.tokens, w.keys.counters], [60_000, 2, "token", *frames])


@case("promote", "due in every lane")
def _(w: World, n: int) -> Case:
    k = w.keys
    for lane in range(8):
        w.delay(n, lane, n * lane)
    w.client("ZADD", k.cancels, 1, "some")
    return Case([*k.streams, k.delayed, k.bodies, k.counters, k.consumers, k.cancels], [8 * n, ME, 0])


@case("take", "every lane")
def _(w: World, n: int) -> Case:
    for lane in range(8):
        w.add(n, lane, n * lane)
    return Case(list(w.keys.streams), [GROUP, ME, 8 * n, ""])


@case("take", "a favoured lane")
def _(w: World, n: int) -> Case:
    for lane in range(8):
        w.add(n, lane, n * lane)
    return Case(list(w.keys.streams), [GROUP, ME, 8 * n, 3])


def _complete(w: World, ids: list[bytes], room: int) -> Case:
    return Case([w.keys.lanes[2], w.keys.counters], [GROUP, ME, room, ids[0], ids[-1], len(ids), *ids])


@case("complete", "the oldest")
def _(w: World, n: int) -> Case:
    return _complete(w, w.held(n), n)


@case("complete", "behind an older one")
def _(w: World, n: int) -> Case:
    w.held(1, OTHER, first=n)
    return _complete(w, w.held(n), n)


def _complete_again(w: World, n: int) -> Case:
    first, again = w.held(n), w.held(n, first=n)
    w.claim(again, ME, "RETRYCOUNT", 2)
    repeated = [part for entry in again for part in (entry, 2)]
    return Case([w.keys.lanes[2], w.keys.counters], [GROUP, ME, 0, "-", "+", n, *first, *repeated])


@case("complete", "one by one, and again")
def _(w: World, n: int) -> Case:
    return _complete_again(w, n)


def _with_results(w: World, case: Case, n: int) -> Case:
    results = [w.keys.result(f"t{i}") for i in range(n)]
    args = [*case.args, *(n * (HOUR, RECORD, w.keys.replies("client")))]
    return Case([*case.keys, *results], args, frozenset(range(3, 3 + n)))


@case("complete_result", "the oldest")
def _(w: World, n: int) -> Case:
    return _with_results(w, _complete(w, w.held(n), n), n)


@case("complete_result", "behind an older one")
def _(w: World, n: int) -> Case:
    w.held(1, OTHER, first=n)
    return _with_results(w, _complete(w, w.held(n), n), n)


@case("complete_result", "one by one, and again")
def _(w: World, n: int) -> Case:
    return _with_results(w, _complete_again(w, n), 2 * n)


@case("cancelled", "held")
def _(w: World, n: int) -> Case:
    ids = w.held(n)
    w.client("ZADD", w.keys.cancels, *(part for i in range(n) for part in (1, f"t{i}")))
    args: list[Any] = [GROUP, ME, HOUR]
    for number, entry in enumerate(ids):
        args += (entry, 1, f"t{number}", RECORD, w.keys.replies("client"))
    results = [w.keys.result(f"t{i}") for i in range(n)]
    keys = [w.keys.lanes[2], w.keys.counters, w.keys.cancels, w.keys.cancelled_steps, *results]
    return Case(keys, args, frozenset(range(5, 5 + n)))


def _retry(w: World, n: int, delay: int, counter: str) -> Case:
    ids, k = w.held(n), w.keys
    w.client("ZADD", k.cancels, 1, "some")
    args: list[Any] = [GROUP, ME, 2]
    for number, entry in enumerate(ids):
        args += (entry, 1, f"t{number}", delay, counter)
    return Case([k.lanes[2], k.delayed, k.bodies, k.counters, k.cancels, k.lanes[2], k.fronts[2]], args)


@case("retry", "with a delay")
def _(w: World, n: int) -> Case:
    return _retry(w, n, 60_000, "retried")


@case("retry", "throttled")
def _(w: World, n: int) -> Case:
    return _retry(w, n, 60_000, "throttled")


@case("hasten", "throttled")
def _(w: World, n: int) -> Case:
    seconds, micros = map(int, w.client("TIME"))
    due, args = seconds * 1000 + micros // 1000 + HOUR, list[Any]()
    for number in range(n):
        w.client("HSET", w.keys.bodies, f"t{number}", dumps([2, 0, 1, 0, "frame", 1]))
        w.client("ZADD", w.keys.delayed, due, f"t{number}")
        args += (f"t{number}", HOUR, 60_000)
    return Case([w.keys.delayed, w.keys.bodies], [5_000, *args])


@case("retry", "at once")
def _(w: World, n: int) -> Case:
    return _retry(w, n, 0, "released")._replace(untouched=frozenset({2, 3}))


@case("dead_letter", "held")
def _(w: World, n: int) -> Case:
    ids, k = w.held(n), w.keys
    args: list[Any] = [GROUP, ME, 2]
    for entry in ids:
        args += (entry, 1, 1, "failed", b"\x80", b"", HOUR, RECORD, k.replies("client"))
    results = [k.result(f"t{i}") for i in range(n)]
    return Case([k.lanes[2], k.dlq, k.counters, *results], args, frozenset(range(4, 4 + n)))


@case("replay", "dead")
def _(w: World, n: int) -> Case:
    k = w.keys
    ids = [entry for lane in range(4) for entry in w.bury(n, lane)]
    results = [k.result(f"t{i}") for i in range(len(ids))]
    return Case([k.dlq, k.counters, *k.lanes, *results], list(ids), frozenset(range(7, 7 + len(ids))))


@case("reclaim", "anybody's")
def _(w: World, n: int) -> Case:
    w.claim(w.held(n, OTHER), OTHER, "IDLE", 2 * HOUR)
    w.held(n, OTHER, first=n)
    return Case([w.keys.lanes[2], w.keys.counters], [GROUP, ME, 2, HOUR, n, n, "", 0, 0])


@case("reclaim", "a dead consumer's")
def _(w: World, n: int) -> Case:
    w.held(n, OTHER)
    return Case([w.keys.lanes[2], w.keys.counters], [GROUP, ME, 2, HOUR, n, n, OTHER, 0, 0])


@case("reconcile", "ghosts")
def _(w: World, n: int) -> Case:
    ids = w.held(n)
    return Case([w.keys.lanes[2], w.keys.counters], [GROUP, ME, *(part for entry in ids for part in (entry, 1))])


@case("renew", "held")
def _(w: World, n: int) -> Case:
    ids = w.held(n)
    return Case([w.keys.lanes[2], w.keys.counters], [GROUP, ME, *(part for entry in ids for part in (entry, 1))])


@case("retire", "nothing held")
def _(w: World, n: int) -> Case:
    for key in w.keys.streams:
        w.client("XGROUP", "CREATECONSUMER", key, GROUP, ME)
    w.client("ZADD", w.keys.consumers, 1, ME, 1, OTHER)
    return Case([*w.keys.streams, w.keys.consumers], [GROUP, ME])


def cancel_call(w: World, task_id: str, message_id: str = "", untouched: frozenset[int] = frozenset()) -> Case:
    """The call that cancels a task; not a case by itself."""
    k = w.keys
    keys = [*k.streams, k.delayed, k.bodies, *k.dedup, k.counters, k.cancels, k.result(task_id), k.cancelled_steps]
    args = [task_id, frame_ident(task_id), message_id, GROUP, cancelled_record(task_id), HOUR, 24 * HOUR, 1000]
    return Case(keys, args, frozenset({15}), untouched)


@case("cancel", "waiting")
def _(w: World, n: int) -> Case:
    (entry,) = w.add(1)
    w.client("HSET", w.keys.dedup[0], "t0", b"2:" + entry)
    return cancel_call(w, "t0", "", frozenset({1, 2, 4, 5, 6, 7, 8, 10, 12, 14}))


@case("cancel", "delayed")
def _(w: World, n: int) -> Case:
    w.delay(1)
    return cancel_call(w, "t0", "", frozenset({1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 14}))


@case("cancel", "a step of a workflow")
def _(w: World, n: int) -> Case:
    frame = encode_task({"id": "t0", "type": "x", "metadata": {STEP: ["n", "w", 0, 1, ":0"]}}).frame
    w.client("XADD", w.keys.lanes[2], "1-1", "t", frame)
    w.client("HSET", w.keys.cancelled_steps, *(part for i in range(n) for part in (f"other{i}", frame)))
    return cancel_call(w, "t0", "2:1-1", frozenset({1, 2, 4, 5, 6, 7, 8, 10, 12, 14}))


@case("cancel", "in flight")
def _(w: World, n: int) -> Case:
    (entry,) = w.held(1)
    w.client("ZADD", w.keys.cancels, *(part for i in range(n) for part in (1, f"old{i}")))
    return cancel_call(w, "t0", f"2:{entry.decode()}", frozenset({10, 13, 15}))


@case("cancel", "unknown")
def _(w: World, n: int) -> Case:
    return cancel_call(w, "t0", "", frozenset({10, 13}))


@case("gcra", "two cells")
def _(w: World, n: int) -> Case:
    cells = [_keys.limiter(w.queue), _keys.limiter(w.queue, "tenant")]
    limit = ["name", 0, 1_000_000, 2_000_000]
    requests = [part for _ in range(n) for part in (0, 2, 1, 1, 0, 2, 1, 0)]
    return Case([_keys.limit_settings(), *cells], [1, *limit, 1, 1, *requests])


@case("gcra_return", "half of a lease")
def _(w: World, n: int) -> Case:
    seconds, micros = map(int, w.client("TIME"))
    now = seconds * 1_000_000 + micros
    w.client("SET", _keys.limiter(w.queue), now + 60_000_000, "PX", HOUR)
    return Case([_keys.limiter(w.queue)], [now + 60_000_000, now, 1_000_000])


@case("gcra_set", "another rate")
def _(w: World, n: int) -> Case:
    return Case([_keys.limit_settings()], ["name", 1_000_000, 2_000_000, "1", "1"])


@case("gcra_refused", "some")
def _(w: World, n: int) -> Case:
    return Case([_keys.limit_refusals()], ["name", 3, 100])


@case("gcra_note", "a name")
def _(w: World, n: int) -> Case:
    return Case([_keys.limit_names()], ["name", "1000000 2000000 1 1", 100, HOUR])


@case("breaker_look", "one that is open and one that nobody knows")
def _(w: World, n: int) -> Case:
    keys = [_keys.breaker_resets("tasks"), _keys.breaker("tasks"), _keys.breaker("unknown")]
    w.client("HSET", keys[1], "state", "open", "era", "1-0", "until", 1, "forced", 0)
    return Case(keys, [], untouched=frozenset({1, 2, 3}))


def _breaker(w: World, op: str) -> Case:
    key = _keys.breaker(w.queue)
    w.client("HSET", key, "state", "open", "era", 7, "until", 0, "forced", 0, "done", 0, "p:mine", 4_000_000_000_000)
    return Case([key], [op, 7, 60_000, "mine", 1, 1])


@case("breaker", "forced open")
def _(w: World, n: int) -> Case:
    return _breaker(w, "force_open")


@case("breaker", "a probe that fails")
def _(w: World, n: int) -> Case:
    return _breaker(w, "failure")


@case("breaker", "a probe that succeeds")
def _(w: World, n: int) -> Case:
    return _breaker(w, "success")


def breaker_call(w: World, op: str, era: Any = 0, token: str = "") -> Case:
    return Case([_keys.breaker(w.queue)], [op, era, 60_000, token, 2, 2])


def open_breaker(w: World) -> bytes:
    """The era of a breaker that lets probes through; one of them, ``t0``, is out."""
    era: bytes = w.call("breaker", breaker_call(w, "open"))[1]
    w.client("HSET", _keys.breaker(w.queue), "until", 0)
    w.call("breaker", breaker_call(w, "probe", era, "t0"))
    return era


@case("breaker", "opening")
def _(w: World, n: int) -> Case:
    return breaker_call(w, "open")


@case("breaker", "permit")
def _(w: World, n: int) -> Case:
    return breaker_call(w, "probe", open_breaker(w), "t1")


@case("lock_acquire", "free")
def _(w: World, n: int) -> Case:
    return Case(list(_keys.lock(w.queue)), ["token", 60_000])


@case("lock_acquire", "held by us")
def _(w: World, n: int) -> Case:
    w.call("lock_acquire", Case(list(_keys.lock(w.queue)), ["token", 30_000]))
    return Case(list(_keys.lock(w.queue)), ["token", 60_000])


@case("lock_extend", "held")
def _(w: World, n: int) -> Case:
    w.call("lock_acquire", Case(list(_keys.lock(w.queue)), ["token", 60_000]))
    return Case([_keys.lock(w.queue)[0]], ["token", 60_000])


@case("lock_release", "held")
def _(w: World, n: int) -> Case:
    w.call("lock_acquire", Case(list(_keys.lock(w.queue)), ["token", 60_000]))
    return Case([_keys.lock(w.queue)[0]], ["token"])


@case("memory_append", "at its position")
def _(w: World, n: int) -> Case:
    _, log = _keys.memory("space", w.queue)
    w.client("RPUSH", log, "first")
    return Case([log], ["second", 1, 100, 60_000])


@case("memory_commit", "at its version")
def _(w: World, n: int) -> Case:
    document, _ = _keys.memory("space", w.queue)
    w.client("HSET", document, "k", "one", "v", 1, *(part for i in range(n) for part in (f"old{i}", i)))
    pairs = [part for i in range(n) for part in (f"new{i}", i)]
    return Case([document], ["one", "two", 60_000, n, *pairs, *(f"old{i}" for i in range(n))])


@case("memory_note", "a new name")
def _(w: World, n: int) -> Case:
    names = _keys.memory_names(w.queue)
    w.client("ZADD", names, 5, "known")
    return Case([names], ["new", 60_000])


@case("memory_forget", "names that were not written again")
def _(w: World, n: int) -> Case:
    names = _keys.memory_names(w.queue)
    w.client("ZADD", names, 9, "written again", *(part for i in range(n) for part in (5, f"gone{i}")))
    return Case([names], ["written again", 5, *(part for i in range(n) for part in (f"gone{i}", 5))])


def _workflow(w: World, n: int, **fields: Any) -> WorkflowKeys:
    """Workflow ``w`` of ``n`` steps behind its first, which runs; ``fields`` of its record besides."""
    keys = WorkflowKeys(w.queue)
    head = {"format": 3, "status": "running", "phase": "running", "driven": 1, "token": "t", "planned": n + 1}
    head |= {
        "steps": n + 1,
        "left": n + 1,
        "running": 1,
        "undo": 0,
        "children": 0,
        "order": 0,
        "current": 0,
        "version": 7,
    }
    head |= {"n:0": " ".join(("fl--", "-1", "0", "s0", *(str(i) for i in range(1, n + 1)))), "p:0": "p", "input": "i"}
    head |= {"q:0": "R 1 1 5 0 0 1 0 0 0", "task": "t", "created": 1} | fields
    for i in range(1, n + 1):
        head |= {f"n:{i}": f"fl-- -1 1 s{i}", f"p:{i}": "p"}
    w.client("HSET", keys.state("w"), *(part for pair in head.items() for part in pair))
    w.client("HSET", keys.context("w"), "c:a", "1")
    w.client("XADD", keys.events("w"), "*", "kind", "workflow.started")
    w.client("ZADD", keys.index, 1, "w")
    return keys


def _move(keys: WorkflowKeys, op: str, *args: Any, untouched: frozenset[int] = frozenset({5, 6, 7})) -> Case:
    return Case([*keys.scripted("w")], [op, "w", HOUR, 5_000, 1 << 20, *args], untouched=untouched)


@case("workflow_make", "a plan")
def _(w: World, n: int) -> Case:
    keys, fields = WorkflowKeys(w.queue), [part for i in range(n) for part in (f"p:{i}", "x")]
    w.client("ZADD", keys.expiry, 1, "old")
    w.client("ZADD", keys.index, 1, "old")
    args = ["w", "token", 5_000, "", 1, 0, n, *fields, 1, "c:a", "1"]
    return Case([*keys.scripted("w")], args, frozenset({2, 3}), frozenset({5}))


@case("workflow_move", "begin")
def _(w: World, n: int) -> Case:
    keys = _workflow(w, n, running=0, **{"q:0": "P 0 1 0 0 0 0 0 0 0"})
    w.client("ZADD", keys.outbox, 1, "w|0|1")
    return _move(keys, "begin", 0, 1, 5)


@case("workflow_move", "finish before many")
def _(w: World, n: int) -> Case:
    return _move(_workflow(w, n), "finish", 0, 1, 5, "completed", "r", "", untouched=frozenset({2, 5, 6, 7}))


@case("workflow_move", "finish the last")
def _(w: World, n: int) -> Case:
    return _move(_workflow(w, 0), "finish", 0, 1, 5, "completed", "r", "", untouched=frozenset({4, 6}))


@case("workflow_move", "grow")
def _(w: World, n: int) -> Case:
    items = [part for k in range(n) for part in ("p", "f", f"s0[{k}]")]
    return _move(_workflow(w, 1), "grow", 0, 1, 5, 0, n, *items, "", untouched=frozenset({2, 5, 6, 7}))


@case("workflow_move", "signal")
def _(w: World, n: int) -> Case:
    waits = {"running": 0, "q:0": "W 1 1 5 0 0 1 0 0 0", "w:0": "signal again 0 s", "a:s": "0"}
    return _move(_workflow(w, n, **waits), "signal", "s", "v", "token", "d")


@case("workflow_save", "by hand")
def _(w: World, n: int) -> Case:
    keys = _workflow(w, n, driven=0)
    written = [part for i in range(n) for part in (f"r:{i}", "x")]
    args = ["w", "t:7", "mine", HOUR, "failed", n, *written, 1, "q:0", 1, "c:b", "2", 1, "c:a"]
    return Case([*keys.scripted("w")], args, untouched=frozenset({4, 6}))


@case("workflow_due", "overdue")
def _(w: World, n: int) -> Case:
    keys = WorkflowKeys(w.queue)
    for i in range(0, n, 1_000):
        w.client("ZADD", keys.outbox, *(part for k in range(i, min(n, i + 1_000)) for part in (1, f"w|{k}|1")))
    return Case([keys.outbox], [n, 5_000])


@case("workflow_emit", "an event")
def _(w: World, n: int) -> Case:
    return Case([*_workflow(w, 1).scripted("w")], ["progress", 0, "d"], untouched=frozenset({2, 4, 5, 6, 7}))


ALL = [(name, situation) for name, situations in CASES.items() for situation in situations]
