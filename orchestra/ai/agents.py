"""A pydantic-ai agent as an agent of orchestra: what a task asks goes in, what the model answers comes out as plain data.

Owns one run for one task: its prompt, its place in the journal, its budgets, what is told of it, and what its errors mean.
Refuses to own the conversation with the model (pydantic-ai's), retries and limits (the queue's). A :class:`PydanticAgent`
has no state between tasks; any number of them may run at once, each in an asyncio task of one event loop.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import json
import logging
import re
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, ParamSpec, TypeAlias

from pydantic_ai import Agent
from pydantic_ai.capabilities import AbstractCapability, HandleDeferredToolCalls
from pydantic_ai.durable_exec import external_event_scope, replay_scope
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.messages import AgentStreamEvent, ModelMessage, UserContent
from pydantic_ai.models import Model
from pydantic_ai.run import AgentRunResult
from pydantic_ai.settings import ModelSettings, merge_model_settings
from pydantic_ai.tools import RunContext
from pydantic_core import PydanticSerializationError, to_jsonable_python

from orchestra._limiting.use import KeyOf, key_for, require_key_of
from orchestra.ai.approvals import Approvals
from orchestra.ai.calling import Calling, calling, journals, spending
from orchestra.ai.conversation import Conversation, decoded, plain
from orchestra.ai.durability import OrchestraDurability, Run, SignalWaiter, current_call, running
from orchestra.ai.failures import translated
from orchestra.ai.journal import Journal, journal_key
from orchestra.ai.streaming import Telling
from orchestra.ai.usage import Budget, Meter, Usage, WorkflowUsage, total
from orchestra.errors import ConfigurationError, Reject, WaitForSignal
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask, check_ident, require_number

Prompt: TypeAlias = str | Sequence[UserContent]
AgentFunction: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]
P = ParamSpec("P")
PromptOf: TypeAlias = str | Callable[[BaseTask], Prompt | Awaitable[Prompt]]

KEEP_S: Final = 7 * 86_400.0
"""Seconds after its last entry at which the journal of an unfinished run is forgotten."""
PARKED_S: Final = 90 * 86_400.0
"""Seconds the journal of a run is kept that waits for somebody without a timeout."""
logger = logging.getLogger("orchestra.ai")
_OURS = frozenset(("user_prompt", "message_history", "conversation", "run_id", "infer_name", "usage"))
_FIELD = re.compile(r"\{(\w+)\}")


_telling: contextvars.ContextVar[Telling | None] = contextvars.ContextVar("orchestra_ai_telling", default=None)


async def _tell(context: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
    telling = _telling.get()
    if telling is not None:
        await telling.follow(context, events)
        return
    async for _ in events:
        pass


class PydanticAgent:
    """Runs a ``pydantic_ai.Agent`` for each task; made by :func:`agent`, which says what the arguments mean."""

    def __init__(
        self,
        pydantic_agent: Agent[Any, Any],
        *,
        prompt: PromptOf = "prompt",
        name: str | None = None,
        model: Model | str | None = None,
        deps: Any = None,
        history: str | None = None,
        result: Literal["output", "full"] = "output",
        stream: bool = False,
        budget: Budget | None = None,
        workflow_budget: Budget | None = None,
        key: KeyOf = None,
        approval: str = "approve",
        approval_timeout: float | None = None,
        memory: MemoryManager | None = None,
        durable: bool = True,
        keep: float = KEEP_S,
        role: str = "",
        **run_options: Any,
    ) -> None:
        if not isinstance(pydantic_agent, Agent):
            raise ConfigurationError(
                f"orchestra.ai.agent takes a pydantic_ai.Agent, got {pydantic_agent!r}", field="pydantic_agent"
            )
        self.name = check_ident("agent name", name or pydantic_agent.name or "agent")
        self.__name__ = re.sub(r"\W", "_", self.name)
        self.pydantic_agent = pydantic_agent
        self._prompt = prompt
        self._model = model
        self._deps = deps
        self._history = history
        self._result = result
        self._budget, self._workflow_budget = budget, workflow_budget
        require_key_of("agent key", key)
        self._key = key
        self._approval, self._approval_timeout = check_ident("agent approval", approval), approval_timeout
        self._memory = memory
        self._durable = durable
        self._keep = keep
        self._role = role
        self._options = {name: run_options[name] for name in run_options.keys() - {"capabilities"}}
        self._capabilities = list(run_options.get("capabilities") or ())
        self._stream = stream
        self._check()
        self._ours = self._durability()

    def _check(self) -> None:
        if self._result not in ("output", "full"):
            raise ConfigurationError(f"agent result must be 'output' or 'full', got {self._result!r}", field="result")
        for field, value in (("budget", self._budget), ("workflow_budget", self._workflow_budget)):
            if value is not None and not isinstance(value, Budget):
                raise ConfigurationError(f"agent {field} must be a Budget, got {value!r}", field=field, value=value)
        if taken := sorted(_OURS & self._options.keys()):
            raise ConfigurationError(f"{taken[0]!r} of a run is orchestra's to set", field=taken[0])
        require_number("agent keep", self._keep, 0.0, 10 * 365 * 86_400.0, unit="seconds", exclusive=True)
        if self._approval_timeout is not None:
            require_number("agent approval_timeout", self._approval_timeout, 0.0, 10 * 365 * 86_400.0, unit="seconds")

    def _durability(self) -> list[AbstractCapability[Any]]:
        """The capability that every run gets; none where the agent was built with one."""
        if OrchestraDurability.from_agent(self.pydantic_agent) is not None:
            return []
        models = {"orchestra": self._model} if isinstance(self._model, Model) else None
        made: OrchestraDurability[Any] = OrchestraDurability(
            name=self.name, models=models, event_stream_handler=_tell if self._stream else None
        )
        return [made]

    async def run(self, task: BaseTask) -> Any:
        """Run the agent for ``task``; what the model answers, as plain data.

        Raises:
            Throttled: the provider limits requests. Reject: it refused this one for good, or the task's input cannot be a
                prompt. RetryLater: it asked to wait. WaitForSignal: a tool call waits for approval. BudgetExceededError: a
                budget is used up. ToolRepeatError: a tool that may run once may have run. StoreError: Redis failed.
        """
        facts = calling(task, self._memory, role=self._role)
        memory = facts.memory if self._durable else None
        journal = Journal(memory, facts.key, facts.order, fingerprint=facts.fingerprint, keep=self._keep)
        await journal.open()
        if journal.recorded:
            logger.info("agent %r goes on with task %s: %d calls are journaled", self.name, task.id, journal.recorded)
        run = Run(journal, Meter(self._budget, lambda: journal.used, self._spending(facts)), facts.signals)
        try:
            return await self._attempt(facts, run)
        except WaitForSignal as waiting:
            await journal.park(PARKED_S if waiting.timeout is None else waiting.timeout + self._keep)
            raise
        except Exception as error:
            await self._after_failure(run, error)
            told = translated(error, lambda: key_for(self._key, task))
            if told is error:
                raise
            raise told from error

    def _spending(self, facts: Calling) -> WorkflowUsage | None:
        if facts.workflow_id is None:
            return None
        return WorkflowUsage(*spending(facts.memory, facts.workflow_id), facts.step, self._workflow_budget)

    async def _attempt(self, facts: Calling, run: Run) -> Any:
        task, journal = facts.task, run.journal
        prompt = await self._asked(task)
        conversation = self._conversation(facts)
        past: list[ModelMessage] | None = None
        if conversation is not None:
            past = await conversation.history(journal)
        elif isinstance(task.input, Mapping) and task.input.get("message_history"):
            past = _given_history(task.input["message_history"])
        async with contextlib.AsyncExitStack() as stack:
            deps = await _made(self._deps, task, stack)
            answer = await self._ask(facts, run, prompt, past, deps)
        if conversation is not None:
            await conversation.add(journal, answer.new_messages())
        output = self._plain(answer.output)
        await self._end(facts, run)
        if self._result == "output":
            return output
        return {"output": output, "usage": journal.used.as_dict(), "messages": plain(answer.new_messages())}

    async def _ask(
        self, facts: Calling, run: Run, prompt: Prompt, past: list[ModelMessage] | None, deps: Any
    ) -> AgentRunResult[Any]:
        can_wait = facts.workflow_id is not None and self._durable and not self._role
        journal = run.journal if can_wait else None
        approvals = Approvals(self._approval, facts.signals, self._approval_timeout, journal)
        waiting: HandleDeferredToolCalls[Any] = HandleDeferredToolCalls(lambda _, requests: approvals.settle(requests))
        telling = None if facts.emit is None else Telling(facts.emit)
        waiter = SignalWaiter(run, facts.workflow_id if can_wait else None)
        token, told, within = running.set(run), _telling.set(telling), current_call.set("")
        try:
            with replay_scope(), external_event_scope(waiter):
                return await self.pydantic_agent.run(
                    prompt,
                    message_history=past,
                    deps=deps,
                    model=self._model,
                    capabilities=[*self._ours, *self._capabilities, waiting],
                    infer_name=False,
                    **{**self.options(facts.task), **self._settings()},
                )
        finally:
            current_call.reset(within)
            _telling.reset(told)
            running.reset(token)

    def options(self, task: BaseTask) -> dict[str, Any]:
        """Further arguments of ``pydantic_ai.Agent.run``."""
        return self._options

    def plain(self, output: Any) -> Any:
        """The model's answer as plain data."""
        return to_jsonable_python(output)

    def _plain(self, output: Any) -> Any:
        try:
            return self.plain(output)
        except PydanticSerializationError as error:
            raise Reject(f"the answer of agent {self.name!r} cannot go out as plain data: {error}") from error

    def _settings(self) -> dict[str, Any]:
        """The queue retries, so the provider's client must not: it would hold a worker, and hide a 429."""
        own, given = self.pydantic_agent.model_settings, self._options.get("model_settings")
        if callable(own) or callable(given) or "max_retries" in {**(own or {}), **(given or {})}:
            return {}
        return {"model_settings": merge_model_settings(given, ModelSettings(max_retries=0))}

    async def _end(self, facts: Calling, run: Run) -> None:
        """Close the journal, and count the step as one that has ended."""
        if run.journal.ended:
            return
        await run.journal.end()
        await run.meter.ended()
        if facts.emit is not None and facts.workflow_id is not None:
            await facts.emit("usage", run.journal.used.as_dict())

    async def _after_failure(self, run: Run, error: Exception) -> None:
        """Let the next attempt ask anew where a replay of the same answers could only fail the same way."""
        same = run.failed_in_call
        if not isinstance(error, UnexpectedModelBehavior) or (same is not None and _caused_by(error, same)):
            return
        if run.journal.once:
            raise Reject(
                f"the model's answers were no use ({error}), and asking anew could repeat a tool that may run once"
            ) from error
        await run.journal.reset(str(error)[:500])

    # -- what is asked

    def _conversation(self, facts: Calling) -> Conversation | None:
        given = facts.task.input
        name = given.get(self._history) if self._history and isinstance(given, Mapping) else None
        return None if name is None else Conversation(facts.memory, str(name))

    async def _asked(self, task: BaseTask) -> Prompt:
        if not isinstance(self._prompt, str):
            made = self._prompt(task)
            return await made if inspect.isawaitable(made) else made
        given = task.input
        if isinstance(given, str):
            return given
        if not isinstance(given, Mapping):
            raise Reject(f"agent {self.name!r} takes a text or a dict as input, got {type(given).__name__}")
        if _FIELD.search(self._prompt):
            return _FIELD.sub(lambda found: _text(self.name, given, found[1]), self._prompt)
        return _text(self.name, given, self._prompt)


def _text(agent_name: str, given: Mapping[str, Any], field: str) -> str:
    if field not in given:
        known = ", ".join(sorted(map(str, given))) or "nothing"
        raise Reject(f"agent {agent_name!r} needs {field!r} in its input to ask the model; the input has {known}")
    value = given[field]
    return value if isinstance(value, str) else json.dumps(to_jsonable_python(value), ensure_ascii=False)


def _given_history(given: Any) -> list[ModelMessage]:
    try:
        return decoded(given)
    except ValueError as error:
        raise Reject(f"message_history is no list of messages: {error}") from error


async def _made(deps: Any, task: BaseTask, stack: contextlib.AsyncExitStack) -> Any:
    """The dependencies of one run: a value, or what a function of the task gives; context managers are entered."""
    if not callable(deps) or inspect.isclass(deps):
        return deps
    made = deps(task)
    if inspect.isawaitable(made):
        made = await made
    if hasattr(made, "__aenter__"):
        return await stack.enter_async_context(made)
    return stack.enter_context(made) if hasattr(made, "__enter__") else made


def _caused_by(error: BaseException | None, cause: BaseException) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if error is cause:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _taking(make: Callable[P, PydanticAgent]) -> Callable[[Callable[..., AgentFunction]], Callable[P, AgentFunction]]:
    """The decorated function takes what ``make`` takes, also for type checkers and editors."""

    def decorate(function: Callable[..., AgentFunction]) -> Callable[P, AgentFunction]:
        function.__signature__ = inspect.signature(make)  # type: ignore[attr-defined]
        return function

    return decorate


@_taking(PydanticAgent)
def agent(*given: Any, **settings: Any) -> AgentFunction:  # noqa: D417 - described are the arguments it takes
    """``pydantic_agent`` as an agent of orchestra: an async function of a task, for ``register``, ``app.agent`` and steps.

    Args:
        pydantic_agent: any agent; it needs a model, and its toolsets need ids.
        prompt: what the model is asked: the name of a field of the task's input (default ``"prompt"``), a text with
            ``{fields}`` of it, or a function of the task (also async). An input that is a text is the prompt itself.
        name: of the agent in journals, by default the pydantic-ai agent's, else ``"agent"``; keep it over releases.
        model: instead of the agent's own.
        deps: the run's dependencies: a value, or a function of the task (also async) that gives them; a context manager that
            it gives is entered for the run.
        history: field of the input that names a conversation: what was said in it before is known to the model, and the
            run is added to it. Without it, a field ``message_history`` may carry messages as plain data.
        result: ``"output"``, the answer as plain data; ``"full"``, a dict of ``output``, ``usage`` and ``messages``.
        stream: tell of text and tool calls as they come, as events of the task's context: ``text`` (``delta``), ``tool_call``
            (``tool args id``), ``tool_result`` (``tool id outcome``).
        budget: what one task may use; ``workflow_budget``: what all steps of its workflow may use.
        key: which key a 429 of the provider parks, given as for :class:`~orchestra.agents.LimitUse`.
        approval: the signal that tool calls wait for which need approval; ``approval_timeout``: seconds, None for ever.
        memory: where journals are kept, instead of with the task's queue.
        durable: False keeps no journal: every attempt begins anew. Budgets and usage count all the same.
        keep: seconds an unfinished journal is kept after its last entry.
        **settings: of ``pydantic_ai.Agent.run``, such as ``model_settings``, ``usage_limits``, ``toolsets``.

    Cost: two round trips to open the journal, one for every call, one to end it; in a workflow two more for every model call,
    and four with a ``workflow_budget``.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    return as_function(PydanticAgent(*given, **settings))


def as_function(runner: PydanticAgent) -> AgentFunction:
    """``runner`` as a function that registries and Apps accept."""

    async def run(orchestra_task: BaseTask, **_: Any) -> Any:
        return await runner.run(orchestra_task)

    run.__name__ = runner.__name__
    run.__qualname__ = f"agent.{runner.__name__}"
    run.__doc__ = f"Runs the pydantic-ai agent {runner.name!r}."
    return run


async def task_usage(task_id: str, *, step: int | None = None, memory: MemoryManager) -> Usage:
    """What the model calls of a task have used so far, or of one ``step`` of a workflow. One round trip.

    Zero when its journal is forgotten: soon after its end. ``memory``: of the queue that it ran in, whose namespace is the
    queue's name.
    """
    key = journal_key("task", task_id, "") if step is None else journal_key("step", task_id, str(step), "")
    journal = Journal(journals(memory), key, (1 << 62, 0))
    await journal.read()
    return journal.used


async def workflow_usage(workflow_id: str, *, memory: MemoryManager) -> Usage:
    """What the model calls of all steps of a workflow have used so far. One round trip.

    It is kept for 30 days after the last call. ``memory``: of the queue that it ran in.
    """
    store, key = spending(journals(memory), workflow_id)
    return total(await store.get(key))
