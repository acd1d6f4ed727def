"""Anthropic's Python library through the proxy, at xAI's /v1/messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from client_library import ClientLibrary
from proxy_process import ProxyProcess
from sandbox import Sandbox

anthropic = ClientLibrary("anthropic")

ASKED: Any = {
    "model": "grok-4.5",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hello"}],
}
WEATHER: Any = {
    **ASKED,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Ask weather"}]}],
    "tools": [
        {
            "name": "weather",
            "input_schema": {
                "type": "object",
                "properties": {"location": {"type": "string"}},
                "required": ["location"],
            },
        }
    ],
}


@pytest.fixture
def client(endpoint: ProxyProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=endpoint.url, api_key="none") as client:
        yield client


def test_a_message_is_answered(client: anthropic.Anthropic, sandbox: Sandbox) -> None:
    sandbox.set(events=3)
    message = client.messages.create(**ASKED)
    assert message.content[0].text == "This is the." and message.stop_reason == "end_turn"
    [seen] = sandbox.requests()
    assert "anthropic-version" in [name.lower() for name, _ in seen["headers"]]


def test_a_streamed_message_is_complete(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == client.messages.create(**ASKED).content[0].text
    assert message.usage.output_tokens == 20


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_is_used(
    client: anthropic.Anthropic, streamed: bool
) -> None:
    if streamed:
        with client.messages.stream(**WEATHER) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**WEATHER)
    [call] = message.content
    assert (call.type, call.name, call.input, message.stop_reason) == (
        "tool_use",
        "weather",
        {"location": "sandbox"},
        "tool_use",
    )
    messages = [
        *WEATHER["messages"],
        {"role": "assistant", "content": message.content},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "fog"}],
        },
    ]
    assert client.messages.create(**{**WEATHER, "messages": messages}).stop_reason == "end_turn"


def test_without_a_login_the_error_advises_to_sign_in(
    client: anthropic.Anthropic, endpoint: ProxyProcess
) -> None:
    endpoint.token_path.unlink()
    with pytest.raises(anthropic.AuthenticationError, match="xai-login --device"):
        client.messages.create(**ASKED)


def test_tokens_are_not_counted_at_xai(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="No handler found on route"):
        client.messages.count_tokens(model="grok-4.5", messages=ASKED["messages"])
