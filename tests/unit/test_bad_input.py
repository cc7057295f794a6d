"""Bad input to the control plane is refused before Redis is touched, in words that say what would be good.

One table over limits, balancers, breakers, scheduler, pool, manager and the options of agents: each number is tried with
zero, negative, fractional, NaN, infinite, overflowing and mistyped values, each choice with unknown and mistyped ones.
The Redis that they are given is a socket that counts who comes: nobody may.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import select
import socket
from dataclasses import dataclass

import pytest

from orchestra import App
from orchestra._breakers.exchange import BreakerExchange
from orchestra._pool.scaling import ScalingPolicy
from orchestra._scheduling import ranks
from orchestra.agents import AgentRegistry, LimitUse
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.errors import ConfigurationError
from orchestra.flow_control import (
    BackpressureConfig,
    RateLimitConfig,
    RedisRateLimiter,
    acquire_all,
    get_flow_controller,
    reset_limit,
    set_limit,
    try_acquire_all,
)
from orchestra.load_balancer import (
    ConsistentHashStrategy,
    LeastLoadedStrategy,
    RoundRobinStrategy,
    WeightedRoundRobinStrategy,
    create_load_balancer,
    register_strategy,
)
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.scheduler import PriorityScheduler
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Retry, RetryBudget, TaskPriority
from orchestra.worker_manager import WorkerManager

NAN, INF = math.nan, math.inf
DAY, MONTH, YEAR = 86_400, 30 * 86_400, 366 * 86_400


class Place:
    """Where everything would go that is not refused."""

    def __init__(self) -> None:
        self.door = socket.create_server(("127.0.0.1", 0))
        self.manager = ConnectionManager(f"redis://127.0.0.1:{self.door.getsockname()[1]}", connect_timeout=0.5)
        self.app = App("bad-input", f"redis://127.0.0.1:{self.door.getsockname()[1]}")

    @property
    def knocked(self) -> bool:
        return bool(select.select([self.door], [], [], 0)[0])

    def limiter(self, burst: int = 5, **settings) -> RedisRateLimiter:
        config = BackpressureConfig(rate_limit=RateLimitConfig(rate=10.0, burst=burst), **settings)
        return RedisRateLimiter("l", config, manager=self.manager)

    def dispatcher(self, **settings) -> Dispatcher:
        return Dispatcher(RedisStreamTaskQueue("q", "g", manager=self.manager), agents=AgentRegistry(), **settings)

    async def close(self) -> None:
        await self.app.close()
        await self.manager.close()
        self.door.close()


@pytest.fixture
async def place():
    place = Place()
    yield place
    assert not place.knocked, "Redis was touched"
    await place.close()


async def told(make, place) -> ConfigurationError:
    """The error of ``make(place)``, which may be a coroutine function."""
    with pytest.raises(ConfigurationError) as caught:
        made = make(place)
        if inspect.isawaitable(made):
            async with asyncio.timeout(20):
                await made
    assert isinstance(caught.value, ValueError)
    return caught.value


async def nothing() -> None:
    """An agent of an App, and a job."""


# -- numbers


@dataclass(frozen=True)
class Number:
    """A number somewhere: from ``low`` (or above it, when ``above``) to ``high``; ``unit`` is part of the message."""

    field: str
    make: object
    low: float
    high: float
    unit: str
    whole: bool = False
    above: bool = False
    infinite: bool = False
    """Whether infinity is allowed."""

    def bad(self) -> list:
        wrong = [NAN, -INF, True, "1", [], 10**400, -(10**400)]
        wrong.append(self.high + 1 if self.whole else self.high * 1.001)
        if not self.infinite:
            wrong.append(INF)
        wrong += [self.low] if self.above else [self.low - 1]
        return [*wrong, 1.5, 1e300] if self.whole else wrong


def whole(field, make, low, high, unit) -> Number:
    return Number(field, make, low, high, unit, whole=True)


def above(field, make, low, high, unit) -> Number:
    return Number(field, make, low, high, unit, above=True)


def of(make, name, **others):
    """``make(name=value, …)`` whatever the place."""
    return lambda value, _place: make(**{**others, name: value})


def rate(name):
    good = {"rate": 10.0, "burst": 5, "period": 1.0}
    return lambda value, _place: RateLimitConfig(**{**good, name: value})


def set_(name):
    good = {"rate": 10.0, "burst": 5, "period": 1.0}
    return lambda value, place: set_limit("l", manager=place.manager, **{**good, name: value})


def status(strategy, name):
    return lambda value, _place: strategy().update_worker_status("w", {name: value})


def manager(name, **others):
    def make(value, _place):
        return WorkerManager(QueueWorkerPool("p"), **{**others, name: value})

    return make


def agent(name):
    return lambda value, _place: AgentRegistry().register("t", nothing, **{name: value})


def submit_timeout(value, _place):
    return QueueWorkerPool("p").submit(nothing, timeout=value)


LIMITS = [
    above("RateLimitConfig.rate", rate("rate"), 0, 1e15, "permits per period"),
    whole("RateLimitConfig.burst", rate("burst"), 1, 10**9, "permits"),
    above("RateLimitConfig.period", rate("period"), 0, YEAR, "seconds"),
    above("RateLimitConfig.rate", set_("rate"), 0, 1e15, "permits per period"),
    whole("RateLimitConfig.burst", set_("burst"), 1, 10**9, "permits"),
    above("RateLimitConfig.period", set_("period"), 0, YEAR, "seconds"),
    Number("BackpressureConfig.max_wait", of(BackpressureConfig, "max_wait"), 0, DAY, "seconds"),
    Number("BackpressureConfig.priority_reserve", of(BackpressureConfig, "priority_reserve"), 0, 0.9, "burst"),
    whole("BackpressureConfig.lease", of(BackpressureConfig, "lease"), 0, 1000, "permits"),
    Number("BackpressureConfig.lease_ttl", of(BackpressureConfig, "lease_ttl"), 0.001, 10, "seconds"),
    whole("cost", lambda value, place: place.limiter().acquire(cost=value), 1, 5, "permits"),
    whole("cost", lambda value, place: place.limiter().try_acquire(cost=value), 1, 5, "permits"),
    whole("cost", lambda value, place: place.limiter().execute(nothing, cost=value), 1, 5, "permits"),
    whole("cost", lambda value, place: try_acquire_all([(place.limiter(), None, value)]), 1, 5, "permits"),
    Number("wait", lambda v, place: place.limiter().acquire(wait=v), 0, DAY, "seconds", infinite=True),
    Number(
        "wait", lambda v, place: acquire_all([(place.limiter(), None, 1)], wait=v), 0, DAY, "seconds", infinite=True
    ),
]
BALANCERS = [
    whole("weight", lambda v, _: WeightedRoundRobinStrategy().set_worker_weight("w", v), 1, 10_000, ""),
    whole("weight", status(WeightedRoundRobinStrategy, "weight"), 1, 10_000, ""),
    whole("capacity", status(RoundRobinStrategy, "capacity"), 0, 10_000, "tasks"),
    Number("load", status(LeastLoadedStrategy, "load"), 0, 1e12, "tasks"),
    above("ConsistentHashStrategy.bound", of(ConsistentHashStrategy, "bound"), 1, 100, ""),
    above(
        "ConsistentHashStrategy.bound",
        lambda v, _: create_load_balancer("consistent_hash", options={"bound": v}),
        1,
        100,
        "",
    ),
]


def breaker(field, low, high, unit, kind=whole) -> Number:
    return kind(f"CircuitBreakerConfig.{field}", of(CircuitBreakerConfig, field), low, high, unit)


BREAKERS = [
    breaker("failure_threshold", 1, 10_000, "failures"),
    breaker("half_open_max_calls", 1, 1000, "calls"),
    breaker("success_threshold", 1, 1000, "calls"),
    breaker("minimum_calls", 1, 1_000_000, "calls"),
    breaker("recovery_timeout", 0, DAY, "seconds", above),
    breaker("rate_window", 0.01, DAY, "seconds", Number),
    breaker("window", 0, DAY, "seconds", above),
    breaker("slow_call", 0, DAY, "seconds", above),
    breaker("failure_rate", 0, 1, "share", above),
    breaker("slow_rate", 0, 1, "share", above),
    Number(
        "BreakerExchange.interval", lambda v, place: BreakerExchange(place.manager, interval=v), 0.05, 60, "seconds"
    ),
]
SCHEDULER = [
    whole("PriorityScheduler.max_size", of(PriorityScheduler, "max_size"), 0, 1 << 40, "tasks"),
    above("PriorityScheduler.max_wait", of(PriorityScheduler, "max_wait"), 0, YEAR, "seconds"),
    Number("get_next_task(timeout)", lambda v, _: PriorityScheduler().get_next_task(v), 0, YEAR, "seconds"),
    whole(
        "get_tasks_by_priority(count)",
        lambda v, _: PriorityScheduler().get_tasks_by_priority(v),
        0,
        1 << 40,
        "tasks",
    ),
    Number("aging", lambda v, _: ranks(v, 0.0), 0, DAY, "seconds"),
    Number("aging", lambda v, place: place.dispatcher(aging=v), 0, DAY, "seconds"),
]


def pool(field, low, high, unit, kind=whole) -> Number:
    name = f"OrchestrationWorkerPoolConfig.{field}"
    return kind(name, of(OrchestrationWorkerPoolConfig, field), low, high, unit)


POOL = [
    pool("workers", 1, 100_000, "workers"),
    pool("max_queue_size", 0, 1 << 31, "jobs"),
    pool("max_concurrent_tasks", 1, 100_000, "tasks"),
    pool("shutdown_timeout", 0, DAY, "seconds", Number),
    whole(
        "OrchestrationWorkerPoolConfig.per_type['k']",
        lambda v, _: OrchestrationWorkerPoolConfig(per_type={"k": v}),
        1,
        100_000,
        "jobs",
    ),
    whole("concurrency", lambda v, _: QueueWorkerPool("p").resize(v), 1, 100_000, "tasks"),
    Number("submit(timeout)", submit_timeout, 0, YEAR, "seconds"),
]
MANAGER = [
    above("monitor_interval", manager("monitor_interval"), 0, DAY, "seconds"),
    above("scale_check_interval", manager("scale_check_interval"), 0, DAY, "seconds"),
    whole("history_size", manager("history_size"), 1, 100_000, "recommendations"),
    whole("min_workers", manager("min_workers", max_workers=1_000_000), 0, 1_000_000, "workers"),
    whole("max_workers", manager("max_workers", min_workers=0), 1, 1_000_000, "workers"),
    above("target_utilisation", manager("target_utilisation"), 0, 1, "workers"),
    above("target_wait", manager("target_wait"), 0, DAY, "seconds"),
    above("scale_up_at", manager("scale_up_at", scale_down_at=0.0), 0, 1, "workers"),
    Number("scale_down_at", manager("scale_down_at", scale_up_at=1.0), 0, 1, "workers"),
    above("max_step", manager("max_step"), 1, 100, "times"),
    Number("cooldown_up", manager("cooldown_up"), 0, DAY, "seconds"),
    Number("cooldown_down", manager("cooldown_down"), 0, DAY, "seconds"),
]
AGENTS = [
    whole("weight", agent("weight"), 1, 10_000, ""),
    whole("max_concurrency", agent("max_concurrency"), 1, 100_000, "tasks"),
    whole("agent type_concurrency", agent("type_concurrency"), 1, 100_000, "tasks"),
    whole("agent cost", agent("cost"), 1, 10**9, "permits"),
    above("agent timeout", agent("timeout"), 0, MONTH, "seconds"),
    whole("LimitUse.cost", lambda v, place: LimitUse(place.limiter(), None, v), 1, 10**9, "permits"),
    whole("max_concurrent_dispatch", lambda v, p: p.dispatcher(max_concurrent_dispatch=v), 1, 100_000, "tasks"),
    whole("default_max_retries", lambda v, p: p.dispatcher(default_max_retries=v), 0, 1000, "retries"),
    whole("batch_size", lambda v, p: p.dispatcher(batch_size=v), 1, 10_000, "deliveries"),
    whole("block_timeout_ms", lambda v, p: p.dispatcher(block_timeout_ms=v), 1, 600_000, "ms"),
    Number("drain_timeout", lambda v, p: p.dispatcher(drain_timeout=v), 0, DAY, "seconds"),
    whole("Retry.max_retries", of(Retry, "max_retries"), 0, 1000, "retries"),
    above("Retry.base", of(Retry, "base"), 0, DAY, "seconds"),
    Number("Retry.factor", of(Retry, "factor"), 1, 100, ""),
    above("Retry.max_delay", of(Retry, "max_delay"), 0, MONTH, "seconds"),
    Number("RetryBudget.ratio", of(RetryBudget, "ratio"), 0, 10, ""),
    above("RetryBudget.floor", of(RetryBudget, "floor"), 0, 1_000_000, "retries a second"),
    Number("RetryBudget.max_delay", of(RetryBudget, "max_delay"), 0, DAY, "seconds"),
]
NUMBERS = [*LIMITS, *BALANCERS, *BREAKERS, *SCHEDULER, *POOL, *MANAGER, *AGENTS]


def shown(value: float, row: Number) -> set[str]:
    """How a message may write a bound."""
    return {f"{value:g}", str(value), f"{value:,}"} | ({str(int(value))} if row.whole else set())


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.field)
async def test_a_bad_number_is_named_with_its_unit_and_range(row, place):
    for value in row.bad():
        error = await told(lambda place, value=value: row.make(value, place), place)
        text = str(error)
        assert error.field == row.field, (value, text)
        for word in (row.field, row.unit, repr(value)):
            assert word in text, (value, word, text)
        for bound in (row.low, row.high):
            assert any(word in text for word in shown(bound, row)), (value, bound, text)


# -- what is no number, or a combination of good ones


def bad_rates(rate, burst, period):
    return lambda _place: RateLimitConfig(rate=rate, burst=burst, period=period)


def options(**given):
    return lambda _place: AgentRegistry().register("t", nothing, **given)


def breaker_of(**given):
    return lambda _place: CircuitBreakerConfig(**given)


def pressure(**given):
    return lambda _place: BackpressureConfig(**given)


OTHERS = {
    "a rate above a million a second": (bad_rates(2e6, 5, 1.0), ("RateLimitConfig.rate", "2000000.0", "1,000,000")),
    "a rate so small that it overflows": (bad_rates(5e-324, 5, 1.0), ("RateLimitConfig.rate", "5e-324", "nine years")),
    "a burst that refills in 30 years": (bad_rates(1, 10**9, 1.0), ("RateLimitConfig.rate", "1000000000", "nine")),
    "set_limit above a million a second": (
        lambda p: set_limit("l", rate=2e6, burst=1, manager=p.manager),
        ("RateLimitConfig.rate", "1,000,000"),
    ),
    "no limiter name": (lambda p: RedisRateLimiter("", manager=p.manager), ("limiter name", "1 to 128", "''")),
    "a limiter name with a space": (lambda p: RedisRateLimiter("a b", manager=p.manager), ("limiter name", "'a b'")),
    "a limiter name that is no text": (lambda p: RedisRateLimiter(7, manager=p.manager), ("limiter name", "7")),
    "a shared limiter's name": (lambda _: get_flow_controller("a b"), ("limiter name", "'a b'")),
    "set_limit by a bad name": (
        lambda p: set_limit("a b", rate=1.0, burst=1, manager=p.manager),
        ("limiter name", "'a b'"),
    ),
    "reset_limit by a bad name": (lambda p: reset_limit("", manager=p.manager), ("limiter name", "''")),
    "a bad scope": (lambda p: RedisRateLimiter("l", manager=p.manager, scope="a b"), ("limit scope", "'a b'")),
    "a config of another class": (
        lambda p: RedisRateLimiter("l", RateLimitConfig(rate=1.0, burst=1), manager=p.manager),
        ("config", "BackpressureConfig"),
    ),
    "a rate limit that is a number": (pressure(rate_limit=10), ("BackpressureConfig.rate_limit", "10")),
    "an unknown backpressure strategy": (pressure(strategy="shed"), ("BackpressureConfig.strategy", "'shed'")),
    "fail_open that is no bool": (pressure(fail_open=1), ("BackpressureConfig.fail_open", "bool", "1")),
    "a lease above the burst": (
        pressure(rate_limit=RateLimitConfig(rate=1.0, burst=5), lease=6),
        ("BackpressureConfig.lease", "permits", "0 to 5", "6"),
    ),
    "a cost above the burst": (lambda p: p.limiter().acquire(cost=6), ("cost", "permits", "1 to 5", "6")),
    "a cost above what the reserve leaves": (
        lambda p: p.limiter(burst=10, priority_reserve=0.5).acquire(cost=6),
        ("cost", "permits", "1 to 5", "priority 0", "6"),
    ),
    "a priority that is no int": (lambda p: p.limiter().acquire(1.0), ("priority", "int", "1.0")),
    "a TaskPriority as urgency": (lambda p: p.limiter().acquire(TaskPriority.HIGH), ("priority", "larger")),
    "an empty key": (lambda p: p.limiter().acquire(key=""), ("key", "''")),
    "a key that is a number": (lambda p: p.limiter().acquire(key=7), ("key", "text", "7")),
    "a missing key": (
        lambda p: RedisRateLimiter("m:{tenant}", manager=p.manager).acquire(),
        ("key", "m:{tenant}", "tenant"),
    ),
    "no limits asked": (lambda _: try_acquire_all([]), ("uses", "1 to 16", "0")),
    "17 limits asked": (lambda p: try_acquire_all([(p.limiter(), None, 1)] * 17), ("uses", "1 to 16", "17")),
    "the same limit twice, above its burst": (
        lambda p: try_acquire_all([(p.limiter(), None, 3)] * 2),
        ("cost", "permits", "1 to 5", "6"),
    ),
    "something else than a limiter": (lambda _: try_acquire_all([("l", None, 1)]), ("uses", "RedisRateLimiter", "'l'")),
    "an unknown balancer": (
        lambda _: create_load_balancer("fastest"),
        ("strategy_name", "strategy 'fastest'", "round_robin", "least_loaded"),
    ),
    "a balancer that is no text": (lambda _: create_load_balancer(None), ("strategy_name", "None", "round_robin")),
    "an unknown option of a balancer": (
        lambda _: create_load_balancer("random", options={"sede": 1}),
        ("sede", "options are seed"),
    ),
    "balancer options that are no dict": (
        lambda _: create_load_balancer("random", options=[1]),
        ("options", "dict", "[1]"),
    ),
    "a strategy registered twice": (
        lambda _: register_strategy("random", RoundRobinStrategy),
        ("name", "strategy 'random'", "replace=True"),
    ),
    "a strategy with a bad name": (lambda _: register_strategy("a b", RoundRobinStrategy), ("strategy name", "'a b'")),
    "a strategy that is not callable": (lambda _: register_strategy("x", 7), ("factory", "callable", "7")),
    "a hash key that is a number": (lambda _: ConsistentHashStrategy(7), ("ConsistentHashStrategy.key", "7")),
    "a status that is no dict": (lambda _: RoundRobinStrategy().update_worker_status("w", 7), ("status", "dict")),
    "healthy that is no bool": (
        lambda _: RoundRobinStrategy().update_worker_status("w", {"healthy": "no"}),
        ("healthy", "True or False", "'no'"),
    ),
    "a breaker without a name": (lambda _: CircuitBreaker(""), ("breaker name", "1 to 128", "''")),
    "neutral that is no tuple of classes": (breaker_of(neutral=(7,)), ("CircuitBreakerConfig.neutral", "(7,)")),
    "counts that is empty": (breaker_of(counts=()), ("CircuitBreakerConfig.counts", "()")),
    "shared that is no bool": (breaker_of(shared=1), ("CircuitBreakerConfig.shared", "True or False", "1")),
    "an origin with a space": (lambda p: BreakerExchange(p.manager, origin="a b"), ("origin", "'a b'")),
    "a pool without a name": (lambda _: QueueWorkerPool(""), ("pool name", "1 to 64", "''")),
    "per_type that is no mapping": (
        lambda _: OrchestrationWorkerPoolConfig(per_type=5),
        ("OrchestrationWorkerPoolConfig.per_type", "5"),
    ),
    "a job's priority that is a text": (
        lambda _: QueueWorkerPool("p").submit(nothing, priority="high"),
        ("submit(priority)", "'high'"),
    ),
    "a job's kind that is a number": (lambda _: QueueWorkerPool("p").submit(nothing, kind=7), ("submit(kind)", "7")),
    "more workers at least than at most": (
        lambda _: ScalingPolicy(min_workers=5, max_workers=4),
        ("max_workers", "at least", "5", "4"),
    ),
    "a pool that resizes itself to nothing": (
        lambda _: WorkerManager(QueueWorkerPool("p"), autoscale=True, min_workers=0),
        ("min_workers", "workers", "1 to 100000", "got 0"),
    ),
    "a pool that resizes itself beyond what it can": (
        lambda _: WorkerManager(QueueWorkerPool("p"), autoscale=True, max_workers=100_001),
        ("max_workers", "workers", "1 to 100000", "got 100001"),
    ),
    "thresholds that cross": (
        lambda _: ScalingPolicy(scale_up_at=0.3, scale_down_at=0.4),
        ("scale_down_at", "below", "0.3", "0.4"),
    ),
    "a worker_id with a space": (options(worker_id="a b"), ("worker_id", "'a b'")),
    "an unknown executor": (options(executor="gpu"), ("executor", "'thread'", "'process'", "'gpu'")),
    "a limiter that is none": (options(limiter=7), ("limiter", "try_acquire", "7")),
    "limits that are a text": (options(limits="openai"), ("limits", "LimitUse", "'openai'")),
    "limits of something else": (options(limits=[7]), ("limits", "LimitUse", "[7]")),
    "a breaker that is no configuration": (options(breaker=5), ("breaker", "CircuitBreakerConfig", "5")),
    "failover that is no bool": (options(failover=1), ("failover", "True or False", "1")),
    "an agent's key that is empty": (options(key=""), ("agent key", "''")),
    "a limit's key that is a number": (lambda p: LimitUse(p.limiter(), 7), ("LimitUse.key", "7")),
    "a retry that is a number": (options(retry=3), ("retry", "Retry", "3")),
    "an App's agent with an unknown option": (
        lambda p: p.app.agent("t", weigth=3)(nothing),
        ("weigth", "weight"),
    ),
    "an App's limit by a key that is empty": (
        lambda p: p.app.agent("t", limit=RateLimitConfig(rate=1.0, burst=1), key="")(nothing),
        ("LimitUse.key", "text", "''"),
    ),
    "an App's agent with a weight of 0": (lambda p: p.app.agent("t", weight=0)(nothing), ("weight", "1", "10000", "0")),
}


SAID_OTHERWISE = {"strategy_name": "strategy", "name": "strategy"}
"""Fields that a message names by another word."""


@pytest.mark.parametrize("name", OTHERS)
async def test_other_bad_input_is_named(name, place):
    make, words = OTHERS[name]
    error = await told(make, place)
    assert error.field == words[0]
    for word in words if words[0] not in SAID_OTHERWISE else words[1:]:
        assert word in str(error), str(error)


WRONG_TYPES = {
    "a dispatcher of no queue": (lambda _: Dispatcher("q"), "task_queue"),
    "a manager of no pool": (lambda _: WorkerManager(7), "worker_pool"),
    "a manager with no queue": (lambda _: WorkerManager(QueueWorkerPool("p"), queue=7), "queue"),
    "executing what is no function": (lambda p: p.limiter().execute(7), "async function"),
    "scheduling what is no dict": (lambda _: PriorityScheduler().add_task([]), "dict"),
    "a task's priority as a text": (lambda _: PriorityScheduler().add_task({"priority": "high"}), "priority"),
    "a task's deadline as a text": (lambda _: PriorityScheduler().add_task({"deadline": "soon"}), "deadline"),
    "a task's deadline that never comes": (lambda _: PriorityScheduler().add_task({"deadline": INF}), "deadline"),
    "balancing what cannot be hashed": (lambda _: RoundRobinStrategy().select_worker([{}]), ""),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
async def test_a_wrong_type_is_a_type_error(name, place):
    make, word = WRONG_TYPES[name]
    with pytest.raises(TypeError) as caught:
        made = make(place)
        if inspect.isawaitable(made):
            await made
    assert word in str(caught.value)


@pytest.mark.parametrize("priority", [-1, 4, 10**30])
async def test_a_task_of_no_priority(priority):
    with pytest.raises(ValueError, match=r"priority must be from 0 \(CRITICAL\) to 3 \(LOW\)"):
        await PriorityScheduler().add_task({"priority": priority})


async def test_the_place_notices_who_comes(place):
    """The proof above is one only if good input would have been seen."""
    asking = asyncio.ensure_future(place.limiter().acquire(cost=5))
    try:
        async with asyncio.timeout(20):
            while not place.knocked:
                await asyncio.sleep(0.005)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    place.door.accept()[0].close()
