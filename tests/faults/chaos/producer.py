"""A producer process: ``python -m tests.faults.chaos.producer PLAN ACTOR URL DIRECTORY``. Ends when its calls have.

Tasks with ids of their own are sent until that was confirmed; others once. One that was killed goes on where it was:
what its histories do not confirm is sent again if it has an own id.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from orchestra.errors import OrchestraError, StoreFullError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults.chaos import history as histories
from tests.faults.chaos.history import History
from tests.faults.chaos.plan import Plan, Task
from tests.faults.chaos.worker import clean, descriptors, make_manager, make_queue, start

AT_ONCE = 32
GIVE_UP = 40.0
"""Seconds beyond the end of the plan after which nothing is sent again."""


def task_dict(task: Task) -> dict[str, Any]:
    """The task as the product takes it."""
    body = {
        "type": "thread" if task["kind"] == "thread" else "work",
        "input": {key: task[key] for key in ("uid", "kind", "s", "n") if key in task},
        "priority": task.get("priority", 2),
    }
    if task["own"]:
        body["id"] = task["uid"]
    body.update({key: task[key] for key in ("delay", "timeout", "max_retries") if task.get(key) is not None})
    return body


class Producer:
    """Makes the calls of one producer slot."""

    def __init__(self, plan: Plan, queue: RedisStreamTaskQueue, history: History, begin: float, done: set[str]) -> None:
        self.plan, self.queue, self.history = plan, queue, history
        self.begin, self.done = begin, done
        self.until = begin + plan.seconds + GIVE_UP
        self.gate = asyncio.Semaphore(AT_ONCE)

    async def run(self, calls: list[dict[str, Any]]) -> None:
        """Each call at its time, whatever became of the others."""
        async with asyncio.TaskGroup() as group:
            for call in calls:
                if (wait := self.begin + call["at"] - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self._call(call))

    async def _call(self, call: dict[str, Any]) -> None:
        tasks = [task for task in call["tasks"] if task["uid"] not in self.done]
        if not tasks:
            return
        async with self.gate:
            sent = await self._produce(tasks, call["how"])
        if sent is not None and tasks[0]["kind"] == "cancel" and len(tasks) == 1:
            await self._cancel(tasks[0], *sent)

    async def _produce(self, tasks: list[Task], how: str) -> tuple[str, str] | None:
        uids = [task["uid"] for task in tasks]
        while True:
            self.history.write("produce", "invoke", tasks=uids)
            try:
                sent = await self._send(tasks, how)
            except StoreFullError as error:
                self.history.write("produce", "fail", tasks=uids, error=str(error))
            except (OrchestraError, OSError) as error:
                self.history.write("produce", "info", tasks=uids, error=str(error))
                if not tasks[0]["own"]:
                    return None
            else:
                self.history.write(
                    "produce", "ok", tasks=uids, ids=[row[0] for row in sent], places=[r[1] for r in sent]
                )
                return sent[0]
            if time.monotonic() > self.until:
                return None
            await asyncio.sleep(0.1)

    async def _send(self, tasks: list[Task], how: str) -> list[tuple[str, str]]:
        dicts = [task_dict(task) for task in tasks]
        if tasks[0].get("want") or how == "many":
            sent = await self.queue.submit(dicts, want_results=bool(tasks[0].get("want")))
            return [(one.task_id, one.message_id) for one in sent]
        return [(tasks[0]["uid"] if tasks[0]["own"] else "?", await self.queue.produce(dicts[0]))]

    async def _cancel(self, task: Task, task_id: str, message_id: str) -> None:
        await asyncio.sleep(task["cancel_after"])
        self.history.write("cancel", "invoke", uid=task["uid"])
        try:
            known = message_id if task["cancel_after"] != 0.3 else None
            result = await self.queue.cancel(task_id, known)
        except OrchestraError as error:
            self.history.write("cancel", "info", uid=task["uid"], error=str(error))
        else:
            self.history.write("cancel", "ok", uid=task["uid"], result=result.value)


def confirmed(directory: Path, slot: str, own: set[str]) -> tuple[set[str], float | None]:
    """What earlier incarnations of this producer need not send again, and when the first began."""
    done: set[str] = set()
    begun: float | None = None
    for path in sorted(directory.glob(f"{slot}.*.jsonl")):
        for line in histories.read_file(path):
            if line["op"] == "actor" and line["phase"] == "ready":
                begun = line["t"] if begun is None else begun
            if line["op"] == "produce":
                done.update(uid for uid in line["tasks"] if line["phase"] == "ok" or uid not in own)
    return done, begun


async def main(plan: Plan, actor: str, url: str, history: History) -> None:
    slot = actor.partition(".")[0]
    directory = Path(sys.argv[4])
    own = {uid for uid, task in plan.tasks().items() if task["own"]}
    done, begun = await asyncio.to_thread(confirmed, directory, slot, own)
    before = descriptors()
    manager = make_manager(plan, url)
    queue = make_queue(plan, manager)
    history.write("actor", "ready")
    producer = Producer(plan, queue, history, time.monotonic() if begun is None else begun, done)
    await producer.run([call for call in plan.calls if f"p{call['producer']}" == slot])
    await queue.close()
    await manager.close()
    history.write("actor", "end", leaked=await clean(before))


if __name__ == "__main__":
    start(sys.argv[1:], main)
