"""Large plans and records are worked on in a thread, so that the event loop goes on meanwhile.

Owns from which size on that pays. Refuses to own the work, which must be a pure function: nobody may change meanwhile what
it is given. One event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

LARGE: Final = 300
"""Steps from which on it pays: to check or to read that many takes about ten milliseconds."""


async def unblocked(steps: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``work`` returns, which is about so many ``steps``."""
    return work(*args, **kwargs) if steps < LARGE else await asyncio.to_thread(work, *args, **kwargs)


def size_of(plan: Any) -> int:
    """The steps of ``plan`` with those of the plans spelled out within it, counted up to :data:`LARGE` at least. O(LARGE)."""
    count, left = 0, [plan]
    while left and count < LARGE:
        steps = left.pop()
        if isinstance(steps, list | tuple):
            count += len(steps)
            args = (step.get("args") for step in steps[:LARGE] if isinstance(step, Mapping))
            left += [each.get("plan") for each in args if isinstance(each, Mapping)]
    return count
