"""Process-wide instances behind every ``get_*()``: one per kind, name and event loop.

A ``get_*()`` returns at once; awaiting what it returned connects it and gives the same object, so both spellings of the
specification work (the idea of asyncpg's ``create_pool``). Asyncio objects belong to one loop, therefore so does each
instance here; one made where no loop runs is adopted by the first loop that asks for it.
Not thread-safe by lock: a dict is only touched by the thread that runs its loop.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

_per_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Any]] = (
    weakref.WeakKeyDictionary()
)
_homeless: dict[tuple[str, str], Any] = {}


class Connectable:
    """Gives a class ``await x`` → ``x``, after :meth:`_connect`, which must tolerate being called again."""

    async def _connect(self) -> None:
        """Reach whatever the object needs; nothing by default."""

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self._connect().__await__()
        return self


def shared(kind: str, name: str, make: Callable[[], T]) -> T:
    """The instance of ``kind`` called ``name`` for the running loop, made on first use."""
    key = (kind, name)
    try:
        bucket = _per_loop.setdefault(asyncio.get_running_loop(), {})
    except RuntimeError:
        bucket = _homeless
    if key not in bucket:  # _homeless itself is the bucket where no loop runs
        bucket[key] = _homeless.pop(key) if key in _homeless else make()
    instance: T = bucket[key]
    return instance


def forget(instance: Any) -> None:
    """Drop ``instance``, so that the next ``get_*()`` makes a new one. For those that were closed."""
    for bucket in (_homeless, *_per_loop.values()):
        for key in [key for key, value in bucket.items() if value is instance]:
            del bucket[key]


def reset() -> None:
    """Drop every shared instance without closing it. For tests."""
    _per_loop.clear()
    _homeless.clear()
