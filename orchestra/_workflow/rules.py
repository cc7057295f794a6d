"""What may be said of one step of a plan: every key and every built-in action checked, every fault named.

Owns the rules for ``action``, ``args``, ``retry``, ``timeout``, ``when``, ``on_failure`` and ``compensate``, and what a
step refers to. Refuses to own how steps hang together (:mod:`orchestra._workflow.plan`). Pure functions, any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeAlias

from orchestra._workflow.conditions import scan_condition
from orchestra._workflow.refs import RESERVED, Ref, is_ref, is_word, scan, shown
from orchestra.errors import ConfigurationError, WorkflowError
from orchestra.tasks import Retry, is_ident, require_int, require_number

Kind: TypeAlias = Literal["agent", "signal", "sleep", "map", "workflow"]
Scope: TypeAlias = Literal["", "item", "own"]

MAX_STEPS: Final = 10_000
"""Most steps of one plan."""
MAX_NESTING: Final = 8
"""Most levels of child workflows whose plans are spelled out within one plan."""
MAX_SECONDS: Final = 365 * 86_400.0
"""Longest sleep, and longest wait for a signal: a year."""
BUILT_IN: Final[Mapping[str, Kind]] = {
    "orchestra.signal": "signal",
    "orchestra.sleep": "sleep",
    "orchestra.map": "map",
    "orchestra.workflow": "workflow",
}
"""Actions that no agent runs."""
_ARGS: Final[Mapping[Kind, frozenset[str]]] = {
    "signal": frozenset({"name", "timeout", "prompt"}),
    "sleep": frozenset({"seconds"}),
    "map": frozenset({"over", "step", "max_parallel"}),
    "workflow": frozenset({"plan", "type", "input"}),
}
_ON_FAILURE: Final = ("fail", "skip", "continue")
_TIMEOUT: Final = 30 * 86_400.0
_SHOWN_ACTIONS: Final = 20


@dataclass(frozen=True, slots=True)
class Rules:
    """What a step is checked against. ``actions``: those that agents carry out, None: any.

    ``nested`` checks the plan of a child workflow, which is ``nesting`` levels deeper than the outermost.
    """

    actions: Collection[str] | None
    nesting: int
    nested: Callable[[Any, Collection[str] | None, int], Any]


def kind_of(step: Mapping[str, Any]) -> Kind:
    """What carries out ``step``: an agent, or one of the built-in kinds."""
    action = step.get("action")
    return BUILT_IN.get(action, "agent") if isinstance(action, str) else "agent"


def step_faults(step: Any, rules: Rules) -> Iterator[str]:
    """Everything that is wrong with ``step`` by itself. O(size of step)."""
    yield from _word_faults(step, rules)
    if isinstance(step, Mapping):
        yield from (f"{at}: {fault}" for at, fault, _ in spoken(step) if isinstance(fault, str))


def _word_faults(step: Any, rules: Rules) -> Iterator[str]:
    if not isinstance(step, Mapping):
        yield f"expected a dict, got {type(step).__name__}"
        return
    if not all(isinstance(key, str) for key in step):
        yield "its keys must be strings"
    if step.get("id") is not None:
        yield from _id_faults(step["id"])
    yield from _action_faults(step.get("action"), rules.actions)
    if step.get("args") is not None:
        yield from _args_faults(step["args"], "args")
    if not isinstance(step.get("reasoning") or "", str):
        yield f"reasoning must be text, got {type(step['reasoning']).__name__}"
    if "retry" in step or "timeout" in step:
        yield from _dealing_faults(step)
    if step.get("on_failure", "fail") not in _ON_FAILURE:
        yield f"on_failure must be one of {', '.join(_ON_FAILURE)}, got {shown(step['on_failure'])}"
    if step.get("compensate") is not None:
        yield from _compensate_faults(step["compensate"], rules)
    if kind_of(step) != "agent":
        yield from _built_in_faults(step, rules)


def _id_faults(own: Any) -> Iterator[str]:
    if not isinstance(own, str) or not is_ident(own) or "." in own:
        yield f"id must be 1 to 128 printable ASCII characters without spaces and dots, got {shown(own)}"
    elif own in RESERVED:
        yield f"id {own!r} means something else in a $ref; reserved are {', '.join(sorted(RESERVED))}"


def _action_faults(action: Any, actions: Collection[str] | None) -> Iterator[str]:
    if not isinstance(action, str) or not is_ident(action):
        yield f"action must be 1 to 128 printable ASCII characters without spaces, got {action!r:.100}"
    elif action.startswith("orchestra."):
        if action not in BUILT_IN:
            yield f"action {action!r} is unknown; built-in actions are {', '.join(BUILT_IN)}"
    elif actions is not None and action not in actions:
        names = sorted(actions)
        more = f" and {len(names) - _SHOWN_ACTIONS} more" if len(names) > _SHOWN_ACTIONS else ""
        yield f"action {action!r} is unknown; known are: {', '.join(names[:_SHOWN_ACTIONS]) or 'none'}{more}"


def _args_faults(args: Any, at: str) -> Iterator[str]:
    if not (isinstance(args, dict) and all(isinstance(key, str) for key in args)):
        yield f"{at} must be a dict with string keys, got {args!r:.100}"


def _dealing_faults(step: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with ``retry`` and ``timeout``."""
    try:
        retry_of(step.get("retry"))
    except ConfigurationError as error:
        yield str(error)
    if step.get("timeout") is not None:
        yield from _number_faults("timeout", step["timeout"], _TIMEOUT, exclusive=True)


def retry_of(value: Any) -> Retry | None:
    """What ``retry`` of a step means: the number of tries after the first, or the fields of a Retry; None: nothing.

    Raises:
        ConfigurationError: it is neither, or out of range.
    """
    if value is None:
        return None
    if type(value) is int:
        require_int("retry", value, 0, 1000, unit="retries")
        return Retry(max_retries=value)
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            f"retry must be a whole number of retries or a dict of Retry's fields, got {shown(value)}", field="retry"
        )
    known = [each.name for each in fields(Retry)]
    if unknown := sorted(str(name) for name in value if name not in known):
        raise ConfigurationError(
            f"retry has no field {', '.join(map(repr, unknown))}; fields are {', '.join(known)}", field="retry"
        )
    if type(value.get("jitter", True)) is not bool:
        raise ConfigurationError(f"Retry.jitter must be True or False, got {value['jitter']!r}", field="Retry.jitter")
    return Retry(**value)


def _number_faults(name: str, value: Any, high: float, *, exclusive: bool = False) -> Iterator[str]:
    try:
        require_number(name, value, 0.0, high, unit="seconds", exclusive=exclusive)
    except ConfigurationError as error:
        yield str(error)


def _compensate_faults(compensate: Any, rules: Rules) -> Iterator[str]:
    if not isinstance(compensate, dict) or not all(isinstance(key, str) for key in compensate):
        yield f"compensate must be a dict such as {{'action': …, 'args': …}}, got {shown(compensate)}"
        return
    action = compensate.get("action")
    if isinstance(action, str) and action in BUILT_IN:
        yield f"compensate: action {action!r} is built in; only an agent can undo a step"
    yield from (f"compensate: {fault}" for fault in _action_faults(action, rules.actions))
    if compensate.get("args") is not None:
        yield from _args_faults(compensate["args"], "compensate.args")
    yield from (f"compensate: {fault}" for fault in _dealing_faults(compensate))


# -- built-in actions


def _built_in_faults(step: Mapping[str, Any], rules: Rules) -> Iterator[str]:
    kind, args = kind_of(step), step.get("args")
    if args is not None and not isinstance(args, dict):
        return
    args = args or {}
    if unknown := sorted(str(name) for name in args if name not in _ARGS[kind]):
        known = ", ".join(sorted(_ARGS[kind]))
        yield f"{step['action']} takes no {', '.join(map(repr, unknown))} in args; it takes {known}"
    yield from argument_faults(kind, args)
    if kind == "map":
        yield from (f"args.step: {fault}" for fault in _template_faults(args.get("step"), rules))
    if kind == "workflow" and isinstance(args.get("plan"), list | tuple):
        yield from (f"args.plan: {fault}" for fault in _nested_faults(args["plan"], rules))


def argument_faults(kind: Kind, args: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the args of a built-in step; a reference that is not resolved yet may become anything."""
    if kind == "signal":
        yield from _signal_faults(args)
    elif kind == "sleep" and not is_ref(args.get("seconds")):
        yield from _number_faults("args.seconds", args.get("seconds"), MAX_SECONDS)
    elif kind == "map":
        yield from _map_faults(args)
    elif kind == "workflow":
        yield from _child_faults(args)


def _signal_faults(args: Mapping[str, Any]) -> Iterator[str]:
    name, timeout, prompt = args.get("name"), args.get("timeout"), args.get("prompt")
    if not is_ref(name) and not (isinstance(name, str) and is_ident(name)):
        yield f"args.name must be 1 to 128 printable ASCII characters without spaces, got {shown(name)}"
    if timeout is not None and not is_ref(timeout):
        yield from _number_faults("args.timeout", timeout, MAX_SECONDS, exclusive=True)
    if prompt is not None and not is_ref(prompt) and not isinstance(prompt, str):
        yield f"args.prompt must be text, got {type(prompt).__name__}"


def _map_faults(args: Mapping[str, Any]) -> Iterator[str]:
    over, most = args.get("over"), args.get("max_parallel")
    if not is_ref(over) and not isinstance(over, list | tuple):
        yield f"args.over must be a list or a $ref to one, got {shown(over)}"
    elif isinstance(over, list | tuple) and len(over) > MAX_STEPS:
        yield f"args.over must have at most {MAX_STEPS} items, got {len(over)}"
    if most is not None and not is_ref(most):
        try:
            require_int("args.max_parallel", most, 1, MAX_STEPS, unit="items")
        except ConfigurationError as error:
            yield str(error)


def _template_faults(template: Any, rules: Rules) -> Iterator[str]:
    """What is wrong with the step of a map, but for what it refers to."""
    if isinstance(template, Mapping) and kind_of(template) == "map":
        yield "a map within a map needs a workflow of its own: {'action': 'orchestra.workflow', …}"
        return
    yield from _word_faults(template, rules)
    if not isinstance(template, Mapping):
        return
    for key in ("id", "depends_on", "compensate"):
        if template.get(key) is not None:
            yield f"{key} belongs to the step that maps, not to the one for each item"
    if template.get("on_failure") == "skip":
        yield "on_failure of an item is 'fail' or 'continue' (its result is null then), got 'skip'"


def _child_faults(args: Mapping[str, Any]) -> Iterator[str]:
    plan, task_type = args.get("plan"), args.get("type")
    if (plan is None) == (task_type is None):
        yield "args must have either plan (a list of steps) or type (which a planner plans for)"
    if plan is not None and not is_ref(plan) and not isinstance(plan, list | tuple):
        yield f"args.plan must be a list of steps or a $ref to one, got {shown(plan)}"
    if task_type is not None and not is_ref(task_type) and not (isinstance(task_type, str) and is_ident(task_type)):
        yield f"args.type must be 1 to 128 printable ASCII characters without spaces, got {shown(task_type)}"


def _nested_faults(plan: Any, rules: Rules) -> Iterator[str]:
    if rules.nesting >= MAX_NESTING:
        yield f"child workflows are nested deeper than {MAX_NESTING} levels"
        return
    try:
        rules.nested(plan, rules.actions, rules.nesting + 1)
    except WorkflowError as error:
        yield from error.faults


# -- what steps refer to


def spoken(step: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Ref | str, Scope]]:
    """Every reference of a step with where it is, or what is wrong there, and what it may mean beside steps.

    ``item``: within the step of a map. ``own``: in a compensation, which knows what it undoes and waits for nothing.
    """
    args, kind = step.get("args"), kind_of(step)
    if kind == "agent" and is_word(args):
        yield from ((at, ref, "") for at, ref in scan(args, f"{prefix}args"))
    elif isinstance(args, Mapping):
        for name, value in args.items():
            if not isinstance(value, Mapping | list | tuple):
                continue
            if kind == "map" and name == "step":
                if isinstance(value, Mapping):
                    yield from ((at, ref, "item") for at, ref, _ in spoken(value, f"{prefix}args.step."))
            elif kind != "workflow" or name != "plan" or is_ref(value):  # a plan speaks of its own steps
                yield from ((at, ref, "") for at, ref in scan(value, f"{prefix}args.{name}"))
    when, compensate = step.get("when"), step.get("compensate")
    if when is not None:
        yield from ((at, ref, "") for at, ref in scan_condition(when, f"{prefix}when"))
    if isinstance(compensate, Mapping):
        yield from ((at, ref, "own") for at, ref in scan(compensate.get("args"), f"{prefix}compensate.args"))
