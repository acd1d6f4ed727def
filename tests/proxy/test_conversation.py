"""x-grok-conv-id (XAI_PROXY_CACHE_AFFINITY): what a client sends becomes an id for xAI."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from proxy_process import ProxyProcess
from sandbox import Sandbox
from scripted_upstream import ScriptedUpstream
from xai_egress import HOST, XaiEgress

from xaiproxy import client_keys

XAI = f"https://{HOST}"
SESSION_HEADERS = (
    "x-session-affinity",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "conversation_id",
    "x-session-id",
)


@pytest.fixture(scope="module")
def xai(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XaiEgress]:
    with XaiEgress(tmp_path_factory.mktemp("ca")) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(xai: XaiEgress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyProcess]:
    folder = tmp_path_factory.mktemp("proxy")
    keys = [f"{name} {client_keys.digest(f'key-of-{name}')}\n" for name in ("ann", "bob")]
    (folder / "client-keys").write_text("".join(keys))
    with ProxyProcess(folder, upstream=XAI, environ=xai.environ) as running:
        running.sign_in(salt="the salt")
        yield running


@pytest.fixture
def ids(xai: XaiEgress, proxy: ProxyProcess) -> Callable[..., list[str]]:
    """Send a request with these header lines; return the values of its x-grok-conv-id at xAI."""

    def send(*fields: str, key: str = "ann", through: ProxyProcess = proxy) -> list[str]:
        key_field = f"Authorization: Bearer key-of-{key}"
        assert through.ask("POST", "/v1/responses", key_field, *fields, body=b"{}").status == 200
        return re.findall("(?im)^x-grok-conv-id: ?(.*)\r$", xai.seen[-1].decode("latin-1"))

    return send


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("latin-1")).hexdigest()[:32]


@pytest.mark.parametrize("name", SESSION_HEADERS)
def test_a_session_header_becomes_an_id_and_passes_unchanged(
    ids: Callable[..., list[str]], xai: XaiEgress, name: str
) -> None:
    for sent in (name, name.title(), name.upper()):
        assert ids(f"{sent}: 01a21ab2-é") == [digest("the salt", "ann", "01a21ab2-é")]
        assert f"\r\n{sent}: 01a21ab2-é\r\n".encode("latin-1") in xai.seen[-1]
    assert ids(f"{name}: 01a21ab2") == [digest("the salt", "ann", "01a21ab2")]


def test_the_first_in_the_order_of_preference_is_the_session(
    ids: Callable[..., list[str]],
) -> None:
    for first, second in itertools.combinations(SESSION_HEADERS, 2):
        for fields in (f"{first}: 1", f"{second}: 2"), (f"{second}: 2", f"{first}: 1"):
            assert ids(*fields) == ids(f"{first}: 1")
        assert ids(f"{first}:", f"{second}: 2") == ids(f"{second}: 2")


@pytest.mark.parametrize("own", ["own", ""])
def test_the_clients_own_id_wins_and_passes_unchanged(
    ids: Callable[..., list[str]], own: str
) -> None:
    assert ids(f"X-Grok-Conv-Id: {own}", "session-id: 1") == [own]


@pytest.mark.parametrize("fields", [(), ("session-id:",), ("x-client-request-id: 1",)])
def test_a_request_without_a_session_gets_no_id(
    ids: Callable[..., list[str]], fields: tuple[str, ...]
) -> None:
    assert ids(*fields) == []


def test_another_key_or_sign_in_makes_another_id_and_a_renewal_does_not(
    ids: Callable[..., list[str]], proxy: ProxyProcess
) -> None:
    first = ids("session-id: 1")
    assert ids("session-id: 1", key="bob") != first
    proxy.sign_in("renewed", salt="the salt")
    assert ids("session-id: 1") == first
    proxy.sign_in("another", salt="another salt")
    assert ids("session-id: 1") != first
    proxy.sign_in(salt="the salt")


def test_proxies_at_one_token_file_make_the_same_id(
    ids: Callable[..., list[str]], xai: XaiEgress, proxy: ProxyProcess
) -> None:
    """Thus a restart does not change it either."""
    folder = proxy.token_path.parent
    with ProxyProcess(folder, upstream=XAI, environ=xai.environ) as second:
        assert ids("session-id: 1", through=second) == ids("session-id: 1")


def test_without_a_salt_an_id_lasts_as_long_as_the_proxy(
    ids: Callable[..., list[str]], xai: XaiEgress, tmp_path: Path
) -> None:
    """As with a file of another program, until its first renewal."""
    found = []
    for _ in range(2):
        with ProxyProcess(tmp_path, upstream=XAI, environ=xai.environ) as fresh:
            fresh.sign_in()
            found += [ids("session-id: 1", through=fresh) for _ in range(2)]
    assert found[0] == found[1] != found[2] == found[3] and len(found[0]) == 1


def test_zero_means_never(ids: Callable[..., list[str]], xai: XaiEgress, tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, upstream=XAI, environ=xai.environ, cache_affinity=0) as without:
        without.sign_in(salt="the salt")
        assert ids("session-id: 1", through=without) == []
        assert ids("x-grok-conv-id: own", through=without) == ["own"]


def test_another_upstream_than_xai_gets_no_id(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with running.client() as client:
        client.request("GET", "/v1/models", "session-id: 1")
        request = upstream.receive().answer()
        assert request.value("session-id") == "1" and request.value("x-grok-conv-id") is None
        assert client.message().status == 200


# The cache


@pytest.mark.parametrize(
    "affinity, share",
    [
        # Of each turn all but the last question.
        (1, 45 / 55),
        (0, 0),
    ],
)
def test_the_cached_share_of_six_interleaved_clients(
    sandbox: Sandbox, tmp_path: Path, affinity: int, share: float
) -> None:
    """Each sends ten turns of a conversation, and upstream has fifty servers."""
    sandbox.set(cache_servers=50)

    def respond(request: bytes) -> bytes:
        host = f"Host: {sandbox.host}:{sandbox.port}\r\nConnection: close\r\n"
        return sandbox.raw(request.replace(f"Host: {HOST}\r\n".encode(), host.encode()))

    conversations: dict[str, list[dict[str, str]]] = {str(uuid.uuid4()): [] for _ in range(6)}
    used = []
    with (
        XaiEgress(tmp_path, respond) as egress,
        ProxyProcess(
            tmp_path,
            issuer=sandbox.url,
            upstream=XAI,
            environ=egress.environ,
            cache_affinity=affinity,
        ) as proxy,
    ):
        sandbox.write_login(proxy.token_path)
        for _ in range(10):
            for session, messages in conversations.items():
                messages.append({"role": "user", "content": f"{uuid.uuid4()} " * 6})
                used.append(usage(proxy, session, messages))
    cached = sum(each["prompt_tokens_details"]["cached_tokens"] for each in used)
    assert cached / sum(each["prompt_tokens"] for each in used) == pytest.approx(share, abs=0.005)


def usage(proxy: ProxyProcess, session: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = json.dumps({"model": "grok-4.5", "messages": messages}).encode()
    fields = ("Content-Type: application/json", f"session-id: {session}")
    response = proxy.ask("POST", "/v1/chat/completions", *fields, body=body)
    assert response.status == 200, response.body
    return json.loads(response.body)["usage"]
