"""``orchestra._ext.step`` against its oracle: results, errors, contexts and references, whatever a coroutine does first."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import weakref

import pytest

from orchestra._ext.step import first_step
from tests.reference import step as reference

BOTH = pytest.mark.parametrize("step", [first_step, reference.first_step], ids=["compiled", "reference"])
VARIABLE: contextvars.ContextVar[object] = contextvars.ContextVar("variable")
OTHER: contextvars.ContextVar[object] = contextvars.ContextVar("other")


class Wait:
    """Suspends once with what it was given."""

    def __init__(self, what):
        self.what = what

    def __await__(self):
        return (yield self.what)


@BOTH
@pytest.mark.parametrize(
    "result", [None, 7, (1, 2), ("one",), StopIteration("value"), ValueError("not raised")], ids=repr
)
def test_one_that_never_waits_has_ended_with_its_result(step, result):
    async def agent(argument):
        assert VARIABLE.get() is argument
        return result

    context, coroutine, value = step(agent, 1, VARIABLE)
    assert (coroutine, value) == (None, result)
    assert context[VARIABLE] == 1
    with pytest.raises(LookupError):
        VARIABLE.get()


@BOTH
@pytest.mark.parametrize("waiting", [None, 7, (1, 2)], ids=repr)
def test_one_that_waits_goes_on_in_its_context(step, waiting):
    async def agent(argument):
        OTHER.set("mine")
        got = await Wait(waiting)
        return got, VARIABLE.get(), OTHER.get()

    context, coroutine, value = step(agent, "a", VARIABLE)
    assert value is waiting
    assert OTHER.get(None) is None
    with pytest.raises(StopIteration) as stop:
        context.run(coroutine.send, "sent")
    assert stop.value.value == ("sent", "a", "mine")


@BOTH
@pytest.mark.parametrize(
    "error", [ValueError("no"), asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr
)
def test_what_it_raises_comes_out_and_the_context_is_left(step, error):
    async def agent(argument):
        OTHER.set("mine")
        raise error

    with pytest.raises(type(error)) as caught:
        step(agent, 1, VARIABLE)
    assert caught.value is error
    assert (VARIABLE.get(None), OTHER.get(None)) == (None, None)


@BOTH
def test_stop_iteration_out_of_a_coroutine_is_an_error_of_its_own(step):
    async def agent(argument):
        raise StopIteration(5)

    with pytest.raises(RuntimeError, match="StopIteration"):
        step(agent, 1, VARIABLE)


@BOTH
def test_the_call_itself_may_raise(step):
    def agent(argument):
        raise LookupError(argument)

    with pytest.raises(LookupError, match="1"):
        step(agent, 1, VARIABLE)
    assert VARIABLE.get(None) is None


@BOTH
@pytest.mark.parametrize("given", [None, 5, "text", Wait(3)], ids=["None", "5", "text", "awaitable"])
def test_what_is_no_coroutine_is_given_back(step, given):
    context, coroutine, waiting = step(lambda _: given, 1, VARIABLE)
    assert coroutine is waiting is given
    assert context[VARIABLE] == 1


@BOTH
def test_a_generator_is_stepped_like_a_coroutine(step):
    def agent(argument):
        got = yield argument
        return got

    _, generator, waiting = step(agent, "first", VARIABLE)
    assert waiting == "first"
    with pytest.raises(StopIteration) as stop:
        generator.send("second")
    assert stop.value.value == "second"


@BOTH
def test_an_object_with_send_is_asked(step):
    class Sent:
        def __await__(self):
            raise AssertionError("not used")

        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration("done")

        def send(self, value):
            assert value is None
            raise StopIteration("done")

    assert step(lambda _: Sent(), 1, VARIABLE)[1:] == (None, "done")


@BOTH
def test_contexts_nest(step):
    async def inner(argument):
        return VARIABLE.get(), OTHER.get()

    async def outer(argument):
        OTHER.set("outer")
        return step(inner, "in", VARIABLE)[2], VARIABLE.get()

    assert step(outer, "out", VARIABLE)[2] == (("in", "outer"), "out")


def test_the_variable_must_be_one():
    with pytest.raises(TypeError):
        first_step(lambda _: None, 1, "no variable")  # type: ignore[arg-type]


def test_nothing_is_kept():
    class Held:
        pass

    async def returns(argument):
        return argument

    async def waits(argument):
        await Wait(argument)

    async def fails(argument):
        raise ValueError(argument)

    held = Held()
    alive = weakref.ref(held)
    for agent in (returns, waits, fails):
        try:
            result = first_step(agent, held, VARIABLE)
        except ValueError:
            continue
        if result[1] is not None:
            result[1].close()
        del result
    del held
    gc.collect()
    assert alive() is None


def test_counts_of_references_stay():
    marker = object()

    async def returns(argument):
        return marker

    before = sys.getrefcount(marker)
    for _ in range(1000):
        first_step(returns, 1, VARIABLE)
    assert sys.getrefcount(marker) == before
