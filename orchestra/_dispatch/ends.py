"""How a dispatcher begins and ends around Redis: reach it first, claim a scheduler, let go without waiting for ever.

Owns which schedulers of this process are in use. Refuses to own the dispatcher's loops and tasks. One event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from typing import TYPE_CHECKING

from orchestra._backoff import Reconnect
from orchestra._breakers.exchange import BreakerExchange
from orchestra.agents import AgentRegistry
from orchestra.errors import ConfigurationError, StoreError, StoreUnavailableError
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.scheduler import PriorityScheduler
from orchestra.task_queue import BaseTaskQueue, RedisStreamTaskQueue

if TYPE_CHECKING:
    from collections.abc import Awaitable

logger = logging.getLogger("orchestra.dispatcher")

REACH_PATIENCE = 1.0
"""Seconds that starting keeps trying to reach Redis."""
READ_GRACE = 2.0
"""Seconds that a read under way gets to end when draining; what a cancelled one brings waits for its lease."""
GOODBYE = 2.0
"""Seconds that ending the lease thread, and forgetting the consumer, may take each."""
_claimed: weakref.WeakSet[PriorityScheduler] = weakref.WeakSet()
"""The schedulers of running dispatchers."""


async def reach(queue: BaseTaskQueue, consumer: str) -> None:
    """Reach Redis before anything is started, so that a wrong address is an error here; a blip is not."""
    backoff, deadline = Reconnect(), time.monotonic() + REACH_PATIENCE
    while True:
        try:
            await queue.maintain(consumer, 0)
        except StoreUnavailableError:
            wait = backoff.next()
            if time.monotonic() + wait > deadline:
                raise
            await asyncio.sleep(wait)
        else:
            return


def claim(scheduler: PriorityScheduler, who: str) -> None:
    """Use ``scheduler`` for the dispatcher called ``who``, until :func:`disclaim`.

    Raises:
        ConfigurationError: another running dispatcher uses it.
    """
    if scheduler in _claimed:
        raise ConfigurationError(
            f"dispatcher {who!r} needs a scheduler of its own: the one given holds what another running "
            "dispatcher has read, and each can settle only its own",
            field="scheduler",
            value=scheduler,
        )
    _claimed.add(scheduler)


def disclaim(scheduler: PriorityScheduler) -> None:
    """It may be used by another dispatcher again."""
    _claimed.discard(scheduler)


async def within(seconds: float, doing: Awaitable[object], who: str, otherwise: str) -> None:
    """Do what belongs to stopping, but neither fail nor wait for Redis for longer than ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            await doing
    except (StoreError, TimeoutError) as error:
        logger.warning("%s stops: %s (%s)", who, otherwise, str(error) or "too slow")


def pool_of(concurrency: int) -> QueueWorkerPool:
    """A dispatcher's own pool."""
    config = OrchestrationWorkerPoolConfig(workers=concurrency, max_concurrent_tasks=concurrency)
    return QueueWorkerPool("dispatcher", config)


def exchange_for(queue: BaseTaskQueue, agents: AgentRegistry, origin: str) -> BreakerExchange | None:
    """What shows the breakers of ``agents``, also those that come later, and shares those that are to be; None: no Redis."""
    if not isinstance(queue, RedisStreamTaskQueue):
        return None
    return BreakerExchange(queue.manager, queue.name, origin=origin, breakers=agents.breakers)
