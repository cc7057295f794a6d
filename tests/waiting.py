"""Waiting for what a worker brings about: conditions and an empty queue, never a fixed time."""

from __future__ import annotations

import asyncio


async def until(condition, seconds=60.0):
    """Wait until the plain function ``condition`` gives something true, which is returned."""
    async with asyncio.timeout(seconds):
        while not (value := condition()):
            await asyncio.sleep(0.005)
        return value


async def settled(queue, seconds=60.0):
    """The statistics of ``queue`` once nothing is live; they must add up."""
    async with asyncio.timeout(seconds):
        while (stats := await queue.stats()).live:
            await asyncio.sleep(0.01)
    assert stats.adds_up, stats
    return stats
