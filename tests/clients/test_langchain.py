"""LangChain's ChatOpenAI through the proxy, by chat completions and by responses."""

from __future__ import annotations

from typing import Any

import pytest
from client_library import ClientLibrary
from proxy_process import ProxyProcess
from sandbox import Sandbox

langchain_openai = ClientLibrary("langchain_openai")
langchain_messages = ClientLibrary("langchain_core.messages")


def weather(location: str) -> str:
    """The weather at a location."""
    return f"fog in {location}"


@pytest.fixture(params=[False, True], ids=["chat completions", "responses"])
def model(endpoint: ProxyProcess, request: pytest.FixtureRequest) -> langchain_openai.ChatOpenAI:
    return langchain_openai.ChatOpenAI(
        model="grok-4.5",
        base_url=f"{endpoint.url}/v1",
        api_key="none",
        use_responses_api=request.param,
    )


def test_a_question_is_answered(model: langchain_openai.ChatOpenAI, sandbox: Sandbox) -> None:
    sandbox.set(events=3)
    answer = model.invoke("Hello")
    assert answer.text == "This is the." and answer.usage_metadata["input_tokens"] == 12


def test_a_streamed_answer_is_complete(model: langchain_openai.ChatOpenAI) -> None:
    chunks: list[langchain_messages.AIMessageChunk] = list(model.stream("Hello"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 20 and whole.text == model.invoke("Hello").text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_is_used(
    model: langchain_openai.ChatOpenAI, streamed: bool
) -> None:
    bound = model.bind_tools([weather])
    messages: list[Any] = [{"role": "user", "content": "Ask weather"}]
    if streamed:
        chunks = list(bound.stream(messages))
        answer: Any = chunks[0]
        for chunk in chunks[1:]:
            answer += chunk
    else:
        answer = bound.invoke(messages)
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"location": "sandbox"})
    answer = bound.invoke(
        [
            *messages,
            answer,
            langchain_messages.ToolMessage(weather(**call["args"]), tool_call_id=call["id"]),
        ]
    )
    assert answer.text and not answer.tool_calls


def test_embeddings_are_returned(endpoint: ProxyProcess) -> None:
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="v1", base_url=f"{endpoint.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert embeddings.embed_query("Hello") == [0.25, -0.5, 0.125]
