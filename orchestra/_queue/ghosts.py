"""Finds deliveries that Redis has handed to a consumer which never received them, and takes them at once.

A reply that is lost on its way (a broken connection, a timeout, a cancelled call) leaves an entry pending for a consumer
that is alive and renews only what it knows: nobody would ever take it over before its lease ends. Owns the times to
look and the look itself; refuses to own what is held. One event loop; the caller makes sure that no read and no reclaim
of the same consumer is under way, because what they are about to bring looks like a ghost.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from orchestra import telemetry
from orchestra._delivery import Delivery
from orchestra._keys import QueueKeys
from orchestra._redis.link import Link
from orchestra._redis.wire import Command, ReplyError, pack, reply_code, reply_error
from orchestra._scripts import Arg, script

PAGE = 500
"""Pending rows of one stream that one look asks for."""
PAGES = 20
"""Pages that one call looks at; the next call goes on."""
SOON = 1.0
"""Seconds after which a server that was stopped has run what a closed connection had sent before."""


class Ghosts:
    """The lost deliveries of one consumer; ``held`` are per stream those that were received."""

    def __init__(
        self,
        queue: str,
        keys: QueueKeys,
        group: str,
        consumer: str,
        held: Sequence[dict[bytes, Delivery]],
        link: Callable[[], Awaitable[Link]],
    ) -> None:
        self._queue = queue
        self._keys = keys
        self._group = group
        self._consumer = consumer
        self._held = held
        self._link = link
        self._born = time.monotonic()
        self._page: tuple[int, bytes] | None = None
        self.looks: list[float] = []
        """When to look, monotonic seconds; a blocked read that was given up may still be served for a while."""

    def suspect(self, block: float = 0.0) -> None:
        """Look at the next chance, and again when a read that blocks for ``block`` seconds has certainly ended."""
        now = time.monotonic()
        self.looks = sorted({now, now + SOON, now + block + SOON})
        self._page = None

    def due_in(self) -> float:
        """Seconds until the next look; 0.0 or less when it is due. Only while there are :attr:`looks`."""
        return self.looks[0] - time.monotonic()

    async def take(self, room: int) -> tuple[list[Delivery], list[str]]:
        """Take up to ``room`` ghosts; also returns the message ids of those whose entries somebody has deleted.

        A look that is not finished goes on at the next call.

        Raises:
            StoreError: what was under way is a ghost still, and the look is repeated at the next call.
        Cost: one round trip for 500 pending entries of a stream, and one more where there are ghosts.
        """
        taken: list[Delivery] = []
        lost: list[str] = []
        number, after = self._page or (0, b"-")
        for _ in range(PAGES):
            if number == len(self._keys.streams) or len(taken) >= room:
                break
            ghosts, after = await self._page_of(number, after, room - len(taken))
            if ghosts:
                rows, gone = await self._claim(number, ghosts)
                taken += rows
                lost += gone
            if not after:
                number, after = number + 1, b"-"
        self._page = (number, after)
        if number == len(self._keys.streams):
            now, self._page = time.monotonic(), None
            self.looks = [at for at in self.looks if at > now]
        if taken:
            telemetry.emit("queue.ghosts", {"count": len(taken)}, {"queue": self._queue, "consumer": self._consumer})
        return taken, lost

    async def _page_of(self, number: int, after: bytes, room: int) -> tuple[list[tuple[bytes, int]], bytes]:
        """Up to ``room`` ghosts (entry, deliveries) behind ``after``, and where to go on: b"" when all was seen."""
        link = await self._link()
        command: Command = ("XPENDING", self._keys.streams[number], self._group, after, "+", PAGE, self._consumer)
        (rows,) = await link.send(pack((command,)), 1)
        if isinstance(rows, ReplyError):
            if reply_code(rows) == "NOGROUP":
                return [], b""
            raise reply_error(rows, link.manager.address.safe) from rows
        youth = (time.monotonic() - self._born) * 1000  # what is older was pending for this name before we had it
        held = self._held[number]
        ghosts: list[tuple[bytes, int]] = []
        for entry, _, idle, count in rows:
            if entry not in held and idle <= youth:
                if len(ghosts) == room:
                    return ghosts, after
                ghosts.append((entry, count))
            after = b"(" + entry
        return ghosts, after if len(rows) == PAGE else b""

    async def _claim(self, number: int, ghosts: Sequence[tuple[bytes, int]]) -> tuple[list[Delivery], list[str]]:
        link = await self._link()
        args: list[Arg] = [self._group, self._consumer]
        for ghost in ghosts:
            args += ghost
        rows, gone = await link.script(script("reconcile"), (self._keys.streams[number], self._keys.counters), args)
        taken = [Delivery(number, entry, fields, self._consumer, int(count)) for entry, count, fields in rows]
        return taken, [f"{number}:{entry.decode()}" for entry in gone]
