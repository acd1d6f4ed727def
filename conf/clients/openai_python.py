"""OpenAI's Python library: pip install openai. OPENAI_BASE_URL and OPENAI_API_KEY do the same."""

import os

from openai import OpenAI

# Seconds. The library's default is ten minutes, and a reasoning model may be silent for longer.
client = OpenAI(
    base_url="http://127.0.0.1:9090/v1",
    api_key=os.environ.get("XAIPROXY_KEY", "none"),
    timeout=3600,
)

with client.responses.stream(model="grok-4.5", input="Say hello.") as stream:
    for event in stream:
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
print()
client.close()
