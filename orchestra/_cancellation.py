"""Cancels tasks by id, and knows which tasks this process has been asked to stop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from orchestra._delivery import Delivery
from orchestra._keys import QueueKeys
from orchestra._link import Link
from orchestra.tasks import Cancellation


class CancelMarks:
    """The cancel marks that one queue object has seen."""

    def __init__(self) -> None:
        self.newest = 0
        self._marks: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._marks)

    def add(self, flat: Sequence[bytes]) -> bool:
        """Take what a tick returned; True when there was anything new."""
        return False

    def covers(self, delivery: Delivery) -> bool:
        """Whether ``delivery`` is of a marked task, and not newer than the mark."""
        return False


class Canceller:
    """Cancels tasks of one queue."""

    def __init__(
        self, keys: QueueKeys, group: str, link: Callable[[], Awaitable[Link]], result_ttl: float, patience: float
    ) -> None:
        self._keys = keys

    async def cancel(self, task_id: str, message_id: str | None) -> Cancellation:
        raise NotImplementedError
