"""An idle worker begins in the callback in which its work arrived: a turn of the event loop sooner than if it was woken.

Owns the exchange of the current task around one step; refuses to own who is idle and what is run.
Invariant: while the step runs, the worker's task is the current one and the step runs in that task's context, so that
``asyncio.timeout``, task groups and context variables see what they would see in the worker's own turn. The task itself
goes on waiting for ``waiter``; what is left of the step is put into ``slot.rest`` before that is resolved, and only the
worker's own turn awaits it. Whoever cancels the task in between cancels what has begun: :func:`awaken` hands it on.
One event loop, and only from its callbacks, where no task is current.
Source: eager tasks of CPython 3.12 do the same exchange (``asyncio.tasks._swap_current_task``).
"""

from __future__ import annotations

import asyncio
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Awaitable, Callable

from orchestra._pool.slots import MORE, More, Slot


def begin(slot: Slot, start: Callable[[Slot], Awaitable[None] | More | None]) -> bool:
    """``start(slot)`` as the worker that waits in ``slot``; False: there was nothing, or nothing is left, and it goes on waiting.

    What ``start`` raises ends the worker, as in its own turn.
    """
    loop, task, waiter = asyncio.get_running_loop(), slot.task, slot.waiter
    assert task is not None
    assert waiter is not None
    assert slot.home is not None
    _enter_task(loop, task)
    try:
        rest = slot.home.run(start, slot)
    except BaseException as error:  # noqa: BLE001 - the worker raises it
        if not waiter.done():
            waiter.set_exception(error)
        return True
    finally:
        _leave_task(loop, task)
    slot.rest = None if rest is MORE else rest
    if waiter.done():  # an agent has cancelled the task it runs in
        return True
    if rest is None:
        return False
    waiter.set_result(None)
    return True


async def awaken(slot: Slot) -> None:
    """Wait until somebody resolves ``slot.waiter``; then ``slot.rest`` is what has begun meanwhile, if anything has."""
    assert slot.task is not None
    assert slot.waiter is not None
    try:
        await slot.waiter
    except asyncio.CancelledError as error:
        if slot.rest is None:
            raise
        slot.task.cancel(*error.args)  # meant for what has begun: it reaches it at its next await
        slot.task.uncancel()
    finally:
        slot.waiter = None
