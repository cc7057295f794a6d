"""What a queue refuses, the same everywhere."""

from __future__ import annotations

import pytest

from orchestra._delivery import Bury
from orchestra.errors import ConfigurationError, QueueFullError


async def test_too_many_dead_letters_close_the_entrance(backend):
    """H3: live tasks still die, nothing is dropped; new ones are refused until dead letters are replayed or purged."""
    queue = backend.make(max_dead=2)
    await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(3)])
    for delivery in await queue.read("c", 3, 100):
        await queue.settle([(delivery, Bury("failed", 1, {}))])
    assert await queue.get_dlq_depth() == 3
    for refused in (queue.produce({"type": "x"}), queue.produce_many([{"type": "x", "delay": 1}])):
        with pytest.raises(QueueFullError, match="3 dead letters of at most 2") as full:
            await refused
        assert full.value.limit == 2
        assert full.value.retry_after > 0
    letters = [letter.message_id for letter in await queue.read_dlq()]
    assert await queue.replay_dlq(letters[:1]) == 1
    assert await queue.purge_dlq(letters[1:2]) == 1
    assert await queue.produce({"type": "x"})


def test_a_bad_limit_is_refused(backend):
    for value in (-1, 1.5, True, None):
        with pytest.raises(ConfigurationError, match="max_dead"):
            backend.make(max_dead=value)
