"""A model that says what it is told to, and the parts to tell it with."""

from __future__ import annotations

from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import RequestUsage


class Scripted(FunctionModel):
    """Answers with the next part of a script, and counts: ``asked`` holds the messages of every request."""

    def __init__(self, *script, tokens=(10, 5)):
        self.script, self.asked, self.tokens = list(script), [], tokens
        super().__init__(self.answer, model_name="scripted")

    async def answer(self, messages, info: AgentInfo) -> ModelResponse:
        self.asked.append(messages)
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(said, Exception):
            raise said
        parts = said if isinstance(said, list) else [said]
        usage = RequestUsage(input_tokens=self.tokens[0], output_tokens=self.tokens[1])
        return ModelResponse(parts=[TextPart(each) if isinstance(each, str) else each for each in parts], usage=usage)


def call(tool, id_=None, **args) -> ToolCallPart:
    return ToolCallPart(tool, args, tool_call_id=id_ or f"id-{tool}")


def prompts(messages) -> list[str]:
    return [part.content for message in messages for part in message.parts if part.part_kind == "user-prompt"]
