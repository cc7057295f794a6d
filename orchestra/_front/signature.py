"""Between the signature of an agent's function and the ``input`` of its tasks.

Owns what may be decorated, how call arguments become a dict of keyword arguments, and how that dict is handed to the
function again. Refuses to own sending and running. Arguments are checked where they are sent, against names and the
plain types ``str int float bool list dict``; anything else an annotation says is for the agent to check.
Immutable after construction; safe from any thread.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from orchestra._agents.context import context_of, is_context
from orchestra.errors import ConfigurationError, InvalidTaskError, InvalidTaskTypeError, Reject
from orchestra.tasks import BaseTask

_Kind = inspect.Parameter
_ACCEPTED: Final[dict[Any, tuple[type, ...]]] = {
    str: (str,),
    int: (int,),
    float: (float, int),
    bool: (bool,),
    list: (list, tuple),  # a tuple arrives as a list
    dict: (dict,),
    type(None): (type(None),),
}


class Signature:
    """What an agent's function takes.

    ``injected`` is the parameter that gets the running :class:`~orchestra.tasks.BaseTask`, ``context`` the one that gets
    its :class:`~orchestra.agents.AgentContext`, if there are such; ``takes_input`` is False for a function of these
    alone, which reads ``task.input`` itself.

    Raises:
        ConfigurationError: tasks cannot call the function: it has positional-only parameters or ``*args``, is a class
            or a generator, or wants the task twice.
    """

    __slots__ = ("_allowed", "_open", "_order", "_required", "_types", "context", "injected", "name", "takes_input")

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.name = name
        _require_function(function, name)
        parameters = list(inspect.signature(function).parameters.values())
        hints = _hints(function, parameters)
        self.injected = _injected(name, parameters, hints, _is_task, "task")
        self.context = _injected(name, parameters, hints, is_context, "context")
        own = [parameter for parameter in parameters if parameter.name not in (self.injected, self.context)]
        for parameter in own:
            if parameter.kind in (_Kind.POSITIONAL_ONLY, _Kind.VAR_POSITIONAL):
                star = "*" if parameter.kind is _Kind.VAR_POSITIONAL else ""
                raise ConfigurationError(
                    f"agent {name!r}: parameter {star}{parameter.name} has no name that a task could use; arguments travel "
                    "as a dict of keyword arguments: make it an ordinary parameter",
                    field=parameter.name,
                )
        self._open = any(parameter.kind is _Kind.VAR_KEYWORD for parameter in own)
        named = [parameter for parameter in own if parameter.kind is not _Kind.VAR_KEYWORD]
        self._order = tuple(p.name for p in named if p.kind is _Kind.POSITIONAL_OR_KEYWORD)
        self._allowed = frozenset(p.name for p in named)
        self._required = frozenset(p.name for p in named if p.default is _Kind.empty)
        self._types = {p.name: kinds for p in named if (kinds := _accepted(hints.get(p.name)))}
        self.takes_input = bool(own) or (self.injected is None and self.context is None)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The ``input`` of a task that calls the function with these arguments; defaults are left to the worker.

        Raises:
            InvalidTaskError: an argument is missing, unknown, given twice, or one too many; ``where`` begins the text.
            InvalidTaskTypeError: an argument has another type than its plain annotation says.
        """
        if len(args) > len(self._order):
            raise self._wrong(f"takes {len(self._order)} positional arguments, got {len(args)}", where)
        values = dict(zip(self._order, args, strict=False))
        for name in kwargs:
            if name in values:
                raise self._wrong(f"got two values for {name!r}", where, name)
        values.update(kwargs)
        self.check_names(values, where)
        self._check_types(values, where)
        return values

    def check_names(self, values: Mapping[str, Any], where: str = "") -> None:
        """Raise InvalidTaskError when the function does not take arguments of these names, or needs others too."""
        if not self._open and not values.keys() <= self._allowed:
            for filled, what in ((self.injected, "the task itself"), (self.context, "the context of the attempt")):
                if filled in values:
                    raise self._wrong(f"{filled!r} is {what} and filled in by the worker", where, filled)
            name = next(name for name in values if name not in self._allowed)
            near = difflib.get_close_matches(str(name), self._allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {_listed(sorted(self._allowed))}"
            raise self._wrong(f"has no parameter {name!r}{hint}", where, str(name))
        if not values.keys() >= self._required:
            missing = next(
                name for name in (*self._order, *sorted(self._required)) if name in self._required - values.keys()
            )
            raise self._wrong(f"needs the argument {missing!r}", where, missing)

    def _check_types(self, values: Mapping[str, Any], where: str) -> None:
        for name, kinds in self._types.items():
            value = values.get(name, name)
            if (
                name in values and not isinstance(value, kinds) and not hasattr(value, "dtype")
            ):  # NumPy values travel as plain ones
                expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in dict.fromkeys(kinds))
                raise InvalidTaskTypeError(
                    f"{where}agent {self.name!r}: {name} must be {expected}, got {type(value).__name__} {_short(value)}",
                    path=f"input.{name}",
                )

    def _wrong(self, what: str, where: str, path: str | None = None) -> InvalidTaskError:
        return InvalidTaskError(f"{where}agent {self.name!r} {what}", path=f"input.{path}" if path else "input")

    def check_input(self, given: Any, where: str = "") -> None:
        """Raise what :meth:`bind` would, for an ``input`` that was made by hand."""
        if not self.takes_input:
            return
        if given is not None and not isinstance(given, dict):
            raise InvalidTaskTypeError(
                f"{where}agent {self.name!r} takes its input as a dict of keyword arguments, got {type(given).__name__}",
                path="input",
            )
        self.bind((), given or {}, where)

    def arguments(self, task: BaseTask) -> dict[str, Any]:
        """The keyword arguments to run ``task`` with.

        Raises:
            Reject: the task was sent to a function with another signature; running it again cannot help.
        """
        if not self.takes_input:
            return self._filled({}, task)
        given = task.input
        if given is None:
            given = {}
        if type(given) is not dict:
            raise Reject(
                f"agent {self.name!r} takes its input as a dict of keyword arguments, got {type(given).__name__}"
            )
        names = given.keys()
        if not names >= self._required or not (self._open or names <= self._allowed):
            try:
                self.check_names(given, "")
            except InvalidTaskError as error:
                raise Reject(str(error)) from None
        return given if self.injected is None and self.context is None else self._filled(given, task)

    def _filled(self, given: dict[str, Any], task: BaseTask) -> dict[str, Any]:
        """``given`` with what the worker fills in."""
        filled: dict[str, Any] = {} if self.injected is None else {self.injected: task}
        if self.context is not None:
            filled[self.context] = context_of(task)
        return {**given, **filled}


def make_call(function: Callable[..., Any], signature: Signature) -> Callable[[BaseTask], Any]:
    """``function`` as an agent: a function of one task."""
    arguments = signature.arguments
    if inspect.iscoroutinefunction(function):

        async def call(task: BaseTask) -> Any:
            return await function(**arguments(task))

        return call

    def plain(task: BaseTask) -> Any:
        return function(**arguments(task))

    return plain


class ProcessCall:
    """An agent that another process can be handed: it travels as the name under which its module holds it.

    The name comes from the decorator in this process, never from a task. Plain pickling of the function would fail,
    because its name in the module belongs to the decorated object.
    """

    __slots__ = ("_call", "_module", "_qualname")

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._module = function.__module__
        self._qualname = function.__qualname__
        self._call: Callable[[BaseTask], Any] | None = None
        if "<" in self._qualname:
            raise ConfigurationError(
                f"agent {name!r} runs in a process, so it must be at the top level of a module, not {self._qualname}",
                field="executor",
                value="process",
            )

    def __call__(self, task: BaseTask) -> Any:
        if self._call is None:
            found: Any = importlib.import_module(self._module)
            for part in self._qualname.split("."):
                found = getattr(found, part)
            function = getattr(found, "function", found)
            self._call = make_call(function, Signature(function, task.type))
        return self._call(task)

    def __getstate__(self) -> tuple[str, str]:
        return self._module, self._qualname

    def __setstate__(self, state: tuple[str, str]) -> None:
        self._module, self._qualname = state
        self._call = None


def _require_function(function: Any, name: str) -> None:
    if inspect.isclass(function) or not callable(function):
        what = "a class: decorate a function, or register an instance with app.agents.register(type, instance)"
        raise ConfigurationError(
            f"agent {name!r} is {what if inspect.isclass(function) else 'not a function'}",
            field="agent",
            value=function,
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"agent {name!r} is a generator; an agent returns one value", field="agent", value=function
        )


def _hints(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> dict[str, Any]:
    """The annotations of ``parameters``, each resolved by itself: one that cannot be leaves the others usable."""
    inner: Any = inspect.unwrap(function)
    namespace = getattr(inner, "__globals__", {})
    hints = {}
    for parameter in parameters:
        annotation = parameter.annotation
        if annotation is _Kind.empty:
            continue
        holder = types.SimpleNamespace(__annotations__={"it": annotation})
        try:
            hints[parameter.name] = typing.get_type_hints(holder, namespace)["it"]
        except Exception:  # noqa: BLE001 - a name that only a type checker sees
            hints[parameter.name] = annotation
    return hints


def _injected(
    name: str,
    parameters: Sequence[inspect.Parameter],
    hints: Mapping[str, Any],
    meant: Callable[[Any], bool],
    what: str,
) -> str | None:
    found = [p for p in parameters if meant(hints.get(p.name))]
    if len(found) > 1:
        raise ConfigurationError(
            f"agent {name!r} wants the {what} twice: {_listed([p.name for p in found])}", field="agent"
        )
    if found and found[0].kind not in (_Kind.POSITIONAL_OR_KEYWORD, _Kind.KEYWORD_ONLY):
        raise ConfigurationError(
            f"agent {name!r}: the {what} parameter {found[0].name} must be an ordinary parameter", field=found[0].name
        )
    return found[0].name if found else None


def _is_task(hint: Any) -> bool:
    if isinstance(hint, str):  # imported for type checkers only
        return any(part.strip().rpartition(".")[2] == "BaseTask" for part in hint.split("|"))
    if _is_union(hint):
        return any(_is_task(part) for part in typing.get_args(hint))
    return inspect.isclass(hint) and issubclass(hint, BaseTask)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _accepted(hint: Any) -> tuple[type, ...]:
    """The classes that satisfy a plain annotation; empty when it says more than a class check can decide."""
    if _is_union(hint):
        parts = [_accepted(part) for part in typing.get_args(hint)]
        return tuple(kind for part in parts for kind in part) if all(parts) else ()
    origin = typing.get_origin(hint) or hint
    try:
        return _ACCEPTED.get(origin, ())
    except TypeError:  # unhashable annotation
        return ()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
