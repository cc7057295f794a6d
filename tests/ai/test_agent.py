"""A pydantic-ai agent as an agent of orchestra: what it is asked, what comes out, what is journaled and what it may use."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import inspect
from dataclasses import dataclass

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import FunctionToolset
from pydantic_ai.usage import UsageLimits

import orchestra.ai as ai
from orchestra.ai.calling import journals
from orchestra.errors import BudgetExceededError, ConfigurationError, Reject, ToolRepeatError
from tests.ai.scripted import Scripted, call, prompts

# -- what it is asked


@pytest.mark.parametrize(
    ("prompt", "given", "asked"),
    [
        ("prompt", {"prompt": "hi"}, "hi"),
        ("prompt", "plain text", "plain text"),
        ("question", {"question": {"a": [1, "ü"]}}, '{"a": [1, "ü"]}'),
        ("Sum up {topic} in {n} words", {"topic": "bees", "n": 3}, "Sum up bees in 3 words"),
        (lambda task: f"{task.type}: {task.input}", 7, "ask: 7"),
    ],
)
async def test_the_prompt_comes_from_the_input(memory, task, prompt, given, asked):
    model = Scripted("yes")
    assert await ai.agent(Agent(model), prompt=prompt, memory=memory)(task(given)) == "yes"
    assert prompts(model.asked[0]) == [asked]


async def test_a_prompt_may_be_made_by_a_coroutine(memory, task):
    async def made(task):
        return ["look", "here"]

    model = Scripted("yes")
    await ai.agent(Agent(model), prompt=made, memory=memory)(task())
    assert prompts(model.asked[0]) == [["look", "here"]]


@pytest.mark.parametrize(
    ("prompt", "given", "told"),
    [("prompt", {"promt": 1}, "needs 'prompt' in its input .* has promt"), ("x {y}", {}, "needs 'y'.*has nothing")],
)
async def test_an_input_without_the_prompt_is_rejected(memory, task, prompt, given, told):
    with pytest.raises(Reject, match=told):
        await ai.agent(Agent(TestModel()), prompt=prompt, memory=memory)(task(given))


@pytest.mark.parametrize("given", [None, 5, ["a"]])
async def test_an_input_that_is_no_dict_and_no_text_is_rejected(memory, task, given):
    with pytest.raises(Reject, match="takes a text or a dict"):
        await ai.agent(Agent(TestModel()), memory=memory)(task(given))


# -- what comes out


@dataclass
class City:
    name: str
    founded: dt.date


class Guide(BaseModel):
    cities: list[City]


async def test_typed_answers_go_out_as_plain_data(memory, task):
    model = Scripted(call("final_result", cities=[{"name": "Bonn", "founded": "0011-01-01"}]))
    answer = await ai.agent(Agent(model, output_type=Guide), memory=memory)(task())
    assert answer == {"cities": [{"name": "Bonn", "founded": "0011-01-01"}]}


async def test_an_answer_that_is_no_plain_data_is_rejected(memory, task):
    def odd(text: str) -> object:
        return object()

    model = Scripted(call("final_result", text="x"))
    with pytest.raises(Reject, match="cannot go out as plain data"):
        await ai.agent(Agent(model, output_type=odd), memory=memory)(task())


async def test_the_full_result_has_usage_and_messages(memory, task):
    answer = await ai.agent(Agent(Scripted("yes")), memory=memory, result="full")(task())
    assert answer["output"] == "yes"
    assert answer["usage"] == {"requests": 1, "input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    assert [message["kind"] for message in answer["messages"]] == ["request", "response"]


# -- deps and history


async def test_deps_are_a_value_a_function_or_a_context_manager(memory, task):
    seen, left = [], []
    agent = Agent(TestModel(), deps_type=str)

    @agent.tool
    def look(ctx: RunContext[str]) -> str:
        seen.append(ctx.deps)
        return ctx.deps

    @contextlib.asynccontextmanager
    async def connection(task):
        yield f"open for {task.id}"
        left.append(task.id)

    async def later(task):
        return "awaited"

    for name, deps in {"a": "plain", "b": lambda task: task.id, "c": later, "d": connection}.items():
        await ai.agent(agent, deps=deps, memory=memory)(task(id=name))
    assert (seen, left) == (["plain", "b", "awaited", "open for d"], ["d"])


async def test_a_conversation_goes_on_over_tasks(memory, task):
    model = Scripted("Hi Ada", "You are Ada")
    agent = ai.agent(Agent(model), history="chat", memory=memory)
    chat = task().id
    await agent(task({"prompt": "I am Ada", "chat": chat}, id=f"{chat}-1"))
    await agent(task({"prompt": "Who am I?", "chat": chat}, id=f"{chat}-2"))
    await agent(task({"prompt": "Who am I?", "chat": f"{chat}-other"}, id=f"{chat}-3"))
    assert [prompts(messages) for messages in model.asked] == [
        ["I am Ada"],
        ["I am Ada", "Who am I?"],
        ["Who am I?"],
    ]


async def test_a_repeated_turn_is_added_once_and_sees_the_same_past(memory, task):
    model = Scripted("one", "two", "three")
    agent = ai.agent(Agent(model), history="chat", memory=memory)
    given = {"prompt": "first", "chat": task().id}
    await agent(task(given, id=f"{given['chat']}-1"))
    await agent(task(given, id=f"{given['chat']}-1"))
    await agent(task({**given, "prompt": "second"}, id=f"{given['chat']}-2"))
    assert [prompts(messages) for messages in model.asked] == [["first"], ["first", "second"]]


async def test_turns_of_two_runs_at_once_are_both_kept(memory, task):
    model = Scripted("a")
    agent = ai.agent(Agent(model), history="chat", memory=memory)
    chat = task().id
    runs = [agent(task({"prompt": str(n), "chat": chat}, id=f"{chat}-{n}")) for n in range(5)]
    await asyncio.gather(*runs)
    await agent(task({"prompt": "last", "chat": chat}, id=f"{chat}-last"))
    assert sorted(prompts(model.asked[-1])) == ["0", "1", "2", "3", "4", "last"]


async def test_messages_may_come_with_the_task(memory, task):
    model = Scripted("one", "two")
    agent = ai.agent(Agent(model), result="full", memory=memory)
    past = (await agent(task({"prompt": "first"}, id=f"{task().id}-1")))["messages"]
    await agent(task({"prompt": "second", "message_history": past}, id=f"{task().id}-2"))
    assert prompts(model.asked[1]) == ["first", "second"]
    with pytest.raises(Reject, match="no list of messages"):
        await agent(task({"prompt": "third", "message_history": ["x"]}, id=f"{task().id}-3"))


# -- the journal


async def test_a_repeat_asks_nothing_and_calls_nothing(memory, task):
    model, calls = Scripted(call("weather", city="Bonn"), "sunny"), []
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str) -> str:
        calls.append(city)
        return "sun"

    run = ai.agent(agent, memory=memory)
    assert [await run(task()) for _ in range(3)] == ["sunny"] * 3
    assert (len(model.asked), calls) == (2, ["Bonn"])


async def test_after_a_failure_the_next_attempt_goes_on_where_it_was(memory, task):
    model, tries = Scripted(call("flaky"), "done"), []
    agent = Agent(model)

    @agent.tool_plain
    def flaky() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("disk")
        return "ok"

    run = ai.agent(agent, memory=memory)
    with pytest.raises(OSError, match="disk"):
        await run(task())
    assert await run(task()) == "done"
    assert (len(model.asked), len(tries)) == (2, 2)


async def test_without_durability_every_attempt_begins_anew(memory, task):
    model = Scripted("yes")
    run = ai.agent(Agent(model), memory=memory, durable=False)
    assert [await run(task()) for _ in range(2)] == ["yes", "yes"]
    assert len(model.asked) == 2


async def test_names_in_the_journal_are_kept_over_releases(memory, task):
    """They are persisted: a change makes running tasks ask again. Only ever add to them."""
    extra = FunctionToolset(id="extra")

    @extra.tool_plain
    def look() -> str:
        return "seen"

    agent = Agent(Scripted([call("own", "1"), call("look", "2")], "done"), toolsets=[extra])

    @agent.tool_plain
    def own() -> int:
        return 1

    given = task()
    await ai.agent(agent, name="scout", memory=memory)(given)
    log = await journals(memory).read_log(f"task/{given.id}/")
    assert {entry["o"] for entry in log if entry["k"] == "call"} == {
        "scout__model.request@1",
        "scout__function_toolset__<agent>.call_tool:own#1@1",
        "scout__function_toolset__extra.call_tool:look#2@1",
        "scout__model.request@2",
    }
    assert [entry["k"] for entry in log][0] == "open"
    assert [entry["k"] for entry in log][-1] == "end"


async def test_parallel_calls_of_one_tool_keep_their_own_results(memory, task):
    model = Scripted([call("slow", "x", n=1), call("slow", "y", n=2)], OSError("down"), "done")
    agent, order = Agent(model), [asyncio.Event(), asyncio.Event()]
    order[1].set()

    @agent.tool_plain
    async def slow(n: int) -> str:
        await order[n - 1].wait()
        order[0].set()
        return f"result {n}"

    run = ai.agent(agent, memory=memory, result="full")
    with pytest.raises(OSError, match="down"):
        await run(task())
    answer = await run(task())
    returned = {
        part["tool_call_id"]: part["content"]
        for message in answer["messages"]
        for part in message["parts"]
        if part["part_kind"] == "tool-return"
    }
    assert returned == {"x": "result 1", "y": "result 2"}


async def test_useless_answers_are_not_replayed_to_the_next_attempt(memory, task):
    model = Scripted("no json", "no json", call("final_result", cities=[]))
    run = ai.agent(Agent(model, output_type=Guide, retries=1), memory=memory)
    with pytest.raises(UnexpectedModelBehavior):
        await run(task())
    assert await run(task()) == {"cities": []}
    assert len(model.asked) == 3
    assert (await ai.task_usage(task().id, memory=memory)).requests == 3


async def test_what_a_tool_asks_the_model_to_correct_is_journaled(memory, task):
    model, tries = Scripted(call("pick", "1", n=1), call("pick", "2", n=2), OSError("down"), "done"), []
    agent = Agent(model)

    @agent.tool_plain
    def pick(n: int) -> str:
        tries.append(n)
        if n == 1:
            raise ModelRetry("not 1")
        return "ok"

    run = ai.agent(agent, memory=memory)
    with pytest.raises(OSError, match="down"):
        await run(task())
    assert await run(task()) == "done"
    assert (tries, len(model.asked)) == ([1, 2], 4)


async def test_a_tool_marked_once_is_not_repeated_after_a_crash(memory, task):
    model, paid = Scripted(call("pay", amount=5), "done"), []
    agent = Agent(model)

    @agent.tool_plain(metadata=ai.ONCE)
    async def pay(amount: int) -> str:
        paid.append(amount)
        raise asyncio.CancelledError

    run = ai.agent(agent, memory=memory)
    with pytest.raises(asyncio.CancelledError):
        await run(task())
    with pytest.raises(ToolRepeatError, match="'pay' may run once") as error:
        await run(task())
    assert isinstance(error.value, Reject)
    assert (error.value.tool, paid, len(model.asked)) == ("pay", [5], 1)


async def test_a_tool_marked_once_that_has_ended_is_replayed(memory, task):
    model, paid = Scripted(call("pay"), OSError("down"), "done"), []
    agent = Agent(model)

    @agent.tool_plain(metadata=ai.ONCE)
    def pay() -> str:
        paid.append(1)
        return "receipt"

    run = ai.agent(agent, memory=memory)
    with pytest.raises(OSError, match="down"):
        await run(task())
    assert await run(task()) == "done"
    assert paid == [1]


async def test_after_a_tool_marked_once_nothing_is_asked_anew(memory, task):
    model = Scripted(call("pay"), "no json", "no json")
    agent = Agent(model, output_type=Guide, retries=1)

    @agent.tool_plain(metadata=ai.ONCE)
    def pay() -> str:
        return "receipt"

    run = ai.agent(agent, memory=memory)
    with pytest.raises(Reject, match="could repeat a tool"):
        await run(task())


async def test_a_tool_outside_of_the_journal_runs_on_every_attempt(memory, task):
    model, looked = Scripted(call("clock"), "done"), []
    agent = Agent(model)

    @agent.tool_plain(metadata=ai.UNRECORDED)
    def clock() -> str:
        looked.append(1)
        return "noon"

    run = ai.agent(agent, memory=memory)
    assert [await run(task()), await run(task())] == ["done", "done"]
    assert (len(looked), len(model.asked)) == (2, 2)


@pytest.mark.parametrize("given", [True, {"twice": 1}, {"once": "yes"}, 3])
async def test_wrong_metadata_of_a_tool_is_an_error(memory, task, given):
    agent = Agent(Scripted(call("pay"), "done"))

    @agent.tool_plain(metadata={"orchestra": given})
    def pay() -> str:
        return "x"

    with pytest.raises(ConfigurationError, match="tool 'pay'"):
        await ai.agent(agent, memory=memory)(task())


async def test_a_result_that_is_no_json_is_rejected(memory, task):
    agent = Agent(Scripted(call("odd"), "done"))

    @agent.tool_plain
    def odd() -> object:
        return object()

    with pytest.raises(Reject, match="cannot be journaled"):
        await ai.agent(agent, memory=memory)(task())


async def test_a_large_result_is_journaled_and_one_that_is_too_large_rejected(memory, task, monkeypatch):
    model, looked = Scripted(call("look"), OSError("down"), "done"), []
    agent = Agent(model)

    @agent.tool_plain
    def look() -> str:
        looked.append(1)
        return "x" * (3 << 20)

    run = ai.agent(agent, memory=memory)
    with pytest.raises(OSError, match="down"):
        await run(task())
    assert await run(task()) == "done"
    assert looked == [1]
    monkeypatch.setattr("orchestra.ai.calling.MAX_BYTES", 1 << 20)
    model.script = [call("look")]
    with pytest.raises(Reject, match="call_tool:look#id-look@1 returned is too large for the journal"):
        await run(task(id=f"{task().id}-b"))


async def test_numbers_that_json_lacks_survive(memory, task):
    model, seen = Scripted(call("measure"), OSError("down"), "done"), []
    agent = Agent(model)

    @agent.tool_plain
    def measure() -> list[float]:
        seen.append(1)
        return [float("inf"), 2.0**70]

    run = ai.agent(agent, memory=memory)
    with pytest.raises(OSError, match="down"):
        await run(task())
    assert await run(task()) == "done"
    assert seen == [1]


async def test_a_sub_agent_with_the_capability_is_journaled_and_counted_too(memory, task):
    inner_model = Scripted("inner")
    inner = Agent(inner_model, name="inner", capabilities=[ai.OrchestraDurability()])
    model, tries = Scripted(call("ask", "1"), call("ask", "2"), "done"), []
    agent = Agent(model, name="outer")

    @agent.tool_plain
    async def ask() -> str:
        answer = (await inner.run("?")).output
        tries.append(1)
        if len(tries) == 2:
            raise OSError("after the inner call")
        return f"{answer} {len(inner_model.asked)}"

    run = ai.agent(agent, memory=memory, budget=ai.Budget(requests=5))
    with pytest.raises(OSError, match="after the inner call"):
        await run(task())
    assert await run(task()) == "done"
    assert (len(inner_model.asked), len(model.asked)) == (2, 3)
    assert (await ai.task_usage(task().id, memory=memory)).requests == 5


async def test_outside_of_a_task_the_capability_does_nothing():
    model = Scripted("yes")
    agent = Agent(model, name="x", capabilities=[ai.OrchestraDurability()])
    assert (await agent.run("?")).output == "yes"


async def test_an_agent_that_was_built_with_the_capability_needs_no_other(memory, task):
    model = Scripted("yes")
    run = ai.agent(Agent(model, name="x", capabilities=[ai.OrchestraDurability()]), memory=memory)
    assert [await run(task()) for _ in range(2)] == ["yes", "yes"]
    assert len(model.asked) == 1


async def test_another_model_for_the_agent(memory, task):
    first, second = Scripted("first"), Scripted("second")
    run = ai.agent(Agent(first), model=second, memory=memory)
    assert [await run(task()) for _ in range(2)] == ["second", "second"]
    assert (len(first.asked), len(second.asked)) == (0, 1)


async def test_an_attempt_that_was_taken_over_stops_before_its_next_call(memory, task):
    arrived, go = asyncio.Event(), asyncio.Event()
    model = Scripted(call("wait"), "done")
    agent = Agent(model)

    @agent.tool_plain
    async def wait() -> str:
        if not arrived.is_set():
            arrived.set()
            await go.wait()
        return "waited"

    run = ai.agent(agent, memory=memory)
    old = asyncio.ensure_future(run(task()))
    await arrived.wait()
    assert await run(task()) == "done"
    go.set()
    with pytest.raises(ai.StaleAttemptError):
        await old
    assert len(model.asked) == 2


# -- budgets


async def test_a_budget_stops_before_the_next_call(memory, task):
    model = Scripted(call("more"), tokens=(100, 20))
    agent = Agent(model)

    @agent.tool_plain
    def more() -> str:
        return "again"

    run = ai.agent(agent, memory=memory, budget=ai.Budget(total_tokens=240))
    for _ in range(2):
        with pytest.raises(BudgetExceededError) as error:
            await run(task())
        assert error.value.used == {"requests": 2, "input_tokens": 200, "output_tokens": 40, "total_tokens": 240}
    assert len(model.asked) == 2


async def test_a_raised_budget_lets_the_task_go_on(memory, task):
    model = Scripted(call("more"), "done")
    agent = Agent(model)

    @agent.tool_plain
    def more() -> str:
        return "again"

    with pytest.raises(BudgetExceededError):
        await ai.agent(agent, memory=memory, budget=ai.Budget(requests=1))(task())
    assert await ai.agent(agent, memory=memory, budget=ai.Budget(requests=2))(task()) == "done"
    assert len(model.asked) == 2


async def test_the_limits_of_pydantic_ai_are_a_budget_too(memory, task):
    model = Scripted(call("more"))
    agent = Agent(model)

    @agent.tool_plain
    def more() -> str:
        return "again"

    run = ai.agent(agent, memory=memory, usage_limits=UsageLimits(request_limit=3))
    with pytest.raises(BudgetExceededError, match="request_limit"):
        await run(task())
    assert len(model.asked) == 3


# -- settings


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"result": "all"}, "result"),
        ({"budget": 5}, "budget"),
        ({"workflow_budget": {"requests": 1}}, "workflow_budget"),
        ({"keep": 0}, "keep"),
        ({"approval": "two words"}, "agent approval"),
        ({"approval_timeout": -1}, "approval_timeout"),
        ({"name": "a b"}, "agent name"),
        ({"run_id": "x"}, "run_id"),
    ],
)
def test_wrong_settings_are_refused(settings, field):
    with pytest.raises(ConfigurationError, match=field):
        ai.agent(Agent(TestModel()), **settings)


def test_editors_see_the_settings():
    parameters = inspect.signature(ai.agent).parameters
    assert list(parameters)[:2] == ["pydantic_agent", "prompt"]
    assert {"budget", "workflow_budget", "stream", "history"} <= set(parameters)


def test_what_is_no_agent_is_refused():
    with pytest.raises(ConfigurationError, match=r"takes a pydantic_ai\.Agent"):
        ai.agent("openai:gpt")


async def test_a_model_that_orchestra_does_not_know_is_rejected(memory, task):
    agent = Agent(TestModel())
    with agent.override(model=TestModel(custom_output_text="x")), pytest.raises(Reject, match="set up"):
        await ai.agent(agent, memory=memory)(task())
