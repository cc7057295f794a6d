"""How the steps of a workflow are laid out as a tree of lines: chains, branches, joins, items, folded runs.

Pure functions from steps to :class:`Line`; no colours, no widths, no I/O. A step stands below its immediate dominator,
the nearest step that every way to it passes through (Lengauer & Tarjan, 1979; here by common ancestors in topological
order, after Cooper, Harvey & Kennedy, 2001): what forks is indented, what joins all branches again goes back to the
indentation of the fork, and a sequence is not indented at all.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestra.workflow import StepState, WorkflowStep

MAX_DEPTH = 8
"""Levels that are drawn; what lies deeper is not indented further."""
FEW = 8
"""Items, or alike lines in a row, that are shown one by one."""
MANY = 24
"""Lines in a row at one level, in whatever state, that are shown one by one."""
_HEAD = 3
_ROOT = -1
_LOOK_UP = 64
_ORDER = (StepState.FAILED, StepState.WAITING, StepState.RUNNING)
"""What of many items is worth a line of its own, most urgent first."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the picture: what is drawn before the step, and the step, or words in its place."""

    gutter: str
    step: WorkflowStep | None
    words: str = ""
    after: tuple[int, ...] = ()
    """The steps it waited for, where the picture alone does not say so."""
    hidden: Mapping[StepState, int] | None = None
    """The steps that ``words`` stand for."""


def lay_out(steps: Sequence[WorkflowStep], *, every: bool = False) -> list[Line]:
    """The lines of ``steps``; with ``every`` nothing is folded. O(steps + edges) for plans that are not knotted."""
    planned = [step for step in steps if not step.role]
    items: dict[int, list[WorkflowStep]] = defaultdict(list)
    for step in steps:
        if step.role == "item" and step.parent is not None:
            items[step.parent].append(step)
    tree = _Tree(planned)
    lines = [line for found in tree.lines() for line in (found, *_items_of(found, items, every=every))]
    return lines if every else list(fold(lines))


def fold(lines: Sequence[Line]) -> Iterator[Line]:
    """``lines`` with what is many and alike cut: long runs at one level in one state, then any longer run at one level."""
    alike = [line for run in _runs(lines, _alike) for line in _cut(run, FEW, frozenset())]
    for run in _runs(alike, _level):
        yield from _cut(run, MANY, frozenset(_ORDER))


def _runs(lines: Sequence[Line], same: Callable[[Line, Line], bool]) -> Iterator[list[Line]]:
    run: list[Line] = []
    for line in lines:
        if run and not same(run[-1], line):
            yield run
            run = []
        run.append(line)
    if run:
        yield run


def _alike(one: Line, other: Line) -> bool:
    return _level(one, other) and one.step is not None and other.step is not None and one.step.state is other.step.state


def _level(one: Line, other: Line) -> bool:
    return len(one.gutter) == len(other.gutter)


def _cut(run: Sequence[Line], most: int, urgent: frozenset[StepState]) -> Iterator[Line]:
    """``run``, of more than ``most`` lines only its ends and some of those in an ``urgent`` state; the others counted."""
    if len(run) <= most:
        yield from run
        return
    shown = {*range(_HEAD), len(run) - 1}
    for state in urgent:
        shown.update([at for at, line in enumerate(run) if line.step is not None and line.step.state is state][:_HEAD])
    hidden: Counter[StepState] = Counter()
    for at, line in enumerate(run):
        if at not in shown:
            hidden.update(line.hidden or ({} if line.step is None else {line.step.state: 1}))
            continue
        if hidden:
            told = ", ".join(f"{hidden[state]} more {state.value}" for state in StepState if hidden[state])
            yield Line(_below(line.gutter), None, told, hidden=dict(hidden))
            hidden = Counter()
        yield line


def _items_of(line: Line, items: dict[int, list[WorkflowStep]], *, every: bool) -> Iterator[Line]:
    """The grown steps below ``line``: all of a few, else those that need somebody, and a count of the rest."""
    found = items.get(line.step.step_index, []) if line.step is not None else []
    if not found:
        return
    gutter = _below(line.gutter)
    if every or len(found) <= FEW:
        yield from (Line(f"{gutter}· ", item) for item in found)
        return
    shown = [item for state in _ORDER for item in [one for one in found if one.state is state][:_HEAD]]
    yield from (Line(f"{gutter}· ", item) for item in shown)
    rest = Counter(item.state for item in found)
    rest.subtract(item.state for item in shown)
    told = ", ".join(f"{rest[state]} {state.value}" for state in StepState if rest[state] > 0)
    yield Line(f"{gutter}· ", None, f"{'and ' if shown else ''}{told}")


def _below(gutter: str) -> str:
    return gutter.replace("├─", "│ ").replace("┌─", "│ ").replace("└─", "  ")  # of one width, so that levels stay


class _Tree:
    """The dominator tree of a plan, and its picture."""

    def __init__(self, planned: Sequence[WorkflowStep]) -> None:
        self.steps = {step.step_index: step for step in planned}
        self.needs = {i: tuple(d for d in step.depends_on if d in self.steps) for i, step in self.steps.items()}
        self.order = self._topological()
        self.above: dict[int, int] = {}
        self.depth = {_ROOT: 0}
        self.after: dict[int, tuple[int, ...]] = {}
        self.below: dict[int, list[int]] = defaultdict(list)
        for index in self.order:
            self.after[index] = self._nearest(self.needs[index])
            above = self._dominator(self.after[index])
            self.above[index] = above
            self.depth[index] = self.depth[above] + 1
            self.below[above].append(index)

    def _topological(self) -> list[int]:
        """Dependencies first, otherwise in the order of the plan."""
        missing = {index: len(set(needs)) for index, needs in self.needs.items()}
        users: dict[int, list[int]] = defaultdict(list)
        for index, needs in self.needs.items():
            for need in set(needs):
                users[need].append(index)
        ready = [index for index, count in missing.items() if not count]
        heapq.heapify(ready)
        order: list[int] = []
        while ready:
            order.append(heapq.heappop(ready))
            for user in users[order[-1]]:
                missing[user] -= 1
                if not missing[user]:
                    heapq.heappush(ready, user)
        return order

    def _nearest(self, needs: tuple[int, ...]) -> tuple[int, ...]:
        """``needs`` without those that every way to another of them passes through anyway; looks so far up only."""
        if len(needs) < 2:
            return needs
        wanted, passed = set(needs), set[int]()
        for need in needs:
            at = need
            for _ in range(_LOOK_UP):
                at = self.above[at]
                if at == _ROOT or at in passed:
                    break
                if at in wanted:
                    passed.add(at)
        return tuple(need for need in needs if need not in passed)

    def _dominator(self, needs: tuple[int, ...]) -> int:
        found, *others = needs or (_ROOT,)
        for other in others:
            one, two = found, other
            while one != two:
                if self.depth[one] >= self.depth[two]:
                    one = self.above[one]
                else:
                    two = self.above[two]
            found = one
        return found

    def lines(self) -> Iterator[Line]:
        """Depth first, without recursion: plans may be 10,000 steps deep."""
        todo: list[tuple[int, str, str]] = [(_ROOT, "", "")]
        while todo:
            index, gutter, rest = todo.pop()
            if index != _ROOT:
                after = self.after[index]
                yield Line(gutter, self.steps[index], after=after if len(after) > 1 else ())
            kids = self.below.get(index, [])
            if not kids:
                continue
            if len(kids) == 1:
                todo.append((kids[0], rest, rest))
                continue
            joined = self._joins(index, kids)
            branches = kids[:-1] if joined else kids
            placed = list(self._placed(branches, rest, top=index == _ROOT, joined=joined))
            if joined:
                todo.append((kids[-1], rest, rest))
            todo += reversed(placed)

    @staticmethod
    def _placed(branches: list[int], rest: str, *, top: bool, joined: bool) -> Iterator[tuple[int, str, str]]:
        if len(rest) >= 3 * MAX_DEPTH:
            yield from ((branch, rest, rest) for branch in branches)
            return
        for number, branch in enumerate(branches):
            last = number == len(branches) - 1 and not joined
            corner = "└─ " if last else "┌─ " if top and not number else "├─ "
            yield branch, rest + corner, rest + ("   " if last else "│  ")

    def _joins(self, index: int, kids: list[int]) -> bool:
        """Whether the last of the steps below ``index`` comes after all others of them."""
        reached: set[int] = set()
        todo = [kids[-1]]
        while todo:
            for need in self.needs[todo.pop()]:
                branch = need
                while branch != index and self.above[branch] != index:
                    branch = self.above[branch]
                if branch != index and branch not in reached:
                    reached.add(branch)
                    todo.append(branch)
        return len(reached) == len(kids) - 1
