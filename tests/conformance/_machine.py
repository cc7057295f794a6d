"""The state machine of the model test: every rule is one call of the product, or something that happens to it."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from orchestra import _identity
from orchestra._delivery import DONE, Again, Bury, Cancel, Complete, Delivery
from orchestra._scripts import script
from orchestra.errors import QueueFullError
from orchestra.serialization import EncodedTask, encode_task
from tests.conformance._actors import GROUP, KEYS, LEASE, MAX_DELIVERIES, PROMOTE, SCAN, WINDOW, Consumer, Server
from tests.conformance._compare import Seen, compare
from tests.reference.queue_model import LANES, STREAMS, Entry, Model, order

IDS = ("a", "b", "c", "d")
VERDICTS = {
    "done": DONE,
    "complete": Complete("value"),
    "retry now": Again(0.0),
    "retry later": Again(3600.0),
    "throttle": Again(7200.0, "throttled"),
    "release": Again(0.0, "released"),
    "bury": Bury("failed", 2, {"error": "it broke"}),
    "cancel": Cancel(),
}

lanes = st.integers(0, LANES - 1)
a_few = st.integers(1, 5)
tasks = st.lists(
    st.tuples(
        lanes, st.sampled_from((None, None, *IDS)), st.sampled_from((0, 0, 3600)), st.sampled_from((True, True, False))
    ),
    min_size=1,
    max_size=4,
)


class QueueMachine(RuleBasedStateMachine):
    """One example. ``shared`` is set by the tests."""

    shared: Server

    def __init__(self) -> None:
        super().__init__()
        self.client = self.shared.client
        self.client("FLUSHALL")
        self.model = Model()
        self.model.bucket = self.time() // WINDOW % 2
        self.started = self.time()
        self.max_length = 0
        self.names = 0
        self.gone: set[str] = set()
        _identity.is_dead = self.gone.__contains__
        self.consumers: list[Consumer] = []
        self.entries: list[tuple[int, Entry]] = []
        self.hastened = 0
        self.touched: set[int] = set()

    @initialize(limit=st.sampled_from((0, 0, 0, 8)), batch=tasks, count=a_few)
    def start(self, limit: int, batch: Any, count: int) -> None:
        self.max_length = limit
        self.consumers = [self.new_consumer() for _ in range(3)]
        self.produce(0, batch)
        self.read(0, count)

    def new_consumer(self) -> Consumer:
        self.names += 1
        return Consumer(f"consumer{self.names}", self.shared.manager, self.max_length)

    def teardown(self) -> None:
        for consumer in self.consumers:
            self.shared.run(consumer.queue.close())

    # -- helpers

    def time(self) -> int:
        seconds, micros = self.client("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def act(self, work: Any) -> Any:
        """Run a call of the product in a millisecond of its own, and let the model know when it ran."""
        while (before := self.time()) <= self.model.now[1]:
            pass
        try:
            return self.shared.run(work) if asyncio.iscoroutine(work) else work()
        finally:
            self.model.now = (before, self.time())

    def check(self) -> None:
        compare(self.model, Seen(self.client, KEYS, GROUP), self.started)
        assert self.model.adds_up()

    def note(self, lane: int, entry: Entry) -> None:
        self.entries.append((lane, entry))

    def pick(self, data: Any, options: Any) -> Any:
        return data.draw(st.sampled_from(list(options)))

    def handed(self, consumer: Consumer, deliveries: list[Delivery], expected: list[tuple[int, Entry, int]]) -> None:
        """The product's deliveries are those of the model."""
        found = [(d.stream, d.entry, d.frame, d.retries, d.before, d.generation, d.deliveries) for d in deliveries]
        wanted = [(lane, e.id, e.frame, e.retries, e.before, e.generation, count) for lane, e, count in expected]
        assert found == wanted
        assert {d.consumer for d in deliveries} <= {consumer.name}
        consumer.deliveries += deliveries

    # -- producing

    @rule(who=st.integers(0, 2), batch=tasks)
    def produce(self, who: int, batch: Any) -> None:
        queue = self.consumers[who].queue
        wanted = batch[0][3]
        dicts = [self._as_task(*task) for task in batch]
        try:
            sent = self.act(queue.submit(dicts, want_results=wanted))
        except QueueFullError:
            sent = None
        flags = {"reply": "client", "flags": 1} if wanted else {}
        answers = {}
        for own in (True, False):  # the product sends those with ids of their own first, in a call of their own
            part = [i for i, task in enumerate(batch) if (task[1] is not None) == own]
            if not part or answers is None:
                continue
            ids = [batch[i][1] or (sent[i].task_id if sent else "?") for i in part]
            frames = [encode_task({**dicts[i], "id": t}, **flags).frame for i, t in zip(part, ids, strict=True)]
            rows = [(batch[i][0], t, own, batch[i][2] * 1000, f) for i, t, f in zip(part, ids, frames, strict=True)]
            out = self.model.produce(rows, self.max_length)
            if out is None:
                answers = None
                continue
            answers.update(zip(part, out, strict=True))
            if not own:
                self._token(part, out, batch)
            for i, answer in zip(part, out, strict=True):
                if isinstance(answer, Entry):
                    self.note(batch[i][0], answer)
                    self.touched.add(batch[i][0])
        assert (sent is None) == (answers is None)
        self.check()
        for i, answer in (answers or {}).items():
            assert sent[i].message_id == self._message_id(batch[i][0], answer, sent[i].task_id)

    @rule(who=st.integers(0, 2), lane=lanes, own=st.lists(st.sampled_from(IDS), min_size=2, unique=True))
    def produce_alike(self, who: int, lane: int, own: list[str]) -> None:
        """Plain tasks for one lane, which have a script of their own."""
        self.produce(who, [(lane, task_id, 0, False) for task_id in own])

    def _as_task(self, lane: int, own: str | None, delay: int, _: bool) -> dict[str, Any]:
        task = {"type": "x", "priority": lane}
        if own is not None:
            task["id"] = own
        return {**task, "delay": delay} if delay else task

    def _token(self, part: list[int], out: list[Any], batch: Any) -> None:
        added = [
            (batch[i][0], answer if isinstance(answer, Entry) else None) for i, answer in zip(part, out, strict=True)
        ]
        self.model.tokens.append(added)

    def _message_id(self, lane: int, answer: Any, task_id: str) -> str:
        if isinstance(answer, Entry):
            return f"{lane}:{answer.id.decode()}"
        if isinstance(answer, tuple):
            where = answer[1]
            return where if isinstance(where, str) else f"{where[0]}:{where[1].id.decode()}"
        return f"z:{task_id}"

    @rule(number=st.integers(0, 1000), lane=lanes, name=st.sampled_from(("produce", "produce_many")))
    def produce_and_lose_the_reply(self, number: int, lane: int, name: str) -> None:
        """The same call twice, with its token: the second adds nothing and gives the answer of the first."""
        frames = [encode_task({"id": f"g{number}.{i}", "type": "x", "priority": lane}).frame for i in range(2)]
        keys = [*KEYS.lanes, KEYS.delayed, KEYS.bodies, *KEYS.dedup, *KEYS.tokens, KEYS.counters, KEYS.dlq]
        token = f"token{len(self.model.tokens)}"
        rows = [(lane, f"g{number}.{i}", False, 0, frame) for i, frame in enumerate(frames)]
        args = [0, WINDOW, 60_000, token]
        for frame in frames:
            args += (lane, "", frame)
        if name == "produce_many":
            keys = [KEYS.lanes[lane], *KEYS.tokens, KEYS.counters]
            args = [60_000, lane, token, *frames]
        lua = script(name).text
        first, again = self.act(lambda: [self.client("EVAL", lua, len(keys), *keys, *args) for _ in range(2)])
        out = self.model.produce(rows)
        self.model.tokens.append([(lane, entry) for entry in out])
        for entry in out:
            self.note(lane, entry)
        self.touched.add(lane)
        self.check()
        assert first == ([entry.id for entry in out] if name == "produce" else again)
        assert again[0] == b"!"
        assert again[1].split()[0::3] == [b"%d" % lane] * len(again[1].split()[0::3])

    def added(self, lane: int, answer: Any) -> None:
        if isinstance(answer, Entry):
            self.note(lane, answer)
            self.touched.add(lane)

    @rule(who=st.integers(0, 2), lane=lanes, own=st.sampled_from((None, *IDS)), delay=st.sampled_from((0, 0, 0, 3600)))
    def produce_one(self, who: int, lane: int, own: str | None, delay: int) -> None:
        """A single task, which goes at once: by the script for one, where there is no limit and no delay."""
        task = encode_task(self._as_task(lane, own, delay, False))
        try:
            sent = self.act(self._post(self.consumers[who], task))
        except QueueFullError:
            sent = None
        out = self.model.produce([(lane, task.id, task.own_id, delay * 1000, task.frame)], self.max_length)
        assert (sent is None) == (out is None)
        if out is not None:
            if own is None:
                self.model.tokens.append([(lane, out[0] if isinstance(out[0], Entry) else None)])
            self.added(lane, out[0])
        self.check()
        if out is not None:
            assert sent == self._message_id(lane, out[0], task.id)

    async def _post(self, consumer: Consumer, task: EncodedTask) -> str:
        return await consumer.queue._producer.post(task)

    @rule(number=st.integers(0, 1000), lane=lanes, own=st.sampled_from((None, *IDS)))
    def produce_one_and_lose_the_reply(self, number: int, lane: int, own: str | None) -> None:
        """The same call of the script for one twice: the second adds nothing and names what the first added."""
        task = encode_task({"id": own or f"o{number}", "type": "x", "priority": lane})
        names = (WINDOW, lane, "id", own) if own else (60_000, lane, "token", f"one{len(self.model.tokens)}")
        call = [KEYS.lanes[lane], *(KEYS.dedup if own else KEYS.tokens), KEYS.counters, *names, task.frame]
        lua = script("produce_one").text
        first, again = self.act(lambda: [self.client("EVAL", lua, 4, *call) for _ in range(2)])
        rows = [(lane, task.id, own is not None, 0, task.frame)]
        (answer,) = self.model.produce(rows)
        repeats = self.model.produce(rows) if own else []
        if not own:
            self.model.tokens.append([(lane, answer)])
        self.added(lane, answer)
        self.check()
        if not own:
            assert first == again == answer.id
        else:
            assert again == b"=" + self._message_id(lane, repeats[0], task.id).encode()
            assert first in ((answer.id,) if isinstance(answer, Entry) else (again,))

    def a_dedup_window_passes(self) -> None:
        """As if the present bucket were the one before: the ids of the one before that are forgotten."""
        current, before = KEYS.dedup[self.model.bucket], KEYS.dedup[1 - self.model.bucket]
        self.client("DEL", before)
        if self.client("EXISTS", current):
            self.client("RENAME", current, before)
        self.model.dedup[1 - self.model.bucket] = self.model.dedup[self.model.bucket]
        self.model.dedup[self.model.bucket] = {}
        self.check()

    # -- handing out

    def grouped(self) -> None:
        self.model.grouped = True
        self.touched.update(range(STREAMS))

    @rule(who=st.integers(0, 2), count=a_few)
    def read(self, who: int, count: int) -> None:
        consumer = self.consumers[who]
        got = self.act(consumer.queue.read(consumer.name, count, 0, exact=True))
        consumer.born = consumer.born or self.model.now[0]
        self.grouped()
        self.handed(consumer, got, [(lane, e, 1) for lane, e in self.model.take(consumer.name, count)])
        self.check()

    @precondition(lambda self: any(self.model.waiting))
    @rule(who=st.integers(0, 2), count=a_few, favoured=st.sampled_from((None, None, 1, 3)))
    def read_and_lose_the_reply(self, who: int, count: int, favoured: int | None) -> None:
        """Ghosts: pending for a consumer that has never heard of them."""
        name, lua = self.consumers[who].name, script("take").text
        share = "" if favoured is None else favoured + 4
        self.act(lambda: self.client("EVAL", lua, STREAMS, *KEYS.streams, GROUP, name, count, share))
        self.model.take(name, count, favoured)
        self.check()

    @rule(who=st.integers(0, 2), count=a_few)
    def reconnect_and_read(self, who: int, count: int) -> None:
        """A consumer that may have lost replies looks for ghosts first."""
        consumer = self.consumers[who]
        if consumer.open_reader() is None:
            return
        ghosts = consumer.open_reader().ghosts
        ghosts.suspect()
        held = [set(lane) for lane in consumer.queue.held]
        got = self.act(consumer.queue.read(consumer.name, count, 0, exact=True))
        ghosts.looks = []
        taken = []
        for lane in range(STREAMS):
            for entry_id in sorted(self.model.pending[lane], key=order):
                row = self.model.pending[lane][entry_id]
                unheard = row.consumer == consumer.name and entry_id not in held[lane] and row.since[0] >= consumer.born
                if unheard and len(taken) < count:
                    entry = self.model.reconcile(lane, entry_id, consumer.name, row.count)
                    if entry is not None:
                        taken.append((lane, entry, row.count + 1))
        expected = taken or [(lane, entry, 1) for lane, entry in self.model.take(consumer.name, count)]
        self.handed(consumer, got, expected)
        self.check()

    # -- settling

    def receivers(self) -> list[Consumer]:
        return [consumer for consumer in self.consumers if consumer.deliveries]

    def current(self, consumer: Consumer) -> list[Delivery]:
        """What it holds, whether it knows or not."""
        holds = self.model.holds
        return [d for d in consumer.deliveries if holds(d.stream, d.entry, d.consumer, d.deliveries)]

    def holders(self) -> list[Consumer]:
        return [consumer for consumer in self.consumers if self.current(consumer)]

    @precondition(receivers)
    @rule(data=st.data())
    def settle_whatever(self, data: Any) -> None:
        """Deliveries that are held, stale or settled before, each with a verdict of its own, in one batch."""
        consumer = self.pick(data, self.receivers())
        self.settle(data, consumer, consumer.deliveries[-8:])

    @precondition(holders)
    @rule(data=st.data())
    def settle_what_is_held(self, data: Any) -> None:
        consumer = self.pick(data, self.holders())
        self.settle(data, consumer, self.current(consumer))

    def outdated(self, consumer: Consumer) -> list[Delivery]:
        """What it was handed, and somebody (itself perhaps) has been handed again since."""
        mine = set(self.current(consumer))
        return [d for d in consumer.deliveries if d not in mine and d.entry in self.model.pending[d.stream]]

    @precondition(lambda self: any(map(self.outdated, self.consumers)))
    @rule(data=st.data())
    def settle_what_is_stale(self, data: Any) -> None:
        """A zombie wakes up."""
        consumer = self.pick(data, [consumer for consumer in self.consumers if self.outdated(consumer)])
        self.settle(data, consumer, self.outdated(consumer))

    def settle(self, data: Any, consumer: Consumer, among: list[Delivery]) -> None:
        picked = data.draw(st.lists(st.integers(0, len(among) - 1), min_size=1, max_size=6, unique=True))
        each = {(among[i].stream, among[i].entry): among[i] for i in picked}  # a batch names an entry once
        batch = [(delivery, VERDICTS[self.pick(data, VERDICTS)]) for delivery in each.values()]
        stale = self.act(consumer.queue.settle(batch))
        expected = self._settle(batch)
        self.check()
        assert sorted(d.message_id for d in stale) == sorted(d.message_id for d in expected)

    @precondition(receivers)
    @rule(data=st.data())
    def complete_everything_held(self, data: Any) -> None:
        """The batch that a worker who keeps up sends: in order, and often the oldest part of the pending list."""
        consumer = self.pick(data, self.receivers())
        batch = [(d, DONE) for lane in consumer.queue.held for d in lane.values()]
        if not batch:
            return
        stale = self.act(consumer.queue.settle(batch))
        expected = self._settle(batch)
        self.check()
        assert sorted(d.message_id for d in stale) == sorted(d.message_id for d in expected)

    def _settle(self, batch: list[tuple[Delivery, Any]]) -> list[Delivery]:
        """What the product's plan does: plain completions first, then each lane and kind; returns what was stale."""
        groups: dict[Any, list[tuple[Delivery, Any]]] = {}
        for delivery, verdict in batch:
            plain = isinstance(verdict, Complete) and (verdict is DONE or not delivery.wants_result)
            groups.setdefault((not plain, delivery.stream, type(verdict)), []).append((delivery, verdict))
        ordered = sorted(groups, key=lambda key: key[0])
        stale, marked = [], []
        for key in ordered:
            for delivery, verdict in groups[key]:
                ended = self._end(delivery, verdict)
                if ended is None:
                    marked.append(delivery)
                elif not ended:
                    stale.append(delivery)
        stale += [delivery for delivery in marked if not self._end(delivery, Cancel())]
        return stale

    def _end(self, d: Delivery, verdict: Any) -> bool | None:
        model, where, task = self.model, (d.stream, d.entry, d.consumer, d.deliveries), d.header.id
        match verdict:
            case Complete():
                if verdict is DONE or not d.wants_result:
                    return model.complete(*where)
                return model.complete_result(*where, task, verdict.value)
            case Cancel():
                return model.cancelled(*where, task)
            case Again():
                return model.retry(*where, task, verdict.delay * 1000, verdict.counter)
            case Bury():
                entry = Entry(task, d.frame)
                return model.dead_letter(
                    *where, entry, (verdict.attempts, verdict.reason, verdict.error), d.wants_result
                )

    # -- leases

    @precondition(receivers)
    @rule(data=st.data())
    def renew(self, data: Any) -> None:
        """What the lease thread sends, also for what is stale."""
        zombies = [consumer for consumer in self.consumers if self.outdated(consumer)]
        consumer = self.pick(data, zombies or self.receivers())
        lane = self.pick(data, {d.stream for d in consumer.deliveries})
        mine = [d for d in consumer.deliveries if d.stream == lane]
        args = [part for d in mine for part in (d.entry, d.deliveries)]
        keys = (KEYS.streams[lane], KEYS.counters)
        lua = script("renew").text
        lost = self.act(lambda: self.client("EVAL", lua, 2, *keys, GROUP, consumer.name, *args))
        expected = [d.entry for d in mine if not self.model.renew(lane, d.entry, consumer.name, d.deliveries)]
        self.check()
        assert [entry.removeprefix(b"!") for entry in lost] == expected  # "!": its entry was deleted

    def in_flight(self) -> list[tuple[int, bytes]]:
        """What is pending and still in its lane."""
        rows = [(lane, entry_id) for lane in range(STREAMS) for entry_id in sorted(self.model.pending[lane], key=order)]
        return [(lane, entry_id) for lane, entry_id in rows if self.model.find(lane, entry_id)]

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data(), who=st.integers(0, 2), room=st.integers(0, 5))
    def leases_run_out(self, data: Any, who: int, room: int) -> None:
        rows = self.in_flight()
        for number in data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)):
            lane, entry_id = rows[number]
            row = self.model.pending[lane][entry_id]
            claim = ("XCLAIM", KEYS.streams[lane], GROUP, row.consumer, 0, entry_id, "IDLE", 2 * LEASE, "JUSTID")
            self.act(lambda claim=claim: self.client(*claim))
            row.since = (self.model.now[0] - 2 * LEASE, self.model.now[1] - 2 * LEASE)
        self.check()
        if room:
            self.reclaim(who, room)

    @precondition(lambda self: any(self.model.pending))
    @rule(who=st.integers(0, 2), room=a_few)
    def reclaim(self, who: int, room: int) -> None:
        consumer = self.consumers[who]
        got = self.act(consumer.queue.reclaim(consumer.name, room, LEASE))
        self.grouped()
        taken = self._reclaim(consumer, room)
        self.handed(consumer, got, self._without_pills(taken))
        self.check()

    def _reclaim(self, consumer: Consumer, room: int, dead: str = "") -> list[tuple[int, Entry, int]]:
        taken: list[tuple[int, Entry, int]] = []
        for lane in range(STREAMS):
            rows, _ = self.model.reclaim(lane, consumer.name, LEASE, SCAN, room - len(taken), dead)
            taken += [(lane, entry, count) for entry, count in rows]
            if len(taken) >= room:
                break
        return taken

    def _without_pills(self, taken: list[tuple[int, Entry, int]]) -> list[tuple[int, Entry, int]]:
        """Dead-letter what was handed out too often, as its new holder does at once."""
        good = [row for row in taken if row[2] <= MAX_DELIVERIES]
        for lane, entry, count in sorted(taken, key=lambda row: row[0]):
            if count > MAX_DELIVERIES:
                times = count - 1
                wanted = Delivery(lane, entry.id, entry.fields, "", count).wants_result
                verdict = (entry.retries + times, "crashed", {"error_type": "Crashed", "deliveries": times})
                holder = self.model.pending[lane][entry.id].consumer
                assert self.model.dead_letter(lane, entry.id, holder, count, entry, verdict, wanted)
        return good

    def crash(self, who: int) -> None:
        """The object and all it knew are gone; its name stays, and is known to be dead."""
        consumer = self.consumers[who]
        self.shared.run(consumer.queue.close())
        self.gone.add(consumer.name)
        self.consumers[who] = self.new_consumer()
        self.check()

    @precondition(lambda self: self.gone)
    @rule(who=st.integers(0, 2), room=a_few)
    def tick(self, who: int, room: int) -> None:
        """Promotion, and adoption of what dead processes held."""
        consumer = self.consumers[who]
        upkeep = consumer.queue._upkeep
        upkeep._adopt_at, upkeep._reclaim_at = 0.0, math.inf
        got = self.act(consumer.queue.maintain(consumer.name, room)).deliveries
        self.model.promote(consumer.name, PROMOTE)
        self.touched.update(range(STREAMS))
        self._adopt_times()
        taken: list[tuple[int, Entry, int]] = []
        for name in sorted(self.model.alive, key=lambda name: (self.model.alive[name], name)):
            if name not in self.gone:
                continue
            self.grouped()
            before = -1
            while before < len(taken) < room:
                before = len(taken)
                taken += self._reclaim(consumer, room - len(taken), name)
            if len(taken) >= room:
                break
            self.model.retire(name)
        self.check_new_entries()
        self.handed(consumer, got, self._without_pills(taken))
        self.check()

    def _adopt_times(self) -> None:
        """The order of the consumers is that of their scores, which only Redis knows."""
        flat = self.client("ZRANGE", KEYS.consumers, 0, -1, "WITHSCORES")
        for name, score in zip(flat[::2], flat[1::2], strict=True):
            known = self.model.alive.get(name.decode())
            if known is not None:
                assert known[0] - 1 <= float(score) <= known[1] + 1
                self.model.alive[name.decode()] = (float(score), float(score))

    def retire(self, who: int) -> None:
        consumer = self.consumers[who]
        self.act(consumer.queue.retire(consumer.name))
        self.model.retire(consumer.name)
        consumer.born = None
        self.check()

    # -- delayed tasks

    @precondition(lambda self: self.model.delayed)
    @rule(data=st.data(), who=st.integers(0, 2))
    def delays_end(self, data: Any, who: int) -> None:
        for number in data.draw(st.sets(st.integers(0, len(self.model.delayed) - 1), min_size=1)):
            delayed = self.model.delayed[number]
            self.hastened += 1
            self.client("ZADD", KEYS.delayed, "XX", self.hastened, delayed.member)
            delayed.due = (self.hastened, self.hastened)
        self.check()
        self.promote(who)

    @rule(who=st.integers(0, 2))
    def promote(self, who: int) -> None:
        consumer = self.consumers[who]
        self.act(consumer.queue.maintain(consumer.name, 0))
        for delayed in self.model.delayed:
            if delayed.due[1] <= self.model.now[0]:
                self.touched.add(delayed.lane + LANES * delayed.front)
        self.model.promote(consumer.name, PROMOTE)
        self.check()
        for delivery in consumer.deliveries:
            task, row = delivery.header.id, self.model.pending[delivery.stream].get(delivery.entry)
            if row is not None and task in self.model.marks:
                covered = int(delivery.entry.partition(b"-")[0]) <= self.model.marks[task][0]
                assert consumer.queue.cancel_requested(delivery) >= covered

    # -- cancelling, dead letters

    @rule(who=st.integers(0, 2), data=st.data())
    def cancel(self, who: int, data: Any) -> None:
        """By id, or where it was put first, or somewhere else."""
        place = None
        if self.entries and data.draw(st.booleans()):
            lane, entry = self.entries[data.draw(st.integers(0, len(self.entries) - 1))]
            place, task = (lane, entry.id), data.draw(st.sampled_from((entry.task, entry.task, "a")))
        else:
            live = [entry.task for _, entry in self.entries[-4:]] + [d.entry.task for d in self.model.delayed[:4]]
            task = self.pick(data, (*IDS, "nobody", *live))
        message_id = None if place is None else f"{place[0]}:{place[1].decode()}"
        answer = self.act(self.consumers[who].queue.cancel(task, message_id))
        expected = self.model.cancel(task, place)
        self.check()
        assert answer.value == expected

    @precondition(lambda self: self.model.dead)
    @rule(data=st.data())
    def replay(self, data: Any) -> None:
        """Some dead letters, each named twice."""
        count = data.draw(st.integers(1, len(self.model.dead)))
        letters = self.model.dead[:count]
        queue = self.consumers[0].queue
        replayed = self.act(queue.replay_dlq([letter.id.decode() for letter in letters] * 2))
        wanted = {e.task for e in (x.entry for x in letters) if Delivery(0, b"1-1", e.fields, "").wants_result}
        for letter in letters:
            self.touched.add(letter.lane)
        assert replayed == self.model.replay(letters * 2, wanted)
        self.check()

    def purge(self) -> None:
        if self.model.dead:
            letter = self.model.dead.pop(0)
            assert self.act(self.consumers[0].queue.purge_dlq([letter.id.decode()])) == 1
            self.check()

    # -- what happens now and then, and what others do

    @rule(what=st.sampled_from(("window", "crash", "crash", "retire", "purge", "flush")), who=st.integers(0, 2))
    def now_and_then(self, what: str, who: int) -> None:
        match what:
            case "window":
                self.a_dedup_window_passes()
            case "crash":
                self.crash(who)
            case "retire":
                self.retire(who)
            case "purge":
                self.purge()
            case "flush":
                self.the_script_cache_is_flushed()

    def the_script_cache_is_flushed(self) -> None:
        self.client("SCRIPT", "FLUSH")
        self.check()

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data(), really=st.sampled_from((False, False, True)))
    def a_stranger_deletes_an_entry_in_flight(self, data: Any, really: bool) -> None:
        if not really:
            return
        lane, entry_id = self.pick(data, self.in_flight())
        self.client("XDEL", KEYS.streams[lane], entry_id)
        self.model.lanes[lane] = [entry for entry in self.model.lanes[lane] if entry.id != entry_id]
        self.check()

    def check_new_entries(self) -> None:
        """Let the model know the ids of what was added, without comparing the rest yet."""
        for lane, entries in enumerate(self.model.lanes):
            rows = self.client("XRANGE", KEYS.streams[lane], "-", "+")
            for entry, (entry_id, _) in zip(entries, rows, strict=False):
                entry.id = entry.id or entry_id
