"""Makes a pydantic-ai agent durable: its model and tool calls go through the journal of the task that runs it.

Built on the public interface for third-party engines, ``pydantic_ai.durable_exec``: the capability says what the engine is,
the backend carries out one call as one unit. Owns the names of calls in the journal (they are persisted: a change of them
makes running tasks ask again) and the order check → announce → call → record. Refuses to own the journal and the budget.

A name is the operation's (``JournalOperationNamer``), the id of the tool call where there is one, and a count for the same
name again, below the call in which it was made: nothing depends on which of two parallel calls is the first.

Guarantees: a recorded call is never made again. A call whose process dies between the call and its record is made again by
the next attempt (at least once), unless its tool is marked ``once``: then the next attempt raises ToolRepeatError.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Final, Literal

from pydantic import JsonValue
from pydantic_ai.agent import EventStreamHandler
from pydantic_ai.durable_exec import (
    JSON_CODEC,
    BaseDurabilityCapability,
    DurabilityEngineSpec,
    DurableOperationBackend,
    DurableOperationId,
    EventStreamHandlerId,
    ExternalEventError,
    ExternalEventWaiter,
    JournalCallableOperationBackend,
    ModelCompactMessagesId,
    ModelRequestId,
    RoleBasedOperationConfig,
    conversation_id_from_run_id,
    record_durable_unit,
)
from pydantic_ai.models import Model
from pydantic_ai.tools import AgentDepsT, RunContext
from pydantic_core import from_json, to_json

from orchestra.ai.journal import Journal
from orchestra.ai.usage import Meter, Usage
from orchestra.errors import ConfigurationError, Reject, TaskTooLargeError, ToolRepeatError, WaitForSignal

METADATA: Final = "orchestra"
ONCE: Final[dict[str, Any]] = {METADATA: {"once": True}}
"""As a tool's ``metadata``: it runs at most once. A repeat after a crash is refused instead of made."""
UNRECORDED: Final[dict[str, Any]] = {METADATA: False}
"""As a tool's ``metadata``: it is cheap and changes nothing, runs outside of the journal, and again on every attempt."""

_Config = Mapping[str, Any]


class Run:
    """One attempt of one agent run: the calls it makes, by name. Used by the tasks of one event loop."""

    def __init__(self, journal: Journal, meter: Meter, signals: Mapping[str, Any] | None = None) -> None:
        self.journal = journal
        self.meter = meter
        self.signals = {} if signals is None else signals
        self.failed_in_call: BaseException | None = None
        """What a call raised last: not recorded, so the next attempt makes that call again."""
        self.executed = 0
        self._recorded = journal.recorded
        self._counts: Counter[str] = Counter()

    def name(self, operation: str, cache_key: tuple[object, ...]) -> str:
        """The next name of ``operation`` in the journal."""
        tool_call = next((part.tool_call_id for part in cache_key if isinstance(part, RunContext)), None)
        name = f"{current_call.get()}{operation}{'' if tool_call is None else f'#{tool_call}'}"
        self._counts[name] += 1
        return f"{name}@{self._counts[name]}"

    async def call(
        self, operation_id: DurableOperationId, name: str, body: Callable[[], Awaitable[object]], config: _Config
    ) -> object:
        """What the journal has for the call, else what ``body`` gives, which is recorded before it is returned."""
        recorded = self.journal.recall(name)
        if recorded is not None:
            self._recorded -= 1
            record_durable_unit(executed=False)
            return from_json(recorded)
        if isinstance(
            operation_id, EventStreamHandlerId
        ):  # told by the attempt in which it happened, and never recorded
            return None if self._recorded > 0 else await body()
        if config.get("once"):
            await self._announce(name)
        model = isinstance(operation_id, ModelRequestId | ModelCompactMessagesId)
        payload = await (self._metered(name, body) if model else self._made(name, body))
        text = to_json(payload, inf_nan_mode="constants").decode()
        try:
            await self.journal.record(name, text, _usage(payload) if model else Usage())
        except TaskTooLargeError as error:
            raise Reject(f"what {name} returned is too large for the journal: {error}") from error
        if model:
            await self.meter.after()
        self.executed += 1
        record_durable_unit(executed=True)
        return from_json(text)

    async def _announce(self, name: str) -> None:
        if self.journal.has_begun(name):
            tool = name.rpartition(":")[2].partition("#")[0]
            raise ToolRepeatError(
                f"tool {tool!r} may run once, and an earlier attempt began this call ({name}) without recording its end: "
                f"it is not made again. Find out what became of it before the task is replayed",
                tool=tool,
            )
        await self.journal.begin(name)

    async def _metered(self, name: str, body: Callable[[], Awaitable[object]]) -> object:
        await self.meter.before()
        try:
            return await self._made(name, body)
        except Exception:
            await self.meter.failed()
            raise
        except BaseException:
            self.meter.interrupted()
            raise

    async def _made(self, name: str, body: Callable[[], Awaitable[object]]) -> object:
        token = current_call.set(f"{name}/")
        try:
            return await body()
        except BaseException as error:
            self.failed_in_call = error
            raise
        finally:
            current_call.reset(token)


running: contextvars.ContextVar[Run | None] = contextvars.ContextVar("orchestra_ai_run", default=None)
"""The run that the current code is part of."""
current_call: contextvars.ContextVar[str] = contextvars.ContextVar("orchestra_ai_call", default="")
"""The call that the current code is part of, as the beginning of the names of calls within it."""


class Backend(JournalCallableOperationBackend[_Config]):
    """Carries out each operation as a call of the current :class:`Run`."""

    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: _Config,
    ) -> object:
        """See :class:`~pydantic_ai.durable_exec.CallableOperationBackend`."""
        run = running.get()
        if run is None:
            return await body()
        return await run.call(operation_id, run.name(name, cache_key), body, config)


def _unserialisable(error: Exception) -> BaseException:
    return Reject(f"what a model or tool call returned cannot be journaled, because it is no JSON: {error}")


class OrchestraDurability(BaseDurabilityCapability[AgentDepsT]):
    """The capability that puts an agent's calls into the journal of the task it runs for.

    :func:`orchestra.ai.agent` adds it to every run. Give it to a sub-agent at construction (``capabilities=[...]``), which
    the tools of another agent run: then its calls are journaled and counted, too. Outside of a task it does nothing.

    ``name``: of the agent in the journal, stable over releases; by default the agent's own. ``models``: other models that
    runs may use, by key.
    """

    engine_spec: ClassVar[DurabilityEngineSpec] = DurabilityEngineSpec(
        engine_name="Orchestra",
        durable_unit_noun="call",
        durable_container_noun="task",
        codec=JSON_CODEC,
        serialization_failure=_unserialisable,
        toolset_lifecycles={"function": "enter-always", "mcp": "enter-in-durable-unit", "dynamic": "enter-never"},
        tool_config_key=METADATA,
    )

    def __init__(
        self,
        *,
        name: str | None = None,
        models: Mapping[str, Model] | None = None,
        event_stream_handler: EventStreamHandler[AgentDepsT] | None = None,
    ) -> None:
        super().__init__(models=models, event_stream_handler=event_stream_handler, name=name)

    @property
    def in_durable_context(self) -> bool:
        """Whether a task runs the agent."""
        return running.get() is not None

    def get_default_run_id(self) -> str | None:
        """The journal's key: every attempt is the same run."""
        run = running.get()
        return None if run is None else run.journal.key

    def get_default_conversation_id(self, run_id: str) -> str | None:
        """The same for every attempt."""
        return conversation_id_from_run_id(run_id) if self.in_durable_context else None

    def get_durable_operation_backend(self) -> DurableOperationBackend[Any]:
        """The backend of this agent's calls."""
        config: RoleBasedOperationConfig[_Config] = RoleBasedOperationConfig(
            model={}, event={}, capability={}, tool={}, resolve_tool=_tool_config
        )
        return Backend(agent_name=self.name, default_model_id=self.default_model_id, config=config)


def _tool_config(_: DurableOperationId, tool: Any, name: str) -> _Config | Literal[False]:
    """What a tool's metadata says for orchestra."""
    given = None if tool is None else (tool.tool_def.metadata or {}).get(METADATA)
    if given is None:
        return {}
    if given is False:
        return False
    if not isinstance(given, Mapping) or set(given) - {"once"} or not isinstance(given.get("once", False), bool):
        raise ConfigurationError(
            f"tool {name!r}: metadata[{METADATA!r}] must be False or {{'once': True or False}}, got {given!r}",
            field=f"metadata.{METADATA}",
            value=given,
        )
    return dict(given)


def _usage(payload: Any) -> Usage:
    """The usage that an encoded model response tells; one request where it tells nothing."""
    response = payload.get("response", payload) if isinstance(payload, dict) else {}
    told = response.get("usage") or {} if isinstance(response, dict) else {}
    return Usage(1, int(told.get("input_tokens") or 0), int(told.get("output_tokens") or 0))


class SignalWaiter(ExternalEventWaiter):
    """Waits for an external event as a workflow step waits for a signal: by ending the attempt."""

    def __init__(self, run: Run, workflow_id: str | None) -> None:
        self._run = run
        self._workflow_id = workflow_id

    async def wait(
        self, name: str, *, ask: Callable[[str], Awaitable[JsonValue]], timeout: timedelta | None
    ) -> JsonValue:
        """See :class:`~pydantic_ai.durable_exec.ExternalEventWaiter`; the token is ``<workflow id>:<signal>``."""
        if self._workflow_id is None:
            raise ExternalEventError(f"only a step of a workflow can wait for {name!r}")
        token = f"{self._workflow_id}:{name}"
        call = self._run.name(f"ask:{name}", ())
        recorded = self._run.journal.recall(call)
        if recorded is None:
            answer = await ask(token)
            await self._run.journal.record(call, to_json(answer).decode())
        else:
            answer = from_json(recorded)
        if answer is not None:
            return answer
        if name in self._run.signals:
            value: JsonValue = self._run.signals[name]
            return value
        raise WaitForSignal(name, timeout=None if timeout is None else timeout.total_seconds())
