"""Between tool calls that need approval and the signals of a workflow.

Owns what is asked (the prompt of a signal) and what an answer means. Refuses to own waiting: it raises ``WaitForSignal``,
which parks the step, and the next attempt of the run comes here again with the same calls, out of its journal.

The first round of a run waits for the signal ``approve``, the second for ``approve-2``, and so on. An answer is ``True``,
``False``, a text (denied, and why), a dict with ``approved`` and optionally ``message`` and ``override_args``, or for
several calls ``{"calls": {tool call id: one of these}}``. For calls that are executed elsewhere the answer is their result,
one value for a single call or ``{"calls": {...}}``. What an answer leaves out is denied.

An answer counts for the calls that were asked about, which the journal remembers with their arguments, and for no others: where
a run has lost its journal, or began anew, its calls are asked about in another round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pydantic_ai.messages import ToolCallPart
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults, ToolApproved, ToolDenied
from pydantic_core import to_json

from orchestra.ai.journal import Journal
from orchestra.errors import Reject, WaitForSignal

UNANSWERED = "Nobody decided about this call, so it was not made."


class Approvals:
    """The rounds of approval of one run. ``signal``: name of the first round's; ``timeout``: seconds a round waits.

    ``journal``: None where nobody could tell the run.
    """

    def __init__(self, signal: str, signals: Mapping[str, Any], timeout: float | None, journal: Journal | None) -> None:
        self._signal = signal
        self._signals = signals
        self._timeout = timeout
        self._journal = journal
        self._rounds = 0

    async def settle(self, requests: DeferredToolRequests) -> DeferredToolResults:
        """What was decided about ``requests``.

        Raises:
            WaitForSignal: nothing yet.
            Reject: the run is no step of a workflow, or keeps no journal.
        """
        journal = self._journal
        if journal is None:
            tools = ", ".join(sorted({call.tool_name for call in (*requests.approvals, *requests.calls)}))
            raise Reject(
                f"the agent called {tools}, which waits for somebody, and only a durable step of a workflow can wait: "
                f"make this agent a step, or resolve such calls with a capability of the agent"
            )
        asked = fingerprint(requests)
        while True:
            self._rounds += 1
            name = self._signal if self._rounds == 1 else f"{self._signal}-{self._rounds}"
            same = journal.fact(f"asked/{name}") == asked
            if name not in self._signals:
                if not same:
                    await journal.note(f"asked/{name}", asked)
                raise WaitForSignal(name, prompt=prompt(requests), timeout=self._timeout)
            if same:
                return results(requests, self._signals[name])


def fingerprint(requests: DeferredToolRequests) -> str:
    """Of the calls and their arguments."""
    calls = [
        [call.tool_call_id, call.tool_name, call.args_as_dict()] for call in (*requests.approvals, *requests.calls)
    ]
    return hashlib.sha256(to_json(calls, inf_nan_mode="constants")).hexdigest()


def prompt(requests: DeferredToolRequests) -> str:
    """What a person reads: one line for each call, with its arguments and its id."""
    lines = [_line("approve", call) for call in requests.approvals] + [_line("answer", call) for call in requests.calls]
    return "\n".join(lines)


def _line(verb: str, call: ToolCallPart) -> str:
    arguments = to_json(call.args_as_dict()).decode()
    return f"{verb} {call.tool_name}({arguments[1:-1][:1000]})  [{call.tool_call_id}]"


def results(requests: DeferredToolRequests, answer: Any) -> DeferredToolResults:
    """``answer`` in pydantic-ai's terms."""
    each = answer.get("calls") if isinstance(answer, Mapping) else None
    by_id: Mapping[str, Any] | None = each if isinstance(each, Mapping) else None
    approvals: dict[str, bool | ToolApproved | ToolDenied] = {
        call.tool_call_id: _decision(answer if by_id is None else by_id.get(call.tool_call_id, UNANSWERED))
        for call in requests.approvals
    }
    calls = {
        call.tool_call_id: answer if by_id is None else by_id.get(call.tool_call_id, UNANSWERED)
        for call in requests.calls
    }
    return DeferredToolResults(approvals=approvals, calls=calls)


def _decision(answer: Any) -> ToolApproved | ToolDenied:
    if isinstance(answer, Mapping):
        override = answer.get("override_args")
        if answer.get("approved") is True:
            return ToolApproved(override_args=dict(override) if isinstance(override, Mapping) else None)
        message = answer.get("message")
        return ToolDenied(str(message)) if message else ToolDenied()
    if answer is True:
        return ToolApproved()
    return ToolDenied(answer) if isinstance(answer, str) and answer else ToolDenied()
