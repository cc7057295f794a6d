"""A suite of its own (`make test-llm`): it needs a model of 93 MB and a server for it, and takes a minute."""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("ORCHESTRA_TEST_LLM") else ["test_*.py"]


@pytest.fixture(scope="session")
def server():
    """The model, served on loopback by this process."""
    from tests.llm.serve import serve

    running = serve()
    yield running
    del running


@pytest.fixture
async def model(server):
    """It, as a model of pydantic-ai."""
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    from tests.llm.serve import MODEL

    provider = OpenAIProvider(base_url=f"{server.listening_address}/v1", api_key="none")
    yield OpenAIChatModel(MODEL, provider=provider)
    await provider.client.close()
