"""What tests of workflows share: agents that note the tasks they were given, and a process that dies."""

from __future__ import annotations

import asyncio
from collections import Counter

from orchestra.agents import AgentRegistry


class Agents(AgentRegistry):
    """A registry whose agents note the tasks they were given."""

    def __init__(self, **answers):
        super().__init__()
        self.seen = []
        for name, answer in answers.items():
            self.answer(name, answer)

    def answer(self, name, answer, **options):
        async def agent(task):
            self.seen.append(task)
            value = answer(task) if callable(answer) else answer
            if asyncio.iscoroutine(value):
                value = await value
            if isinstance(value, BaseException):
                raise value
            return value

        self.register(name, agent, **options)

    def runs(self):
        return Counter(task.type for task in self.seen)


class Killed(BaseException):
    """The process is gone: nothing catches it."""
