"""OpenAI's Agents SDK: pip install openai-agents."""

import os

from agents import Agent, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

# Traces would go to OpenAI.
set_tracing_disabled(True)
# Seconds; a reasoning model may be silent for long.
client = AsyncOpenAI(
    base_url="http://127.0.0.1:9090/v1",
    api_key=os.environ.get("XAIPROXY_KEY", "none"),
    timeout=3600,
)
agent = Agent("assistant", model=OpenAIResponsesModel("grok-4.5", client))

print(Runner.run_sync(agent, "Say hello.").final_output)
