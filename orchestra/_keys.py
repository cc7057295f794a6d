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
        self.fronts = tuple(f"{tag}f:{lane}" for lane in range(LANES))
        """Streams, one before each lane: a task that was there before and comes back, waiting or in flight."""
        self.streams = (*self.lanes, *self.fronts)
        """Number ``n`` is a lane, ``n + 4`` what stands before it."""
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
        self.cancelled_steps = f"{tag}cs"
        """Hash: id of a task that was cancelled and carried a step of a workflow → its frame, until that has been told."""
        self.breakers = f"{tag}b"
        """Sorted set: process that tells of its circuit breakers → milliseconds of the Redis clock when it last did."""

    def breakers_of(self, origin: str) -> str:
        """String: what a process tells of its circuit breakers, JSON; expires soon after the process is gone."""
        return f"{self.tag}b:{origin}"

    def result(self, task_id: str) -> str:
        """String: the terminal record of a task whose sender wants it."""
        return f"{self.tag}r:{task_id}"

    def replies(self, client: str) -> str:
        """Pub/sub channel: terminal records; several in one message behind the byte C1, each with its length (4 bytes) before it."""
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


def limit_refusals(scope: str = "all") -> str:
    """Hash: name of a rate limit → how many it refused lately, for display; forgotten a minute after the last one."""
    return f"{PREFIX}{{lim.{check_name('limit scope', scope)}}}:refused"


def breaker(name: str) -> str:
    """Hash: the state of a circuit breaker that processes share, with the permits of its probes.

    All of them share a slot, so that one command can look at all.
    """
    return f"{PREFIX}{{brk}}:s:{name}"


def breaker_resets(queue: str) -> str:
    """Hash: breaker of this queue's processes that is to be reset → milliseconds of the Redis clock when that was asked."""
    return f"{PREFIX}{{brk}}:r:{check_name('queue name', queue)}"


def lock(name: str) -> tuple[str, str]:
    """String holding the owner's token, and the counter its fences are drawn from."""
    tag = f"{PREFIX}{{lock.{check_name('lock name', name)}}}:"
    return f"{tag}l", f"{tag}f"


def memory(namespace: str, name: str, scope: str = "") -> tuple[str, str]:
    """Hash with the value that a :class:`~orchestra.memory.MemoryManager` keeps under ``name``, and list of its log.

    ``scope`` is made by :func:`memory_scope`. A namespace has no slash, so no scope meets a plain name.
    """
    space = check_name("namespace", namespace) + (f"/{scope}/" if scope else ":")
    tag = f"{PREFIX}{{mem:{space}{check_ident('memory key', name)}}}:"
    return f"{tag}v", f"{tag}l"


def memory_scope(outer: str, part: str) -> str:
    """The scope ``part`` within the scope ``outer``: each part behind its length, so that two never give the same."""
    return f"{outer}{len(check_ident('memory scope', part))}:{part}"


def memory_names(namespace: str, scope: str = "") -> str:
    """Sorted set: name of a value or log of this scope → microseconds of the Redis clock when it was last written."""
    return f"{PREFIX}{{mem:{check_name('namespace', namespace)}{f'/{scope}' if scope else ''}}}:names"


class WorkflowKeys:
    """The keys of the workflows of one namespace; all share one slot, so that a script can reach several workflows."""

    def __init__(self, namespace: str) -> None:
        tag = f"{PREFIX}{{wf:{check_name('namespace', namespace)}}}:"
        self.tag = tag
        self.outbox = f"{tag}o"
        """Sorted set: step that may be sent and was not begun → when the sweep may send it, ms of the Redis clock."""
        self.ended = f"{tag}x"
        """Stream: workflows that ended, for those who wait for them; trimmed to about the last 10,000."""
        self.index = f"{tag}i"
        """Sorted set: workflow → when it was made, milliseconds of the Redis clock."""
        self.expiry = f"{tag}t"
        """Sorted set: workflow that ended → when it is forgotten, milliseconds of the Redis clock."""

    def state(self, task_id: str) -> str:
        """Hash: the durable state of one workflow."""
        return f"{self.tag}s:{check_ident('task id', task_id)}"

    def context(self, task_id: str) -> str:
        """Hash: what the steps of one workflow share (``c:``), and the signals that came for it (``g:``)."""
        return f"{self.tag}c:{check_ident('task id', task_id)}"

    def events(self, task_id: str) -> str:
        """Stream: what happened to one workflow, trimmed to about the last 100,000."""
        return f"{self.tag}e:{check_ident('task id', task_id)}"

    def scripted(self, task_id: str) -> tuple[str, ...]:
        """The keys of one workflow in the order in which the scripts have them."""
        check_ident("task id", task_id)
        tag = self.tag
        own = (f"{tag}s:{task_id}", f"{tag}c:{task_id}", f"{tag}e:{task_id}")
        return (*own, self.outbox, self.ended, self.index, self.expiry)
