"""Which of several workers gets the next task (section "Load Balancer" of the specification).

Owns the rotation, the weights and what was reported about workers; refuses to know how a worker is reached and whether it
has a free slot: the caller offers only workers that may be chosen now.

A worker is any hashable value, or an object with a ``worker_id``; two workers with one id are one worker. ``select_worker``
returns the very object that was offered.

The specification says O(1) for all strategies. That holds for the random ones. A rotation that stays fair while the offered
workers change has to look at each of them: it is O(n) in n workers, in compiled code (``orchestra._ext.wrr``).

Concurrency: thread-safe. Rotations change in one call of compiled code, which is atomic with a GIL or without; everything
else that changes does so under one lock per strategy, and what a selection reads without it are immutable snapshots.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import inspect
import math
import random
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

from orchestra._ext.wrr import MAX_WEIGHT, SmoothRing
from orchestra.errors import ConfigurationError
from orchestra.tasks import check_name, require_int, require_number

__all__ = [
    "BaseLoadBalancerStrategy",
    "ConsistentHashStrategy",
    "LeastLoadedStrategy",
    "RandomStrategy",
    "RoundRobinStrategy",
    "WeightedRoundRobinStrategy",
    "create_load_balancer",
    "register_strategy",
]

StrategyFactory: TypeAlias = Callable[..., "BaseLoadBalancerStrategy"]

_MAX_LOAD = 1e12
_STALE = 1024  # ids that a rotation may know beyond those it was offered last, before it forgets them
_WORD = 2**64 - 1


class BaseLoadBalancerStrategy(abc.ABC):
    """What the dispatcher asks. A strategy of your own needs :meth:`select_worker` only; it must be thread-safe."""

    @abc.abstractmethod
    def select_worker(self, available_workers: list[Any], task_info: dict[str, Any] | None = None) -> Any | None:
        """One of ``available_workers``, or None if there is none that may be chosen.

        ``task_info``: the task dict, for strategies that look at it.
        """

    def update_worker_status(self, worker_id: Any, status: dict[str, Any]) -> None:
        """Take note of what is known about a worker; a strategy ignores the keys that it has no use for."""

    def task_done(self, worker_id: Any) -> None:
        """Take note that a task given to a worker has ended, for strategies that count."""

    def remove_worker(self, worker_id: Any) -> None:
        """Forget a worker that will not be offered again."""


class _HealthAware(BaseLoadBalancerStrategy):
    """Leaves out workers reported as unhealthy or without capacity, and leaves the choice to ``_choose``.

    Status keys: ``healthy`` (bool; False leaves the worker out until True comes), ``capacity`` (whole number from 0 to
    10_000; 0 leaves it out until more comes).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unhealthy: frozenset[Hashable] = frozenset()  # replaced, never changed: read without the lock
        self._full: frozenset[Hashable] = frozenset()

    @abc.abstractmethod
    def _choose(self, ids: list[Any], task_info: dict[str, Any] | None) -> int:
        """The index of the choice in ``ids``, which is not empty."""

    def select_worker(self, available_workers: list[Any], task_info: dict[str, Any] | None = None) -> Any | None:
        """The next worker by this strategy, or None if none is offered that is healthy and has capacity.

        Raises:
            TypeError: a worker is neither hashable nor has a hashable ``worker_id``.
        """
        workers = list(available_workers)
        ids = [worker if type(worker) is str else _id_of(worker) for worker in workers]
        if self._unhealthy or self._full:
            out = self._unhealthy | self._full
            keep = [index for index, identity in enumerate(ids) if identity not in out]
            workers = [workers[index] for index in keep]
            ids = [ids[index] for index in keep]
        if not ids:
            return None
        return workers[self._choose(ids, task_info)]

    def update_worker_status(self, worker_id: Any, status: dict[str, Any]) -> None:
        """Take note of ``healthy`` and ``capacity``, and of the keys that the strategy adds.

        Raises:
            ConfigurationError: a value is of the wrong type or out of range; then nothing of ``status`` is taken.
        """
        if not isinstance(status, Mapping):
            raise ConfigurationError(
                f"worker status must be a dict, got {type(status).__name__}", field="status", value=status
            )
        self._validate(status)
        with self._lock:
            self._note(_id_of(worker_id), status)

    def remove_worker(self, worker_id: Any) -> None:
        """Forget everything about a worker."""
        with self._lock:
            self._drop(_id_of(worker_id))

    def _validate(self, status: Mapping[str, Any]) -> None:
        healthy = status.get("healthy", True)
        if not isinstance(healthy, bool):
            raise ConfigurationError(
                f"worker status healthy must be True or False, got {healthy!r}", field="healthy", value=healthy
            )
        if "capacity" in status:
            require_int("capacity", status["capacity"], 0, MAX_WEIGHT, unit="tasks")

    def _note(self, identity: Hashable, status: Mapping[str, Any]) -> None:
        """Store a validated status; the lock is held."""
        if "healthy" in status:
            self._unhealthy = _with(self._unhealthy, identity, member=not status["healthy"])
        if "capacity" in status:
            self._full = _with(self._full, identity, member=status["capacity"] == 0)

    def _drop(self, identity: Hashable) -> None:
        """Forget; the lock is held."""
        self._unhealthy = _with(self._unhealthy, identity, member=False)
        self._full = _with(self._full, identity, member=False)


class _Rotation(_HealthAware):
    """A :class:`SmoothRing` in which workers take their place when they are first offered, with weight 1."""

    def __init__(self) -> None:
        super().__init__()
        self._ring = SmoothRing(default_weight=1)
        self._kept: set[Hashable] = set()  # ids with a weight of their own; under the lock

    def _choose(self, ids: list[Any], task_info: dict[str, Any] | None) -> int:
        if len(self._ring) > 2 * len(ids) + _STALE:
            self._forget_others(ids)
        return self._ring.select_index(ids)

    def _forget_others(self, ids: list[Any]) -> None:
        """Workers that come and go for years must not fill the ring; those that come back start afresh."""
        with self._lock:
            for identity in set(self._ring.ids()) - set(ids) - self._kept:
                self._ring.remove(identity)

    def _drop(self, identity: Hashable) -> None:
        super()._drop(identity)
        self._kept.discard(identity)
        self._ring.remove(identity)


class RoundRobinStrategy(_Rotation):
    """Each worker in turn. O(n).

    With the same workers offered each time: a circular sequence in the order in which they were first offered. When the
    offer changes, turns stay even among those offered together, and nobody who is offered again and again is passed over.
    """


class WeightedRoundRobinStrategy(_Rotation):
    """Workers in proportion to their weights, spread evenly (nginx's smooth weighted round robin). O(n).

    After a change of the offer or of a weight, the next ``sum(weights)`` selections give each offered worker exactly its
    weight of them; and so do, from then on, any so many in a row, until the next change. A worker without a weight has
    weight 1.

    Status keys besides ``healthy``: ``weight`` (whole number from 1 to 10_000); ``capacity``, if there is no ``weight``
    beside it, is the weight too, and 0 leaves the worker out.
    """

    def set_worker_weight(self, worker_id: Any, weight: int) -> None:
        """Let a worker have ``weight`` times the tasks of a worker of weight 1, from the next selection on. O(n).

        Changing weights brings no burst: every worker stays owed the turns it was owed, up to one.

        Raises:
            ConfigurationError: ``weight`` is not a whole number from 1 to 10_000, or 65_536 workers have one already.
        """
        self.update_worker_status(worker_id, {"weight": weight})

    def get_worker_weight(self, worker_id: Any) -> int:
        """The weight of a worker, 1 unless another was set. O(1)."""
        return self._ring.weight(_id_of(worker_id)) or 1

    def _validate(self, status: Mapping[str, Any]) -> None:
        super()._validate(status)
        if "weight" in status:
            require_int("weight", status["weight"], 1, MAX_WEIGHT)

    def _note(self, identity: Hashable, status: Mapping[str, Any]) -> None:
        weight = status.get("weight", status.get("capacity", 0))
        if weight:
            try:
                self._ring.set_weight(identity, weight)
            except ValueError as error:
                raise ConfigurationError(f"weight: {error}", field="weight", value=weight) from error
            self._kept.add(identity)
        super()._note(identity, status)


class RandomStrategy(_HealthAware):
    """Any worker, each as likely as the others. O(1) besides reading the offer.

    ``seed``: an int, str or bytes makes the sequence repeatable; None takes one from the operating system.
    """

    def __init__(self, seed: int | str | bytes | None = None) -> None:
        super().__init__()
        self._random = random.Random(seed).random  # noqa: S311 - nobody gains by foreseeing a choice

    def _choose(self, ids: list[Any], task_info: dict[str, Any] | None) -> int:
        return int(self._random() * len(ids))


class _Counting(_HealthAware):
    """Knows the load of each worker: what it reported, and the tasks given to it since, less those that have ended.

    Status keys besides ``healthy``: ``load`` (a number of 0 or more, in tasks; replaces what was counted), ``capacity``
    (tasks at a time; loads are compared as shares of it).
    """

    def __init__(self) -> None:
        super().__init__()
        self._loads: dict[Hashable, float] = {}
        self._capacities: dict[Hashable, int] = {}

    def get_worker_load(self, worker_id: Any) -> float:
        """Tasks that the worker is believed to have. O(1)."""
        return self._loads.get(_id_of(worker_id), 0.0)

    def task_done(self, worker_id: Any) -> None:
        """Count one task less for a worker, not below 0. O(1)."""
        identity = _id_of(worker_id)
        with self._lock:
            self._set_load(identity, self._loads.get(identity, 0.0) - 1)

    def _choose(self, ids: list[Any], task_info: dict[str, Any] | None) -> int:
        with self._lock:
            if len(self._loads) > 2 * len(ids) + _STALE:
                self._forget_others(ids)
            index = self._pick(ids, task_info)
            self._loads[ids[index]] = self._loads.get(ids[index], 0.0) + 1
        return index

    def _forget_others(self, ids: list[Any]) -> None:
        """Workers that were given tasks and went without a word must not fill the memory."""
        offered = set(ids)
        for identity in [identity for identity in self._loads if identity not in offered]:
            del self._loads[identity]
            self._capacities.pop(identity, None)

    @abc.abstractmethod
    def _pick(self, ids: list[Any], task_info: dict[str, Any] | None) -> int:
        """The index of the choice; the lock is held."""

    def _share(self, identity: Hashable) -> float:
        return self._loads.get(identity, 0.0) / self._capacities.get(identity, 1)

    def _set_load(self, identity: Hashable, load: float) -> None:
        if load > 0:
            self._loads[identity] = load
        else:
            self._loads.pop(identity, None)  # an idle worker costs no memory

    def _validate(self, status: Mapping[str, Any]) -> None:
        super()._validate(status)
        if "load" in status:
            require_number("load", status["load"], 0.0, _MAX_LOAD, unit="tasks")

    def _note(self, identity: Hashable, status: Mapping[str, Any]) -> None:
        super()._note(identity, status)
        if "load" in status:
            self._set_load(identity, float(status["load"]))
        if status.get("capacity"):
            self._capacities[identity] = status["capacity"]

    def _drop(self, identity: Hashable) -> None:
        super()._drop(identity)
        self._loads.pop(identity, None)
        self._capacities.pop(identity, None)


class LeastLoadedStrategy(_Counting):
    """The less loaded of two workers drawn at random. O(1) besides reading the offer.

    Two choices are nearly as good as looking at all, and do not send every task of a moment to the one worker whose last
    report was the lowest (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).

    ``seed``: as for :class:`RandomStrategy`.
    """

    def __init__(self, seed: int | str | bytes | None = None) -> None:
        super().__init__()
        self._random = random.Random(seed).random  # noqa: S311 - nobody gains by foreseeing a choice

    def _pick(self, ids: list[Any], task_info: dict[str, Any] | None) -> int:
        count = len(ids)
        one = int(self._random() * count)
        if count == 1:
            return one
        other = int(self._random() * (count - 1))
        other += other >= one
        return other if self._share(ids[other]) < self._share(ids[one]) else one


class ConsistentHashStrategy(_Counting):
    """Tasks with one key go to one worker, as long as that worker is not overloaded. O(n log n).

    Rendezvous hashing (Thaler and Ravishankar, 1996): when a worker goes, only its keys move. A worker takes at most ``bound``
    times its share of the load of the offered workers (by capacity), then the next in the key's order (Mirrokni, Thorup and Zadimoghaddam,
    "Consistent Hashing with Bounded Loads", 2016); this needs :meth:`task_done` or reports of ``load``.

    ``key``: the name of a field that is looked for in the task, then in its ``metadata``, then in its ``input``; or a
    path with dots from the task on (``"input.user.id"``); or a function of the task dict. A task without a key goes to
    the least loaded worker. The order depends on ``str(key)`` and ``repr(worker id)`` alone, so processes agree if these
    do. ``bound``: above 1, at most 100.

    Raises:
        ConfigurationError: ``key`` is neither text nor callable, or ``bound`` is out of range.
    """

    def __init__(self, key: str | Callable[[dict[str, Any]], Any] = "affinity_key", *, bound: float = 1.25) -> None:
        super().__init__()
        require_number("ConsistentHashStrategy.bound", bound, 1.0, 100.0, exclusive=True)
        if not callable(key) and not (isinstance(key, str) and all(key.split("."))):
            raise ConfigurationError(
                f"ConsistentHashStrategy.key must be a field's name, a path with dots or a function, got {key!r}",
                field="ConsistentHashStrategy.key",
                value=key,
            )
        self._key = functools.partial(_field, key.split(".")) if isinstance(key, str) else key
        self._bound = bound

    def _pick(self, ids: list[Any], task_info: dict[str, Any] | None) -> int:
        key = self._key(task_info) if task_info else None
        if key is None:
            return min(range(len(ids)), key=lambda index: self._share(ids[index]))
        seed = _digest(str(key))
        ranked = sorted(range(len(ids)), key=lambda index: _mix(seed ^ _digest(repr(ids[index]))), reverse=True)
        loads = [self._loads.get(identity, 0.0) for identity in ids]
        capacities = [self._capacities.get(identity, 1) for identity in ids]
        mean = self._bound * (sum(loads) + 1) / sum(capacities)
        return next((index for index in ranked if loads[index] < math.ceil(mean * capacities[index])), ranked[0])


_strategies: dict[str, StrategyFactory] = {
    "round_robin": RoundRobinStrategy,
    "random": RandomStrategy,
    "weighted_round_robin": WeightedRoundRobinStrategy,
    "least_loaded": LeastLoadedStrategy,
    "consistent_hash": ConsistentHashStrategy,
}


def register_strategy(name: str, factory: StrategyFactory, *, replace: bool = False) -> None:
    """Make ``create_load_balancer(name, options=…)`` call ``factory(**options)``, in this process.

    Raises:
        ConfigurationError: the name is malformed, or taken and ``replace`` is False; or ``factory`` is not callable.
    """
    check_name("strategy name", name)
    if not callable(factory):
        raise ConfigurationError(f"strategy {name!r}: the factory must be callable, got {factory!r}", field="factory")
    if name in _strategies and not replace:
        raise ConfigurationError(
            f"strategy {name!r} is registered already; say replace=True to replace it", field="name", value=name
        )
    _strategies[name] = factory


def create_load_balancer(
    strategy_name: str = "round_robin", *, options: Mapping[str, Any] | None = None
) -> BaseLoadBalancerStrategy:
    """A new load balancer: round_robin, random, weighted_round_robin, least_loaded, consistent_hash or a registered one.

    ``options``: arguments of the strategy: ``seed`` of random and least_loaded, ``key`` and ``bound`` of consistent_hash.

    Raises:
        ConfigurationError: no strategy has this name, an option is unknown or wrong, or its factory did not make a strategy.
    """
    factory = _strategies.get(strategy_name) if isinstance(strategy_name, str) else None
    if factory is None:
        raise ConfigurationError(
            f"unknown load balancer strategy {strategy_name!r}; known are {', '.join(sorted(_strategies))}",
            field="strategy_name",
            value=strategy_name,
        )
    if options:
        _check_options(strategy_name, factory, options)
    strategy = factory(**(options or {}))
    if not isinstance(strategy, BaseLoadBalancerStrategy):
        raise ConfigurationError(
            f"the factory of strategy {strategy_name!r} must make a BaseLoadBalancerStrategy, got {strategy!r}",
            field="strategy_name",
            value=strategy_name,
        )
    return strategy


def _id_of(worker: Any) -> Hashable:
    identity: Hashable = getattr(worker, "worker_id", worker)
    return identity


def _with(members: frozenset[Hashable], identity: Hashable, *, member: bool) -> frozenset[Hashable]:
    if (identity in members) == member:
        return members
    return members | {identity} if member else members - {identity}


def _check_options(name: str, factory: StrategyFactory, options: Mapping[str, Any]) -> None:
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"options must be a dict, got {options!r}", field="options", value=options)
    taken = inspect.signature(factory).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        return
    known = [each.name for each in taken if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    for option, value in options.items():
        if option not in known:
            raise ConfigurationError(
                f"strategy {name!r} has no option {option!r}; options are {', '.join(known) or 'none'}",
                field=str(option),
                value=value,
            )


def _field(path: list[str], task: dict[str, Any]) -> Any:
    if len(path) == 1:
        places = (task, task.get("metadata"), task.get("input"))
        return next((each[path[0]] for each in places if isinstance(each, Mapping) and path[0] in each), None)
    value: Any = task
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


@functools.lru_cache(maxsize=4096)  # workers and hot keys come again and again
def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _mix(word: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): xor alone would rank all keys alike."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
