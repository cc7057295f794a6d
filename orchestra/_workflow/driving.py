"""The changes of a workflow that workers drive: each is one script call that answers what may be sent next.

Owns the calls and their words. Refuses to own sending, agents and built-in steps, which are the driver's. No state
between calls; one event loop.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from orchestra import telemetry
from orchestra._shared import Connectable
from orchestra._workflow.answers import Begun, Moved, StepFacts, read_begun, read_moved
from orchestra._workflow.plan import compensation_step, compile_plan
from orchestra._workflow.record import decode_state
from orchestra._workflow.states import StepState, WorkflowState, error_of
from orchestra._workflow.store import Arg, WorkflowStore, workflow_store
from orchestra.errors import CorruptEntryError, InvalidTaskError, WorkflowError
from orchestra.serialization import dumps, loads
from orchestra.tasks import TaskState, check_ident, require_int, require_number

if TYPE_CHECKING:
    from orchestra.memory import MemoryManager

logger = logging.getLogger("orchestra.workflow")

MAX_GROWN: Final = 10_000
"""Most items of one map."""
_YEAR: Final = 365 * 86_400.0
_MAX_TRIES: Final = 16


class Driving(Connectable):
    """The part of :class:`~orchestra.workflow.WorkflowEngine` that drivers and workers call.

    Steps are named by workflow, index and series. Every method raises WorkflowError for an unknown workflow or step,
    CorruptEntryError for a record that is damaged (it is left as it is) and StoreError when Redis fails; a change that
    does not apply any more is no error: ``Moved.done`` is False. Each is one round trip unless it says otherwise.
    """

    memory_manager: MemoryManager
    _retention_ms: int
    _kept: WorkflowStore | None = None

    async def _connect(self) -> None:
        await self.memory_manager
        await self._store()

    async def _store(self) -> WorkflowStore:
        return await workflow_store(self.memory_manager)

    async def _ask(self, op: str, task_id: str, *args: Arg) -> list[Any]:
        store = await self._store()
        return await store.move(op, task_id, self._retention_ms, self.memory_manager.max_bytes, args)

    async def _do(self, op: str, task_id: str, *args: Arg, step: int | None = None) -> Moved:
        return await self._taken(task_id, await self._ask(op, task_id, *args), step)

    async def _taken(self, task_id: str, reply: Sequence[Any], step: int | None) -> Moved:
        """Read an answer, tell of it, and tell the parent if this was the end of a child."""
        moved = read_moved(task_id, reply)
        if moved.why == "index":
            raise WorkflowError(f"workflow {task_id} has steps 0 to {moved.total - 1}, not {step!r}")
        if moved.done and moved.why != "repeated":
            self._emit(task_id, moved.status, step, moved.total - moved.left, moved.total)
        if moved.attention and moved.status.value != "running" and reply[11]:
            return moved._replace(parent=await self._tell_parent(task_id, reply[11].decode()), attention=False)
        return moved

    @staticmethod
    def _emit(task_id: str, status: TaskState, step: int | None, completed: int, total: int) -> None:
        telemetry.emit(
            "workflow.changed",
            {"completed": completed, "total": total},
            {"workflow_id": task_id, "status": status.value, "step": step},
        )

    # -- one step

    async def begin(self, workflow_id: str, index: int, series: int, fence: int, claim: str = "") -> Begun:
        """Ask whether a delivery may run the step, and get what its agent call needs. O(its dependencies).

        ``fence`` is the delivery's: of two of one series the lower is stale. ``claim``, ``"<life>:<copy>"``, is its
        task's: of two that were sent for one series, however late, only the first to begin ever runs; and none that was
        sent in an earlier life of the workflow, which the beginning of the record's token tells. The step leaves the
        outbox.
        """
        reply = await self._ask("begin", workflow_id, index, series, fence, claim)
        moved = await self._taken(workflow_id, reply, index)
        begun = read_begun(workflow_id, reply)
        return begun._replace(moved=moved)

    async def facts(self, workflow_id: str, index: int) -> StepFacts:
        """What args and ``when`` of a step may refer to, without beginning it. O(its dependencies)."""
        reply = await self._ask("look", workflow_id, index)
        if reply[1] == b"index":
            await self._taken(workflow_id, reply, index)
        return read_begun(workflow_id, reply).known

    async def results(self, workflow_id: str, indexes: Sequence[int]) -> dict[int, Any]:
        """The results of those of the steps that have one. O(indexes)."""
        names = {index: f"r:{index}" for index in indexes}
        (found,) = await (await self._store()).fields([workflow_id], list(names.values()))
        return {index: loads(found[name]) for index, name in names.items() if name in found}

    async def finish(
        self,
        workflow_id: str,
        index: int,
        series: int | None,
        state: StepState,
        result: Any = None,
        error: Mapping[str, Any] | str | None = None,
        *,
        fence: int | None = None,
        claim: str = "",
    ) -> Moved:
        """Record that a step ended, and everything that follows. O(its dependents).

        ``state`` is COMPLETED, FAILED (its ``on_failure`` decides what that means) or SKIPPED. ``fence`` and ``claim``:
        see :meth:`begin`. Repeated, it changes
        nothing and tells which of its dependents were not begun; the first result stays. ``why`` is "stale" for
        another series, claim or a later delivery, "ended" when it ended otherwise, "over" when the workflow has.

        Raises:
            TaskTooLargeError, InvalidTaskError: the result cannot be recorded; nothing was.
        """
        if state not in (StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED):
            raise WorkflowError(f"a step ends as completed, failed or skipped, not {state!r}")
        told = self._packed(f"result of step {index}", result)
        problem = error_of(error) if error is not None else {"message": "failed"} if state is StepState.FAILED else None
        facts = (told, self._packed(f"error of step {index}", problem))
        args = (index, _some(series), _some(fence), state.value, *facts, claim)
        return await self._do("finish", workflow_id, *args, step=index)

    async def retrying(
        self,
        workflow_id: str,
        index: int,
        series: int,
        error: Mapping[str, Any] | str | None = None,
        delay: float = 0.0,
        *,
        fence: int | None = None,
        counted: bool = True,
        claim: str = "",
    ) -> Moved:
        """RUNNING → PENDING: the queue brings the step back after ``delay`` seconds.

        ``counted`` False: it was no attempt (throttled), and no event is written.
        """
        data = dumps({"error": None if error is None else error_of(error), "delay": delay})
        args = (index, series, _some(fence), int(counted), data, claim)
        return await self._do("retrying", workflow_id, *args, step=index)

    async def park(
        self,
        workflow_id: str,
        index: int,
        series: int,
        *,
        signal: str | None = None,
        timer: bool = False,
        child: str | None = None,
        prompt: Any = None,
        due: float | None = None,
        fence: int | None = None,
        claim: str = "",
    ) -> Moved:
        """The step is WAITING, for one of ``signal``, ``timer`` (with ``due``) and ``child``; it holds no worker.

        ``due``: seconds from now at which :meth:`fire` ends it; the outbox has it two seconds later. A signal that has
        come before counts. A step that was RUNNING runs again when its signal comes, under a new series; one that was
        not is COMPLETED with the value.
        """
        given = [kind for kind, word in (("signal", signal), ("timer", timer), ("child", child)) if word]
        if len(given) != 1:
            raise WorkflowError(f"a step waits for one of signal, timer and child, got {given}")
        name = check_ident(f"name of the {given[0]}", signal or child) if signal or child else "-"
        if due is not None:
            require_number("park due", due, 0.0, 10 * _YEAR, unit="seconds")
        ms = 0 if due is None else max(1, round(due * 1000))
        told = dumps({"for": given[0], "name": name, "prompt": prompt, "due_in": due})
        args = (index, series, _some(fence), given[0], name, ms, self._packed("prompt", prompt), told, claim)
        return await self._do("park", workflow_id, *args, step=index)

    async def fire(self, workflow_id: str, index: int, series: int) -> Moved:
        """What a WAITING step waits for is due, by the clock of Redis: a timer COMPLETED, a signal FAILED.

        Not due: ``why`` is "early". Not WAITING any more: "repeated".
        """
        problem = {"type": "SignalTimeout", "message": "no signal came within its timeout"}
        return await self._do("fire", workflow_id, index, series, dumps(problem), step=index)

    async def grow(
        self,
        workflow_id: str,
        steps: Sequence[Mapping[str, Any]],
        *,
        parent: int,
        series: int | None = None,
        max_parallel: int | None = None,
    ) -> Moved:
        """Add the items of the map step ``parent``, which is WAITING then, and COMPLETED with their results in the end.

        ``steps`` are plans of steps, each with its ``item`` and ``index``; at most ``max_parallel`` of them are ready at
        once. An item that FAILED fails the map unless it says ``on_failure``; others begin no more then. No items: the
        map is COMPLETED with []. Repeated, it adds nothing. O(items).

        Raises:
            WorkflowError: there are more than 10,000 items.
        """
        if len(steps) > MAX_GROWN:
            raise WorkflowError(f"a map takes at most {MAX_GROWN} items, got {len(steps)}: map over parts of the list")
        if max_parallel is not None:
            require_int("max_parallel", max_parallel, 1, MAX_GROWN)
        rows: list[Arg] = []
        for place, step in enumerate(steps):
            name = check_ident("id of an item", step.get("id") or f"{parent}[{place}]")
            rows += (self._packed("an item", dict(step)), str(step.get("on_failure") or "fail")[0], name)
        told = dumps({"for": "items", "name": str(len(steps))})
        args = (parent, _some(series), "", max_parallel or 0, len(steps), *rows, told)
        return await self._do("grow", workflow_id, *args, step=parent)

    # -- the whole workflow

    async def signal(self, workflow_id: str, name: str, value: Any = None, *, by: str | None = None) -> Moved:
        """Bring a signal: to the steps that wait for it, or kept until one does. The first value of a name stays.

        ``why`` is "answered" when there was one, "stop" or "over" when the workflow ends or has ended.
        """
        check_ident("signal name", name)
        told = dumps({"name": name, "value": value} | ({} if by is None else {"by": by}))
        packed = self.memory_manager.encode(f"signal {name!r}", value)
        return await self._do("signal", workflow_id, name, packed, secrets.token_hex(8), told)

    async def pause(self, workflow_id: str) -> Moved:
        """Begin nothing more; what runs goes on."""
        return await self._do("pause", workflow_id)

    async def resume(self, workflow_id: str) -> Moved:
        """Go on: a paused workflow, or one that FAILED, where it failed. O(steps).

        What was held, or failed, is ready under a new series. ``why`` is "compensated" when the workflow has undone what
        it did, "over" when it is COMPLETED or CANCELLED.
        """
        return await self._do("resume", workflow_id)

    async def cancel(self, workflow_id: str, reason: str | None = None) -> Moved:
        """Begin nothing more, undo what can be, and end CANCELLED. O(steps) when something runs.

        ``in_flight`` are the steps that run, ``children`` the workflows that are to be cancelled with it.
        """
        problem = dumps({"type": "cancelled", "message": reason or "cancelled"})
        reply = await self._ask("cancel", workflow_id, problem)
        moved = await self._taken(workflow_id, reply, None)
        runs, children = reply[10] or ((), ())
        pairs = tuple(zip(runs[::2], runs[1::2], strict=True))
        return moved._replace(in_flight=pairs, children=tuple(child.decode() for child in children))

    async def next_phase(self, workflow_id: str) -> Moved:
        """Move on a workflow that fails or is cancelled and in which nothing runs, or tell the parent of a child's end.

        Steps that COMPLETED and say ``compensate`` are undone by grown steps, the last first, one after the other;
        with none, the workflow ends. ``children`` are to be cancelled. Idempotent. Two round trips, O(workflow).

        Raises:
            WorkflowError: the workflow changes all the time; call again.
        """
        children: dict[str, None] = {}
        for _ in range(_MAX_TRIES):
            state, order = await self._ordered(workflow_id)
            for each in state.steps:  # first they: once this one has ended, nobody would look for them
                if each.waiting and each.waiting["for"] == "child" and each.waiting["name"] not in children:
                    children[each.waiting["name"]] = None
                    with contextlib.suppress(WorkflowError):  # one that is not planned yet
                        await self.cancel(each.waiting["name"], f"its parent {workflow_id} ended")
            if state.is_finished():
                return (await self._told_again(state))._replace(children=tuple(children))
            rows: list[Arg] = []
            compiled = compile_plan(state.plan)
            undone = [compiled[index] for index in order if compiled[index].compensate is not None]
            for step in undone:
                planned = compensation_step(step)
                rows += (self._packed("a compensation", planned), planned["id"], step.index)
            moved = await self._do("undo", workflow_id, state.version, len(undone), *rows)
            if moved.why != "conflict":
                return moved._replace(children=tuple(children))
        raise WorkflowError(f"workflow {workflow_id} changed {_MAX_TRIES} times meanwhile; call again")

    async def _ordered(self, workflow_id: str) -> tuple[WorkflowState, list[int]]:
        """The workflow, and the planned steps that COMPLETED, the last one first."""
        record, context = await (await self._store()).read(workflow_id)
        if not record:
            raise WorkflowError(
                f"there is no workflow for task {workflow_id}: it was never initialised, or has expired"
            )
        state = decode_state(workflow_id, record, context)
        done = [step.step_index for step in state.steps if step.state is StepState.COMPLETED and not step.role]
        return state, sorted(done, key=lambda index: -int(record[f"q:{index}"].split(b" ")[8]))

    async def _told_again(self, state: WorkflowState) -> Moved:
        if state.parent is None:
            return await self._do("told", state.task_id)
        told = await self._tell_parent(state.task_id, f"{state.parent[0]} {state.parent[1]}")
        moved = Moved(True, "over", (), state.status, "", state.left, 0, state.version, len(state.steps))
        return moved._replace(parent=told)

    async def _tell_parent(self, child: str, parent: str) -> tuple[str, Moved]:
        """Commit the step of the parent that waits for ``child``, which has ended; then the outbox may forget it."""
        workflow_id, _, index = parent.rpartition(" ")
        series = _series_of(child, f"{workflow_id}/{index}")
        record, context = await (await self._store()).read(child)
        state = decode_state(child, record, context)
        where = (workflow_id, int(index), series, f"{state.task['of']}:0" if "of" in state.task else "")
        if state.status is TaskState.COMPLETED:
            moved = await self._end_of(where, StepState.COMPLETED, state.workflow_context.get("final_output"), None)
        else:
            problem = {
                "type": "ChildWorkflow",
                "message": f"child workflow {child} {state.status.value}",
                "child": child,
                "cause": state.error,
            }
            moved = await self._end_of(where, StepState.FAILED, None, problem)
        read_moved(child, await self._ask("told", child))
        return workflow_id, moved

    async def _end_of(
        self, where: tuple[str, int, int | None, str], state: StepState, result: Any, problem: Any
    ) -> Moved:
        claim = where[3]
        try:
            return await self.finish(*where[:3], state, result, problem, claim=claim)
        except InvalidTaskError as error:  # what the child came to is more than its parent may record
            told = {"type": type(error).__name__, "message": str(error)[:2000]}
            return await self.finish(*where[:3], StepState.FAILED, None, told, claim=claim)
        except WorkflowError as error:  # the parent is gone: nobody is left to be told
            return Moved(False, str(error), (), TaskState.CANCELLED, "", 0, 0)

    # -- the outbox

    async def overdue(self, limit: int = 100) -> list[tuple[str, Moved]]:
        """What should have begun by now, by workflow; it is put off by five seconds, so that one sweep has it.

        ``Moved.ready`` is to be sent (again), ``due`` to be fired, with ``attention`` next_phase is to be called.
        One round trip, and one for each workflow.
        """
        require_int("overdue limit", limit, 1, 10_000)
        store = await self._store()
        members: dict[str, list[tuple[int, int]]] = {}
        for member in await store.due(limit):
            workflow_id, index, series = member.rsplit("|", 2)
            members.setdefault(workflow_id, []).append((int(index), int(series)))
        found = []
        for workflow_id, entries in members.items():
            try:
                reply = await self._ask("sweep", workflow_id, *(word for entry in entries for word in entry))
                if len(reply) == 2 and reply[1] == b"unknown":
                    await store.forget([f"{workflow_id}|{index}|{series}" for index, series in entries])
                    continue
                moved = read_moved(workflow_id, reply)
            except CorruptEntryError as error:  # it must not keep the others from going on
                logger.warning("workflow %s cannot go on: %s", workflow_id, error)
                continue
            due = tuple(zip(reply[10][::2], reply[10][1::2], strict=True))
            found.append((workflow_id, moved._replace(due=due, attention=any(index < 0 for index, _ in entries))))
        return found

    async def cursor(self, name: str, value: str | None = None) -> str | None:
        """A position kept beside the workflows of this namespace under ``name``; ``value`` replaces it."""
        return await (await self._store()).cursor(check_ident("cursor name", name), value)

    def _packed(self, what: str, value: Any) -> bytes:
        return b"" if value is None else self.memory_manager.encode(what, value)


def _series_of(child: str, first: str) -> int | None:
    """Of which run of its parent's step ``child`` is: the end of an earlier one says nothing about a later one."""
    rest = child.removeprefix(first)
    if rest == child:
        return None  # somebody else named it
    return int(rest[1:]) if rest.startswith(".") and rest[1:].isdecimal() else 1


def _some(number: int | None) -> Arg:
    return "" if number is None else number
