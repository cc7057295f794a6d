"""The steps of a workflow run by whoever waits for it, through a pool, without a queue.

Owns the order of things where there is no queue: start a step, call its agent, record what became of it; of a plan with
``depends_on`` all steps that are ready at once. Refuses what needs somebody to come back later (signals, sleeps, maps,
children, compensation): that takes a queue. One event loop.

Crash-only: every call looks at the record and goes on from there. Of several processes, the one that started a step
last may record its result.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from orchestra._agents.services import StepScope
from orchestra._workflow.conditions import holds
from orchestra._workflow.local import NOT_NOW, LocalAgents, describe, wait_before_retry
from orchestra._workflow.plan import PlannedStep, compile_plan, ready_args
from orchestra._workflow.refs import Facts, StepFact
from orchestra.errors import InvalidTaskError, WorkflowError
from orchestra.tasks import BaseTask, TaskPriority
from orchestra.workflow import StepState, WorkflowEngine, WorkflowState, WorkflowStep

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("orchestra.orchestrator")

_OVER = frozenset({StepState.COMPLETED, StepState.SKIPPED, StepState.FAILED})


class Inline:
    """Runs workflows of ``engine`` with the agents of ``local``."""

    def __init__(self, engine: WorkflowEngine, local: LocalAgents) -> None:
        self._engine = engine
        self._local = local

    async def carry_on(self, state: WorkflowState) -> None:
        """Run what is left of a workflow; ``state`` follows the record, so that no step has to read it again."""
        planned = compile_plan(state.plan)
        refuse_built_in(state.task_id, planned)
        while ready := _ready(state, planned):
            for index in ready:
                step = state.steps[index]
                if step.state is StepState.FAILED:  # recorded, but not what it means for the workflow
                    await self._engine.handle_step_failure(state.task_id, index, step.error or "failed")
                    return
            if not await self._run_all(state, planned, ready):
                return
        await self._engine.complete_workflow(state.task_id, final_output(state, planned))

    async def _run_all(self, state: WorkflowState, planned: Sequence[PlannedStep], ready: list[int]) -> bool:
        """Run steps that are ready; False: one of them has ended the workflow."""
        if len(ready) == 1:
            return self._go_on(state, planned, await self.execute(state, planned[ready[0]]))
        results = await asyncio.gather(
            *(self.execute(state, planned[index]) for index in ready), return_exceptions=True
        )
        goes_on = True
        for result in results:
            if isinstance(result, BaseException):
                raise result
            goes_on = self._go_on(state, planned, result) and goes_on
        return goes_on

    def _go_on(self, state: WorkflowState, planned: Sequence[PlannedStep], step: WorkflowStep) -> bool:
        state.steps[step.step_index] = step
        return step.state is not StepState.FAILED or planned[step.step_index].on_failure == "continue"

    async def execute(self, state: WorkflowState, planned: PlannedStep) -> WorkflowStep:
        """Start a step, run its agent, record its result or its failure; returns it as recorded.

        Raises:
            Throttled, RetryLater, CircuitOpenError, WorkerPoolError: it cannot run now; it is PENDING again.
        """
        engine, task_id, index = self._engine, state.task_id, planned.index
        known = facts_of(state)
        if not holds(planned.when, known) or _left_out(state, planned):
            return await engine.update_step_state(task_id, index, StepState.SKIPPED)
        number = 1
        while True:
            step = await engine.update_step_state(task_id, index, StepState.RUNNING, attempt=state.steps[index].attempt)
            state.steps[index] = step
            try:
                scope = StepScope(task_id, index, planned.id, 1, len(state.steps), known)
                task = step_task(state, planned, known, step)
                entry = self._local.agents.get(task.type)
                if entry is not None and entry.check is not None:
                    entry.check(task.input, f"step {planned.id}: ")
                result = await self._local.call(task, scope)
                return await engine.update_step_state(task_id, index, StepState.COMPLETED, result, attempt=step.attempt)
            except NOT_NOW as error:
                wait = self._retry_wait(planned, error, number)
                await engine.update_step_state(task_id, index, StepState.PENDING, attempt=step.attempt)
                if wait is None:
                    raise
            except WorkflowError as error:
                if not error.faults:
                    raise  # somebody else has taken the step over; otherwise its references lead nowhere
                return await self._failed(state, planned, step, error)
            except InvalidTaskError as error:  # what the agent returned cannot be recorded
                return await self._failed(state, planned, step, error)
            except Exception as error:  # noqa: BLE001 - whatever an agent raises is the step's failure
                wait = self._retry_wait(planned, error, number)
                if wait is None:
                    return await self._failed(state, planned, step, error)
                await engine.update_step_state(task_id, index, StepState.PENDING, attempt=step.attempt)
            await asyncio.sleep(wait)
            number += 1

    def _retry_wait(self, planned: PlannedStep, error: Exception, number: int) -> float | None:
        entry = self._local.agents.get(planned.action)
        retry = planned.retry or (entry.options.retry if entry is not None else None)
        return wait_before_retry(error, retry, number)

    async def _failed(
        self, state: WorkflowState, planned: PlannedStep, step: WorkflowStep, error: Exception
    ) -> WorkflowStep:
        logger.warning("step %d (%s) of task %s failed: %r", step.step_index, step.action, state.task_id, error)
        told, where = describe(error), (state.task_id, step.step_index)
        if planned.on_failure != "fail":
            await self._engine.finish(*where, None, StepState.FAILED, None, told)  # as its on_failure says
            step.state = StepState.SKIPPED if planned.on_failure == "skip" else StepState.FAILED
            step.error = told
            return step
        after = await self._engine.handle_step_failure(*where, told, attempt=step.attempt)
        return after.steps[step.step_index]


def refuse_built_in(task_id: str, planned: Sequence[PlannedStep]) -> None:
    """Raise WorkflowError for steps that nobody can carry out without a queue."""
    faults = tuple(f"step {step.index}: {step.action} needs a queue" for step in planned if step.kind != "agent")
    if faults:
        raise WorkflowError(
            f"workflow {task_id} cannot run without a queue: {'; '.join(faults[:10])}; give the Orchestrator a task_queue",
            faults=faults,
        )


def _ready(state: WorkflowState, planned: Sequence[PlannedStep]) -> list[int]:
    """The steps that may run now. Of a sequential plan the first that has not ended, failed or not."""
    ready = []
    for step in planned:
        now = state.steps[step.index].state
        if now is StepState.COMPLETED or now is StepState.SKIPPED:
            continue
        if now is StepState.FAILED and step.on_failure == "continue":
            continue
        if all(state.steps[needed].state in _OVER for needed in step.depends_on):
            ready.append(step.index)
    return ready


def _left_out(state: WorkflowState, step: PlannedStep) -> bool:
    """Whether all it waited for was skipped, so that it is skipped too."""
    return step.linked and all(state.steps[needed].state is StepState.SKIPPED for needed in step.depends_on)


def facts_of(state: WorkflowState) -> Facts:
    """What references of the steps of ``state`` can lead to."""
    steps = {step.id: StepFact(step.state.value, step.result, step.error) for step in state.steps}
    return Facts(state.task.get("input"), state.workflow_context, steps)


def final_output(state: WorkflowState, planned: Sequence[PlannedStep]) -> Any:
    """The result of the last step that completed; of a plan that ends in several, each one's by its id."""
    read = {needed for step in planned for needed in step.depends_on}
    sinks = [step for step in planned if step.index not in read]
    done = [step for step in state.steps[: len(planned)] if step.state is StepState.COMPLETED]
    if len(sinks) == 1:
        return done[-1].result if done else None
    return {step.id: state.steps[step.index].result for step in sinks}


def step_task(state: WorkflowState, planned: PlannedStep, known: Facts, step: WorkflowStep) -> BaseTask:
    """The task that the agent of a step is given. Raises WorkflowError when a reference leads nowhere."""
    told, index = state.task, planned.index
    where = {"task_id": state.task_id, "step_index": index, "total": len(state.steps), "reasoning": planned.reasoning}
    context = {
        "task": {"id": state.task_id, "type": told.get("type"), "input": told.get("input")},
        "results": [earlier.result for earlier in state.steps[:index]],
        "shared": dict(state.workflow_context),
    }
    return BaseTask(
        id=f"{state.task_id}:{index}",
        type=planned.action,
        input=told.get("input") if planned.args is None else ready_args(planned, known),
        priority=told.get("priority", TaskPriority.NORMAL),
        attempt=step.attempt,
        metadata={**told.get("metadata", {}), "workflow": where, "context": context},
        timeout=planned.timeout,
        fence=step.attempt,
    )
