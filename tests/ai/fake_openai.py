"""A scripted server that speaks OpenAI's chat completions, on loopback: says what it is told to, and records what it was asked.

Each request takes the next entry of the script; the last one is repeated. One event loop, or a thread of its own
(:func:`in_thread`), whose script may then not be changed while requests run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


@dataclass
class Answer:
    """A completion. ``hold``: set it to let the first token go. ``cut_after``: the connection breaks after so many chunks."""

    text: str = ""
    tools: tuple[tuple[str, dict[str, Any]], ...] = ()
    input_tokens: int = 10
    output_tokens: int = 5
    hold: asyncio.Event | None = None
    cut_after: int | None = None


@dataclass
class Failure:
    """An error status."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": {"message": "scripted", "type": "scripted", "code": null}}'


@dataclass
class Raw:
    """Any body with status 200."""

    body: str


class FakeOpenAI:
    """The server. ``requests`` are the bodies it got, in order; ``disconnects``, how many clients left in their answer."""

    def __init__(self, *script: Answer | Failure | Raw) -> None:
        self.script = list(script)
        self.requests: list[dict[str, Any]] = []
        self.disconnects = 0
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._models: list[OpenAIChatModel] = []

    def model(self) -> OpenAIChatModel:
        """A model that asks here; its connections are closed with the server."""
        made = OpenAIChatModel("fake", provider=OpenAIProvider(base_url=self.url, api_key="none"))
        self._models.append(made)
        return made

    @property
    def address(self) -> tuple[str, int]:
        return self._server.sockets[0].getsockname()

    @property
    def url(self) -> str:
        return "http://{}:{}/v1".format(*self.address)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for model in self._models:
            await model.client.close()
        self._server.close()
        for task in self._serving:
            task.cancel()
        for ended in await asyncio.gather(*self._serving, return_exceptions=True):
            if isinstance(ended, Exception):  # not CancelledError: some were just closing their connection
                raise ended

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._talk(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
            body = json.loads(await reader.readexactly(int(fields.get("content-length", 0))))
            self.requests.append(body)
            said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            try:
                await self._answer(said, body, reader, writer, len(self.requests))
            except ConnectionError:
                self.disconnects += 1
                raise
            if isinstance(said, Answer) and said.cut_after is not None:
                return

    async def _answer(
        self, said: Any, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        if isinstance(said, Failure):
            _head(writer, said.status, {**said.headers, "content-length": str(len(said.body.encode()))})
            writer.write(said.body.encode())
        elif isinstance(said, Raw):
            _head(writer, 200, {"content-length": str(len(said.body.encode()))})
            writer.write(said.body.encode())
        elif body.get("stream"):
            await self._stream(said, body, reader, writer, number)
        else:
            if said.hold is not None:
                await self._held(said.hold, reader)
            text = json.dumps(_completion(said, body, number))
            _head(writer, 200, {"content-length": str(len(text))})
            writer.write(text.encode())
        await writer.drain()

    async def _held(self, hold: asyncio.Event, reader: asyncio.StreamReader) -> None:
        """Until ``hold`` is set, or the client has gone: by FIN, or by RST if it left anything unread."""
        while not hold.is_set():
            if reader.at_eof() or reader.exception() is not None:
                raise ConnectionResetError
            await asyncio.sleep(0.01)

    async def _stream(
        self,
        said: Answer,
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        number: int,
    ) -> None:
        _head(writer, 200, {"transfer-encoding": "chunked", "content-type": "text/event-stream"})
        await writer.drain()
        if said.hold is not None:
            await self._held(said.hold, reader)
        for count, piece in enumerate(_pieces(said, body, number)):
            if count == said.cut_after:
                return
            line = f"data: {piece if isinstance(piece, str) else json.dumps(piece)}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            await writer.drain()
        writer.write(b"0\r\n\r\n")


def _head(writer: asyncio.StreamWriter, status: int, headers: dict[str, str]) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"content-type": "application/json", **headers}.items())
    writer.write(f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode())


def _tools(said: Answer, number: int) -> list[dict[str, Any]]:
    return [
        {
            "index": at,
            "id": f"call-{number}-{at}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(args)},
        }
        for at, (name, args) in enumerate(said.tools)
    ]


def _usage(said: Answer) -> dict[str, int]:
    whole = said.input_tokens + said.output_tokens
    return {"prompt_tokens": said.input_tokens, "completion_tokens": said.output_tokens, "total_tokens": whole}


def _completion(said: Answer, body: dict[str, Any], number: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": said.text or None}
    if said.tools:
        message["tool_calls"] = _tools(said, number)
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if said.tools else "stop"}
    head = {"id": f"chat-{number}", "object": "chat.completion", "created": 1, "model": body["model"]}
    return {**head, "choices": [choice], "usage": _usage(said)}


def _pieces(said: Answer, body: dict[str, Any], number: int) -> Iterator[Any]:
    head = {"id": f"chat-{number}", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word + " "} for word in said.text.split()]
    deltas += [{"tool_calls": [call]} for call in _tools(said, number)]
    for delta in deltas:
        yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    end = {"index": 0, "delta": {}, "finish_reason": "tool_calls" if said.tools else "stop"}
    yield {**head, "choices": [end]}
    yield {**head, "choices": [], "usage": _usage(said)}
    yield "[DONE]"


@contextlib.contextmanager
def in_thread(fake: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """``fake``, served by a thread, so that other processes can ask while the test's own loop is not there."""
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with fake:
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="fake-openai")
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@contextlib.asynccontextmanager
async def served(*script: Answer | Failure | Raw) -> AsyncIterator[FakeOpenAI]:
    """A server with this script."""
    async with FakeOpenAI(*script) as fake:
        yield fake
