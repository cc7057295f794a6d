"""The scheduler's order under floods, deadlines and tasks that wait on one another. Time is a manual clock."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestra import telemetry
from orchestra.errors import ConfigurationError, InvalidTaskError, InvalidTaskTypeError
from orchestra.scheduler import PriorityScheduler, TaskPriority, ranks
from orchestra.testing import ManualClock

CRITICAL, HIGH, NORMAL, LOW = TaskPriority.CRITICAL, TaskPriority.HIGH, TaskPriority.NORMAL, TaskPriority.LOW


def task(name, priority=NORMAL, **more):
    return {"id": name, "type": "t", "priority": priority, **more}


def drain(scheduler):
    return [item["id"] for item in iter(scheduler.pop_nowait, None)]


# -- max_wait


@given(
    wait_ticks=st.integers(1, 40),
    per_tick=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    level=st.sampled_from([HIGH, NORMAL, LOW]),
    ahead=st.integers(0, 15),
)
@settings(max_examples=150)
def test_no_flood_makes_a_task_wait_longer_than_max_wait(wait_ticks, per_tick, level, ahead):
    """One task is served a tick, while any number of more urgent ones arrives: more than can be served, too."""
    clock = ManualClock()
    scheduler = PriorityScheduler(max_wait=float(wait_ticks), clock=clock)
    for number in range(ahead):
        scheduler.add_nowait(task(f"ahead{number}", CRITICAL))
    scheduler.add_nowait(task("patient", level))
    bound = max(wait_ticks, 2 * ahead) + 2
    for tick in range(bound + 1):
        for number in range(per_tick[tick % len(per_tick)]):
            scheduler.add_nowait(task(f"flood{tick}.{number}", CRITICAL))
        if scheduler.pop_nowait()["id"] == "patient":
            break
        clock.advance(1.0)
    assert tick <= bound


def test_without_max_wait_priority_is_strict():
    clock = ManualClock()
    scheduler = PriorityScheduler(clock=clock)
    scheduler.add_nowait(task("low", LOW))
    clock.advance(1e6)
    scheduler.add_nowait(task("high", HIGH))
    assert drain(scheduler) == ["high", "low"]


def test_a_flood_of_overdue_tasks_takes_every_other_turn_only():
    clock = ManualClock()
    scheduler = PriorityScheduler(max_wait=1.0, clock=clock)
    for number in range(6):
        scheduler.add_nowait(task(f"l{number}", LOW))
    clock.advance(5.0)
    for number in range(3):
        scheduler.add_nowait(task(f"c{number}", CRITICAL))
    assert drain(scheduler) == ["l0", "c0", "l1", "c1", "l2", "c2", "l3", "l4", "l5"]
    assert scheduler.statistics().overdue >= 3


def test_overdue_tasks_have_their_turns_among_other_items_too():
    clock = ManualClock()
    scheduler = PriorityScheduler(max_wait=1.0, clock=clock)
    for number in range(3):
        scheduler.add_nowait(task(f"l{number}", LOW))
        scheduler.put_nowait(0, {"id": f"raw{number}"})
    clock.advance(1.0)
    assert drain(scheduler) == ["l0", "raw0", "l1", "raw1", "l2", "raw2"]


def test_peek_shows_what_is_taken_next():
    clock = ManualClock()
    scheduler = PriorityScheduler(max_wait=1.0, clock=clock)
    scheduler.add_nowait(task("low", LOW))
    scheduler.add_nowait(task("late", HIGH, deadline=clock.time() + 1.5))
    scheduler.add_nowait(task("high", HIGH))
    assert scheduler.peek_nowait()["id"] == "late"
    clock.advance(2.0)
    for name in ("low", "high"):
        assert scheduler.peek_nowait()["id"] == name
        assert scheduler.pop_nowait()["id"] == name
    assert scheduler.peek_nowait() is None
    assert scheduler.statistics().expired == 1


# -- ranks, the keys of a dispatcher


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50)), min_size=1, max_size=60),
    st.integers(1, 20),
)
@settings(max_examples=100)
def test_ranks_let_a_task_be_passed_only_by_what_comes_within_the_aging(arrivals, aging):
    scheduler, now, items = PriorityScheduler(), 0, []
    for number, (level, pause) in enumerate(arrivals):
        now += pause
        items.append((number, level, now))
        scheduler.put_nowait(ranks(float(aging), float(now))[level], items[-1])
    order = {item[0]: place for place, item in enumerate(scheduler.pop_many_nowait(len(items)))}
    for number, level, at in items:
        for other, more_urgent, later in items[number + 1 :]:
            if later - at > (level - more_urgent) * aging:
                assert order[number] < order[other]
            elif more_urgent < level and later - at < (level - more_urgent) * aging:
                assert order[other] < order[number]


def test_ranks_without_aging_are_the_levels():
    assert ranks(None, 5.0) == ranks(0, 7.0) == (0, 1, 2, 3)


@pytest.mark.parametrize("aging", [-1, float("nan"), float("inf"), 1e9, "5", True])
def test_bad_aging_is_refused(aging):
    with pytest.raises(ConfigurationError, match="aging must be a number of seconds a priority level, 0 or more"):
        ranks(aging, 0.0)


# -- deadlines


async def test_a_task_past_its_deadline_is_dropped_and_told_apart():
    clock, seen = ManualClock(), []
    scheduler = PriorityScheduler(on_expired=seen.append, clock=clock)
    scheduler.add_nowait(task("in time", HIGH, deadline=clock.time() + 10))
    scheduler.add_nowait(task("late", CRITICAL, deadline=clock.time() + 1))
    scheduler.add_nowait(task("any time", LOW))
    clock.advance(2.0)
    told = []
    detach = telemetry.attach(lambda *event: told.append(event), "scheduler.expired")
    try:
        assert (await scheduler.get_next_task())["id"] == "in time"
    finally:
        detach()
    assert [item["id"] for item in seen] == ["late"]
    assert told == [("scheduler.expired", {"late_s": 1.0}, {"task_id": "late", "type": "t"})]
    statistics = scheduler.statistics()
    assert (statistics.expired, statistics.taken, statistics.size, statistics.unfinished) == (1, 1, 1, 2)
    assert statistics.added == statistics.taken + statistics.expired + statistics.cleared + statistics.size


async def test_a_getter_that_finds_only_late_tasks_goes_on_waiting():
    clock = ManualClock()
    scheduler = PriorityScheduler(clock=clock)
    getter = asyncio.create_task(scheduler.get_next_task())
    await asyncio.sleep(0)
    scheduler.add_nowait(task("late", deadline=clock.time()))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not getter.done()
    assert await scheduler.get_next_task(timeout=0) is None
    joined = asyncio.create_task(scheduler.join())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert joined.done(), "what expired is finished"
    scheduler.add_nowait(task("good"))
    assert (await getter)["id"] == "good"


def test_an_on_expired_that_raises_is_survived(caplog):
    clock = ManualClock()

    def broken(_task):
        raise RuntimeError("no")

    scheduler = PriorityScheduler(on_expired=broken, clock=clock)
    scheduler.add_nowait(task("late", deadline=clock.time()))
    assert scheduler.pop_nowait() is None
    assert "on_expired failed for task late" in caplog.text


@pytest.mark.parametrize("deadline", ["soon", True, float("nan"), float("inf"), [1]])
def test_a_bad_deadline_is_refused(deadline):
    scheduler = PriorityScheduler()
    with pytest.raises(InvalidTaskTypeError, match="deadline must be unix seconds") as caught:
        scheduler.add_nowait(task("x", deadline=deadline))
    assert caught.value.path == "deadline"
    assert len(scheduler) == 0


# -- who waits on whom


def test_a_task_that_others_wait_on_is_as_urgent_as_they_are_while_they_wait():
    scheduler = PriorityScheduler()
    for name, level in (("n0", NORMAL), ("base", LOW), ("middle", LOW), ("n1", NORMAL), ("urgent", HIGH)):
        scheduler.add_nowait(task(name, level))
    scheduler.inherit("middle", "base")
    scheduler.inherit("urgent", "middle")
    assert scheduler.peek_nowait()["id"] == "base", "HIGH through middle, and there before it"
    scheduler.release("urgent")
    assert drain(scheduler) == ["urgent", "n0", "n1", "base", "middle"], "each fell back into its old place"


def test_a_waiter_that_was_taken_keeps_what_it_waits_for_urgent():
    scheduler = PriorityScheduler()
    scheduler.add_nowait(task("parent", CRITICAL))
    scheduler.add_nowait(task("other", HIGH))
    assert scheduler.pop_nowait()["id"] == "parent"
    scheduler.inherit("parent", "child", priority=CRITICAL)
    scheduler.inherit("child", "grandchild", priority=LOW)
    scheduler.add_nowait(task("grandchild", LOW))
    scheduler.add_nowait(task("child", LOW))
    assert [scheduler.pop_nowait()["id"] for _ in range(2)] == ["grandchild", "child"], "by arrival; both CRITICAL"
    scheduler.ended("grandchild")
    scheduler.add_nowait(task("again", LOW))
    scheduler.inherit("child", "again")
    assert scheduler.peek_nowait()["id"] == "again", "child is taken, and still as urgent as parent"
    scheduler.ended("parent")
    assert drain(scheduler) == ["other", "again"]


def test_what_inherits_becomes_more_urgent_with_the_one_it_inherits_from():
    scheduler = PriorityScheduler()
    for name, level in (("a", LOW), ("b", LOW), ("n", NORMAL)):
        scheduler.add_nowait(task(name, level))
    scheduler.inherit("b", "a")
    assert scheduler.raise_priority("b", HIGH) is True
    assert drain(scheduler) == ["a", "b", "n"]


def test_raise_priority_knows_only_what_waits_and_never_lowers():
    scheduler = PriorityScheduler()
    scheduler.add_nowait(task("x", NORMAL))
    assert scheduler.raise_priority("x", LOW) is False
    assert scheduler.raise_priority("x", NORMAL) is False
    assert scheduler.raise_priority("y", HIGH) is False
    assert scheduler.raise_priority("x", CRITICAL) is True
    assert scheduler.pop_nowait()["id"] == "x"
    assert scheduler.raise_priority("x", CRITICAL) is False
    assert len(scheduler) == 0
    for bad, error in ((4, InvalidTaskError), (-1, InvalidTaskError), ("high", InvalidTaskTypeError)):
        with pytest.raises(error, match="priority"):
            scheduler.raise_priority("x", bad)


def test_circles_are_refused():
    scheduler = PriorityScheduler()
    for name in "abc":
        scheduler.add_nowait(task(name))
    scheduler.inherit("a", "b")
    scheduler.inherit("b", "c")
    for waiter, on in (("a", "a"), ("b", "a"), ("c", "a"), ("c", "b")):
        with pytest.raises(ConfigurationError, match="would close a circle") as caught:
            scheduler.inherit(waiter, on)
        assert caught.value.field == "on"
    with pytest.raises(ConfigurationError, match=r"inherit\(priority\) must be given"):
        scheduler.inherit("unknown", "a")
    scheduler.release("a", "b")
    scheduler.inherit("c", "a")


async def test_the_graph_forgets_what_has_ended():
    scheduler = PriorityScheduler()
    for number in range(100):
        scheduler.add_nowait(task(f"a{number}"))
        scheduler.add_nowait(task(f"b{number}", LOW))
        scheduler.inherit(f"a{number}", f"b{number}")
    await scheduler.clear()
    assert len(scheduler._waits) == 0
    scheduler.inherit("x", "y", priority=HIGH)
    scheduler.ended("y")
    assert len(scheduler._waits) == 0


async def test_places_that_were_left_do_not_pile_up():
    scheduler = PriorityScheduler(max_size=3)
    scheduler.add_nowait(task("target", LOW))
    scheduler.put_nowait(2, {"id": "raw"})
    for number in range(5_000):
        scheduler.inherit(f"w{number}", "target", priority=CRITICAL)
        scheduler.release(f"w{number}")
    assert len(scheduler._heap) < 300
    assert (len(scheduler), scheduler.is_full()) == (2, False)
    assert drain(scheduler) == ["raw", "target"]
    assert scheduler.is_empty()
    assert await scheduler.get_next_task(timeout=0) is None


def test_a_waiters_priority_may_be_told_after_others_waited_for_it():
    """An id that is only waited on has no level of its own yet; when it waits itself, that must be told, and counts."""
    scheduler = PriorityScheduler()
    for name in ("first", "second"):
        scheduler.add_nowait(task(name, HIGH))
    scheduler.inherit("first", "running")
    with pytest.raises(ConfigurationError, match=r"inherit\(priority\)"):
        scheduler.inherit("running", "second")
    scheduler.inherit("running", "second", priority=CRITICAL)
    assert drain(scheduler) == ["second", "first"]


def test_tasks_that_were_there_before_the_first_inherit_keep_their_places():
    scheduler = PriorityScheduler()
    items = [task(f"t{number}", number % 4) for number in range(20)] + [{"type": "t"}, {"id": 7, "type": "t"}]
    for item in items:
        scheduler.add_nowait(item)
    scheduler.put_nowait(-3, "before all")
    scheduler.raise_priority("t19", CRITICAL)
    expected = sorted(items, key=lambda item: 0 if item.get("id") == "t19" else item.get("priority", 2))
    assert scheduler.pop_many_nowait(50) == ["before all", *expected]


class Order(RuleBasedStateMachine):
    """Against a list that is searched: next is the least (urgency, arrival), urgency as the definition says."""

    def __init__(self):
        super().__init__()
        self.scheduler = PriorityScheduler()
        self.own: dict[str, int] = {}  # of every task there ever was
        self.held: list[str] = []
        self.edges: set[tuple[str, str]] = set()

    def urgency(self, name):
        return min([self.own[name], *(self.urgency(waiter) for waiter, on in self.edges if on == name)])

    def reaches(self, start, goal):
        return start == goal or any(self.reaches(on, goal) for waiter, on in self.edges if waiter == start)

    @rule(level=st.integers(0, 3))
    def add(self, level):
        name = f"t{len(self.own)}"
        self.own[name] = level
        self.held.append(name)
        self.scheduler.add_nowait(task(name, level))

    @precondition(lambda self: self.own)
    @rule(data=st.data(), level=st.integers(0, 3))
    def raise_one(self, data, level):
        name = data.draw(st.sampled_from(sorted(self.own)))
        self.scheduler.raise_priority(name, level)
        if name in self.held:
            self.own[name] = min(self.own[name], level)

    @precondition(lambda self: len(self.own) > 1)
    @rule(data=st.data())
    def wait(self, data):
        waiter, on = data.draw(st.tuples(*[st.sampled_from(sorted(self.own))] * 2))
        if self.reaches(on, waiter):
            with pytest.raises(ConfigurationError):
                self.scheduler.inherit(waiter, on, self.own[waiter])
        else:
            self.scheduler.inherit(waiter, on, self.own[waiter])
            self.edges.add((waiter, on))

    @precondition(lambda self: self.edges)
    @rule(data=st.data(), all_of_it=st.booleans())
    def release(self, data, all_of_it):
        waiter, on = data.draw(st.sampled_from(sorted(self.edges)))
        self.scheduler.release(waiter, None if all_of_it else on)
        self.edges -= {edge for edge in self.edges if edge[0] == waiter} if all_of_it else {(waiter, on)}

    @precondition(lambda self: self.own)
    @rule(data=st.data())
    def end(self, data):
        name = data.draw(st.sampled_from(sorted(self.own)))
        self.scheduler.ended(name)
        self.edges = {edge for edge in self.edges if name not in edge}

    @precondition(lambda self: self.held)
    @rule()
    def take(self):
        first = min(self.held, key=lambda name: (self.urgency(name), self.held.index(name)))
        assert self.scheduler.peek_nowait()["id"] == first
        assert self.scheduler.pop_nowait()["id"] == first
        self.held.remove(first)

    @invariant()
    def same_size(self):
        assert len(self.scheduler) == len(self.held)


Order.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestOrder = Order.TestCase


@pytest.mark.parametrize("max_wait", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_bad_max_wait_is_refused(max_wait):
    with pytest.raises(ConfigurationError, match="PriorityScheduler.max_wait must be a number of seconds") as caught:
        PriorityScheduler(max_wait=max_wait)
    assert repr(max_wait) in str(caught.value)
