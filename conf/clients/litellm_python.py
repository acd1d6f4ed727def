"""LiteLLM: pip install litellm. In the configuration of its proxy: model, api_base and api_key."""

import os

import litellm

# Seconds; a reasoning model may be silent for long.
stream = litellm.completion(
    model="xai/grok-4.5",
    api_base="http://127.0.0.1:9090/v1",
    api_key=os.environ.get("XAIPROXY_KEY", "none"),
    messages=[{"role": "user", "content": "Say hello."}],
    stream=True,
    timeout=3600,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
