"""Makes the consumer group of a queue, at the beginning of its streams, and notices when it was taken away.

Owns the knowledge of what the group was made on (which server, which streams), so that a restart without persistence, a
FLUSHALL or an XGROUP DESTROY is told apart from a first start. Refuses to own what follows for deliveries that are
held: ``on_gone(streams)`` is told. One event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from orchestra import telemetry
from orchestra._keys import QueueKeys
from orchestra._redis.link import Link
from orchestra._redis.wire import Command, ReplyError, pack, reply_code, reply_error
from orchestra.errors import ConfigurationError
from orchestra.tasks import LANES

logger = logging.getLogger("orchestra.queue")


class StreamGroup:
    """The one group of one queue; ``on_gone(streams)`` returns how many deliveries it gave up."""

    def __init__(
        self,
        queue: str,
        keys: QueueKeys,
        group: str,
        link: Callable[[], Awaitable[Link]],
        patience: float,
        on_gone: Callable[[Sequence[int]], int],
    ) -> None:
        self._queue = queue
        self._keys = keys
        self._group = group
        self._link = link
        self._patience = patience
        self._on_gone = on_gone
        self._making: asyncio.Future[bool] | None = None
        self._under_way: set[asyncio.Future[bool]] = set()
        self._server: tuple[bytes, bytes] | None = None
        self._made = False
        self.ready = False

    async def ensure(self) -> None:
        """Make sure that the group exists in every lane; one round trip for each queue object, none afterwards.

        Raises:
            ConfigurationError: another group consumes the queue.
            StoreError: Redis refused, or was unavailable for longer than ``patience``.
        """
        if self._making is None:
            self._making = self._begin()
        try:
            await asyncio.shield(self._making)
        except Exception:
            self._making = None
            raise

    def doubt(self) -> None:
        """The group may be gone: the next :meth:`ensure` looks again."""
        self.ready, self._making = False, None

    async def verify(self) -> bool:
        """Look again, one round trip; returns whether the server is another one, or the same in another role."""
        making = self._making = self._begin()
        self.ready = False
        try:
            return await asyncio.shield(making)
        except Exception:
            self._making = None
            raise

    async def close(self) -> None:
        """End what is under way, also for callers who were cancelled; what is found next is a first start."""
        for making in self._under_way:
            making.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        self.doubt()
        self._made, self._server = False, None

    def _begin(self) -> asyncio.Future[bool]:
        making = asyncio.ensure_future(self._make())
        self._under_way.add(making)
        making.add_done_callback(self._under_way.discard)
        return making

    async def _make(self) -> bool:
        streams = self._keys.streams
        commands: list[Command] = [("EXISTS", key) for key in streams]
        commands += [("XGROUP", "CREATE", key, self._group, "0", "MKSTREAM") for key in streams]
        commands += [("XINFO", "GROUPS", key) for key in streams]
        commands.append(("INFO", "server", "replication"))
        link = await self._link()
        replies, _ = await link.patiently(lambda: link.send(pack(commands), len(commands)), self._patience)
        existed, created, groups = (replies[n * len(streams) : (n + 1) * len(streams)] for n in range(3))
        known = [self._names(rows) for rows in groups]
        for reply, names in zip(created, known, strict=True):
            # Redis refuses for lack of memory, or of a permission, before it looks whether there is anything to make.
            if isinstance(reply, ReplyError) and reply_code(reply) != "BUSYGROUP" and self._group not in names:
                raise reply_error(reply, link.manager.address.safe) from reply
        self._refuse_others(known)
        changed = self._is_another(replies[-1])
        made = [number for number, reply in enumerate(created) if not isinstance(reply, ReplyError)]
        if self._made and made:
            self._tell_gone(made, [number for number in made if not existed[number]], changed)
        self._made = self.ready = True
        return changed

    @staticmethod
    def _names(rows: Any) -> list[str]:
        return [] if isinstance(rows, ReplyError) else [bytes(row[1]).decode() for row in rows]

    def _refuse_others(self, known: Sequence[list[str]]) -> None:
        for names in known:
            if others := [name for name in names if name != self._group]:
                raise ConfigurationError(
                    f"queue {self._queue!r} is consumed by the group {others[0]!r}, not {self._group!r}: settled tasks "
                    "are deleted, so a queue has one group; use its name, or another queue",
                    field="consumer_group",
                    value=self._group,
                )

    def _is_another(self, info: Any) -> bool:
        """Whether run id or role differ from the last time; a user who may not ask (ACL) never learns."""
        if isinstance(info, ReplyError):
            return False
        facts = dict(line.split(b":", 1) for line in bytes(info).splitlines() if b":" in line)
        before, self._server = self._server, (facts.get(b"run_id", b""), facts.get(b"role", b""))
        return before is not None and before != self._server

    def _tell_gone(self, made: list[int], vanished: list[int], restarted: bool) -> None:
        held = self._on_gone(made)
        lanes, vanished = (sorted({number % LANES for number in numbers}) for numbers in (made, vanished))
        for lane in lanes:
            telemetry.emit("queue.group_recreated", {}, {"queue": self._queue, "lane": lane})
        if vanished or restarted:
            facts = {"queue": self._queue, "lanes": vanished, "restarted": restarted}
            telemetry.emit("queue.data_loss_suspected", {"held": held}, facts)
            logger.error(
                "queue %s: data loss suspected: %s; what waited there is lost, %d deliveries held here are given up",
                self._queue,
                f"the streams of lanes {vanished} were gone" if vanished else "the server restarted without its groups",
                held,
            )
        else:
            logger.warning("queue %s: the group was gone in lanes %s and was made again", self._queue, lanes)
