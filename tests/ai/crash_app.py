"""The worker that tests/ai/test_crash.py kills: an agent of three model calls and two tools, against the server named."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

import orchestra.ai as ai
from orchestra import App, Retry

NOTES = Path(os.environ["NOTES"])
"""What the tools did, one line each."""
STAY = os.environ.get("STAY", "")
"""The tool that never returns."""

model = OpenAIChatModel("fake", provider=OpenAIProvider(base_url=os.environ["FAKE_URL"], api_key="none"))
agent = Agent(model, name="crash")
app = App("crash", lease=2.0, retry=Retry(max_retries=2, base=0.05))


async def noted(name: str) -> str:
    with NOTES.open("a") as out:
        out.write(f"{name}\n")
    if name == STAY:
        await asyncio.Event().wait()
    return f"{name} done"


@agent.tool_plain
async def first() -> str:
    return await noted("first")


@agent.tool_plain
async def second() -> str:
    return await noted("second")


@agent.tool_plain(metadata=ai.ONCE)
async def pay() -> str:
    return await noted("pay")


app.agent("think")(ai.agent(agent, result="full", stream="--stream" in sys.argv))


async def main() -> None:
    async with app.worker(concurrency=2):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
