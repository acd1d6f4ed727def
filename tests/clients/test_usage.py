"""Usage is read from what real clients get with their default settings, which ask for gzip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from client_library import ClientLibrary
from proxy_process import ProxyProcess
from sandbox import Sandbox
from scraped import Scraped

anthropic = ClientLibrary("anthropic")
openai = ClientLibrary("openai")

MODEL = "grok-4.5"
HELLO: Any = [{"role": "user", "content": "Hello"}]
LONG = 2000  # events of a stream, far more than what is kept of one


@pytest.fixture(params=["all", "none"])
def compressing(request: pytest.FixtureRequest, sandbox: Sandbox) -> Sandbox:
    sandbox.set(gzip=request.param)
    return sandbox


def chat(url: str, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
        assert list(answer) if stream else answer.usage.total_tokens


def responses(url: str, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.responses.create(model=MODEL, input="Hello", stream=stream)
        assert list(answer) if stream else answer.usage.total_tokens


def messages(url: str, stream: bool) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        answer = client.messages.create(model=MODEL, max_tokens=9, messages=HELLO, stream=stream)
        assert list(answer) if stream else answer.usage.output_tokens


def accepted(headers: list[tuple[str, str]]) -> list[str]:
    return [value for name, value in headers if name.lower() == "accept-encoding"]


def counted(proxy: ProxyProcess) -> tuple[list[float], float]:
    """The tokens by type, and the responses whose usage was not read."""
    scraped = Scraped(proxy)
    types = ("input", "cached_input", "output", "reasoning")
    tokens = [scraped("xaiproxy_tokens_total", model=MODEL, type=type) for type in types]
    return tokens, scraped("xaiproxy_usage_unread_total")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("events", [3, LONG])
@pytest.mark.parametrize(
    "ask, reasoning",
    [(chat, 3), (responses, None), (messages, 0)],
    ids=["chat", "responses", "messages"],
)
def test_nothing_is_unread(
    endpoint: ProxyProcess,
    compressing: Sandbox,
    ask: Callable[[str, bool], None],
    reasoning: int | None,
    events: int,
    stream: bool,
) -> None:
    compressing.set(events=events)
    before, unread_before = counted(endpoint)
    ask(endpoint.url, stream)
    after, unread = counted(endpoint)
    assert unread == unread_before
    asked = [seen["headers"] for seen in compressing.requests("/v1/")]
    assert all("gzip" in value for [value] in map(accepted, asked))
    used = [now - then for now, then in zip(after, before)]
    assert used[0] > 0 and used[2] >= events
    if reasoning is not None:
        assert used[2:] == [events + reasoning, reasoning]
