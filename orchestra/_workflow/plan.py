"""Plans: the steps of a workflow, what is wrong with them, and what each waits for.

A plan is a list of 1 to 10,000 dicts. Each has an ``action`` and may have ``args``, ``reasoning``, ``id``,
``depends_on``, ``retry``, ``timeout``, ``when`` (:mod:`orchestra._workflow.conditions`), ``on_failure`` and
``compensate``; other keys travel along. Where no step says ``depends_on``, each follows the one before it. Otherwise
they are a graph: a step waits for what it depends on and for the steps that its ``args`` and ``when`` refer to
(:mod:`orchestra._workflow.refs`), and for nothing else.

Owns the words of a plan, their check with every fault named, and the compiled form that engines work on. Refuses to
own what becomes of a step. Pure functions, any thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from orchestra._workflow.refs import Known, Ref, is_ref, is_word, resolve, shown
from orchestra._workflow.rules import MAX_STEPS, Kind, Rules, argument_faults, kind_of, retry_of, spoken, step_faults
from orchestra.errors import WorkflowError
from orchestra.tasks import Retry

OnFailure: TypeAlias = Literal["fail", "skip", "continue"]
_KEYS: Final = frozenset(
    ("action", "args", "reasoning", "id", "depends_on", "retry", "timeout", "when", "on_failure", "compensate")
)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step of a valid plan, with all that follows from its words.

    ``depends_on``: indexes of the steps that end before it begins, in order. ``linked``: these were asked for, so it is
    skipped where all of them were skipped; False: they only come before it. ``reads``: indexes of the steps whose facts
    its args and ``when`` need. ``retry`` and ``timeout`` (seconds) go before those of the agent; None: not said.
    ``extra``: the keys of the plan that mean nothing here.
    """

    index: int
    id: str
    action: str
    args: dict[str, Any] | None = None
    reasoning: str = ""
    depends_on: tuple[int, ...] = ()
    linked: bool = False
    retry: Retry | None = None
    timeout: float | None = None
    when: Any = True
    on_failure: OnFailure = "fail"
    compensate: dict[str, Any] | None = None
    kind: Kind = "agent"
    reads: frozenset[int] = frozenset()
    extra: dict[str, Any] = field(default_factory=dict)


def validate_plan(plan: Any, *, actions: Collection[str] | None = None) -> list[dict[str, Any]]:
    """``plan`` with ``action``, ``args`` and ``reasoning`` in each step; all else as it came.

    The ``id`` of a step that has none is its index as text; only the compiled plan says so. ``actions``: those that
    agents carry out; None: not known here, any will do. A plan that came out of here goes
    through unchanged. O(size of the plan).

    Raises:
        WorkflowError: it is no plan; ``.faults`` lists everything that is wrong with it, not only the first: steps by
            index, and a cycle as the path that closes it.
    """
    return _validated(plan, actions, 0)


def _validated(plan: Any, actions: Collection[str] | None, nesting: int) -> list[dict[str, Any]]:
    if not isinstance(plan, list | tuple) or not 1 <= len(plan) <= MAX_STEPS:
        came = f"{len(plan)} steps" if isinstance(plan, list | tuple) else type(plan).__name__
        raise refused("a plan", [f"expected a list of 1 to {MAX_STEPS} steps, got {came}"])
    rules, faults = Rules(actions, nesting, _validated), list[str]()
    for index, step in enumerate(plan):
        faults += (f"{_label(index, step)}: {fault}" for fault in step_faults(step, rules))
    faults += _graph_faults(plan)
    if faults:
        raise refused("the plan", faults)
    return [{**step, "args": step.get("args"), "reasoning": step.get("reasoning") or ""} for step in plan]


def refused(what: str, faults: Sequence[str]) -> WorkflowError:
    """The error that lists ``faults`` of ``what``."""
    more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
    return WorkflowError(f"{what} is refused: {'; '.join(faults[:10])}{more}", faults=tuple(faults))


def _id_of(index: int, step: Any) -> Any:
    own = step.get("id") if isinstance(step, Mapping) else None
    return str(index) if own is None else own


def _label(index: int, step: Any) -> str:
    own = _id_of(index, step)
    return f"step {index}" if own == str(index) else f"step {index} ({shown(own, 40)})"


# -- how steps hang together


class _Graph:
    """Who waits for whom, as far as a plan that may have faults says it. ``faults`` are those of the links."""

    def __init__(self, plan: Sequence[Any]) -> None:
        self.faults: list[str] = []
        self.plan = [step if isinstance(step, Mapping) else {} for step in plan]
        self.ids: dict[str, int] = {}
        self.linked = any(step.get("depends_on") is not None for step in self.plan)
        self._name_steps(plan)
        self.reads: list[frozenset[int]] = []
        self.needs = [self._needs(index, step) for index, step in enumerate(self.plan)]

    def _name_steps(self, plan: Sequence[Any]) -> None:
        for index, step in enumerate(plan):
            own = _id_of(index, step)
            if not isinstance(own, str):
                continue
            first = self.ids.setdefault(own, index)
            if first != index:
                self.faults.append(f"step {index}: id {shown(own, 40)} is taken by step {first}")

    def _needs(self, index: int, step: Mapping[str, Any]) -> set[int]:
        needs = set(self._explicit(index, step))
        read = frozenset(self._read(index, step))
        self.reads.append(read)
        if self.linked:
            return needs | read
        for later in sorted(each for each in read if each > index):
            self._fault(index, f"refers to step {_id_of(later, self.plan[later])!r}, which comes after it")
        return {index - 1} if index else set()

    def _explicit(self, index: int, step: Mapping[str, Any]) -> Iterator[int]:
        given = step.get("depends_on")
        if given is None:
            return
        if not isinstance(given, list | tuple):
            self._fault(index, f"depends_on must be a list of ids or indexes of steps, got {shown(given)}")
            return
        for each in given:
            found = self._find(each)
            if found is None:
                self._fault(index, f"depends_on names {shown(each)}, which is no step of this plan")
            elif found == index:
                self._fault(index, "depends on itself")
            else:
                yield found

    def _find(self, named: Any) -> int | None:
        if isinstance(named, str):
            return self.ids.get(named)
        return named if type(named) is int and 0 <= named < len(self.plan) else None

    def _read(self, index: int, step: Mapping[str, Any]) -> Iterator[int]:
        for at, ref, scope in spoken(step):
            if isinstance(ref, str) or ref.root in ("input", "context"):
                continue
            if ref.root in ("item", "index") and scope == "item":
                continue
            found = self.ids.get(ref.root)
            if found is None:
                only = " outside of the step of a map" if ref.root in ("item", "index") else ""
                self._fault(
                    index, f"{at}: $ref {str(ref)!r} leads to {ref.root!r}, which is no step of this plan{only}"
                )
            elif found == index and scope != "own":
                self._fault(index, f"{at}: $ref {str(ref)!r} leads to the step itself")
            elif scope != "own":
                yield found

    def _fault(self, index: int, text: str) -> None:
        self.faults.append(f"{_label(index, self.plan[index])}: {text}")


def _graph_faults(plan: Sequence[Any]) -> list[str]:
    graph = _Graph(plan)
    cycles = (" → ".join(str(_id_of(i, graph.plan[i])) for i in cycle) for cycle in _cycles(graph.needs))
    return graph.faults + [f"steps wait for each other in a circle: {path}" for path in cycles]


def _order(needs: Sequence[Collection[int]]) -> list[int]:
    """The indexes in an order in which each comes after what it needs, lowest first; those in a circle are left out."""
    unmet = [len(each) for each in needs]
    after: list[list[int]] = [[] for _ in needs]
    for index, each in enumerate(needs):
        for needed in each:
            after[needed].append(index)
    ready = [index for index, count in enumerate(unmet) if count == 0]  # sorted, so it is a heap
    order: list[int] = []
    while ready:
        order.append(done := heapq.heappop(ready))
        for waiting in after[done]:
            unmet[waiting] -= 1
            if unmet[waiting] == 0:
                heapq.heappush(ready, waiting)
    return order


def _cycles(needs: Sequence[Collection[int]]) -> Iterator[list[int]]:
    """Circles among steps that wait for each other, each as the path that closes it; none twice. O(steps + edges)."""
    left = set(range(len(needs))) - set(_order(needs))
    for start in sorted(left):
        if start not in left:
            continue
        at, path, seen = start, list[int](), dict[int, int]()
        while at not in seen:
            seen[at] = len(path)
            path.append(at)
            further = left.intersection(needs[at])
            if not further:
                break
            at = min(further)
        else:
            circle = path[seen[at] :]
            first = circle.index(min(circle))
            yield [*circle[first:], *circle[:first], circle[first]]
        left.difference_update(path)


def topological(steps: Sequence[PlannedStep]) -> list[int]:
    """The indexes of ``steps`` in an order in which each comes after all it depends on; lowest first where free.

    O((steps + edges) log steps).
    """
    return _order([step.depends_on for step in steps])


def compile_plan(plan: Sequence[Mapping[str, Any]]) -> tuple[PlannedStep, ...]:
    """What a plan that came out of :func:`validate_plan` says, in plan order. O(size of the plan)."""
    graph = _Graph(plan)
    return tuple(
        _compiled(step, index, graph.reads[index], tuple(sorted(graph.needs[index])), linked=graph.linked)
        for index, step in enumerate(graph.plan)
    )


def compile_step(
    step: Mapping[str, Any],
    index: int,
    ids: Mapping[str, int],
    *,
    depends_on: tuple[int, ...] = (),
    linked: bool = False,
) -> PlannedStep:
    """One step that was checked, also one that grew later: for an item of a map, or a compensation.

    ``ids``: the index of each step that it may refer to; what is not in there is not among its ``reads``.
    """
    found = (ids.get(ref.root) for _, ref, scope in spoken(step) if isinstance(ref, Ref) and scope != "own")
    reads = frozenset(each for each in found if each is not None)
    return _compiled(step, index, reads, depends_on, linked=linked)


def _compiled(
    step: Mapping[str, Any], index: int, reads: frozenset[int], depends_on: tuple[int, ...], *, linked: bool
) -> PlannedStep:
    when, timeout = step.get("when"), step.get("timeout")
    return PlannedStep(
        index=index,
        id=_id_of(index, step),
        action=step["action"],
        args=step.get("args"),
        reasoning=step.get("reasoning") or "",
        depends_on=depends_on,
        linked=linked and bool(depends_on),
        retry=retry_of(step.get("retry")),
        timeout=None if timeout is None else float(timeout),
        when=True if when is None else when,
        on_failure=step.get("on_failure", "fail"),
        compensate=step.get("compensate"),
        kind=kind_of(step),
        reads=reads,
        extra={name: value for name, value in step.items() if name not in _KEYS},
    )


def item_step(step: PlannedStep, index: int) -> dict[str, Any]:
    """The plan of the step that a map grows for its item ``index``."""
    assert step.kind == "map", "only a map has items"
    template: dict[str, Any] = dict((step.args or {})["step"])
    return {**template, "id": f"{step.id[:100]}[{index}]"}


def compensation_step(step: PlannedStep) -> dict[str, Any]:
    """The plan of the step that undoes ``step``; what it refers to are the steps of the plan, ``step`` among them."""
    assert step.compensate is not None, "nothing undoes this step"
    return {**step.compensate, "id": f"{step.id[:100]}~undo"}


def ready_args(step: PlannedStep, known: Known) -> dict[str, Any] | None:
    """The args of ``step`` with every reference replaced: what its agent gets, or what a built-in step is told.

    Of a map ``step``, and of a child workflow the ``plan`` where it is spelled out, stay as they are: they have
    references of their own. None where the plan gives none. O(size of args).

    Raises:
        WorkflowError: a reference leads nowhere, or a built-in step got what it cannot use; ``.faults`` names each.
    """
    if step.args is None:
        return None
    if step.kind == "agent" and is_word(step.args):
        return _whole(step, resolve(step.args, known))
    kept = _kept(step)
    args: dict[str, Any] = resolve({name: value for name, value in step.args.items() if name not in kept}, known)
    args |= {name: step.args[name] for name in kept}
    if step.kind != "agent" and (faults := [*argument_faults(step.kind, args)]):
        raise refused(f"step {step.id} ({step.action})", faults)
    return args


def _whole(step: PlannedStep, found: Any) -> dict[str, Any] | None:
    """The args where one reference stands for all of them."""
    if found is not None and not (isinstance(found, dict) and all(isinstance(key, str) for key in found)):
        fault = f"args: {shown(step.args)} must lead to a dict with string keys, got {shown(found)}"
        raise refused(f"step {step.id} ({step.action})", [fault])
    return found


def _kept(step: PlannedStep) -> frozenset[str]:
    args = step.args or {}
    if step.kind == "map":
        return frozenset({"step"}) & args.keys()
    if step.kind == "workflow" and not is_ref(args.get("plan")):
        return frozenset({"plan"}) & args.keys()
    return frozenset()
