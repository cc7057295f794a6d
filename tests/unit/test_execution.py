"""One delivery to its verdict: the closed set of outcomes, isolation of context variables, parking at a limit."""

from __future__ import annotations

import asyncio
import contextvars
import time
from types import SimpleNamespace

import pytest

from orchestra import telemetry
from orchestra._delivery import DONE, WANTS_RESULT, Again, Bury, Complete, Delivery
from orchestra._dispatch.isolation import Rest, first_step
from orchestra._execution import BUSY_DELAY, Ended, Execution, current_task
from orchestra._pool.slots import Slot
from orchestra.agents import AgentRegistry
from orchestra.errors import CircuitOpenError, Reject, RetryLater, Throttled
from orchestra.load_balancer import BaseLoadBalancerStrategy, RoundRobinStrategy
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.serialization import encode_task
from orchestra.tasks import Outcome, Retry, TaskPriority
from orchestra.testing import SimulatedCrash

STEADY = Retry(max_retries=2, base=1.0, factor=2.0, jitter=False)
mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="clean")


def delivery(*, retries=0, flags=0, **fields) -> Delivery:
    """A delivery of a task of type ``work`` that has consumed ``retries``."""
    frame = encode_task({"id": "t1", "type": "work", **fields}, flags=flags).frame
    entry = (b"t", frame) if not retries else (b"t", frame, b"n", b"%d" % retries)
    return Delivery(fields.get("priority", 2), b"1-1", entry, "consumer")


@pytest.fixture
def agents():
    registry = AgentRegistry()
    yield registry
    registry.close()


class Runner:
    """Runs deliveries in a real worker, so that interruptions come as they do."""

    def __init__(self, pool: QueueWorkerPool, execution: Execution) -> None:
        self.pool, self.execution = pool, execution
        self._waiting: list[tuple[Delivery, asyncio.Future[Ended]]] = []
        pool.attach(self)

    def start_nowait(self, slot: Slot, until: float):
        if not self._waiting:
            return None
        slot.source, slot.item = self, self._waiting.pop(0)
        return self._run(*slot.item, slot)

    async def _run(self, given: Delivery, future: asyncio.Future[Ended], slot: Slot) -> None:
        try:
            ended = self.execution.start_nowait(given, slot)
            future.set_result(ended if isinstance(ended, Ended) else await ended)
        except BaseException as error:
            future.set_exception(error if not isinstance(error, asyncio.CancelledError) else RuntimeError("cancelled"))
            raise

    def start(self, given: Delivery) -> asyncio.Future[Ended]:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((given, future))
        self.pool.wake()
        return future

    async def run(self, given: Delivery) -> Ended:
        async with asyncio.timeout(5):
            return await self.start(given)

    @property
    def slot(self) -> Slot:
        (slot,) = [slot for slot in self.pool.slots if slot.item is not None]
        return slot


@pytest.fixture
async def make_runner(agents):
    made = []

    def make(limiter=None, balancer=None, retry=STEADY) -> Runner:
        limits = OrchestrationWorkerPoolConfig(workers=1, max_concurrent_tasks=1)
        made.append(QueueWorkerPool("unit", limits))
        chosen = balancer or RoundRobinStrategy()
        return Runner(made[-1], Execution("queue", agents, retry, lambda _agent: chosen, limiter))

    yield make
    for pool in made:
        await pool.shutdown(wait=False)


@pytest.fixture
async def runner(make_runner):
    return make_runner()


class FakeLimiter:
    """Refuses for ``waits`` seconds, one after the other; admits when there are none left."""

    def __init__(self, *waits: float, interval: float = 0.5) -> None:
        self.waits, self.interval = list(waits), interval
        self.asked: list[tuple[int, int]] = []

    async def try_acquire(self, priority=0, cost=1):
        self.asked.append((priority, cost))
        wait = self.waits.pop(0) if self.waits else 0.0
        return SimpleNamespace(allowed=not wait, retry_after=wait)


# -- the closed set


def raiser(error):
    async def agent(_task):
        raise error

    return agent


async def test_completed(agents, runner):
    seen = []

    async def agent(task):
        seen.append(task)

    agents.register("work", agent)
    given = delivery(input={"n": 1}, priority=TaskPriority.HIGH, metadata={"k": "v"}, colour="red", retries=1)
    ended = await runner.run(given)
    assert ended.outcome is Outcome.COMPLETED
    assert ended.verdict is DONE
    (task,) = seen
    assert (task.id, task.type, task.input, task.priority, task.attempt) == ("t1", "work", {"n": 1}, 1, 2)
    assert (task.metadata, task.extra, task.fence) == ({"k": "v"}, {"colour": "red"}, 1)


@pytest.mark.parametrize(("flags", "value"), [(0, None), (WANTS_RESULT, "answer")])
async def test_a_value_travels_only_to_who_wants_it(agents, runner, flags, value):
    async def agent(_task):
        return "answer"

    agents.register("work", agent)
    assert await runner.run(delivery(flags=flags)) == Ended(Outcome.COMPLETED, Complete(value))


@pytest.mark.parametrize(
    ("error", "outcome", "verdict"),
    [
        (ValueError("x"), Outcome.FAILED, Again(1.0, "retried")),
        (TimeoutError("inner"), Outcome.FAILED, Again(1.0, "retried")),
        (CircuitOpenError("open", retry_after=9.0), Outcome.THROTTLED, Again(9.0, "throttled")),
        (CircuitOpenError("open"), Outcome.THROTTLED, Again(BUSY_DELAY, "throttled")),
        (asyncio.CancelledError(), Outcome.FAILED, Again(1.0, "retried")),
        (SystemExit(2), Outcome.FAILED, Again(1.0, "retried")),
        (GeneratorExit(), Outcome.FAILED, Again(1.0, "retried")),
        (RetryLater(7.5), Outcome.FAILED, Again(7.5, "retried")),
        (RetryLater(-1.0), Outcome.FAILED, Again(0.001, "retried")),
        (Throttled(4.0, "key"), Outcome.THROTTLED, Again(4.0, "throttled")),
        (Throttled(-4.0), Outcome.THROTTLED, Again(0.001, "throttled")),
        (SimulatedCrash("no Exception"), Outcome.FAILED, Again(1.0, "retried")),
        (BaseExceptionGroup("many", [SimulatedCrash("x")]), Outcome.FAILED, Again(1.0, "retried")),
        (ExceptionGroup("many", [ValueError("x")]), Outcome.FAILED, Again(1.0, "retried")),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_whatever_an_agent_raises_is_an_outcome(agents, runner, error, outcome, verdict):
    agents.register("work", raiser(error))
    assert await runner.run(delivery()) == Ended(outcome, verdict)
    (replica,) = agents.get("work").replicas
    assert replica.running == 0
    assert runner.pool.get_active_workers() == 1, "the worker lives on"


async def test_an_agent_that_waits_and_raises_generator_exit_has_failed(agents, runner):
    async def agent(_task):
        await asyncio.sleep(0.001)
        raise GeneratorExit

    agents.register("work", agent)
    assert await runner.run(delivery()) == Ended(Outcome.FAILED, Again(1.0, "retried"))
    assert runner.pool.get_active_workers() == 1, "the worker lives on"


@pytest.mark.parametrize("whole", [True, False])
async def test_a_run_that_is_closed_has_no_outcome(agents, whole):
    """As the garbage collector does with what a closed event loop has left behind."""
    closed = []

    async def agent(_task):
        try:
            await asyncio.Event().wait()
        except GeneratorExit:
            closed.append(True)
            raise

    agents.register("work", agent)
    execution, slot, given = Execution("queue", agents, STEADY, lambda _agent: RoundRobinStrategy()), Slot(), delivery()

    def begin():
        return execution.run(given, slot, given.task()) if whole else execution.start_nowait(given, slot)

    async def work():
        running.append(begin())
        await running[0]

    running = []
    slot.task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    slot.task.get_coro().close()
    assert closed == [True]
    assert running[0].cr_frame is None
    slot.task.cancel()
    await asyncio.wait([slot.task])


@pytest.mark.parametrize(("retries", "wait"), [(0, 1.0), (1, 2.0), (2, None)])
async def test_backoff_grows_until_retries_are_used_up(agents, runner, retries, wait):
    agents.register("work", raiser(ValueError("no luck")))
    ended = await runner.run(delivery(retries=retries))
    if wait is not None:
        assert ended.verdict == Again(wait, "retried")
    else:
        assert isinstance(ended.verdict, Bury)
        assert (ended.verdict.reason, ended.verdict.attempts) == ("failed", 3)
        assert (ended.verdict.error["error"], ended.verdict.error["error_type"]) == ("no luck", "ValueError")
        assert "raise error" in ended.verdict.error["traceback"]


@pytest.mark.parametrize(
    ("own", "agents_own", "dead"), [(None, None, False), (0, None, True), (None, 0, True), (1, 0, False)]
)
async def test_whose_max_retries_counts(agents, runner, own, agents_own, dead):
    options = {} if agents_own is None else {"retry": Retry(max_retries=agents_own)}
    agents.register("work", raiser(ValueError()), **options)
    fields = {} if own is None else {"max_retries": own}
    assert isinstance((await runner.run(delivery(**fields))).verdict, Bury) is dead


async def test_reject_is_dead_at_once_with_its_reason(agents, runner):
    agents.register("work", raiser(Reject("bad input")))
    ended = await runner.run(delivery())
    assert ended.outcome is Outcome.FAILED
    assert (ended.verdict.reason, ended.verdict.attempts) == ("rejected", 1)
    assert ended.verdict.error["error"] == "bad input"


async def test_an_error_without_a_text_is_described_by_its_name_and_a_long_one_cut(agents, runner):
    agents.register("work", raiser(KeyError()), retry=Retry(max_retries=0))
    assert (await runner.run(delivery())).verdict.error["error"] == "KeyError"
    agents.register("work", raiser(ValueError("x" * 100_000)), retry=Retry(max_retries=0))
    error = (await runner.run(delivery())).verdict.error
    assert len(error["error"]) == 2000
    assert len(error["traceback"]) < 20_000


async def test_an_unknown_type_is_buried_with_what_is_known(agents, runner):
    agents.register("other", raiser(ValueError()))
    ended = await runner.run(delivery(retries=1))
    assert ended.outcome is Outcome.FAILED
    assert (ended.verdict.reason, ended.verdict.attempts) == ("unknown_agent", 1)
    assert "registered are: other" in ended.verdict.error["error"]


async def test_a_missed_deadline_is_not_started(agents, runner):
    agents.register("work", raiser(AssertionError("started")))
    ended = await runner.run(delivery(deadline=time.time() - 1))
    assert ended.outcome is Outcome.CANCELLED
    assert (ended.verdict.reason, ended.verdict.attempts) == ("deadline_missed", 0)


@pytest.mark.parametrize(
    ("fields", "reason", "kind"),
    [
        ((b"t", b"garbage"), "corrupt", "CorruptEntryError"),
        ((b"t", b""), "corrupt", "CorruptEntryError"),
        ((b"t", b"garbage", b"n", b"many"), "corrupt", "CorruptEntryError"),
        ((b"x", b"y"), "foreign", "ForeignEntry"),
        ((), "foreign", "ForeignEntry"),
    ],
)
async def test_a_corrupt_entry_is_buried_with_what_is_wrong(runner, fields, reason, kind):
    ended = await runner.run(Delivery(2, b"1-1", fields, "consumer"))
    assert ended.outcome is Outcome.FAILED
    assert (ended.verdict.reason, ended.verdict.error["error_type"]) == (reason, kind)


# -- interruptions


@pytest.mark.parametrize(
    ("why", "outcome", "verdict"),
    [
        (Outcome.TIMED_OUT, Outcome.TIMED_OUT, Again(1.0, "retried")),
        (Outcome.RELEASED, Outcome.RELEASED, Again(0.0, "released")),
    ],
)
async def test_an_interrupted_attempt_ends_as_the_interruption_says(agents, runner, why, outcome, verdict):
    async def agent(_task):
        await asyncio.Event().wait()

    agents.register("work", agent, timeout=30.0)
    running = runner.start(delivery())
    await asyncio.sleep(0.001)
    slot = runner.slot
    assert 29.0 < slot.deadline - time.monotonic() < 31.0
    slot.interrupt(why)
    assert await running == Ended(outcome, verdict)
    await asyncio.sleep(0)
    assert (slot.task.cancelling(), slot.deadline, slot.why) == (0, None, None)


async def test_a_timeout_without_retries_left_is_dead_and_says_how_long(agents, runner):
    async def agent(_task):
        await asyncio.Event().wait()

    agents.register("work", agent, timeout=30.0, retry=Retry(max_retries=0))
    running = runner.start(delivery(timeout=2.5))
    await asyncio.sleep(0.001)
    assert runner.slot.deadline - time.monotonic() < 3.0, "the task's own timeout counts"
    runner.slot.interrupt(Outcome.TIMED_OUT)
    ended = await running
    assert ended.outcome is Outcome.TIMED_OUT
    assert ended.verdict.reason == "timed_out"
    assert ended.verdict.error["error"] == "the attempt took longer than its timeout of 2.5 s"


@pytest.mark.parametrize("stubborn", ["returns", "raises"])
async def test_an_interrupted_agent_that_answers_otherwise_leaves_its_worker_clean(agents, runner, stubborn):
    async def agent(_task):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if stubborn == "raises":
                raise ValueError("in the cleanup") from None
            return "done all the same"

    agents.register("work", agent, timeout=30.0)
    running = runner.start(delivery())
    await asyncio.sleep(0.001)
    slot = runner.slot
    slot.interrupt(Outcome.TIMED_OUT)
    ended = await running
    assert ended.outcome is (Outcome.COMPLETED if stubborn == "returns" else Outcome.TIMED_OUT)
    await asyncio.sleep(0)
    assert slot.task.cancelling() == 0

    async def failing_group(_task):
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            group.create_task(raiser(ValueError("inside"))(None))

    agents.register("work", failing_group, retry=Retry(max_retries=0))
    assert (await runner.run(delivery())).verdict.error["error_type"] == "ValueError"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("in the clean-up"), Ended(Outcome.RELEASED, Again(0.0, "released"))),
        (Throttled(3.0), Ended(Outcome.THROTTLED, Again(3.0, "throttled"))),
    ],
    ids=["a failed clean-up", "a word of the agent"],
)
async def test_a_released_task_is_not_charged_for_what_its_clean_up_raises(agents, runner, raised, expected):
    """A drain cancels agents; one whose clean-up fails must neither lose a retry nor its task to the dead letters."""

    async def agent(_task):
        try:
            await asyncio.Event().wait()
        finally:
            raise raised

    agents.register("work", agent, retry=Retry(max_retries=0))
    running = runner.start(delivery())
    await asyncio.sleep(0.001)
    runner.slot.interrupt(Outcome.RELEASED)
    assert await running == expected


async def test_the_cancellation_of_the_worker_itself_is_not_swallowed(agents, runner):
    async def agent(_task):
        await asyncio.Event().wait()

    agents.register("work", agent)
    running = runner.start(delivery())
    await asyncio.sleep(0.001)
    worker = runner.slot.task
    worker.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        await running
    await asyncio.wait([worker])
    assert worker.cancelled()
    assert agents.get("work").replicas[0].running == 0


# -- context variables


async def test_what_an_agent_sets_nobody_else_sees(agents, runner):
    seen = []

    async def agent(task):
        seen.append(mark.get())
        mark.set("set")
        if task.id == "suspends":
            await asyncio.sleep(0)
            seen.append(mark.get())

    agents.register("work", agent)
    for name in ("at-once", "suspends", "at-once", "suspends"):
        await runner.run(delivery(id=name))
    assert seen == ["clean", "clean", "set", "clean", "clean", "set"]
    assert mark.get() == "clean"


async def test_every_step_of_a_suspended_agent_runs_in_its_own_context(agents, make_runner):
    """Two agents in turns on two workers: each finds its own value after every suspension, also in its children."""
    runners, seen = [make_runner(), make_runner()], []

    async def child():
        return mark.get()

    async def agent(task):
        mark.set(task.id)
        for _ in range(5):
            await asyncio.sleep(0)
            async with asyncio.TaskGroup() as group:
                inner = group.create_task(child())
            seen.append((task.id, mark.get(), inner.result(), current_task.get().id))

    agents.register("work", agent)
    await asyncio.gather(*[one.run(delivery(id=name)) for one, name in zip(runners, "ab", strict=True)])
    assert len(seen) == 10
    assert all(len(set(row)) == 1 for row in seen), seen


async def test_exceptions_thrown_in_are_handled_in_the_agents_context(agents, runner):
    seen = []

    async def agent(task):
        mark.set("mine")
        broken = asyncio.get_running_loop().create_future()
        broken.get_loop().call_soon(broken.set_exception, ValueError("thrown"))
        try:
            await broken
        except ValueError:
            seen.append(("caught", mark.get()))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(("cancelled", mark.get()))
            raise
        finally:
            mark.set("cleanup")
            await asyncio.sleep(0)
            seen.append(("cleanup", mark.get(), current_task.get().id))

    agents.register("work", agent)
    running = runner.start(delivery())
    async with asyncio.timeout(5):
        while not seen:
            await asyncio.sleep(0)
    runner.slot.interrupt(Outcome.RELEASED)
    assert (await running).outcome is Outcome.RELEASED
    assert seen == [("caught", "mine"), ("cancelled", "mine"), ("cleanup", "cleanup", "t1")]
    assert mark.get() == "clean"


async def test_the_task_is_known_inside_its_agent_only(agents, runner):
    seen = []

    async def agent(task):
        seen.append(current_task.get() is task)

    agents.register("work", agent)
    await runner.run(delivery())
    assert seen == [True]
    with pytest.raises(LookupError):
        current_task.get()


async def test_an_agent_that_is_dropped_half_way_is_closed_in_good_order():
    """The coroutine of an agent is closed with the one that awaits it, so that its ``finally`` runs."""
    closed = []

    async def agent(_task):
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    waiting = Rest(*first_step(agent, SimpleNamespace(id="t1"), current_task)).__await__()
    waiting.send(None)
    waiting.close()
    assert closed == [True]


# -- permits


async def test_a_refusal_is_throttled_and_no_attempt(agents, make_runner):
    limiter = FakeLimiter(3.0)
    agents.register("work", raiser(AssertionError("started")))
    ended = await make_runner(limiter).run(delivery())
    assert ended.outcome is Outcome.THROTTLED
    assert ended.verdict.counter == "throttled"
    assert ended.verdict.delay == pytest.approx(3.0, abs=0.05)


async def test_both_limiters_are_asked_with_urgency_and_cost(agents, make_runner):
    ours, theirs = FakeLimiter(), FakeLimiter()

    async def agent(_task):
        pass

    agents.register("work", agent, limiter=theirs, cost=5)
    runner = make_runner(ours)
    for priority in TaskPriority:
        assert (await runner.run(delivery(priority=priority))).outcome is Outcome.COMPLETED
    assert ours.asked == [(3, 1), (2, 1), (1, 1), (0, 1)], "most urgent is the limiter's largest number"
    assert theirs.asked == [(3, 5), (2, 5), (1, 5), (0, 5)]


async def test_parked_tasks_fan_out_at_the_limiters_rate(agents, make_runner):
    """Twenty refusals of one moment must not all come back at one moment."""
    limiter = FakeLimiter(*[1.0] * 20, interval=0.5)
    agents.register("work", raiser(AssertionError("started")))
    runner = make_runner(limiter)
    delays = [(await runner.run(delivery(id=f"t{n}"))).verdict.delay for n in range(20)]
    assert delays[0] == pytest.approx(1.0, abs=0.1)
    steps = [later - sooner for sooner, later in zip(delays, delays[1:], strict=False)]
    assert steps == pytest.approx([0.5] * 19, abs=0.1)


async def test_parking_counts_the_cost_and_each_limiter_for_itself(agents, make_runner):
    ours, theirs = FakeLimiter(0.0, 0.0, 1.0, interval=0.5), FakeLimiter(2.0, 2.0, interval=0.5)
    agents.register("work", raiser(AssertionError("started")), limiter=theirs, cost=4)
    runner = make_runner(ours)
    delays = [(await runner.run(delivery(id=f"t{n}"))).verdict.delay for n in range(3)]
    assert delays == pytest.approx([2.0, 4.0, 6.0], abs=0.1)
    assert (len(ours.asked), len(theirs.asked)) == (1, 1), "those behind a parked key do not ask"
    agents.register("free", raiser(AssertionError("started")))
    ended = await runner.run(delivery(id="other", type="free"))
    assert ended.outcome is Outcome.FAILED, "the other limit is not parked"


async def test_a_limiter_that_breaks_is_a_failure_of_the_attempt(agents, make_runner):
    class Broken(FakeLimiter):
        async def try_acquire(self, priority=0, cost=1):
            raise ConnectionError("redis is gone")

    agents.register("work", raiser(AssertionError("started")))
    ended = await make_runner(Broken()).run(delivery())
    assert ended == Ended(Outcome.FAILED, Again(1.0, "retried"))


# -- replicas


async def test_full_replicas_delay_a_task_without_charging_it(agents, runner):
    replica = agents.register("work", raiser(AssertionError("started")), max_concurrency=1)
    other = agents.register("work", raiser(AssertionError("started")), worker_id="b", max_concurrency=1)
    replica.running = other.running = 1
    assert await runner.run(delivery()) == Ended(Outcome.THROTTLED, Again(BUSY_DELAY, "throttled"))
    assert (replica.running, other.running) == (1, 1)


class Says(BaseLoadBalancerStrategy):
    """Chooses what it was told to; remembers what it was offered."""

    def __init__(self, answer) -> None:
        self.answer, self.offered = answer, []

    def select_worker(self, available_workers, task_info=None):
        self.offered.append(([worker.worker_id for worker in available_workers], task_info))
        return self.answer(available_workers)


@pytest.fixture
def three_replicas(agents):
    """Replicas a, b and c, the last of them full; the list is of those that ran."""
    ran = []
    for name in "abc":

        async def agent(_task, name=name):
            ran.append(name)

        replica = agents.register("work", agent, worker_id=name, max_concurrency=1)
    replica.running = 1
    return ran


async def test_the_balancer_chooses_among_those_with_room(three_replicas, make_runner):
    balancer = Says(lambda free: free[1])
    ended = await make_runner(balancer=balancer).run(delivery(input=[1], priority=0))
    assert (ended.outcome, three_replicas) == (Outcome.COMPLETED, ["b"])
    assert balancer.offered == [(["a", "b"], {"id": "t1", "type": "work", "priority": 0, "input": [1], "metadata": {}})]


async def test_a_balancer_that_wants_none_of_them_delays_the_task(three_replicas, make_runner):
    ended = await make_runner(balancer=Says(lambda free: None)).run(delivery())
    assert ended == Ended(Outcome.THROTTLED, Again(BUSY_DELAY, "throttled"))
    assert three_replicas == []


async def test_started_is_told_before_the_agent_runs(agents, runner):
    told = []

    async def agent(_task):
        told.append("ran")

    agents.register("work", agent)
    detach = telemetry.attach(lambda name, measurements, metadata: told.append(dict(metadata)), "task.started")
    try:
        await runner.run(delivery(retries=1))
    finally:
        detach()
    facts = {"queue": "queue", "task_id": "t1", "type": "work", "attempt": 2, "worker_id": "work"}
    assert told == [facts, "ran"]
