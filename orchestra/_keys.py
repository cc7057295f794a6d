"""Every Redis key of orchestra, one function or attribute each.

All keys of one queue partition share one hash tag, ``orc:{queue.p}:…``, so that every script touches one Cluster slot.
User text enters a key only after :func:`orchestra.tasks.check_name` or ``check_ident``, behind a fixed prefix: two
different names never give the same key.
"""

from __future__ import annotations

import hashlib

from orchestra.tasks import LANES, check_ident, check_name, is_ident

PREFIX = "orc:"


class QueueKeys:
    """The keys of one partition of one queue."""

    def __init__(self, queue: str, partition: int = 0) -> None:
        tag = f"{PREFIX}{{{check_name('queue name', queue)}.{partition}}}:"
        self.tag = tag
        self.lanes = tuple(f"{tag}s:{lane}" for lane in range(LANES))
        """Streams, most urgent first: a task that waits or is in flight."""
        self.delayed = f"{tag}z"
        """Sorted set: member → due time, milliseconds of the Redis clock."""
        self.bodies = f"{tag}zb"
        """Hash: member of ``delayed`` → the packed entry."""
        self.dedup = (f"{tag}d:0", f"{tag}d:1")
        """Hashes of alternating time buckets: task id → message id."""
        self.tokens = (f"{tag}k:0", f"{tag}k:1")
        """Hashes of alternating time buckets: produce token → what that call added."""
        self.dlq = f"{tag}dlq"
        """Stream of dead letters."""
        self.counters = f"{tag}n"
        """Hash: counters and the reclaim cursors."""
        self.consumers = f"{tag}w"
        """Sorted set: consumer → last sign of life, milliseconds of the Redis clock."""
        self.cancels = f"{tag}c"
        """Sorted set: id of a task to be cancelled → milliseconds of the Redis clock; it means entries that are not newer."""
        self.breakers = f"{tag}b"
        """Sorted set: process that tells of its circuit breakers → milliseconds of the Redis clock when it last did."""
        self.breaker_resets = f"{tag}br"
        """Hash: breaker that is to be reset → milliseconds of the Redis clock when that was asked for."""

    def breakers_of(self, origin: str) -> str:
        """String: what a process tells of its circuit breakers, JSON; expires soon after the process is gone."""
        return f"{self.tag}b:{origin}"

    def result(self, task_id: str) -> str:
        """String: the terminal record of a task whose sender wants it."""
        return f"{self.tag}r:{task_id}"

    def replies(self, client: str) -> str:
        """Pub/sub channel on which a waiting client is told of results."""
        return f"{self.tag}p:{client}"


def limiter(name: str, key: str | None = None, scope: str = "all") -> str:
    """String: theoretical arrival time of a rate limiter (for one ``key`` of it), microseconds of the Redis clock.

    ``name`` is an ident. ``key`` is any text: as it is where it is an ident, else by its hash; behind the length of the
    name, so that two pairs never give the same. Limits of one ``scope`` share a slot, so that one script can ask several.
    """
    tag = f"{PREFIX}{{lim.{scope}}}:"
    if key is None:
        return f"{tag}t:{name}"
    if is_ident(key):
        return f"{tag}k:{len(name)}:{name}:{key}"
    return f"{tag}h:{len(name)}:{name}:{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def limit_settings(scope: str = "all") -> str:
    """Hash: name of a rate limit → what was set for it at run time: version, T, burst (microseconds), rate, period."""
    return f"{PREFIX}{{lim.{check_name('limit scope', scope)}}}:set"


def limit_names(scope: str = "all") -> str:
    """Hash: name of a rate limit → what its limiters were made with, for display; forgotten after 30 days without use."""
    return f"{PREFIX}{{lim.{check_name('limit scope', scope)}}}:names"


def breaker(name: str) -> str:
    """Hash: the state of a circuit breaker that processes share, with the permits of its probes."""
    return f"{PREFIX}{{brk.{name}}}:s"


def lock(name: str) -> tuple[str, str]:
    """String holding the owner's token, and the counter its fences are drawn from."""
    tag = f"{PREFIX}{{lock.{check_name('lock name', name)}}}:"
    return f"{tag}l", f"{tag}f"


def memory(namespace: str, name: str) -> tuple[str, str]:
    """Hash with the value that a :class:`~orchestra.memory.MemoryManager` keeps under ``name``, and list of its log."""
    tag = f"{PREFIX}{{mem:{check_name('namespace', namespace)}:{check_ident('memory key', name)}}}:"
    return f"{tag}v", f"{tag}l"


def workflow(namespace: str, task_id: str) -> str:
    """Hash: the durable state of one workflow. The colons keep it apart from every queue, limiter and lock."""
    return f"{PREFIX}{{wf:{check_name('namespace', namespace)}:{check_ident('task id', task_id)}}}:s"
