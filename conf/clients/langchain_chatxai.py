"""LangChain's ChatXAI: pip install langchain-xai."""

import os

from langchain_xai import ChatXAI

model = ChatXAI(
    model="grok-4.5",
    xai_api_base="http://127.0.0.1:9090/v1",
    api_key=os.environ.get("XAIPROXY_KEY", "none"),
    # Seconds; a reasoning model may be silent for long.
    timeout=3600,
)

for chunk in model.stream("Say hello."):
    print(chunk.text, end="", flush=True)
print()
