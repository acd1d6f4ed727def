"""A proxy that requires a client key, and the ways in which real clients send theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client_library import ClientLibrary
from proxy_process import ProxyProcess
from sandbox import Sandbox

from xaiproxy import client_keys

anthropic = ClientLibrary("anthropic")
openai = ClientLibrary("openai")
langchain_openai = ClientLibrary("langchain_openai")

KEY = "xaip_of-the-laptop"
MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared_keyed(
    shared_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    folder, origin = tmp_path_factory.mktemp("keyed"), shared_sandbox.url
    (folder / "client-keys").write_text(f"laptop {client_keys.digest(KEY)}\n")
    shared_sandbox.write_login(folder / "tokens.json")
    with ProxyProcess(folder, issuer=origin, upstream=origin) as proxy:
        yield proxy


@pytest.fixture
def keyed(sandbox: Sandbox, shared_keyed: ProxyProcess) -> ProxyProcess:
    return shared_keyed


def ask_openai(url: str, key: str) -> Any:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        return client.chat.completions.create(model="grok-4.5", messages=MESSAGES)


def ask_langchain(url: str, key: str) -> Any:
    return langchain_openai.ChatOpenAI(model="grok-4.5", base_url=f"{url}/v1", api_key=key).invoke(
        "Hello"
    )


def ask_anthropic(url: str, **credential: Any) -> Any:
    with anthropic.Anthropic(base_url=url, **credential) as client:
        return client.messages.create(model="grok-4.5", max_tokens=9, messages=MESSAGES)


def ask_older_anthropic(url: str, key: str) -> Any:
    """As the library before 2.0 does, and Claude Code with ANTHROPIC_API_KEY."""
    return ask_anthropic(url, default_headers={"X-Api-Key": key, "Authorization": anthropic.Omit()})


CLIENTS: dict[str, Callable[[str, str], Any]] = {
    "openai": ask_openai,
    "langchain": ask_langchain,
    "anthropic, X-Api-Key": ask_older_anthropic,
    "anthropic, api_key": lambda url, key: ask_anthropic(url, api_key=key),
    "anthropic, auth_token": lambda url, key: ask_anthropic(url, auth_token=key),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_key_is_accepted_and_not_forwarded(
    keyed: ProxyProcess, sandbox: Sandbox, client: str
) -> None:
    before = len(keyed.log_lines())
    assert CLIENTS[client](keyed.url, KEY)
    [seen] = sandbox.requests()
    assert [name.lower() for name, _ in seen["headers"]].count("authorization") == 1
    assert "x-api-key" not in [name.lower() for name, _ in seen["headers"]]
    assert keyed.wait_for_log(lambda line: "status" in line, start=before)["key"] == "laptop"


@pytest.mark.parametrize("client", CLIENTS)
def test_another_key_is_refused_with_a_sentence(
    keyed: ProxyProcess, sandbox: Sandbox, client: str
) -> None:
    with pytest.raises((openai.AuthenticationError, anthropic.AuthenticationError)) as error:
        CLIENTS[client](keyed.url, "xaip_of-another-proxy")
    assert "is not one of this proxy's" in str(error.value) and "xaip_" not in str(error.value)
    assert sandbox.requests() == []
