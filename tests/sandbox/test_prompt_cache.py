"""The prompt caches of the sandbox's servers (the knob cache_servers)."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from sandbox import Sandbox

QUESTIONS = [{"role": "user", "content": f"question {number}" * 20} for number in range(4)]


@pytest.fixture
def conversation() -> list[dict[str, str]]:
    """Four questions, which no other test sends."""
    return [{"role": "system", "content": str(uuid.uuid4())}, *QUESTIONS]


def chat(sandbox: Sandbox, token: str, messages: list[Any], **headers: str) -> tuple[int, int]:
    """Return the size of the prompt, and how much of it was cached."""
    body = {"model": "grok-4.5", "messages": messages}
    used = sandbox.post("/v1/chat/completions", body, token, **headers)[1]["usage"]
    return used["prompt_tokens"], used["prompt_tokens_details"]["cached_tokens"]


def test_without_cache_servers_nothing_is_cached(
    sandbox: Sandbox, token: str, conversation: list[Any]
) -> None:
    assert [chat(sandbox, token, conversation) for _ in range(2)] == [(12, 0)] * 2


def test_the_longest_common_prefix_is_cached(
    sandbox: Sandbox, token: str, conversation: list[Any]
) -> None:
    sandbox.set(cache_servers=1)
    size, cached = chat(sandbox, token, conversation[:3])
    assert cached == 0 < size
    assert chat(sandbox, token, conversation)[1] == size
    # Another question at the end; then another one at the beginning.
    assert chat(sandbox, token, [*conversation[:3], conversation[1]])[1] == size
    assert chat(sandbox, token, conversation[1:])[1] == 0


def test_requests_of_one_conversation_id_go_to_one_server(
    sandbox: Sandbox, token: str, conversation: list[Any]
) -> None:
    sandbox.set(cache_servers=50)
    size, _ = chat(sandbox, token, conversation, X_Grok_Conv_Id="a")
    assert chat(sandbox, token, conversation, X_Grok_Conv_Id="a") == (size, size)
    assert chat(sandbox, token, conversation, X_Grok_Conv_Id="b") == (size, 0)


def test_requests_without_an_id_go_to_each_server_in_turn(
    sandbox: Sandbox, token: str, conversation: list[Any]
) -> None:
    sandbox.set(cache_servers=3)
    cached = [chat(sandbox, token, conversation)[1] > 0 for _ in range(6)]
    assert cached == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "body, header",
    [({}, "a"), ({"prompt_cache_key": "a"}, None), ({"prompt_cache_key": "b"}, "a")],
    ids=["header", "body", "header before body"],
)
def test_a_response_is_cached_by_header_or_body(
    sandbox: Sandbox, token: str, conversation: list[Any], body: dict[str, str], header: str | None
) -> None:
    sandbox.set(cache_servers=50)
    fields = {"X_Grok_Conv_Id": header} if header else {}
    body = {"model": "grok-4.5", "input": conversation, **body}
    first, second = [
        sandbox.post("/v1/responses", body, token, **fields)[1]["usage"] for _ in range(2)
    ]
    assert first["input_tokens_details"]["cached_tokens"] == 0
    assert second["input_tokens_details"]["cached_tokens"] == second["input_tokens"] > 0
    # A conversation id of the body "b" leads elsewhere.
    other = {**body, "prompt_cache_key": "b"}
    used = sandbox.post("/v1/responses", other, token)[1]["usage"]
    assert used["input_tokens_details"]["cached_tokens"] == 0
