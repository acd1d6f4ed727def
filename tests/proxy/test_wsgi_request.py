"""The API under a WSGI server that knows nothing of this package: gevent's own pywsgi."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from checkout import SUPPORT
from proxy_process import Client, ProxyProcess
from scripted_upstream import ScriptedUpstream

PREFLIGHT = (
    "Origin: https://chat.example",
    "Access-Control-Request-Method: POST",
)
REFUSED = (
    b'HTTP/1.1 403 Forbidden\r\nContent-Length: 37\r\n\r\n{"code":"unauthenticated:bad-token"}\n'
)
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def served(
    scripted: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    command = [sys.executable, str(SUPPORT / "stock_pywsgi.py")]
    proxy = ProxyProcess(
        tmp_path_factory.mktemp("pywsgi"),
        command=command,
        upstream=scripted.origin,
        allowed_origins="https://chat.example",
        replay_memory=100_000,
    )
    proxy.sign_in()
    yield proxy
    proxy.kill()


@pytest.fixture
def client(served: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[Client]:
    served.sign_in()
    with served.client() as connection:
        yield connection


def test_a_request_is_forwarded_with_its_target_fields_and_the_token(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("GET", "/v1/a%20b%C3%A9/c?x=%2F&y", "X-One: 1", "Cookie: no=1")
    request = upstream.receive().answer()
    assert (request.target, request.token) == ("/v1/a%20b%C3%A9/c?x=%2F&y", "the-token")
    assert (request.value("X-One"), request.values("Cookie")) == ("1", [])
    assert client.message().body == b"ok"


@pytest.mark.parametrize("method", ["GET", "DELETE", "PROPFIND", "OPTIONS"])
def test_any_method_is_forwarded(client: Client, upstream: ScriptedUpstream, method: str) -> None:
    client.request(method, "/v1/")
    assert upstream.receive().answer().method == method
    assert client.message().status == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [1, 90_000])
def test_a_body_is_replayed_with_the_newer_token(
    served: ProxyProcess, client: Client, upstream: ScriptedUpstream, size: int, chunked: bool
) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    if chunked:
        client.request("POST", "/v1/x", "Transfer-Encoding: chunked")
        client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    else:
        client.request("POST", "/v1/x", body=body)
    first = upstream.receive()
    assert first.body == body
    served.sign_in("newer")
    first.answer(REFUSED)
    second = upstream.receive().answer()
    assert (second.token, second.body) == ("newer", body)
    assert client.message().body == b"ok"


def test_a_stream_is_forwarded_event_by_event(client: Client, upstream: ScriptedUpstream) -> None:
    client.request("POST", "/v1/chat/completions", body=b"{}")
    # pywsgi sends the head together with the first bytes of the content.
    request = upstream.receive().answer(EVENTS + b"9\r\ndata: 0\n\n\r\n")
    assert client.head().value("Content-Type") == "text/event-stream"
    assert client.chunk() == b"data: 0\n\n"
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        request.answer(b"%x\r\n%b\r\n" % (len(event), event))
        assert client.chunk() == event
    request.answer(b"0\r\n\r\n")
    assert client.chunk() == b""


def test_a_cut_stream_is_visibly_truncated(client: Client, upstream: ScriptedUpstream) -> None:
    client.request("POST", "/v1/chat/completions", body=b"{}")
    request = upstream.receive().answer(EVENTS + b"3\r\nabc\r\n")
    assert client.head().status == 200 and client.chunk() == b"abc"
    request.connection.reset()
    assert client.rest() == b""


def test_the_proxy_answers_refusals_and_preflights_itself(
    served: ProxyProcess, client: Client
) -> None:
    refused = client.ask("GET", "/v1/x", "Origin: https://evil.example")
    assert (refused.status, refused.value("X-XAI-Proxy-Error")) == (403, "origin_not_allowed")
    allowed = client.ask("OPTIONS", "/v1/x", *PREFLIGHT, body=b"")
    assert (allowed.status, allowed.value("Access-Control-Allow-Methods")) == (204, "POST")
    assert client.ask("GET", "/v1/../x").status == 400
    assert client.ask("GET", "/models").status == 404
    assert client.ask("GET", "/healthz").status == 200
    served.token_path.unlink()
    assert client.ask("GET", "/v1/models").value("X-XAI-Proxy-Error") == "login_required"


def test_a_failed_request_frees_the_copy_of_its_body(
    served: ProxyProcess, client: Client, upstream: ScriptedUpstream
) -> None:
    body = b"x" * 60_000
    for _ in range(2):
        client.request("POST", "/v1/x", body=body)
        upstream.receive().connection.reset()
        assert client.message().status == 502
    client.request("POST", "/v1/x", body=body)
    first = upstream.receive()
    served.sign_in("newer")
    first.answer(REFUSED)
    assert upstream.receive().answer().body == body
    assert client.message().status == 200


@pytest.mark.parametrize("path", ["/v1//models", "/v1/", "/v1/a//b/", "/v2//"])
def test_a_path_is_forwarded_unchanged(
    client: Client, upstream: ScriptedUpstream, path: str
) -> None:
    client.request("GET", path)
    assert upstream.receive().answer().target == path
    assert client.message().status == 200
