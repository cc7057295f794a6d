"""Several limits asked at once: all of them give, or none does.

Owns what a request over several limiters is and who is told of its end; refuses to own the limits. What is asked in one
tick travels in one call, whatever limits it names. One event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from orchestra._limiting.request import Request
from orchestra._limiting.rules import Admission, require_wait
from orchestra._limiting.store import QUEUE, Use
from orchestra.errors import ConfigurationError

MAX_USES = 16
"""Limits that one request may name."""

Uses = Sequence[tuple[Any, str | None, int]]
"""Limiter, key or None, and cost, each."""


async def try_acquire_all(uses: Uses, priority: int = 0, *, queue: bool = False) -> Admission:
    """Take permits of several limits, all or none, without waiting for them. One round trip at most, shared.

    ``uses``: 1 to 16 of limiter, key or None, and cost; the same cell twice counts twice. ``queue``: see
    :meth:`~orchestra.flow_control.RedisRateLimiter.try_acquire`. A refusal names the limit that makes it wait longest, and its key.

    Raises:
        ConfigurationError: no or too many limits; limits on different Redis servers or of different scopes; a bad cost or key.
        StoreUnavailableError: Redis cannot be asked, unless all of them are ``fail_open``.
    """
    request = _request(uses, priority, queue=queue)
    request.store.ask((request,))
    admission = await request.answer()
    for limiter, cell, cost, _ in request.uses:
        if admission.allowed or (limiter.name == admission.limiter and limiter.key_of(cell) == admission.key):
            limiter.count(admission, cost, local=not request.asked)
    return admission


async def acquire_all(uses: Uses, priority: int = 0, *, wait: float | None = None) -> Admission:
    """Like :func:`try_acquire_all`, but waits, in the line that all processes share.

    ``wait``: seconds at most, ``math.inf`` for as long as it takes; by default the least that one of the limits is
    configured to wait (nothing under REJECT). Cost: a round trip at each turn in the line, most often one or two.

    Raises: as :func:`try_acquire_all`.
    """
    loop = asyncio.get_running_loop()
    if wait is None:
        most = min([use.limit.max_wait for use in _request(uses, priority, queue=False).uses])
    else:
        most = require_wait(wait)
    deadline = loop.time() + most
    while True:
        admission = await try_acquire_all(uses, priority, queue=most > 0.0)
        if admission.allowed or loop.time() + admission.retry_after > deadline:
            return admission
        await asyncio.sleep(admission.retry_after)


def _request(uses: Uses, priority: int, *, queue: bool) -> Request:
    if not 1 <= len(uses) <= MAX_USES:
        raise ConfigurationError(
            f"uses: from 1 to {MAX_USES} limits can be asked at once, got {len(uses)}", field="uses"
        )
    asked: dict[str, Use] = {}
    stores = set()
    for given, key, cost in uses:
        limiter = given.here() if hasattr(given, "here") else given  # of an App, which has one for each event loop
        if not hasattr(limiter, "key_of"):
            raise ConfigurationError(f"uses: a limit must be a RedisRateLimiter, got {limiter!r}", field="uses")
        cell = limiter.cell(key)
        urgency = limiter.config.weigh(priority, cost)[0]
        total = cost + (asked[cell].cost if cell in asked else 0)
        limiter.config.weigh(priority, total)
        asked[cell] = Use(limiter, cell, total, urgency)
        stores.add(limiter.store())
    if len(stores) > 1:
        names = ", ".join(
            f"{limiter.name} ({limiter.address.safe}, scope {limiter.scope})" for limiter, *_ in asked.values()
        )
        raise ConfigurationError(f"limits asked together must share one Redis and one scope: {names}", field="uses")
    return Request(tuple(asked.values()), urgency, stores.pop(), QUEUE if queue else 0)
