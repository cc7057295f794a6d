"""A job: every task of a source through a queue into a file, each exactly once, however often it is interrupted.

The file is the truth about what is done. A task that is not in it has a record in Redis, or lives in the queue, or was
never sent; what was sent is recognised by its id, so sending again adds nothing. A record is deleted only after its
line is on disk. Hence a run that is killed at any instant is continued by the next one, which repeats nothing.

Owns feeding, collecting and knowing when it is over. Refuses to own who runs tasks (:mod:`orchestra._jobs.workers`),
the files (:mod:`orchestra._jobs.file`) and what is shown. One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orchestra._jobs.file import JobIdentity, ResultsFile
from orchestra._jobs.input import BadLine, TaskChecker
from orchestra._jobs.records import BATCH, Record, records_of
from orchestra._jobs.tally import Tally
from orchestra._jobs.workers import Workers
from orchestra.app import App
from orchestra.errors import InvalidTaskError, OrchestraError, StoreError, StoreUnavailableError
from orchestra.tasks import TaskDict

logger = logging.getLogger("orchestra.run")

KEEP = 7 * 86_400.0
"""Seconds that results wait in Redis for the next run, and that sent tasks are recognised."""
KEEP_FINISHED = 86_400
"""Seconds that the traces of a job without dead letters stay."""
WINDOW = 20_000
"""Tasks sent and not ended, at most."""
FLUSH_EVERY = 0.05
SYNC_EVERY = 1.0
LOOK_AT = 2_000
"""Tasks whose records one look covers; hints bring the others. Every tenth look covers all."""
OUTAGE = 60.0
"""Seconds of unreachable Redis after which the job is given up (and may be continued)."""
MOST_SENDS = 3
"""Times that a task of which Redis has lost every trace is sent."""


class SourceError(OrchestraError):
    """The source of the App raised."""

    code = "source"


class OutputError(OrchestraError):
    """The output file cannot be written any more."""

    code = "output"


class Job:
    """What the source and the report of an App are given.

    ``id`` and ``name`` of the job, ``args`` that were given behind the target, ``console`` to print to.
    """

    def __init__(self, engine: JobEngine, args: list[str], console: Any) -> None:
        self._engine = engine
        self.id = engine.identity.job
        self.name = engine.app.name
        self.args = args
        self.console = console

    async def results(self, task_ids: Iterable[str]) -> dict[str, Any]:
        """What the tasks returned, by id, once all of them have ended; dead ones are missing.

        They must have been yielded before, in this run or in an earlier one of the same job.

        Raises:
            InvalidTaskError: a task was never yielded, so that waiting for it would never end.
        """
        return await self._engine.results(list(task_ids))

    def expect(self, total: int) -> None:
        """Say how many tasks there will be, for the progress display."""
        self._engine.expected = total


@dataclass(slots=True)
class Progress:
    """Tasks of one type, earlier runs included."""

    total: int = 0
    completed: int = 0
    dead: int = 0


@dataclass(slots=True)
class _Waiter:
    missing: set[str]
    future: asyncio.Future[None]


class JobEngine:
    """Runs one job. ``on_bad`` is told of every task that cannot be sent."""

    def __init__(
        self,
        app: App,
        identity: JobIdentity,
        results: ResultsFile,
        make_workers: Callable[[Tally], Workers],
        on_bad: Callable[[BadLine], None],
    ) -> None:
        self.app = app
        self.identity = identity
        self.file = results
        self.tally = Tally()
        self.types: dict[str, Progress] = {}
        self.expected = 0
        self.bad = 0
        self.resumed = 0
        """Tasks whose results were there already."""
        self.outstanding: dict[str, TaskDict] = {}
        """Sent, or about to be, and not ended."""
        self.feeding = True
        self.failure: BaseException | None = None
        self.stopped = False
        self.checker = TaskChecker(app.agents.__contains__, lambda: sorted(app.agents), app.max_task_bytes)
        self._records = records_of(app.queue, identity.job, self._take)
        self._workers = make_workers(self.tally)
        self._on_bad = on_bad
        self._accepted: set[str] = set()
        self._batch: list[TaskDict] = []
        self._sends: dict[str, int] = {}
        self._unsynced: list[str] = []
        self._waiters: list[_Waiter] = []
        self._flushing = asyncio.Lock()
        self._room = asyncio.Event()
        self._over = asyncio.Event()
        self._connected = self.started = False
        self._tasks: list[asyncio.Task[None]] = []

    # -- life

    @property
    def total(self) -> int:
        """Tasks known or expected."""
        return max(self.expected, len(self._accepted))

    @property
    def ended(self) -> int:
        """Tasks with a line in the file, of those known."""
        return len(self._accepted) - len(self.outstanding) - len(self._batch)

    @property
    def left(self) -> int:
        """Tasks known that have not ended."""
        return len(self.outstanding) + len(self._batch)

    async def run(self, tasks: AsyncIterator[Any]) -> None:
        """Until every task of ``tasks`` has its line, or :meth:`stop`. ``failure`` says why else it ended.

        ``tasks`` gives task dicts, ``(where, task dict)`` or :class:`BadLine`.
        """
        feeder = self._spawn(self._feed(tasks))
        self._spawn(self._flush_often())
        self._spawn(self._look_often())
        self._spawn(self._sync_often())
        try:
            await self._over.wait()
        finally:
            await self._wind_up(feeder)

    def stop(self) -> None:
        """End soon: send no more, let running agents finish, release the rest."""
        self.stopped = True
        self._over.set()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        task.add_done_callback(self._note_end)
        self._tasks.append(task)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())
        self._over_if_done()

    def _fail(self, error: BaseException | None) -> None:
        if self.failure is None and not self.stopped:
            self.failure = error
        self._over.set()

    def _over_if_done(self) -> None:
        if not self.feeding and not self.outstanding and not self._batch:
            self._over.set()

    async def connect(self) -> None:
        """Reach Redis and hear of results. Raises: StoreError."""
        if not self._connected:
            await self.app.connect()
            await self._records.open()
            self._connected = True

    async def _start(self) -> None:
        await self.connect()
        await self._records.keep_for(None)
        await self._workers.start()
        self.started = True
        self._spawn(self._workers.failed())

    async def _wind_up(self, feeder: asyncio.Task[None]) -> None:
        feeder.cancel()
        await asyncio.gather(feeder, return_exceptions=True)
        await self._workers.stop()  # also when it was interrupted while starting
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            if self._connected:
                await self._look(every=True, resend=False)
            await self._sync()
            if self.started and not self.left and not self.file.dead and self.failure is None:
                await self._records.keep_for(KEEP_FINISHED)
        except StoreError as error:
            self.failure = self.failure or error
        self.file.sync()

    # -- feeding

    async def _feed(self, tasks: AsyncIterator[Any]) -> None:
        number = 0
        try:
            async for given in tasks:
                number += 1
                await self._offer(given, number)
        except OrchestraError:
            raise
        except Exception as error:
            raise SourceError(f"the source of {self.app.name} failed: {type(error).__name__}: {error}") from error
        await self._flush()
        self.feeding = False

    async def _offer(self, given: Any, number: int) -> None:
        if isinstance(given, BadLine):
            self._refuse(given)
            return
        where, task = given if isinstance(given, tuple) else (f"task {number} of the source", given)
        try:
            task = self.checker.check(task)
        except InvalidTaskError as error:
            self._refuse(BadLine(where, str(error)))
            return
        self._accept(task)
        if len(self._batch) >= BATCH:
            await self._flush()
            while len(self.outstanding) >= WINDOW:
                self._room.clear()
                await self._room.wait()
        elif number % 100 == 0:
            await asyncio.sleep(0)

    def _refuse(self, bad: BadLine) -> None:
        self.bad += 1
        self._on_bad(bad)

    def _accept(self, task: TaskDict) -> None:
        task_id = task["id"]
        self._accepted.add(task_id)
        progress = self.types.setdefault(task["type"], Progress())
        progress.total += 1
        if task_id not in self.file:
            self._batch.append(task)
            return
        self.resumed += 1
        if task_id in self.file.dead:
            progress.dead += 1
        else:
            progress.completed += 1

    async def _flush_often(self) -> None:
        """A source that waits for something else must not hold back what it gave already."""
        while True:
            await asyncio.sleep(FLUSH_EVERY)
            if self._batch:
                await self._flush()

    async def _flush(self) -> None:
        async with self._flushing:
            batch, self._batch = self._batch, []
            if not batch:
                return
            self.outstanding.update((task["id"], task) for task in batch)
            if not self.started:
                await self._start()
            await self._patiently(lambda: self._send(batch))

    async def _send(self, batch: list[TaskDict]) -> None:
        for record in await self._records.find([task["id"] for task in batch]):
            self._take(record)
        fresh = [task for task in batch if task["id"] in self.outstanding]
        if fresh:
            await self.app.queue.produce_many(fresh, want_results=True)

    async def _patiently(self, attempt: Callable[[], Any]) -> None:
        """Repeat ``attempt``, which may be repeated, while Redis is unreachable."""
        deadline = asyncio.get_running_loop().time() + OUTAGE
        while True:
            try:
                await attempt()
            except StoreUnavailableError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                logger.warning("%s; trying again", error)
                await asyncio.sleep(1.0)
            else:
                return

    # -- collecting

    def _take(self, record: Record) -> None:
        """Write the line of a terminal record, unless it is written or its task is not ours."""
        task = self.outstanding.pop(str(record.get("id")), None)
        if task is None:
            return
        line = _line(task, record)
        try:
            self.file.append(line)
        except OSError as error:
            self.outstanding[task["id"]] = task  # its record is kept for the next run
            self._fail(
                OutputError(f"{self.file.path} cannot be written: {error.strerror}; nothing is lost, run it again")
            )
            return
        progress = self.types[task["type"]]
        if line["outcome"] == "completed":
            progress.completed += 1
        else:
            progress.dead += 1
        task_id = task["id"]
        self._unsynced.append(task_id)
        self.tally.forget(task_id)
        self._tell_waiters(task_id)
        self._room.set()
        self._over_if_done()

    def _tell_waiters(self, task_id: str) -> None:
        for waiter in self._waiters:
            waiter.missing.discard(task_id)
            if not waiter.missing and not waiter.future.done():
                waiter.future.set_result(None)

    async def results(self, task_ids: list[str]) -> dict[str, Any]:
        """See :meth:`Job.results`."""
        for task_id in task_ids:
            if task_id not in self._accepted and task_id not in self.file:
                raise InvalidTaskError(f"job.results: no task {task_id!r} was yielded before", path="id")
        missing = {task_id for task_id in task_ids if task_id not in self.file}
        if missing:
            await self._flush()
            missing = {task_id for task_id in missing if task_id not in self.file}
        if missing:
            waiter = _Waiter(missing, asyncio.get_running_loop().create_future())
            self._waiters.append(waiter)
            try:
                await waiter.future
            finally:
                self._waiters.remove(waiter)
        lines = ((task_id, self.file.read(task_id)) for task_id in task_ids)
        return {task_id: line.get("value") for task_id, line in lines if line["outcome"] == "completed"}

    async def _look_often(self) -> None:
        """Hints may be lost; records are not."""
        failing = False
        number = 0
        while True:
            await asyncio.sleep(self._records.look_every)
            number += 1
            try:
                if self.started and self.outstanding:
                    await self._look(every=number % 10 == 0)
                failing = False
            except StoreError as error:
                logger.log(logging.DEBUG if failing else logging.WARNING, "%s", error)
                failing = True

    async def _look(self, *, every: bool, resend: bool = True) -> None:
        """Look for records. With the lock, everything outstanding has been sent.

        When the queue was empty before the look and a task still has no record, Redis knows nothing of it: the file
        was edited, or Redis lost its data. Then it is sent again.
        """
        async with self._flushing:
            empty = (await self.app.queue.stats()).live == 0
            ids = list(self.outstanding)
            for record in await self._records.find(ids if empty or every else ids[:LOOK_AT]):
                self._take(record)
            if empty and resend:
                await self._resend([task_id for task_id in ids if task_id in self.outstanding])

    async def _resend(self, lost: list[str]) -> None:
        again = []
        for task_id in lost:
            self._sends[task_id] = self._sends.get(task_id, 1) + 1
            if self._sends[task_id] > MOST_SENDS:
                error = {"error": f"sent {MOST_SENDS} times, and Redis kept no trace of it", "error_type": "Lost"}
                self._take({"id": task_id, "outcome": "dead", "reason": "lost", "attempts": 0, "error": error})
            else:
                again.append(self.outstanding[task_id])
        if again:
            await self._records.forget([task["id"] for task in again])
            await self.app.queue.produce_many(again, want_results=True)

    async def _sync_often(self) -> None:
        while True:
            await asyncio.sleep(SYNC_EVERY)
            with contextlib.suppress(StoreError):  # then the records expire by themselves
                await self._sync()

    async def _sync(self) -> None:
        """Lines to disk first, then their records may go."""
        ids, self._unsynced = self._unsynced, []
        if ids:
            await asyncio.to_thread(self.file.sync)
            await self._records.delete(ids)

    async def abandon(self, queue: str) -> None:
        """Let what an earlier job left in its queue expire. Raises: StoreError."""
        await self.connect()
        await self._records.keep_for(int(KEEP), queue)

    # -- the dead

    async def revisit_dead(self, *, retry: bool) -> int:
        """Before :meth:`run`: take back the lines of dead tasks that ended well since (or with ``retry``, of all).

        Somebody may have replayed their dead letters. Returns how many lines were taken back.
        """
        if not self.file.dead:
            return 0
        await self.connect()
        dead = set(self.file.dead)
        found = await self._records.find(sorted(dead))
        good = {record["id"] for record in found if record.get("outcome") == "completed"}
        if not retry:
            self.file.drop(good)
            return len(good)
        await self._records.delete(sorted(dead - good))
        self.file.drop(dead)
        await self._records.keep_for(None)
        await self._records.forget(sorted(dead - good - await self._replay(dead - good)))
        return len(dead)

    async def _replay(self, dead: set[str]) -> set[str]:
        """Replay the dead letters of the tasks ``dead``; returns the ids that had one."""
        queue, after, found, had = self.app.queue, None, list[str](), set[str]()
        while letters := await queue.read_dlq(1000, after):
            after = letters[-1].message_id
            for letter in letters:
                task_id = (letter.task_data or {}).get("id")
                if task_id in dead and task_id not in had:
                    had.add(task_id)
                    found.append(letter.message_id)
        await queue.replay_dlq(found)
        return had


def _line(task: TaskDict, record: Record) -> dict[str, Any]:
    line = {"id": task["id"], "type": task["type"], "outcome": record.get("outcome", "dead")}
    if line["outcome"] == "completed":
        line["value"] = record.get("value")
    else:
        error = record.get("error") or {}
        line["reason"] = record.get("reason", line["outcome"])
        line["attempts"] = record.get("attempts", 0)
        line["error"] = error.get("error", "")
        line["error_type"] = error.get("error_type", "")
    if task.get("metadata"):
        line["metadata"] = task["metadata"]
    return line
