"""Who acts in the model test: a server that all examples share, and consumers as far as the queue knows them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from orchestra._delivery import Delivery
from orchestra._keys import QueueKeys
from orchestra._process import loop_factory
from orchestra._queue.replies import ReplyListener
from orchestra.connections import ConnectionManager
from orchestra.task_queue import RedisStreamTaskQueue
from tests.reference.keyspace import Plain

UVLOOP = os.environ.get("ORCHESTRA_TEST_UVLOOP", "0") not in ("", "0")
QUEUE, GROUP = "model", "workers"
KEYS = QueueKeys(QUEUE)
HOUR = 3_600_000
LEASE = HOUR
WINDOW = 30 * 24 * HOUR
SCAN = PROMOTE = 3
MAX_DELIVERIES = 3


class Server:
    """What examples share: a server, an event loop that stays open, a connected manager."""

    def __init__(self, server: Any) -> None:
        self.client = Plain(server.socket)
        self.runner = asyncio.Runner(loop_factory=loop_factory("uvloop" if UVLOOP else "asyncio"))
        self.manager = ConnectionManager(server.url)
        self.run(self.manager.connect())

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def close(self) -> None:
        self.run(self.manager.close())
        self.runner.close()
        self.client.close()


class Consumer:
    """A process as far as the queue is concerned: a queue object and the name it reads under."""

    def __init__(self, name: str, manager: ConnectionManager, max_length: int) -> None:
        self.name = name
        self.queue = RedisStreamTaskQueue(
            QUEUE,
            GROUP,
            LEASE,
            manager=manager,
            max_length=max_length,
            dedup_window=WINDOW / 1000,
            max_deliveries=MAX_DELIVERIES,
        )
        self.queue._replies = ReplyListener(self.queue.keys, manager, client="client")  # every sender has one name
        self.born: int | None = None
        """When its reader was opened, ms: what was pending for its name before is not its own."""
        self.deliveries: list[Delivery] = []
        """All that were ever handed to it, ended and stale ones too."""

    def open_reader(self) -> Any:
        return self.queue._intake._consumers.get(self.name)
