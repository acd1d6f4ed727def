"""LangChain: pip install langchain-openai."""

import os

from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model="grok-4.5",
    base_url="http://127.0.0.1:9090/v1",
    api_key=os.environ.get("XAIPROXY_KEY", "none"),
    # Seconds; a reasoning model may be silent for long.
    timeout=3600,
)

for chunk in model.stream("Say hello."):
    print(chunk.text, end="", flush=True)
print()
