"""What the tests of the engine share: how often a task is tried, and looks at what a queue holds."""

from __future__ import annotations

from orchestra import _execution
from orchestra.tasks import Retry

NEVER = Retry(max_retries=0)
QUICK = Retry(max_retries=2, base=0.01, jitter=False)


async def letters_of(queue):
    """Dead letters by task id; no task may have two."""
    letters = await queue.read_dlq(1000)
    by_id = {letter.task_data["id"]: letter for letter in letters}
    assert len(by_id) == len(letters)
    return by_id


async def give_back(queue):
    """Release what dead consumers hold, as if their leases had run out."""
    left = await queue.reclaim("survivor", 1000, 0)
    await queue.settle([(delivery, _execution.RELEASED.verdict) for delivery in left])
