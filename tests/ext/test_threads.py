"""J7, J8: sixteen threads on every compiled class, switching as often as the interpreter can, or without a GIL."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import random
import sys
import sysconfig
import threading
from collections import Counter

import pytest

from orchestra._ext import wire
from orchestra._ext.codec import DecodeError, EncodeError, IdMaker, TaskCodec, TaskMaker, decode_header, packb, unpackb
from orchestra._ext.gcra import GcraTable
from orchestra._ext.heap import TaskHeap
from orchestra._ext.step import first_step
from orchestra._ext.wrr import SmoothRing

THREADS = 16
LONGER = 10 if sysconfig.get_config_var("Py_GIL_DISABLED") else 1
"""A thread that runs beside others, not in turns with them, needs time to meet them in the middle of something."""


@pytest.fixture(autouse=True)
def switching():
    """Threads take turns about every bytecode."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work):
    """``work(number)`` in sixteen threads that start at once; their results, or the first error."""
    start, results, errors = threading.Barrier(THREADS), [None] * THREADS, []

    def run(number):
        try:
            start.wait(30)
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


def test_heap_loses_and_doubles_nothing():
    """J7: what was pushed comes out once, each thread's own in its order."""
    heap = TaskHeap()

    def work(number):
        got = []
        for turn in range(400):
            heap.push(0, (number, turn))
            if turn % 3 == 0:
                got.append(heap.pop())
            if turn % 50 == 49:
                got += heap.pop_many(5)
                len(heap), sys.getsizeof(heap)
        return got

    got = together(work)
    rest = heap.pop_many(10**6)
    everything = list(itertools.chain(*got, rest))
    assert Counter(everything) == {(number, turn): 1 for number in range(THREADS) for turn in range(400)}
    for mine in (*got, rest):
        for number in range(THREADS):
            turns = [turn for owner, turn in mine if owner == number]
            assert turns == sorted(turns), "first in, first out within a priority"


def test_heap_cleared_by_others():
    """J8: clear and pop at once; objects whose ``__del__`` comes back to the heap."""
    heap = TaskHeap()
    died = itertools.count()

    class Thing:
        def __del__(self):
            next(died)
            len(heap)

    def work(number):
        cleared = popped = 0
        for turn in range(300):
            heap.push(turn % 7, Thing())
            if number < 2 and turn % 20 == 0:
                cleared += heap.clear()
            elif turn % 2:
                try:
                    heap.pop()
                    popped += 1
                except IndexError:
                    pass
        return cleared + popped

    gone = sum(together(work))
    gone += heap.clear()
    assert gone == 300 * THREADS
    assert next(died) == gone


def test_ring_is_exact():
    """J7: every window of sum(weights) selections holds each id its weight times, whoever selects."""
    ring = SmoothRing()
    weights = {f"w{n}": n for n in range(1, 9)}
    for ident, weight in weights.items():
        ring.set_weight(ident, weight)
    total = sum(weights.values())
    counts = together(lambda number: Counter(ring.select() for _ in range(total * 9)))
    assert sum(counts, Counter()) == {ident: weight * 9 * THREADS for ident, weight in weights.items()}


def test_ring_under_changes():
    """J8: the list of ids changes while it is read; ids join, leave and change their weight."""
    ring = SmoothRing(default_weight=1)
    offer = [f"w{n}" for n in range(20)]

    def work(number):
        rng = random.Random(number)
        for turn in range(300):
            if number == 0:
                offer.append(f"w{rng.randrange(30)}")
            elif number == 1 and len(offer) > 3:
                offer.pop()
            elif number == 2:
                ring.set_weight(f"w{rng.randrange(30)}", rng.randrange(5))
            elif number == 3:
                ring.remove(f"w{rng.randrange(30)}")
                ring.ids()
            else:
                chosen = ring.select(offer)
                assert chosen is None or chosen.startswith("w")
                index = ring.select_index(list(offer))
                assert index == -1 or index >= 0

    together(work)
    assert len(ring) == len(ring.ids()) == len(set(ring.ids()))


class Slow:
    """An id whose ``__eq__`` and ``__hash__`` let other threads run."""

    def __init__(self, name):
        self.name = name

    def __hash__(self):
        sum(range(5))
        return hash(self.name)

    def __eq__(self, other):
        sum(range(5))
        return isinstance(other, Slow) and self.name == other.name


def test_ring_whose_ids_run_python():
    """J8: foreign code in ``__hash__`` and ``__eq__`` gives way in the middle of a selection."""
    ring = SmoothRing(default_weight=1)

    def work(number):
        mine = Counter()
        for turn in range(60):
            ids = [Slow(f"w{n}") for n in range(6)]
            mine[ring.select(ids).name] += 1
            if number == 0 and turn % 10 == 0:
                ring.remove(Slow("w3"))
        return mine

    counts = sum(together(work), Counter())
    assert counts.total() == 60 * THREADS
    assert set(counts) == {f"w{n}" for n in range(6)}
    assert len(ring) <= 6


def test_gcra_table():
    """J7: observations of many threads; the capacity holds, and the newest answer for a key is the one kept."""
    table = GcraTable(64)

    def work(number):
        for turn in range(300):
            key = f"k{(turn * 7 + number) % 100}"
            table.observe(key, 10_000 + turn, 1_000, 1_000 + turn)
            assert 0 <= table.refused_for(key, 1, 1_000 + turn, 100, 1_000) < 1 << 62
            table.observe("shared", 50_000 + number, 1_000, 2_000 + turn * THREADS + number)
            if turn % 40 == 0:
                table.forget(f"k{turn % 100}")
                assert len(table) <= 64
            if number == 0 and turn % 100 == 99:
                table.clear()

    together(work)
    assert len(table) <= 64
    table.observe("last", 9_000, 1_000, 10**6)
    assert table.known("last")[1] == 10**6
    assert table.known("shared") is None or table.known("shared")[1] <= 2_000 + 300 * THREADS


def test_codec():
    """J7: values, frames and refusals at once; the caches of keys and types are shared by all threads."""
    codec = TaskCodec(lambda: "made-up")

    def work(number):
        rng = random.Random(number)
        for turn in range(150):
            keys = [f"key{rng.randrange(600)}" for _ in range(6)]
            value = {key: [number, turn, key] for key in keys}
            assert unpackb(packb(value)) == value
            frame = codec.encode({"type": f"type{rng.randrange(300)}", "id": f"i{number}", "input": value})[2]
            assert decode_header(frame).id == f"i{number}"
            assert codec.decode(frame)["input"] == value
            for bad in (frame[: rng.randrange(len(frame))], b"\xc1"):
                with pytest.raises(DecodeError):
                    codec.decode(bad)
            with pytest.raises(EncodeError):
                packb([value, 1 << 70])

    together(work)


def test_encoding_what_another_thread_changes():
    """J8: a list and a dict that grow and shrink meanwhile are encoded as they were at some moment, or refused."""
    shared: dict = {"list": list(range(50)), "text": "x" * 100, "dict": {str(n): [n] * 3 for n in range(50)}}
    done = threading.Event()

    def hook(value):
        return str(type(value))

    def work(number):
        rng = random.Random(number)
        if number < 4:
            while not done.is_set():
                deed = rng.randrange(4)
                if deed == 0:
                    shared["list"].append([object()] if rng.random() < 0.3 else rng.randrange(10**9))
                elif deed == 1 and shared["list"]:
                    with contextlib.suppress(IndexError, ValueError):  # another one was quicker
                        shared["list"].pop(rng.randrange(len(shared["list"])))
                elif deed == 2:
                    shared["dict"][str(rng.randrange(99))] = [object()]
                else:
                    shared["dict"].pop(str(rng.randrange(99)), None)
            return 0
        made = 0
        try:
            for _ in range(150):
                try:
                    unpackb(packb(shared, hook))
                    made += 1
                except EncodeError as error:
                    assert "changed while" in str(error)
        finally:
            done.set()
        return made

    assert sum(together(work)) > 0


def test_ids_are_unique():
    """J7: one maker, sixteen threads: no id twice, and each thread's own ascend."""
    maker = IdMaker("abcdef012345")
    made = together(lambda number: [maker.make(1000.0 + turn % 3) for turn in range(5000 * LONGER)])
    assert all(mine == sorted(mine) for mine in made)
    assert len(set(itertools.chain(*made))) == 5000 * LONGER * THREADS


def test_names_that_push_each_other_out():
    """J7: more names than the caches have slots, so that each thread drops what another one is about to take."""
    names = [f"name{number}" for number in range(1500)]
    values = [packb({name: 1}) for name in names]
    frames = [TaskCodec(None).encode({"type": name, "id": "i"})[2] for name in names]

    def work(number):
        rng = random.Random(number)
        order = rng.sample(range(1500), 1500) * 3 * LONGER
        got = [next(iter(unpackb(values[place]))) for place in order]
        types = [decode_header(frames[place]).type for place in order]
        return got == types == [names[place] for place in order]

    assert together(work) == [True] * THREADS


def test_encoding_a_task_whose_keys_change():
    """J8: the keys of one task come, go and change while every thread encodes it: a whole frame, or a refusal."""
    codec = TaskCodec(lambda: "made-up")
    task = {"type": "t", "id": "i", "timeout": 2.5, "input": {"n": 1}}

    def work(number):
        rng = random.Random(number)
        made = 0
        for turn in range(800 * LONGER):
            if number % 2:
                task["timeout"] = rng.random() + 1e-3
                task["id"] = f"i{rng.randrange(10**6)}"
                task["type"] = "t" * (1 + turn % 60)
                task[f"extra{rng.randrange(12)}"] = [number] * 3
                task.pop(f"extra{rng.randrange(12)}", None)
                task["metadata"] = {str(turn): turn}
            else:
                try:
                    frame = codec.encode(task)[2]
                except EncodeError as error:
                    assert "changed while" in str(error)
                    continue
                got = codec.decode(frame)
                assert (set(got["type"]), got["input"]) == ({"t"}, {"n": 1})
                assert got["id"][0] == "i" and (got["id"] + "0")[1:].isdigit()
                made += 1
        return made

    assert sum(together(work)) > 0


class Task:
    __slots__ = (
        *("id", "type", "input", "priority", "attempt", "metadata", "max_retries", "timeout", "deadline", "fence"),
        "extra",
    )


def test_tasks_out_of_one_frame():
    """J7: one maker, one frame, one header: every thread gets a task of its own."""
    codec = TaskCodec(lambda: "made-up")
    maker = TaskMaker(codec, Task)
    frame = codec.encode({"type": "t", "id": "i", "input": {"a": [1, 2]}, "metadata": {"m": 1}, "own": 3})[2]
    header = decode_header(frame)

    def work(number):
        made = [maker.make(frame, header if turn % 2 else None, number, turn)[1] for turn in range(300)]
        assert all(one.input == {"a": [1, 2]} and one.extra == {"own": 3} for one in made)
        return [(one.attempt, one.fence, id(one.input)) for one in made]

    got = together(work)
    assert [mine[-1][:2] for mine in got] == [(number, 299) for number in range(THREADS)]
    assert all(len({place for _, _, place in mine}) == 300 for mine in got)


class Delivery(wire.Arrival):
    __slots__ = ()

    def _read_fields(self, fields):
        self.frame = b"odd"

    def _decoded(self):
        return [self.frame]


def test_deliveries_that_are_read_and_replaced_at_once():
    """J8: the frame and the header of one delivery, while others put new ones."""
    shared = wire.arrivals(Delivery, 1, [[b"%d-1" % n, [b"t", b"x" * 50]] for n in range(5)], "c", 0)

    def work(number):
        one = shared[number % 2]
        for turn in range(3000 * LONGER):
            if number < 4:
                one.frame = b"%d" % turn * 9
                one._header = None
            else:
                assert type(one.frame) is type(one.header[0]) is bytes
                one.deliveries = turn
                assert 0 <= one.deliveries < 3000 * LONGER
        with pytest.raises(AttributeError):
            one.entry = b"0-0"

    together(work)
    assert [one.entry for one in shared] == [b"%d-1" % n for n in range(5)]


def test_replies_and_batches_that_change():
    """J8: a reply, and a list of deliveries, that grow and shrink while they are read, held and packed."""
    reply = [[b"%d-1" % n, [b"t", b"frame"]] for n in range(40)]
    batch = wire.arrivals(Delivery, 1, reply, "c", 0)
    spare = list(batch)
    held = [{} for _ in range(8)]
    command = b"*2\r\n$4\r\nXACK\r\n$1\r\nk\r\n"

    def work(number):
        rng = random.Random(number)
        for _ in range(300 * LONGER):
            if number < 4:
                batch.append(rng.choice(spare))
                reply[rng.randrange(40)] = [b"7-7", [b"t", b"y"]] if rng.random() < 0.5 else [b"7-7", [b"t"], b"more"]
                reply[rng.randrange(40)] = [b"8-8", [b"t", b"z"]]
                if len(batch) > 20:
                    del batch[rng.randrange(10) :]
                reply[rng.randrange(40)].clear()
            elif number < 8:
                with contextlib.suppress(TypeError):
                    assert all(type(one.frame) is bytes for one in wire.arrivals(Delivery, 1, reply, "c", 0))
            else:
                packed = wire.with_ids(command, batch)
                arguments = int(packed[1 : packed.index(b"\r")])
                assert packed.count(b"\r\n$") == arguments
                wire.hold(held, batch)
                groups, rest = wire.sift([(one, 1) for one in spare], 1)
                assert rest == [] and sum(len(first) + len(again) for first, again in groups.values()) == 40

    together(work)
    assert set(held[1].values()) <= set(spare)


def test_first_steps_keep_to_their_threads():
    """J7: each thread's coroutine sees its own value of the variable, and leaves none behind."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")

    async def agent(number):
        assert variable.get() == number
        return number

    def work(number):
        for _ in range(500):
            context, coroutine, result = first_step(agent, number, variable)
            assert (context[variable], coroutine, result) == (number, None, number)
        return variable.get(None)

    assert together(work) == [None] * THREADS
