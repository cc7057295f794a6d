"""``orchestra._ext.heap`` against its oracle, and at the edges where compiled code goes wrong."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from orchestra._ext.heap import TaskHeap
from tests.ext._leaks import growth, needs_resource
from tests.reference import heap as reference

INT64 = st.integers(-(2**63), 2**63 - 1)


class Differential(RuleBasedStateMachine):
    """The same operations on both heaps; every object is new, so order within a priority shows."""

    def __init__(self):
        super().__init__()
        self.ours, self.theirs = TaskHeap(), reference.TaskHeap()

    @rule(priority=st.one_of(st.integers(0, 3), INT64))
    def push(self, priority):
        obj = object()
        self.ours.push(priority, obj)
        self.theirs.push(priority, obj)

    @rule(priorities=st.lists(st.integers(0, 3), max_size=300))
    def push_many(self, priorities):
        for priority in priorities:
            self.push(priority)

    @rule(priority=st.integers(0, 3), data=st.data())
    def insert(self, priority, data):
        """An entry of a sequence that is not in the heap any more: its order is defined."""
        taken = {sequence for _, sequence, _ in self.theirs.entries()}
        free = sorted(set(range(self.theirs.arrivals)) - taken)
        if free:
            obj, sequence = object(), data.draw(st.sampled_from(free))
            self.ours.insert(priority, sequence, obj)
            self.theirs.insert(priority, sequence, obj)

    @rule()
    def pop(self):
        if len(self.theirs):
            assert self.ours.pop() is self.theirs.pop()

    @rule()
    def pop_item(self):
        if len(self.theirs):
            assert self.ours.pop_item() == self.theirs.pop_item()

    @rule(count=st.integers(0, 400))
    def pop_many(self, count):
        assert self.ours.pop_many(count) == self.theirs.pop_many(count)

    @rule()
    def clear(self):
        assert self.ours.clear() == self.theirs.clear()

    @invariant()
    def same(self):
        assert (len(self.ours), self.ours.arrivals) == (len(self.theirs), self.theirs.arrivals)
        assert {id(obj): at for *at, obj in self.ours.entries()} == {id(obj): at for *at, obj in self.theirs.entries()}
        if len(self.theirs):
            assert self.ours.peek() is self.theirs.peek()


Differential.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestDifferential = Differential.TestCase


@given(st.lists(INT64))
def test_drains_as_a_stable_sort(priorities):
    heap = TaskHeap()
    for index, priority in enumerate(priorities):
        heap.push(priority, index)
    assert heap.pop_many(len(priorities) + 1) == sorted(range(len(priorities)), key=priorities.__getitem__)


def test_empty_heap_refuses():
    heap = TaskHeap()
    for method in (heap.pop, heap.pop_item, heap.peek):
        with pytest.raises(IndexError, match="empty TaskHeap"):
            method()
    assert heap.pop_many(3) == []
    with pytest.raises(ValueError, match="0 or more, got -1"):
        heap.pop_many(-1)


@pytest.mark.parametrize(
    ("bad", "error"), [(1.5, TypeError), ("1", TypeError), (None, TypeError), (2**63, OverflowError)]
)
def test_push_refuses_what_is_no_priority(bad, error):
    heap = TaskHeap()
    with pytest.raises(error):
        heap.push(bad, "object")
    assert len(heap) == 0


@pytest.mark.parametrize(
    ("priority", "sequence", "error"),
    [(1.5, 0, TypeError), (2**63, 0, OverflowError), (1, 1, ValueError), (1, -1, OverflowError), (1, "0", TypeError)],
)
def test_insert_refuses_what_is_no_place(priority, sequence, error):
    heap = TaskHeap()
    heap.push(0, "first")
    with pytest.raises(error):
        heap.insert(priority, sequence, "object")
    assert heap.entries() == [(0, 0, "first")]


def test_none_is_an_object_like_any_other():
    heap = TaskHeap()
    heap.push(0, None)
    assert len(heap) == 1
    assert heap.pop() is None
    assert len(heap) == 0


def test_references_balance():
    heap, probe = TaskHeap(), object()
    before = sys.getrefcount(probe)
    for _ in range(500):
        heap.push(1, probe)
    assert sys.getrefcount(probe) == before + 500
    heap.peek()
    heap.pop()
    heap.pop_item()
    heap.pop_many(98)
    assert sys.getrefcount(probe) == before + 400
    heap.clear()
    assert sys.getrefcount(probe) == before
    heap.push(1, probe)
    del heap
    assert sys.getrefcount(probe) == before


def test_memory_of_a_burst_is_given_back():
    heap = TaskHeap()
    empty = sys.getsizeof(heap)
    for index in range(10_000):
        heap.push(index % 4, index)
    assert sys.getsizeof(heap) >= empty + 10_000 * 24
    heap.pop_many(10_000)
    assert sys.getsizeof(heap) == empty + 64 * 24
    assert len(*gc.get_referents(heap)) == 64


def test_cycle_through_the_heap_is_collected():
    class Node:
        pass

    node, heap = Node(), TaskHeap()
    node.heap = heap
    heap.push(0, node)
    gone = weakref.ref(node)
    del node, heap
    gc.collect()
    assert gone() is None


def test_del_that_reenters_during_clear_finds_a_whole_heap():
    heap, seen = TaskHeap(), []

    class Reenters:
        def __del__(self):
            seen.append(len(heap))
            heap.push(5, "from __del__")

    for _ in range(3):
        heap.push(0, Reenters())
    assert heap.clear() == 3
    assert seen == [0, 1, 2]
    assert heap.pop_many(9) == ["from __del__"] * 3


def test_collection_that_reenters_during_growth_keeps_order():
    """An allocation inside push or pop_many may run a ``__del__`` that pushes and pops."""
    heap, popped = TaskHeap(), []

    class Reenters:
        def __init__(self):
            self.me = self

        def __del__(self):
            heap.push(9, "late")
            popped.append(heap.pop())

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for index in range(2_000):
            Reenters()
            heap.push(1, index)
        rest = heap.pop_many(5_000)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    numbers = [value for value in popped + rest if value != "late"]
    assert sorted(numbers) == list(range(2_000))
    assert [value for value in rest if value != "late"] == sorted(value for value in rest if value != "late")


def test_objects_taken_by_the_collector_are_an_error_not_a_crash():
    heap = TaskHeap()
    heap.push(0, "a")
    (objects,) = gc.get_referents(heap)
    objects.clear()
    for operation in (heap.pop, heap.peek, heap.pop_item, lambda: heap.pop_many(1), lambda: heap.push(0, "b")):
        with pytest.raises(RuntimeError, match="no longer usable"):
            operation()


def test_neither_copied_nor_pickled():
    with pytest.raises(TypeError):
        copy.copy(TaskHeap())


LEAK = """
from orchestra._ext.heap import TaskHeap

def rounds(count):
    heap = TaskHeap()
    for _ in range(count):
        for index in range(2000):
            heap.push(index & 3, bytearray(64))
        heap.pop(); heap.pop_item(); heap.pop_many(1000)
        try:
            heap.push(0.5, bytearray(64))
        except TypeError:
            pass
        heap.clear()
        TaskHeap().push(1, heap)
"""


@needs_resource
def test_no_leak_in_a_fresh_process():
    assert growth(LEAK) < 1_000  # a leaked round would be 200 each
