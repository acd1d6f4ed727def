"""OpenAI's Python library through the proxy: its requests, the errors that it gets, and its
retries.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_library import ClientLibrary
from proxy_process import ProxyProcess
from sandbox import Sandbox, until

openai = ClientLibrary("openai")

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = [{"role": "user", "content": "Ask weather for San Francisco"}]
PARAMETERS: Any = {
    "type": "object",
    "properties": {"location": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["location"],
}
MODEL = "grok-4.5"


def openai_client(proxy: ProxyProcess, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy.url}/v1", **{"api_key": "none", **options})


@pytest.fixture
def client(endpoint: ProxyProcess) -> Iterator[openai.OpenAI]:
    with openai_client(endpoint) as client:
        yield client


# The API


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).owned_by == "xai"


def test_a_chat_completion_is_answered(client: openai.OpenAI, sandbox: Sandbox) -> None:
    sandbox.set(events=3)
    completion = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert (
        completion.choices[0].message.content == "This is the."
        and completion.usage.total_tokens == 18
    )
    assert completion._request_id == completion.id


def test_a_streamed_chat_completion_is_complete(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": False}
    ) as stream:
        assert list(stream)[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_is_used(client: openai.OpenAI, streamed: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    if streamed:
        with client.chat.completions.stream(model=MODEL, messages=WEATHER, tools=tools) as stream:
            choice = stream.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(model=MODEL, messages=WEATHER, tools=tools).choices[
            0
        ]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"location": "sandbox"}
    messages = [
        *WEATHER,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "fog"},
    ]
    again = client.chat.completions.create(model=MODEL, messages=messages, tools=tools).choices[0]
    assert again.finish_reason == "stop" and again.message.content


def test_a_response_is_answered(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="Hello")
    assert (
        response.output_text.startswith("This is the sandbox")
        and response.output[0].type == "reasoning"
    )
    assert client.responses.retrieve(response.id) == response
    assert client.responses.input_items.list(response.id).data[0].content[0].text == "Hello"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_streamed_response_is_complete(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Hello") as stream:
        text = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
        response = stream.get_final_response()
    assert text == response.output_text and response.usage.output_tokens == 20


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_calls_a_tool_and_uses_its_result(client: openai.OpenAI, streamed: bool) -> None:
    asked: Any = {
        "model": MODEL,
        "input": "Ask weather",
        "tools": [
            {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}
        ],
    }
    if streamed:
        with client.responses.stream(**asked) as stream:
            response = stream.get_final_response()
    else:
        response = client.responses.create(**asked)
    call = response.output[1]
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "weather",
        {"location": "sandbox"},
    )
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "fog"}]
    assert client.responses.create(
        **{**asked, "input": result}, previous_response_id=response.id
    ).output_text


def test_an_older_completion_is_answered(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Hello").choices[0]
    with client.completions.create(model=MODEL, prompt="Hello", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.text
    assert whole.finish_reason == "stop" and whole.text


def test_embeddings_are_returned(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="v1", input=["Hello", "world"])
    assert [one.embedding for one in answer.data] == [[0.25, -0.5, 0.125]] * 2


def test_a_file_is_uploaded_and_downloaded(client: openai.OpenAI, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    (tmp_path / "a.bin").write_bytes(content)
    with open(tmp_path / "a.bin", "rb") as opened:
        file = client.files.create(
            file=opened,
            purpose="assistants",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    assert (file.bytes, file.filename) == (
        len(content),
        "a.bin",
    ) and file.expires_at - file.created_at == 3600
    assert file in client.files.list().data and client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_an_image_and_a_client_secret_are_returned(client: openai.OpenAI) -> None:
    assert client.images.generate(model="grok-imagine-image", prompt="a cat", n=2).data[1].url
    assert client.realtime.client_secrets.create(
        expires_after={"anchor": "created_at", "seconds": 60}
    ).value


# A client that disconnects


def test_a_closed_stream_is_cancelled_upstream(client: openai.OpenAI, sandbox: Sandbox) -> None:
    sandbox.set(silence_after=3)
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    sandbox.wait(
        lambda seen: (seen["cancelled_streams"], seen["open_streams"]) == (1, 0), seconds=1
    )


def test_a_cancelled_task_cancels_its_request(endpoint: ProxyProcess, sandbox: Sandbox) -> None:
    """Also before the response has begun."""
    sandbox.set(answers=[{"path": "/v1/responses", "delay": 60}])

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none") as client:
            await client.responses.create(model=MODEL, input="Hello")

    async def cancel() -> None:
        task = asyncio.create_task(ask())
        await asyncio.to_thread(sandbox.wait, lambda seen: seen["requests"] == 1)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(cancel())
    sandbox.wait(lambda seen: seen["cancelled_requests"] == 1, seconds=1)


# Errors and retries


def test_without_a_login_the_error_advises_to_sign_in(
    client: openai.OpenAI, endpoint: ProxyProcess
) -> None:
    endpoint.token_path.unlink()
    with pytest.raises(openai.AuthenticationError) as error:
        client.models.list()
    assert (
        error.value.code == "login_required" and error.value.response.headers["X-XAI-Proxy-Error"]
    )
    assert "run" in str(error.value) and "xai-login --device" in str(error.value)


def test_the_library_retries_while_the_token_cannot_be_renewed(
    client: openai.OpenAI, endpoint: ProxyProcess, sandbox: Sandbox
) -> None:
    now = time.time()
    sandbox.write_login(
        endpoint.token_path,
        expires_at=now - 1,
        refresh_error={
            "code": "temporarily_unavailable",
            "description": "try later",
            "at": now,
            "terminal": False,
        },
    )
    before = len(endpoint.log_lines())
    models: list[Any] = []
    asking = threading.Thread(target=lambda: models.extend(client.models.list()))
    asking.start()
    endpoint.wait_for_log(lambda line: line.get("status") == 503, start=before)
    sandbox.write_login(endpoint.token_path)
    asking.join()
    assert MODEL in [model.id for model in models]
    endpoint.wait_for_log(lambda line: line.get("status") == 200, start=before)
    statuses = [line["status"] for line in endpoint.log_lines()[before:] if "status" in line]
    assert statuses == [503, 200]


def test_the_library_stops_after_its_own_number_of_retries(
    endpoint: ProxyProcess, sandbox: Sandbox
) -> None:
    now = time.time()
    sandbox.write_login(
        endpoint.token_path,
        expires_at=now - 1,
        refresh_error={
            "code": "temporarily_unavailable",
            "description": "try later",
            "at": now,
            "terminal": False,
        },
    )
    with (
        openai_client(endpoint, max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as error,
    ):
        client.models.list()
    assert (error.value.status_code, error.value.code) == (503, "token_unavailable")
    assert error.value.response.headers["Retry-After"] == "1"


def test_a_base_url_without_v1_is_explained(endpoint: ProxyProcess) -> None:
    with (
        openai.OpenAI(base_url=endpoint.url, api_key="none") as client,
        pytest.raises(openai.NotFoundError) as error,
    ):
        client.models.list()
    assert error.value.code == "not_found" and "perhaps /v1/models is meant" in str(error.value)


def test_xais_error_about_an_unknown_model_passes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="grok-0", messages=HELLO)
    assert error.value.response.json()["error"].startswith("The model grok-0 does not exist")


@pytest.mark.parametrize(
    "name, error, sentence",
    [
        ("rate_limited", "RateLimitError", "Too many requests for team"),
        ("spending_limit", "APIStatusError", "You have run out of credits"),
        (
            "no_subscription",
            "PermissionDeniedError",
            "do not have an active Grok subscription",
        ),
        ("unsupported_parameter", "BadRequestError", "does not support parameter"),
        ("unavailable", "InternalServerError", "Service temporarily unavailable"),
    ],
)
def test_an_error_of_xai_passes(
    endpoint: ProxyProcess, sandbox: Sandbox, name: str, error: str, sentence: str
) -> None:
    sandbox.set(answers=[{"path": "/v1/chat/completions", "error": name}])
    with (
        openai_client(endpoint, max_retries=0) as client,
        pytest.raises(getattr(openai, error)) as raised,
    ):
        client.chat.completions.create(model=MODEL, messages=HELLO)
    answer = raised.value.response
    assert sentence in answer.json()["error"] and "X-XAI-Proxy-Error" not in answer.headers
    assert sandbox.counters()["requests"] == 1


def test_the_library_retries_after_xais_rate_limit(client: openai.OpenAI, sandbox: Sandbox) -> None:
    sandbox.set(answers=[{"path": "/v1/chat/completions", "error": "rate_limited", "times": 1}])
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices
    first, second = sandbox.requests()
    # xAI's Retry-After of 1 s has reached the library.
    assert second["at"] - first["at"] > 0.9


def test_an_error_within_a_stream_is_raised(client: openai.OpenAI, sandbox: Sandbox) -> None:
    sandbox.set(capacity_error_after=2)
    with (
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream,
        pytest.raises(openai.APIError, match="at capacity due to high demand"),
    ):
        list(stream)


def test_a_cut_stream_raises_a_connection_error(client: openai.OpenAI, sandbox: Sandbox) -> None:
    sandbox.set(cut_after=5)
    with (
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream,
        pytest.raises(openai.APIConnectionError),
    ):
        list(stream)


def test_the_library_does_not_retry_after_a_timeout(sandbox: Sandbox, tmp_path: Path) -> None:
    """The work may have been done, and paid for."""
    sandbox.write_login(tmp_path / "tokens.json")
    sandbox.reset()
    sandbox.set(answers=[{"path": "/v1/responses", "delay": 60}])
    with (
        ProxyProcess(tmp_path, issuer=sandbox.url, upstream=sandbox.url, idle_timeout=0.2) as proxy,
        openai_client(proxy) as client,
        pytest.raises(openai.InternalServerError) as error,
    ):
        client.responses.create(model=MODEL, input="Hello")
    assert error.value.code == "upstream_timeout"
    until(lambda: sandbox.counters()["cancelled_requests"] == 1)
    assert sandbox.counters()["requests"] == 1
