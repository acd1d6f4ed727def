"""The log line of a request names what failed, and why."""

from __future__ import annotations

import gzip
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from proxy_process import ProxyProcess, both_ways
from scripted_upstream import ScriptedUpstream
from websocket_handshake import handshake

CAPACITY = (
    b'data: {"error":{"message":"The model is currently at capacity","type":"server_error",'
    b'"code":"resource-exhausted"}}\n\n'
)


@pytest.fixture
def proxy(start_proxy: Callable[..., ProxyProcess]) -> ProxyProcess:
    return start_proxy()


def answer(status: str, body: bytes, *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def failure(line: dict[str, Any]) -> tuple[str, int, str, str]:
    return line["level"], line["status"], line["error"], line["reason"]


def test_an_error_of_the_proxy(proxy: ProxyProcess) -> None:
    with proxy.client() as client:
        message = client.ask("GET", "/v1/v1/log-own")
    line = proxy.wait_for_request("/v1/v1/log-own")
    assert line["message"] == "GET /v1/v1/log-own 404 not_found"
    assert failure(line)[:3] == ("info", 404, "not_found")
    assert line["reason"] in message.body.decode() and line["client"] == "127.0.0.1"


def test_an_error_of_the_wsgi_application(proxy: ProxyProcess) -> None:
    proxy.ask("GET", "/log-elsewhere")
    line = proxy.wait_for_request("/log-elsewhere")
    assert line["error"] == "not_found" and "perhaps /v1/log-elsewhere is meant" in line["reason"]


def test_a_head_that_is_malformed(proxy: ProxyProcess) -> None:
    start = len(proxy.log_lines())
    with proxy.client() as client:
        client.send(b"GET /v1/models\r\n\r\n")
        assert client.message().status == 400
    line = proxy.wait_for_log(lambda line: line.get("path") == "-", start=start)
    assert line["message"] == "- - 400 bad_request" and "request line" in line["reason"]


def test_upstream_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{free.getsockname()[1]}"
        with ProxyProcess(tmp_path, upstream=origin) as proxy:
            proxy.sign_in()
            proxy.ask("GET", "/v1/models")
            line = proxy.wait_for_request("/v1/models")
    assert line["message"] == "GET /v1/models 502 upstream_unreachable"
    reason = f"no connection to {origin}: Connection refused"
    assert failure(line) == ("warning", 502, "upstream_unreachable", reason)


def test_no_login(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path) as proxy:
        proxy.ask("GET", "/v1/models")
        line = proxy.wait_for_request("/v1/models")
    assert failure(line)[:3] == ("info", 401, "login_required")
    assert "xai-login --device" in line["reason"]


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_an_error_of_the_api(proxy: ProxyProcess, upstream: ScriptedUpstream, coding: str) -> None:
    body = b'{"code":"personal-team-blocked:spending-limit","error":"You have run out of credits."}'
    fields = [f"Content-Encoding: {coding}", "x-request-id: from-upstream"]
    path = f"/v1/log-{coding}"
    with proxy.client() as client:
        client.request("POST", path, body=b"{}")
        sent = gzip.compress(body) if coding == "gzip" else body
        upstream.receive().answer(answer("402 Payment Required", sent, *fields))
        assert client.message().body == sent
    line = proxy.wait_for_request(path)
    assert line["message"] == f"POST {path} 402 personal-team-blocked:spending-limit"
    reason = "the account has no credits, or no subscription that covers this"
    assert failure(line) == ("info", 402, "personal-team-blocked:spending-limit", reason)
    assert (line["upstream_request_id"], line["request_bytes"]) == ("from-upstream", 2)
    assert "run out" not in str(line)


@both_ways
def test_a_stream_that_upstream_cuts(running: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with running.client() as client:
        client.request("GET", "/v1/log-cut")
        request = upstream.receive()
        request.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
        assert client.head() and client.chunk() == b"ok"
        request.connection.close()
        client.closed_within()
    line = running.wait_for_request("/v1/log-cut")
    assert line["message"] == "GET /v1/log-cut 200 upstream_broken"
    reason = "upstream broke the response off: it closed the connection"
    assert failure(line) == ("warning", 200, "upstream_broken", reason)
    assert (line["ended_by"], line["bytes"]) == ("upstream", 2)


@both_ways
@pytest.mark.parametrize("before", [b"", b"data: {}\n\n" * 5000])
def test_a_stream_that_ends_with_an_error(
    running: ProxyProcess, upstream: ScriptedUpstream, before: bytes
) -> None:
    path = f"/v1/chat/completions/{len(before)}"
    content = before + CAPACITY
    with running.client() as client:
        client.request("GET", path)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        upstream.receive().answer(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        assert client.message().body == content
    line = running.wait_for_request(path)
    assert failure(line)[:3] == ("warning", 200, "resource-exhausted")
    assert line["ended_by"] == "done"


@both_ways
def test_a_compressed_stream_that_ends_with_an_error(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """SDKs ask for gzip, also of streams."""
    content = gzip.compress(b"data: {}\n\n" * 5000 + CAPACITY)
    fields = ("Content-Type: text/event-stream", "Content-Encoding: gzip")
    with running.client() as client:
        client.request("POST", "/v1/responses/packed", body=b"{}")
        upstream.receive().answer(answer("200 OK", content, *fields))
        assert client.message().body == content
        client.request("POST", "/v1/responses/garbled", body=b"{}")
        upstream.receive().answer(answer("200 OK", content[9:], *fields))
        assert client.message().body == content[9:]
    line = running.wait_for_request("/v1/responses/packed")
    assert failure(line)[:3] == ("warning", 200, "resource-exhausted")
    assert line["ended_by"] == "done"
    line = running.wait_for_request("/v1/responses/garbled")
    assert line["level"] == "info" and "error" not in line


def test_the_line_of_the_last_request_is_not_lost(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """The line of a compressed stream is written a moment after its end."""
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.sign_in()
        with proxy.client() as client:
            client.request("POST", "/v1/responses/last", body=b"{}")
            request = upstream.receive()
            proxy.process.terminate()
            proxy.wait_for_log(lambda line: line["message"].startswith("stopping"))
            fields = ("Content-Type: text/event-stream", "Content-Encoding: gzip")
            request.answer(answer("200 OK", gzip.compress(CAPACITY), *fields))
            client.message()
        proxy.process.wait()
        lines = [line.get("path") for line in proxy.log_lines()]
    assert "/v1/responses/last" in lines


def test_a_client_that_leaves_is_no_failure(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with proxy.client() as client:
        client.request("GET", "/v1/log-left")
        upstream.receive()
    line = proxy.wait_for_request("/v1/log-left")
    assert (line["status"], line["level"], line["ended_by"]) == (499, "info", "client")
    assert "error" not in line and "reason" not in line


# Request ids


def test_a_clients_request_id_passes_and_is_logged(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    fields = ("X-Request-Id: mine-1", "User-Agent: an agent/2")
    with proxy.client() as client:
        client.request("GET", "/v1/log-id", *fields)
        request = upstream.receive()
        assert request.values("x-request-id") == ["mine-1"]
        request.answer(answer("200 OK", b"ok"))
        assert not client.message().values("x-request-id")
        line = proxy.wait_for_request("/v1/log-id")
        assert (line["request_id"], line["user_agent"]) == ("mine-1", "an agent/2")
        assert line["upstream_request_id"] is None
        own = client.ask("GET", "/v1/v1/log-id", *fields)
    assert own.values("x-request-id") == ["mine-1"]


@pytest.mark.parametrize(
    "fields",
    [
        (),
        ("X-Request-Id: " + "x" * 201,),
        ("X-Request-Id:",),
        ("X-Request-Id: a", "X-Request-Id: b"),
    ],
    ids=["none", "too long", "empty", "two"],
)
def test_a_request_id_is_made_for_the_log_and_own_errors(
    proxy: ProxyProcess, upstream: ScriptedUpstream, fields: tuple[str, ...]
) -> None:
    path = f"/log-made-{len(fields)}-{len(''.join(fields))}"
    with proxy.client() as client:
        made = client.ask("GET", path, *fields).values("x-request-id")
        assert re.fullmatch("[0-9a-f]{8}-[0-9a-f]+", made[0]) and len(made) == 1
        assert proxy.wait_for_request(path)["request_id"] == made[0]
        client.request("GET", "/v1" + path, *fields)
        request = upstream.receive()
        assert len(request.values("x-request-id")) == len(fields)
        request.answer(answer("200 OK", b"ok"))
        assert client.message().status == 200
    assert proxy.wait_for_request("/v1" + path)["request_id"] != made[0]


# Bytes


@pytest.mark.parametrize("size", [0, 1, 300_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bytes_of_bodies(
    proxy: ProxyProcess, upstream: ScriptedUpstream, size: int, chunked: bool
) -> None:
    path = f"/v1/log-bytes-{size}-{chunked}"
    with proxy.client() as client:
        if chunked:
            client.request("POST", path, "Transfer-Encoding: chunked")
            body = b"%x\r\n%b\r\n" % (size, bytes(size)) if size else b""
            client.send(body + b"0\r\n\r\n")
        else:
            client.request("POST", path, body=bytes(size))
        request = upstream.receive()
        request.answer(answer("200 OK", bytes(size)))
        assert client.message().status == 200
    line = proxy.wait_for_request(path)
    assert (line["request_bytes"], line["bytes"]) == (size, size)


def test_bytes_of_a_websocket(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with proxy.client() as client:
        request = handshake(client, upstream, "/v1/log-tunnel")
        client.send(b"12345")
        assert request.connection.exactly(5) == b"12345"
        request.answer(b"123")
        assert client.exactly(3) == b"123"
        request.connection.close()
    line = proxy.wait_for_request("/v1/log-tunnel")
    assert (line["status"], line["request_bytes"], line["bytes"]) == (101, 5, 3)


def test_a_line_stays_within_its_limit(proxy: ProxyProcess) -> None:
    with proxy.client() as client:
        client.ask("GET", "/log-long", "User-Agent: " + "a b" * 9000, "X-Request-Id: " + "i " * 90)
    line = proxy.wait_for_request("/log-long")
    assert len(line["user_agent"]) <= 512 and line["error"] == "not_found"
