"""What limiters admitted, in the time of Redis, and the exact check of it; also a client process to be started many times.

Run as a program: ``_limit_log.py URL NAME RATE BURST SECONDS WAITERS LEASE`` saturates a limit and prints its log as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Self

from orchestra._limiting.store import LimitStore


class Log:
    """Every call of the script that decided something: ``(microseconds of the Redis clock, [(cost, admitted), …])``."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[tuple[int, bool]]]] = []
        self.returned: list[tuple[int, int]] = []
        """What leases gave back: when each was taken, and how much of it, both in microseconds."""
        self._answer, self._direct, self._run = LimitStore._answer, LimitStore.direct, LimitStore.run

    def __enter__(self) -> Self:
        log, answer, direct = self, self._answer, self._direct

        def recorded(store, batch, keys, sent_us, reply):
            waits = reply[len(keys) :: 2]
            log.calls.append((reply[0], [(q.uses[0].cost, not w) for q, w in zip(batch, waits, strict=True)]))
            answer(store, batch, keys, sent_us, reply)

        async def directly(store, limit, cell, cost, urgency, flags):
            reply = await direct(store, limit, cell, cost, urgency, flags)
            if reply is not None:
                log.calls.append((reply[0], [(cost, not reply[2])]))
            return reply

        async def returning(store, name, keys, args):
            reply = await run(store, name, keys, args)
            if name == "gcra_return":
                log.returned.append((args[1], reply))
            return reply

        run = self._run
        LimitStore._answer, LimitStore.direct, LimitStore.run = recorded, directly, returning
        return self

    def __exit__(self, *exc_info: object) -> None:
        LimitStore._answer, LimitStore.direct, LimitStore.run = self._answer, self._direct, self._run

    def admitted(self) -> list[tuple[int, int]]:
        return sorted((now, cost) for now, asked in self.calls for cost, given in asked if given)


def worst_window(log: list[tuple[int, int]], emission_us: int) -> int:
    """The largest, over all windows, of cost * T - length: whole numbers, so exact. At most burst * T is right."""
    worst, total, least = 0, 0, None
    for at, cost in log:
        start = total * emission_us - at
        least = start if least is None else min(least, start)
        total += cost
        worst = max(worst, total * emission_us - at - least)
    return worst


async def saturate(url: str, name: str, rate: float, burst: int, seconds: float, waiters: int, lease: int) -> Log:
    from orchestra.connections import ConnectionManager
    from orchestra.flow_control import BackpressureConfig, BackpressureStrategy, RateLimitConfig, RedisRateLimiter

    limit = RateLimitConfig(rate=rate, burst=burst)
    config = BackpressureConfig(
        rate_limit=limit, strategy=BackpressureStrategy.WAIT, lease=lease, lease_ttl=0.2 if lease else 1.0
    )
    loop = asyncio.get_running_loop()

    async def client(limiter) -> None:
        while (left := end - loop.time()) > 0:
            await limiter.acquire(wait=left)

    with Log() as log:
        async with ConnectionManager(url) as manager:
            limiter = RedisRateLimiter(name, config, manager=manager)
            await limiter
            print("ready", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            end = loop.time() + seconds
            await asyncio.gather(*(client(limiter) for _ in range(waiters)))
            await limiter.close()
    return log


if __name__ == "__main__":
    url, name, rate, burst, seconds, waiters, lease = sys.argv[1:]
    done = asyncio.run(saturate(url, name, float(rate), int(burst), float(seconds), int(waiters), int(lease)))
    print(json.dumps({"admitted": done.admitted(), "returned": done.returned, "calls": len(done.calls)}))
