"""``orchestra cancel``: cancels tasks by their ids, wherever they are."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from orchestra.cli._options import JsonOption, QueueOption, RedisOption, examples, manager_of, opened, workers_alive
from orchestra.cli._output import print_json, say
from orchestra.tasks import Cancellation, check_ident

EPILOG = examples("orchestra cancel jobs:app order-17", "orchestra cancel triage 0199f1c2 0199f1c3 --json")

_TEXT = {
    Cancellation.CANCELLED: "cancelled {}",
    Cancellation.REQUESTED: "requested {}: a worker ends it when it learns of it",
    Cancellation.ENDED: "had ended {}",
}


def cancel(
    target: Annotated[
        str, typer.Argument(metavar="TARGET|QUEUE", help="The app (module:app or file.py), or a queue's name.")
    ],
    task_ids: Annotated[list[str], typer.Argument(metavar="TASK_ID...", help="The ids of the tasks.")],
    redis: RedisOption = None,
    queue: QueueOption = None,
    as_json: JsonOption = False,
) -> int:
    """Cancel tasks: waiting, delayed or running.

    Says for each task whether it is cancelled now; or whether that was requested, because a worker holds it or it was
    not found waiting (so too for an id that nobody knows); or whether it had ended before.

    Exit status: 0, whatever the answers; 1 if Redis failed, 2 wrong usage.
    """
    for task_id in task_ids:
        check_ident("task id", task_id)

    async def work() -> int:
        async with opened(target, redis, queue) as app:
            answers = []
            for task_id in task_ids:
                answer = await app.cancel(task_id)
                answers.append(answer)
                if as_json:
                    print_json({"id": task_id, "cancellation": answer.value, "queue": app.queue_name})
                else:
                    print(_TEXT[answer].format(task_id))
            if Cancellation.REQUESTED in answers and not await workers_alive(manager_of(app), app.queue_name):
                say("no worker takes tasks from this queue now; what was requested waits for one, for 24 hours")
            return 0

    return asyncio.run(work())
