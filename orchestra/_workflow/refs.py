"""References: how a step of a plan names what is known only when it runs.

``{"$ref": "fetch.rows.0.name"}`` stands for a value. Its root is the id of a step (its result), ``input`` (the input of
the workflow's task), ``context`` (the workflow's context), or, inside the step of a map, ``item`` or ``index``. Keys and
indexes follow, counted from the end where they are negative; a list instead of a text spells keys that hold a dot.
``fetch.$error`` is the error of a step that has one, ``fetch.$state`` its state. ``{"$literal": …}`` stands for what is
in it, unread. What a reference leads to is taken as it is: references in results are data.

Owns finding, checking and resolving references. Refuses to own which steps there are. Pure functions, any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from orchestra.errors import WorkflowError

REF: Final = "$ref"
LITERAL: Final = "$literal"
ERROR: Final = "$error"
STATE: Final = "$state"
RESERVED: Final = frozenset({"input", "context", "item", "index", "workflow"})
"""Roots that are no step, and so no id of a step."""
MAX_DEPTH: Final = 64
"""Most levels of dicts and lists within one value of a plan."""


class Unset:
    """The type of :data:`UNSET`."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()
"""There is no such thing, where None is a value."""


class Ref(NamedTuple):
    """A reference: its root and the keys and indexes behind it."""

    root: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((self.root, *self.path))


class StepFact(NamedTuple):
    """What is known of a step. ``state`` in lower case, such as ``"completed"``; ``result`` counts in that one only."""

    state: str
    result: Any = None
    error: dict[str, Any] | None = None


class Known(Protocol):
    """What references can lead to."""

    @property
    def input(self) -> Any:
        """The input of the workflow's task."""

    @property
    def context(self) -> Mapping[str, Any]:
        """The workflow's context."""

    @property
    def item(self) -> Any:
        """Of the step of a map, its item; else :data:`UNSET`."""

    @property
    def index(self) -> int | None:
        """Of the step of a map, the index of its item; else None."""

    def step(self, step_id: str) -> StepFact | None:
        """The step ``step_id``; None: nothing is known of it."""


@dataclass(slots=True)
class Facts:
    """:class:`Known` as plain data."""

    input: Any = None
    context: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, StepFact] = field(default_factory=dict)
    item: Any = UNSET
    index: int | None = None
    signals: Mapping[str, Any] = field(default_factory=dict)
    """The signals that a parked agent was waiting for, by name; for its context, no reference leads there."""

    def step(self, step_id: str) -> StepFact | None:
        """See :class:`Known`."""
        return self.steps.get(step_id)


def parse_ref(spelled: Any) -> Ref:
    """The reference that ``{"$ref": spelled}`` is. Raises ValueError saying what is wrong with it."""
    parts = spelled.split(".") if isinstance(spelled, str) else spelled
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError(f"a $ref must be a text such as 'fetch.rows.0' or a list of its parts, got {shown(spelled)}")
    if not all(isinstance(part, str) or type(part) is int for part in parts):
        raise ValueError(f"the parts of a $ref must be texts or whole numbers, got {shown(spelled)}")
    ref = Ref(str(parts[0]), tuple(str(part) for part in parts[1:]))
    if not all((ref.root, *ref.path)):
        raise ValueError(f"a $ref has no empty parts, got {shown(spelled)}")
    if ref.path and ref.path[0].startswith("$") and isinstance(spelled, str) and ref.path[0] not in (ERROR, STATE):
        raise ValueError(f"a step has {ERROR} and {STATE}, no {ref.path[0]!r}, in {shown(spelled)}")
    return ref


def is_ref(value: Any) -> bool:
    """Whether ``value`` is a reference, well spelled or not."""
    return type(value) is dict and len(value) == 1 and REF in value


def is_word(value: Any) -> bool:
    """Whether ``value`` as a whole is a reference or a literal, well spelled or not."""
    return isinstance(value, Mapping) and (REF in value or LITERAL in value)


def scan(value: Any, at: str, depth: int = 0) -> Iterator[tuple[str, Ref | str]]:
    """Every reference in ``value`` with where it is, or what is wrong there, as text. O(size of value)."""
    if depth > MAX_DEPTH:
        yield at, f"is nested deeper than {MAX_DEPTH} levels"
    elif isinstance(value, Mapping):
        if REF in value or LITERAL in value:
            yield from _scan_word(value, at)
            return
        for key, inner in value.items():
            if isinstance(inner, Mapping | list | tuple):
                yield from scan(inner, f"{at}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            if isinstance(inner, Mapping | list | tuple):
                yield from scan(inner, f"{at}.{index}", depth + 1)


def _scan_word(value: Mapping[str, Any], at: str) -> Iterator[tuple[str, Ref | str]]:
    word = REF if REF in value else LITERAL
    if len(value) > 1:
        others = ", ".join(repr(key) for key in value if key != word)
        yield at, f"{word} stands alone in its dict, here with {others}; wrap data in {{{LITERAL!r}: …}}"
    elif word == REF:
        try:
            yield at, parse_ref(value[REF])
        except ValueError as error:
            yield at, str(error)


def resolve(value: Any, known: Known, *, at: str = "args") -> Any:
    """``value`` with every reference replaced by what it leads to. O(size of value).

    A reference to the result of a step that did not complete is None, whatever path follows.

    Raises:
        WorkflowError: references lead nowhere; ``.faults`` names each, where it is and what there is instead.
    """
    faults: list[str] = []
    found = _resolved(value, known, at, faults)
    if faults:
        raise WorkflowError("; ".join(faults[:10]), faults=tuple(faults))
    return found


def _resolved(value: Any, known: Known, at: str, faults: list[str]) -> Any:
    if isinstance(value, Mapping):
        if LITERAL in value:
            return value[LITERAL]
        if REF in value:
            return _followed(value, known, at, faults)
        return {key: _resolved(inner, known, f"{at}.{key}", faults) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(inner, known, f"{at}.{index}", faults) for index, inner in enumerate(value)]
    return value


def _followed(value: Mapping[str, Any], known: Known, at: str, faults: list[str]) -> Any:
    try:
        return follow(parse_ref(value[REF]), known)
    except (LookupError, ValueError) as error:
        faults.append(f"{at}: {error.args[0]}")
        return None


def follow(ref: Ref, known: Known) -> Any:
    """What ``ref`` leads to. O(length of its path).

    Raises:
        LookupError: nowhere; its text says from where on, and what there is.
    """
    value, path, at = _start(ref, known)
    for part in path:
        if value is None and at.void:
            return None
        value = _entered(value, part, ref, at.name)
        at = _At(f"{at.name}.{part}", at.void)
    return value


class _At(NamedTuple):
    """How far a reference was followed; ``void``: what is None there may be so for want of a step's end."""

    name: str
    void: bool


def _start(ref: Ref, known: Known) -> tuple[Any, tuple[str, ...], _At]:
    root, path = ref
    if root == "input":
        return known.input, path, _At(root, void=False)
    if root == "context":
        return known.context, path, _At(root, void=False)
    if root == "item" and known.item is not UNSET:
        return known.item, path, _At(root, void=False)
    if root == "index" and known.index is not None:
        return known.index, path, _At(root, void=False)
    fact = known.step(root)
    if fact is None:
        raise LookupError(f"$ref {str(ref)!r}: nothing is known of {root!r} here")
    if path[:1] == (STATE,):
        return fact.state, path[1:], _At(f"{root}.{STATE}", void=False)
    if path[:1] == (ERROR,):
        return fact.error, path[1:], _At(f"{root}.{ERROR}", void=fact.error is None)
    done = fact.state == "completed"
    return (fact.result if done else None), path, _At(root, void=not done)


def _entered(value: Any, part: str, ref: Ref, at: str) -> Any:
    if isinstance(value, Mapping):
        if part in value:
            return value[part]
        number = _number(part)
        if number is not None and number in value:
            return value[number]
        raise LookupError(f"$ref {str(ref)!r}: {at} has no key {part!r}; it has {_keys(value)}")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        number = _number(part)
        if number is not None and -len(value) <= number < len(value):
            return value[number]
        raise LookupError(f"$ref {str(ref)!r}: {at} is a list of {len(value)}, it has no {part!r}")
    raise LookupError(f"$ref {str(ref)!r}: {at} is {shown(value)}, which has no {part!r}")


def _number(part: str) -> int | None:
    digits = part.removeprefix("-")
    return int(part) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


def _keys(value: Mapping[Any, Any]) -> str:
    names = [str(key)[:40] for key in list(value)[:10]]
    return (", ".join(names) + (", …" if len(value) > len(names) else "")) or "none"


def shown(value: Any, limit: int = 80) -> str:
    """``value`` as a short text for an error."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
