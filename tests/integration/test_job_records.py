"""What a job leaves behind in Redis when another is started in its place."""

from __future__ import annotations

from orchestra._jobs.records import records_of
from orchestra._keys import WorkflowKeys
from orchestra.memory import MemoryManager
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import BaseTask
from orchestra.workflow import WorkflowEngine


async def test_the_unfinished_workflows_of_an_abandoned_job_expire_with_its_queue(manager):
    queue = RedisStreamTaskQueue("job", "workers", manager=manager)
    engine = WorkflowEngine(MemoryManager(manager, namespace="job"), retention=3600)
    for name in ("goes-on", "over"):
        await engine.initialize_workflow(BaseTask(name, "sum"), [{"action": "sum"}])
    await engine.fail_workflow("over", "enough")
    keys, redis = WorkflowKeys("job"), manager.client
    records = records_of(queue, "client", lambda record: None)

    async def lives() -> list[int]:
        return [await redis.ttl(key) for key in (keys.index, keys.state("goes-on"), keys.state("over"))]

    index, open_one, ended = await lives()
    assert (index, open_one) == (-1, -1)
    assert 3000 < ended <= 3600
    await records.keep_for(60)
    index, open_one, ended = await lives()
    assert 0 < index <= 60
    assert 0 < open_one <= 60
    assert 3000 < ended <= 3600, "it has a time to live of its own"
    await records.keep_for(None)
    assert (await lives())[:2] == [-1, -1]
    assert 3000 < await redis.ttl(keys.state("over")) <= 3600
    await queue.close()
