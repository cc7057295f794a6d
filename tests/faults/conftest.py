"""A queue on Redis, for the tests that need no other."""

from __future__ import annotations

import pytest

from orchestra.task_queue import RedisStreamTaskQueue


@pytest.fixture
async def queue(manager):
    queue = RedisStreamTaskQueue("tasks", "workers", 5_000, manager=manager)
    yield queue
    await queue.close()
