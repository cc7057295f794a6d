"""Against a scripted server that speaks OpenAI's protocol: what its errors come to, streaming, and interruption."""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import socket
import struct

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelAPIError, UnexpectedModelBehavior
from pydantic_ai.models.fallback import FallbackModel

import orchestra.ai as ai
from orchestra.ai.calling import Calling
from orchestra.errors import Reject, RetryLater, Throttled
from tests.ai.fake_openai import Answer, Failure, Raw, served

pytestmark = pytest.mark.usefixtures("requests_allowed")


@pytest.fixture
def requests_allowed(no_real_models, monkeypatch):
    """Of this server alone: its address is the model's."""
    monkeypatch.setattr("pydantic_ai.models.ALLOW_MODEL_REQUESTS", True)


class Guide(BaseModel):
    city: str


async def test_an_answer_and_its_usage(memory, task):
    async with served(Answer("Bonn", input_tokens=11, output_tokens=3)) as fake:
        assert await ai.agent(Agent(fake.model()), memory=memory)(task("Where?")) == "Bonn"
    assert fake.requests[0]["messages"] == [{"role": "user", "content": "Where?"}]
    assert await ai.task_usage(task().id, memory=memory) == ai.Usage(1, 11, 3)


def in_seconds(seconds: float) -> str:
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
    return email.utils.format_datetime(moment, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"retry-after": "7"}, 7, 7),
        ({"retry-after": lambda: in_seconds(40)}, 20, 41),
        ({"retry-after": lambda: in_seconds(-40)}, 0, 0.05),
        ({"retry-after-ms": "250"}, 0.25, 0.25),
        ({"retry-after": "soon"}, 5, 5),
        ({}, 5, 5),
    ],
)
async def test_a_429_is_throttled_for_as_long_as_the_provider_says(memory, task, headers, least, most):
    headers = {name: value if isinstance(value, str) else value() for name, value in headers.items()}
    async with served(Failure(429, headers), Answer("later")) as fake:
        run = ai.agent(Agent(fake.model()), memory=memory, key="{tenant}")
        with pytest.raises(Throttled) as error:
            await run(task({"prompt": "hi", "tenant": "acme"}))
        assert least <= error.value.retry_after <= most
        assert error.value.key == "acme"
        assert await run(task({"prompt": "hi", "tenant": "acme"})) == "later"
    assert len(fake.requests) == 2, "the client repeats nothing by itself"


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
async def test_what_the_provider_refuses_is_rejected(memory, task, status):
    async with served(Failure(status)) as fake:
        with pytest.raises(Reject, match=f"status_code: {status}"):
            await ai.agent(Agent(fake.model()), memory=memory)(task())
    assert len(fake.requests) == 1


async def test_a_quota_that_is_used_up_is_rejected_although_it_is_a_429(memory, task):
    body = '{"error": {"message": "pay", "type": "insufficient_quota", "code": "insufficient_quota"}}'
    async with served(Failure(429, {}, body)) as fake:
        with pytest.raises(Reject, match="insufficient_quota"):
            await ai.agent(Agent(fake.model()), memory=memory)(task())


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 529])
async def test_what_may_pass_is_a_failure_and_goes_on(memory, task, status):
    async with served(Failure(status), Answer("yes")) as fake:
        run = ai.agent(Agent(fake.model()), memory=memory)
        with pytest.raises(ModelAPIError) as error:
            await run(task())
        assert not isinstance(error.value, Reject | Throttled)
        assert await run(task()) == "yes"
    assert len(fake.requests) == 2


async def test_an_overloaded_provider_says_when_to_come_back(memory, task):
    async with served(Failure(503, {"retry-after": "9"})) as fake:
        with pytest.raises(RetryLater) as error:
            await ai.agent(Agent(fake.model()), memory=memory)(task())
    assert error.value.after == 9


async def test_nobody_there_is_a_failure(memory, task):
    async with served(Answer("x")) as fake:
        model = fake.model()
    with pytest.raises(ModelAPIError):
        await ai.agent(Agent(model), memory=memory)(task())


async def test_of_several_models_that_all_refuse_the_soonest_counts(memory, task):
    async with (
        served(Failure(429, {"retry-after": "30"})) as first,
        served(Failure(429, {"retry-after": "4"})) as second,
    ):
        model = FallbackModel(first.model(), second.model())
        with pytest.raises(Throttled) as error:
            await ai.agent(Agent(model), memory=memory)(task())
    assert error.value.retry_after == 4


async def test_of_several_models_one_that_answers_is_enough(memory, task):
    async with served(Failure(500)) as first, served(Answer("second")) as second:
        run = ai.agent(Agent(FallbackModel(first.model(), second.model())), memory=memory)
        assert [await run(task()) for _ in range(2)] == ["second", "second"]
    assert (len(first.requests), len(second.requests)) == (1, 1)


@pytest.mark.parametrize("body", ["{not json", '{"choices": "none"}', "[]"])
async def test_a_malformed_answer_is_a_failure_and_asked_again(memory, task, body):
    async with served(Raw(body), Answer("yes")) as fake:
        run = ai.agent(Agent(fake.model()), memory=memory)
        with pytest.raises(Exception) as error:  # noqa: PT011 - what the client makes of it is its own affair
            await run(task())
        assert not isinstance(error.value, Reject | Throttled)
        assert await run(task()) == "yes"


async def test_an_answer_of_the_wrong_shape_goes_back_to_the_model(memory, task):
    wrong, right = Answer(tools=(("final_result", {"town": 1}),)), Answer(tools=(("final_result", {"city": "Bonn"}),))
    async with served(wrong, right) as fake:
        answer = await ai.agent(Agent(fake.model(), output_type=Guide, retries=1), memory=memory)(task())
    assert answer == {"city": "Bonn"}
    assert "city" in str(fake.requests[1]["messages"][-1])


async def test_an_answer_that_stays_wrong_is_a_failure(memory, task):
    async with served(Answer(tools=(("final_result", {"town": 1}),))) as fake:
        with pytest.raises(UnexpectedModelBehavior):
            await ai.agent(Agent(fake.model(), output_type=Guide, retries=1), memory=memory)(task())
    assert len(fake.requests) == 2


@pytest.fixture
def told(monkeypatch):
    """What runs tell, in order."""
    events: list[tuple[str, dict]] = []

    async def emit(kind, data):
        events.append((kind, data))

    monkeypatch.setattr("orchestra.ai.agents.calling", _telling(emit))
    return events


def _telling(emit):
    import dataclasses

    from orchestra.ai.calling import calling

    def told(*args, **kwargs) -> Calling:
        return dataclasses.replace(calling(*args, **kwargs), emit=emit)

    return told


async def test_text_and_tool_calls_are_told_as_they_come(memory, task, told, monkeypatch):
    monkeypatch.setattr("orchestra.ai.streaming.GATHER_S", 0.0)
    async with served(Answer(tools=(("look", {"n": 1}),)), Answer("one two three")) as fake:
        agent = Agent(fake.model())

        @agent.tool_plain
        def look(n: int) -> str:
            return "seen"

        run = ai.agent(agent, stream=True, memory=memory)
        assert await run(task()) == "one two three "
        first = list(told)
        assert await run(task()) == "one two three "
    assert [kind for kind, _ in first] == ["tool_call", "tool_result", "text", "text", "text"]
    assert first[0][1] == {"tool": "look", "args": {"n": 1}, "id": "call-1-0"}
    assert first[1][1] == {"tool": "look", "id": "call-1-0", "outcome": "success"}
    assert "".join(data["delta"] for kind, data in first if kind == "text") == "one two three "
    assert told == first, "a replay tells nothing again"
    assert len(fake.requests) == 2
    assert await ai.task_usage(task().id, memory=memory) == ai.Usage(2, 20, 10)


async def test_text_that_comes_fast_is_told_in_few_pieces(memory, task, told, monkeypatch):
    monkeypatch.setattr("orchestra.ai.streaming.GATHER_S", 60.0)
    words = " ".join(f"word{n:03d}" for n in range(200))
    async with served(Answer(words)) as fake:
        await ai.agent(Agent(fake.model()), stream=True, memory=memory)(task())
    deltas = [data["delta"] for _, data in told]
    assert "".join(deltas) == words + " "
    assert len(deltas) <= 6


async def test_a_stream_that_is_cut_is_a_failure_and_asked_again(memory, task, told):
    async with served(Answer("one two three", cut_after=2), Answer("one two three")) as fake:
        run = ai.agent(Agent(fake.model()), stream=True, memory=memory)
        with pytest.raises(Exception) as error:  # noqa: PT011
            await run(task())
        assert not isinstance(error.value, Reject | Throttled)
        assert await run(task()) == "one two three "
    assert len(fake.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_run_that_is_cancelled_before_the_first_token_hangs_up(memory, task, told, stream):
    async with served(Answer("never", hold=asyncio.Event()), Answer("now")) as fake:
        run = ai.agent(Agent(fake.model()), stream=stream, memory=memory)
        waiting = asyncio.ensure_future(run(task()))
        async with asyncio.timeout(20):
            while not fake.requests:
                await asyncio.sleep(0.005)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            while not fake.disconnects:
                await asyncio.sleep(0.005)
        assert (await run(task())).strip() == "now"


async def test_the_scripted_server_notices_a_client_that_leaves_its_answer_unread():
    """Closed with bytes unread, a connection ends with RST: an error of the reader, and not its end."""
    async with served(Answer("never", hold=asyncio.Event())) as fake:
        body = b'{"model": "fake", "stream": true}'
        reader, writer = await asyncio.open_connection(*fake.address)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        no_lingering = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_lingering)
        writer.transport.abort()
        async with asyncio.timeout(20):
            while not fake.disconnects:
                await asyncio.sleep(0.005)


async def test_the_agents_own_number_of_client_retries_is_kept(memory, task):
    async with served(Failure(500, {"retry-after-ms": "1"}), Answer("yes")) as fake:
        agent = Agent(fake.model(), model_settings={"max_retries": 1})
        assert await ai.agent(agent, memory=memory)(task()) == "yes"
    assert len(fake.requests) == 2
