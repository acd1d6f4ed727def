"""Pydantic AI: pip install 'pydantic-ai-slim[openai]'."""

import os

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(
    base_url="http://127.0.0.1:9090/v1", api_key=os.environ.get("XAIPROXY_KEY", "none")
)
# Seconds; a reasoning model may be silent for long.
agent = Agent(OpenAIResponsesModel("grok-4.5", provider=provider), model_settings={"timeout": 3600})

print(agent.run_sync("Say hello.").output)
