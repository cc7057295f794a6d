"""K7, K11: what cannot travel is refused where it is produced; Redis is sent nothing of it."""

from __future__ import annotations

import pytest

from orchestra.errors import InvalidTaskError, TaskTooLargeError
from orchestra.serialization import encode_task
from orchestra.task_queue import RedisStreamTaskQueue

CAP = 1 << 20


async def seen_by_redis(manager) -> tuple[int, int]:
    """Scripts that ran, and live keys."""
    calls = await manager.client.info("commandstats")
    return sum(calls.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval", "xadd")), (
        await manager.client.dbsize()
    )


def sized(frame_bytes: int) -> dict:
    """A task whose frame has that many bytes."""
    task = {"id": "sized", "type": "x", "input": b""}
    head = len(encode_task({**task, "input": b"x" * 70_000}).frame) - 70_000  # with a length of four bytes
    return {**task, "input": b"x" * (frame_bytes - head)}


@pytest.mark.parametrize("size", [0, 1, 512 << 10])
async def test_sizes_up_to_the_cap_travel(manager, size):
    """K7: nothing, one byte, half a megabyte."""
    async with RedisStreamTaskQueue("tasks", "workers", manager=manager) as queue:
        await queue.produce({"id": f"s{size}", "type": "x", "input": "é"[:size] + "x" * (size - 1)})
        ((message_id, task),) = await queue.consume("c", 1, 5000)
        assert len(task["input"]) == size
        assert await queue.acknowledge(message_id)


@pytest.mark.parametrize("over", [0, 1])
async def test_the_cap_is_exact_to_the_byte(manager, over):
    """K7: the default cap of a frame, and one byte more."""
    async with RedisStreamTaskQueue("tasks", "workers", manager=manager) as queue:
        task = sized(CAP + over)
        if not over:
            await queue.produce(task)
            ((message_id, back),) = await queue.consume("c", 1, 5000)
            assert back["input"] == task["input"]
            assert await queue.acknowledge(message_id)
            return
        before = await seen_by_redis(manager)
        with pytest.raises(TaskTooLargeError) as refused:
            await queue.produce(task)
        assert (refused.value.size, refused.value.limit) == (CAP + 1, CAP)
        assert await seen_by_redis(manager) == before


@pytest.mark.parametrize("size", [2 << 20, 64 << 20, 600 << 20])
async def test_what_is_far_too_large_is_never_sent(manager, size):
    """K7: also beyond ``proto-max-bulk-len`` (512 MiB), where Redis would close the connection."""
    async with RedisStreamTaskQueue("tasks", "workers", manager=manager) as queue:
        await queue.stats()
        before = await seen_by_redis(manager)
        for task in ({"type": "x", "input": memoryview(bytes(size))}, {"type": "x", "metadata": {"a": bytes(size)}}):
            with pytest.raises(TaskTooLargeError):
                await queue.produce(task)
            with pytest.raises(TaskTooLargeError):
                await queue.produce_many([{"type": "x"}, task])
        assert await seen_by_redis(manager) == before
        assert (await queue.stats()).live == 0


class Raises:
    def __str__(self):
        raise RuntimeError("on purpose")

    __repr__ = __hash__ = __len__ = __str__


@pytest.mark.parametrize("bad", [Raises(), {1: Raises()}, [[Raises()]], "\ud800", 1 << 64, {1.5: 1}])
async def test_one_bad_task_of_many_sends_none(manager, bad):
    """K11: objects that raise wherever they are touched: an error with the path, no partial produce."""
    async with RedisStreamTaskQueue("tasks", "workers", manager=manager) as queue:
        await queue.stats()
        before = await seen_by_redis(manager)
        tasks = [{"id": f"t{n}", "type": "x"} for n in range(1200)] + [{"id": "bad", "type": "x", "input": bad}]
        with pytest.raises(InvalidTaskError) as refused:
            await queue.produce_many(tasks)
        assert refused.value.path.startswith("input")
        assert await seen_by_redis(manager) == before
        assert (await queue.stats()).live == 0
