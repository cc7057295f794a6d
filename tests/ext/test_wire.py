"""``orchestra._ext.wire`` against its oracle: what is read, held, sorted and packed, also where replies are damaged."""

from __future__ import annotations

import gc
import sys
import weakref

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra._ext import wire
from tests.reference import wire as reference


@wire.untracked
class Compiled(wire.Arrival):
    __slots__ = ()

    def _read_fields(self, fields):
        self.retries = len(fields)
        self.frame = b"unusual"

    def _decoded(self):
        return ("header", self.frame)


class Plain(reference.Arrival):
    _read_fields = Compiled._read_fields
    _decoded = Compiled._decoded


NAMES = (
    *("stream", "lane", "entry", "frame", "consumer", "deliveries", "rank", "retries", "before", "generation"),
    *("lost", "abandoned", "foreign", "attempt", "fence", "header"),
)
values = st.one_of(
    st.binary(max_size=4), st.integers(), st.none(), st.text(max_size=2), st.lists(st.binary(max_size=2))
)
plain_fields = st.binary(max_size=60).map(lambda frame: [b"t", frame])
fields = st.one_of(plain_fields, st.lists(values, max_size=6), values)
entries = st.lists(st.tuples(st.binary(max_size=20), plain_fields).map(list), max_size=30)
damaged = st.lists(st.one_of(st.tuples(values, fields).map(list), st.lists(values, max_size=3), values), max_size=8)


def facts(delivery):
    return [getattr(delivery, name) for name in NAMES]


def outcome(function, *args):
    """What a call gives, or the kind of its refusal: a reply of another shape is told by these alone."""
    try:
        return [facts(delivery) for delivery in function(*args)]
    except (TypeError, ValueError, LookupError, AttributeError):
        return "refused"


def make(kind, rows):
    return [kind(stream, entry, (b"t", b"f"), who, count, rank) for stream, entry, who, count, rank in rows]


rows = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.binary(min_size=1, max_size=25),
        st.sampled_from("ab"),
        st.integers(1, 3),
        st.integers(0, 99),
    ),
    max_size=40,
)


@given(st.integers(0, 7), entries, st.integers(0, 2**40))
def test_entries_become_deliveries(stream, given_entries, rank):
    ours = outcome(wire.arrivals, Compiled, stream, given_entries, "me", rank)
    assert ours == outcome(reference.arrivals, Plain, stream, given_entries, "me", rank)
    assert len(ours) == len(given_entries)


@given(st.integers(0, 7), damaged)
def test_a_damaged_reply_is_refused_whole_or_read_alike(stream, given_entries):
    ours = outcome(wire.arrivals, Compiled, stream, given_entries, "me", 0)
    assert ours == outcome(reference.arrivals, Plain, stream, given_entries, "me", 0)


@given(st.integers(0, 7), st.binary(max_size=9), fields, st.integers(1, 2**63 - 1), st.integers(0, 2**60))
def test_one_delivery(stream, entry, given_fields, deliveries, rank):
    args = (stream, entry, given_fields, "me", deliveries, rank)
    assert outcome(lambda: [Compiled(*args)]) == outcome(lambda: [Plain(*args)])


@pytest.mark.parametrize(
    "args", [(1, None, [], "c"), (1, b"1-1", [], None), ("1", b"1-1", [], "c"), (1, "1-1", [], "c")]
)
def test_facts_of_a_wrong_type_are_refused(args):
    with pytest.raises(TypeError):
        Compiled(*args)


@pytest.mark.parametrize("generation", [0, 1, 1 << 22, 1 << 40])
def test_fences_and_large_numbers(generation):
    ours, theirs = Compiled(1, b"1-1", [b"t", b""], "c", 3), Plain(1, b"1-1", [b"t", b""], "c", 3)
    ours.generation = theirs.generation = generation
    ours.before = theirs.before = 7
    assert ours.fence == theirs.fence
    with pytest.raises(OverflowError):
        ours.before = 1 << 70


@pytest.mark.parametrize("retries", [0, 1, 2**31 - 1, 2**31, 2**63 - 1])
def test_attempts_count_on_however_many_there_were(retries):
    delivery = Compiled(1, b"1-1", [b"t", b""], "c", 2)
    delivery.retries = delivery.before = retries
    assert delivery.attempt == retries + 1
    assert delivery.fence == retries + 2


@pytest.mark.parametrize("kind", [int, object, Plain])
def test_only_deliveries_are_made(kind):
    with pytest.raises(TypeError, match="Arrival"):
        wire.arrivals(kind, 1, [[b"1-1", [b"t", b""]]], "c", 0)


@pytest.mark.parametrize("stream", [-1, 8, 2**31 - 1, 2**40])
def test_only_of_streams_that_there_are(stream):
    with pytest.raises((ValueError, OverflowError)):
        wire.arrivals(Compiled, stream, [[b"1-1", [b"t", b""]]], "c", 0)


def test_an_untracked_class_is_the_same_class():
    assert (Compiled.__name__, Compiled.__module__) == ("Compiled", __name__)
    assert issubclass(Compiled, wire.Arrival)
    assert Compiled._decoded.__qualname__ == "Compiled._decoded"


@pytest.mark.parametrize("bases", [(object,), (wire.Arrival, Exception), (Compiled,)], ids=repr)
def test_only_a_plain_subclass_can_be_untracked(bases):
    with pytest.raises(TypeError):
        wire.untracked(type("Other", bases, {"__slots__": ()}))
    with pytest.raises(TypeError):
        wire.untracked(type("Slots", (wire.Arrival,), {"__slots__": ("more",)}))
    with pytest.raises(TypeError):
        wire.untracked(type("Open", (wire.Arrival,), {}))


def test_a_frame_is_bytes():
    delivery = Compiled(1, b"1-1", [b"t", b"frame"], "c")
    for wrong in (None, "text", 5, bytearray(b"x")):
        with pytest.raises(TypeError):
            delivery.frame = wrong
    assert delivery.frame == b"frame"


def test_a_header_is_decoded_once():
    calls = []

    class Counting(wire.Arrival):
        __slots__ = ()
        _read_fields = Compiled._read_fields

        def _decoded(self):
            calls.append(1)
            return Compiled._decoded(self)

    delivery = Counting(1, b"1-1", [b"t", b"frame"], "c")
    assert delivery.header is delivery.header
    assert calls == [1]


@given(rows)
def test_holding(given_rows):
    held, theirs = ([{} for _ in range(8)] for _ in range(2))
    deliveries = make(Compiled, given_rows)
    wire.hold(held, deliveries)
    reference.hold(theirs, deliveries)
    assert held == theirs


def test_holding_refuses_what_is_no_delivery():
    with pytest.raises(TypeError):
        wire.hold([{}], [object()])


@given(rows, st.data())
def test_sorting_a_batch(given_rows, data):
    done, other = object(), object()
    batch = [(d, data.draw(st.sampled_from((done, done, done, other)))) for d in make(Compiled, given_rows)]
    assert wire.sift(batch, done) == reference.sift(batch, done)


@pytest.mark.parametrize("pair", [(object(), 1), (None, 1), 5, (1, 2, 3)])
def test_a_batch_of_something_else_is_refused(pair):
    with pytest.raises((TypeError, ValueError)):
        wire.sift([pair], 1)


@given(rows, st.lists(st.binary(max_size=40), min_size=1, max_size=12))
def test_ids_are_packed_as_hiredis_packs_them(given_rows, words):
    deliveries = make(Compiled, given_rows)
    packed = wire.with_ids(hiredis.pack_command(tuple(words)), deliveries)
    assert packed == hiredis.pack_command((*words, *[delivery.entry for delivery in deliveries]))
    assert packed == reference.with_ids(hiredis.pack_command(tuple(words)), deliveries)


@given(st.binary(max_size=30))
def test_what_is_not_packed_is_refused_or_ends_as_the_oracle_says(command):
    def packed(function):
        try:
            return function(command, [])
        except ValueError:
            return None

    ours = packed(wire.with_ids)
    assert ours is None or ours == packed(reference.with_ids)


@pytest.mark.parametrize(
    "command",
    [b"", b"*", b"*\r\n", b"$3\r\nabc\r\n", b"*x\r\n", b"*1", b"*99999999999999999999999\r\n$"]
    + [b"*9999999999999999999\r\n", b"*9223372036854775807\r\n"],
)
def test_no_command(command):
    with pytest.raises(ValueError, match="packed"):
        wire.with_ids(command, [])


def test_many_ids():
    deliveries = make(Compiled, [(1, b"1700000000000-%d" % n, "c", 1, n) for n in range(20_000)])
    head = hiredis.pack_command(("EVALSHA", "x"))
    assert wire.with_ids(head, deliveries) == reference.with_ids(head, deliveries)


def test_deliveries_are_no_matter_for_the_garbage_collector_and_keep_nothing():
    class Held:
        pass

    held = Held()
    alive = weakref.ref(held)
    delivery = Compiled(1, b"1-1", [b"t", b"frame"], "c")
    assert not gc.is_tracked(delivery)
    delivery._header = held
    del held, delivery
    assert alive() is None


def test_counts_of_references_stay():
    rows_given = [[b"1-%d" % n, [b"t", b"frame %d" % n]] for n in range(100)]
    consumer = "consumer of its own"
    batch_done = object()
    watched = (consumer, batch_done, rows_given[5][0], rows_given[5][1][1], Compiled)
    before = [sys.getrefcount(each) for each in watched]
    for _ in range(50):
        found = wire.arrivals(Compiled, 2, rows_given, consumer, 0)
        wire.hold([{}, {}, {}], found)
        wire.sift([(delivery, batch_done) for delivery in found], batch_done)
        wire.with_ids(b"*1\r\n$1\r\na\r\n", found)
    del found
    assert [sys.getrefcount(each) for each in watched] == before
