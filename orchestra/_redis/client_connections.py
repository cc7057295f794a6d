"""redis-py's connections, with one fault taken out: they heed a cancellation that comes as a command has been sent.

redis-py sends under ``asyncio.wait_for``, which on Python 3.11 swallows a cancellation that is delivered in the very
iteration in which the inner future completes (cpython#86296): the call went on, and its task ran for ever. A command that
is sent at once completes in that very iteration, so that a cancellation which comes while the task runs (the SIGINT handler
of ``asyncio.run``), and waits for its next suspension, was lost each time. Owns nothing else; used by
:mod:`orchestra.connections` alone. One event loop, as the connections themselves.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import redis.asyncio as aredis
from redis.asyncio.sentinel import SentinelManagedConnection

if TYPE_CHECKING:
    _Base = aredis.Connection
else:
    _Base = object


class _Heeds(_Base):
    """Mixed in before a connection class of redis-py."""

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """As redis-py's; a swallowed cancellation is raised again, and the connection, whose reply is due, closed.

        A task that has been cancelled before pays one iteration of the loop for it, others nothing.
        """
        task = asyncio.current_task()
        asked = task.cancelling() if task is not None else 0
        if asked:
            await asyncio.sleep(0)  # what has not reached the task yet is raised here, before anything is sent
        await super().send_packed_command(command, check_health)
        if task is not None and task.cancelling() > asked:
            await self.disconnect(nowait=True)
            raise asyncio.CancelledError


class TcpConnection(_Heeds, aredis.Connection):
    """For ``redis:``."""


class TlsConnection(_Heeds, aredis.SSLConnection):
    """For ``rediss:``."""


class UnixConnection(_Heeds, aredis.UnixDomainSocketConnection):
    """For ``unix:`` and ``embedded:``."""


class SentinelConnection(_Heeds, SentinelManagedConnection):
    """For ``redis+sentinel:``: to the present master."""
