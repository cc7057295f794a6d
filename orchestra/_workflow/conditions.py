"""Conditions: ``when`` of a step, which says whether it runs.

A condition is ``True`` or ``False``, a ``{"$ref": …}`` (whether the value is true as Python has it), or a dict of one
word: ``{"eq"|"ne"|"lt"|"le"|"gt"|"ge": [a, b]}``, ``{"in": [a, container]}``, ``{"and"|"or": [condition, …]}``,
``{"not": condition}``, ``{"exists": {"$ref": …}}`` (it leads to something that is not null). Operands may be references.
``and`` and ``or`` stop at the first that decides. A truth value equals no number.

Owns checking and deciding conditions, by a closed list of words: nothing is evaluated. Pure functions, any thread.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from orchestra._workflow.refs import (
    LITERAL,
    MAX_DEPTH,
    REF,
    Known,
    Ref,
    follow,
    is_ref,
    parse_ref,
    resolve,
    scan,
    shown,
)
from orchestra.errors import WorkflowError

_ORDERS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_PAIRS: Final = frozenset({"eq", "ne", "in", *_ORDERS})
WORDS: Final = ("eq", "ne", "lt", "le", "gt", "ge", "in", "and", "or", "not", "exists")
"""What a condition may be made of, beside truth values and references."""


def scan_condition(when: Any, at: str = "when", depth: int = 0) -> Iterator[tuple[str, Ref | str]]:
    """Every reference in ``when`` with where it is, or what is wrong there, as text. O(size of when)."""
    if isinstance(when, bool):
        return
    if depth > MAX_DEPTH:
        yield at, f"is nested deeper than {MAX_DEPTH} levels"
    elif isinstance(when, Mapping) and (REF in when or LITERAL in when):
        yield from scan(when, at)
    elif not isinstance(when, Mapping) or len(when) != 1:
        yield at, f"a condition is a truth value, a $ref or a dict of one word, got {shown(when)}"
    else:
        ((word, operand),) = when.items()
        yield from _scan_word(word, operand, f"{at}.{word}", depth)


def _scan_word(word: Any, operand: Any, at: str, depth: int) -> Iterator[tuple[str, Ref | str]]:
    if word in _PAIRS:
        if not isinstance(operand, list | tuple) or len(operand) != 2:
            yield at, f"takes a list of two values, got {shown(operand)}"
        else:
            yield from scan(operand, at)
    elif word in ("and", "or"):
        if not isinstance(operand, list | tuple) or not operand:
            yield at, f"takes a list of one condition or more, got {shown(operand)}"
        else:
            for index, inner in enumerate(operand):
                yield from scan_condition(inner, f"{at}.{index}", depth + 1)
    elif word == "not":
        yield from scan_condition(operand, at, depth + 1)
    elif word == "exists":
        yield from scan(operand, at) if is_ref(operand) else [(at, f"takes a $ref, got {shown(operand)}")]
    else:
        yield at, f"is no word of a condition; those are {', '.join(WORDS)}"


def holds(when: Any, known: Known, *, at: str = "when") -> bool:
    """Whether the condition ``when``, which was checked with its plan, holds. O(size of when).

    Raises:
        WorkflowError: a reference leads nowhere, or two values cannot be compared; the text says where.
    """
    if isinstance(when, bool):
        return when
    if REF in when or LITERAL in when:
        return bool(resolve(when, known, at=at))
    ((word, operand),) = when.items()
    at = f"{at}.{word}"
    if word == "and":
        return all(holds(inner, known, at=f"{at}.{index}") for index, inner in enumerate(operand))
    if word == "or":
        return any(holds(inner, known, at=f"{at}.{index}") for index, inner in enumerate(operand))
    if word == "not":
        return not holds(operand, known, at=at)
    if word == "exists":
        return _exists(operand, known)
    left, right = resolve(operand, known, at=at)
    return _compared(word, left, right, at)


def _exists(operand: Any, known: Known) -> bool:
    try:
        return follow(parse_ref(operand[REF]), known) is not None
    except LookupError:
        return False


def _compared(word: str, left: Any, right: Any, at: str) -> bool:
    try:
        if word in ("eq", "ne"):
            return _equal(left, right) is (word == "eq")
        if word == "in":
            if isinstance(right, list | tuple):
                return any(_equal(left, each) for each in right)
            return left in right
        return bool(_ORDERS[word](left, right))
    except (TypeError, ValueError):  # ValueError: arrays
        text = f"{at}: {shown(left)} and {shown(right)} cannot be compared so"
        raise WorkflowError(text, faults=(text,)) from None


def _equal(left: Any, right: Any) -> bool:
    return isinstance(left, bool) is isinstance(right, bool) and bool(left == right)
