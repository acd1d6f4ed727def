"""What upstream receives for a request, what the client receives for its response, and the pool."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import inspect
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from exchanges import perform
from network import refused_port
from proxy_process import Client, ProxyProcess, both_ways
from raw_connection import KEPT, TIMEOUT, readable
from request_bodies import whole_body
from scripted_upstream import OK, Request, ScriptedUpstream, make_certificate

from xaiproxy import __version__, config
from xaiproxy.errors import ClientGone, UpstreamBroken
from xaiproxy.http1 import exchange, request_head
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.request_body import RequestBody

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
FRAMINGS = {
    "chunked": (CHUNKED, lambda data: b"%x\r\n%b\r\n" % (len(data), data), b"0\r\n\r\n"),
    "length": (SIZED, lambda data: data, b""),
    "close": (CLOSED, lambda data: data, b""),
}


@pytest.fixture
def client(running: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[Client]:
    with running.client() as connection:
        yield connection


@pytest.fixture
def short_timeout_proxy(
    start_proxy: Callable[..., ProxyProcess], way: str, upstream: ScriptedUpstream
) -> ProxyProcess:
    """A proxy that gives upstream half a second."""
    return start_proxy(way=way, idle_timeout=0.5)


# The request that upstream receives


@pytest.mark.parametrize(
    "target",
    [
        "/v1/files:initialize?x=%2F%2f&a=b%20c",
        "/v1/a%2Fb//c;d?",
        "/v2/x",
        "/v1/?",
        "/v1/a?b=/../c",
        "/v1/~a!$&'()*+,=@|^`{}\"<>",
    ],
)
def test_the_target_passes_byte_for_byte(
    client: Client, upstream: ScriptedUpstream, target: str
) -> None:
    client.request("GET", target)
    assert upstream.receive().line == f"GET {target} HTTP/1.1"


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "M-SEARCH", "get"]
)
def test_every_method_passes(client: Client, upstream: ScriptedUpstream, method: str) -> None:
    client.request(method, "/v1/x", body=b"{}")
    request = upstream.receive()
    assert (request.line, request.body) == (f"{method} /v1/x HTTP/1.1", b"{}")
    request.answer()
    assert client.message().body == b"ok"


def test_fields_keep_their_order_case_and_repetitions(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request(
        "GET",
        "/v1/models",
        "X-b: 2",
        "x-B: 1",
        "Accept: a",
        "accept: b",
        "X-Grok-Conv-Id: \xe9 \t!",
        "X-Empty:",
        "Content-Type: application/json",
    )
    request = upstream.receive()
    via = request.value("Via")
    assert request.head == (
        f"GET /v1/models HTTP/1.1\r\nHost: {upstream.authority}\r\nUser-Agent: xaiproxy/{__version__}\r\n"
        "Authorization: Bearer the-token\r\nX-b: 2\r\nx-B: 1\r\nAccept: a\r\naccept: b\r\n"
        f"X-Grok-Conv-Id: \xe9 \t!\r\nX-Empty: \r\nContent-Type: application/json\r\nVia: {via}\r\n\r\n"
    ).encode("latin-1")


def test_hop_by_hop_fields_and_those_that_the_proxy_sets_are_dropped(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request(
        "POST",
        "/v1/x",
        "User-Agent: curl",
        "Authorization: Bearer client",
        "X-Api-Key: client",
        "Cookie: a=b",
        "Proxy-Authorization: x",
        "Proxy-Any: x",
        "Forwarded: for=x",
        "X-Forwarded-For: x",
        "CF-Connecting-IP: x",
        "CF-Ray: x",
        "CDN-Loop: cloudflare",
        "Via: 1.1 x",
        "Api-Key: x",
        "Cf-Access-Jwt-Assertion: x",
        "X-Amzn-Oidc-Data: x",
        "Remote-User: x",
        "Connection: keep-alive, X-Hop",
        "X-Hop: 1",
        "TE: trailers",
        "Upgrade: x",
        "Keep-Alive: 5",
        "X-Stays: 1",
        "Accept-Encoding: br;q=1, gzip;q=0.5, zstd, deflate, *",
        body=b"x",
    )
    request = upstream.receive()
    assert request.fields == [
        ("Host", upstream.authority),
        ("User-Agent", f"xaiproxy/{__version__}"),
        ("Authorization", "Bearer the-token"),
        ("Accept-Encoding", "gzip;q=0.5, deflate"),
        ("X-Stays", "1"),
        ("Via", request.value("Via")),
        ("Content-Length", "1"),
    ]


def test_a_multipart_body_passes_unchanged(client: Client, upstream: ScriptedUpstream) -> None:
    body = (
        b"--x\r\nContent-Disposition: form-data\r\n\r\n"
        + bytes(range(256)) * 300
        + b"\r\n--x--\r\n"
    )
    client.request(
        "POST", "/v1/files", 'Content-Type: multipart/form-data; boundary="x"', body=body
    )
    request = upstream.receive()
    assert request.body == body and request.values("Content-Length") == [str(len(body))]
    assert request.values("Content-Type") == ['multipart/form-data; boundary="x"']
    assert request.values("Transfer-Encoding") == []


def test_a_chunked_body_is_forwarded_as_it_arrives(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/files", "Transfer-Encoding: chunked")
    request = upstream.receive(body=False)
    assert (
        request.values("Transfer-Encoding") == ["chunked"]
        and request.values("Content-Length") == []
    )
    client.send(b"3;ext=1\r\nabc\r\n")
    assert request.connection.chunk() == b"abc"
    client.send(b"A")
    # A chunk may be split anywhere.
    client.send(b"\r\n01234")
    first = request.connection.chunk()
    client.send(b"56789\r")
    client.send(b"\n0\r\nTrailer: x\r\n\r\n")
    rest = request.connection.chunk()
    while len(first + rest) < 10:
        rest += request.connection.chunk()
    assert first + rest == b"0123456789"
    assert request.connection.until(b"\r\n\r\n") == b"0\r\n\r\n"
    request.answer()
    assert client.message().body == b"ok"


def test_a_sized_body_is_forwarded_as_it_arrives(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("DELETE", "/v1/files/1", "Content-Length: 9")
    request = upstream.receive(body=False)
    for part in (b"abc", b"def", b"ghi"):
        client.send(part)
        assert request.connection.exactly(3) == part
    request.answer()
    assert client.message().body == b"ok"


def test_a_large_upload_is_streamed(
    running: ProxyProcess, client: Client, upstream: ScriptedUpstream
) -> None:
    """A body beyond XAI_PROXY_REPLAY_LIMIT is not kept: 64 MiB pass through little memory."""
    part, count = bytes(1 << 20), 64
    before = running.resident_kib()
    client.request("POST", "/v1/files", f"Content-Length: {len(part) * count}")
    request = upstream.receive(body=False)
    for _ in range(count):
        client.send(part)
        assert request.connection.exactly(len(part)) == part
    request.answer()
    assert client.message().status == 200
    assert running.resident_kib() - before < 24 * 1024


def test_an_early_refusal_reaches_the_client(client: Client, upstream: ScriptedUpstream) -> None:
    """Upstream refuses the body and closes. The client receives that response."""
    size = 64 << 20
    client.request("POST", "/v1/files", f"Content-Length: {size}")
    client.send(b"x")
    request = upstream.receive(body=False)
    request.answer(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    request.connection.close()
    client.send(bytes(size - 1))
    answer = client.message()
    assert (answer.status, answer.body, answer.value("Connection")) == (413, b"no", "close")
    assert client.closed_within()


def test_an_upload_continues_after_a_response_with_connection_close(
    client: Client, upstream: ScriptedUpstream
) -> None:
    """The rest of the body goes out on that connection, not on a new one."""
    client.request("POST", "/v1/files", "Content-Length: 6").send(b"abc")
    request = upstream.receive(body=False)
    assert request.connection.exactly(3) == b"abc"
    request.answer(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
    # The proxy reads the response before the rest of the body.
    time.sleep(0.1)
    client.send(b"def")
    assert request.connection.exactly(3) == b"def"
    answer = client.message()
    assert (answer.status, answer.body) == (200, b"ok") and upstream.quiet()


# The response that the client receives


@both_ways
def test_a_response_passes_unchanged(client: Client, upstream: ScriptedUpstream) -> None:
    client.request()
    upstream.receive().answer(
        b"HTTP/1.1 299 Fine \xe9\r\nDate: then\r\nX-b: 1\r\nx-A: 2\r\nX-b: 3\r\nContent-Type: text/x; y\r\n"
        b"Set-Cookie: a=b\r\nKeep-Alive: 3\r\nConnection: X-Hop\r\nX-Hop: 1\r\nServer: cloudflare\r\n"
        b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\n\x1f\x8b\x00\xff\n"
    )
    answer = client.message()
    assert answer.head.replace(KEPT, b"") == (
        b"HTTP/1.1 299 Fine \xe9\r\nDate: then\r\nX-b: 1\r\nx-A: 2\r\nX-b: 3\r\nContent-Type: text/x; y\r\n"
        b"Server: cloudflare\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n"
    )
    assert answer.body == b"\x1f\x8b\x00\xff\n"


@both_ways
@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_gzip_body_passes_unchanged(
    client: Client, upstream: ScriptedUpstream, framing: str
) -> None:
    head, frame, end = FRAMINGS[framing]
    packed = gzip.compress(b"{}").ljust(30, b"\0")
    client.request("GET", "/v1/models", "Accept-Encoding: gzip")
    request = upstream.receive()
    request.answer(
        head.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + frame(packed) + end
    )
    if framing == "close":
        request.connection.close()
    answer = client.message()
    assert answer.body == packed and answer.value("Content-Encoding") == "gzip"


@both_ways
@pytest.mark.parametrize("status", [200, 202, 204, 304, 205, 404, 500])
def test_a_response_without_a_body_keeps_the_connections_open(
    client: Client, upstream: ScriptedUpstream, status: int
) -> None:
    client.request()
    length = b"" if status in (204, 304) else b"Content-Length: 0\r\n"
    upstream.receive().answer(
        b"HTTP/1.1 %d X\r\nDate: then\r\nETag: a\r\n%b\r\n" % (status, length)
    )
    assert client.message().head.replace(
        KEPT, b""
    ) == b"HTTP/1.1 %d X\r\nDate: then\r\nETag: a\r\n%b\r\n" % (status, length)
    assert client.silent()
    # Both connections can carry another request.
    client.request()
    request = upstream.receive()
    assert request.connection.requests == 2
    request.answer()
    assert client.message().body == b"ok"


@both_ways
@pytest.mark.parametrize(
    "head",
    [
        b"304 Not Modified\r\nContent-Length: 30",
        b"204 No Content\r\nContent-Length: 0",
        b"304 Not Modified\r\nTransfer-Encoding: chunked",
    ],
)
def test_the_framing_of_an_absent_body_passes(
    client: Client, upstream: ScriptedUpstream, head: bytes
) -> None:
    client.request()
    upstream.receive().answer(b"HTTP/1.1 " + head + b"\r\nDate: then\r\n\r\n")
    assert (
        client.message().head.replace(KEPT, b"")
        == b"HTTP/1.1 " + head.split(b"\r")[0] + b"\r\nDate: then\r\n\r\n"
    )
    client.request()
    upstream.receive().answer()
    assert client.message().body == b"ok"


@both_ways
@pytest.mark.parametrize("head", [SIZED, CHUNKED, b"HTTP/1.1 200 OK\r\nDate: x\r\n\r\n"])
def test_a_response_to_head_passes(client: Client, upstream: ScriptedUpstream, head: bytes) -> None:
    client.request("HEAD")
    request = upstream.receive()
    assert request.method == "HEAD"
    request.answer(head)
    answer = client.message(body=False)
    assert answer.values("Content-Length") == (["30"] if head == SIZED else [])
    assert answer.values("Transfer-Encoding") == [] and client.silent()
    client.request()
    upstream.receive().answer()
    assert client.message().body == b"ok"


INTERIM = [
    b"103 Early Hints\r\nLink: </a>\r\nSet-Cookie: a\r\n",
    b"102 Processing\r\nX: y\r\nContent-Length: 5\r\n",
    b"100 Continue\r\n",
    b"199 \r\n",
]


def test_interim_responses_are_forwarded_as_they_arrive(
    client: Client, upstream: ScriptedUpstream
) -> None:
    """Except 100, which the proxy itself sends to clients that expect it."""
    client.request()
    request = upstream.receive()
    for interim, passed in zip(
        INTERIM,
        ((b"103 Early Hints\r\nLink: </a>\r\n"), b"102 Processing\r\nX: y\r\n", b"", b"199 \r\n"),
    ):
        request.answer(b"HTTP/1.1 " + interim + b"\r\n")
        if passed:
            assert client.head().head == b"HTTP/1.1 " + passed + b"\r\n"
    request.answer(OK)
    assert client.message().line == "HTTP/1.1 200 OK"
    assert client.silent()


def test_an_http_1_0_client_gets_no_interim_responses(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request(version="HTTP/1.0")
    request = upstream.receive()
    for interim in INTERIM:
        request.answer(b"HTTP/1.1 " + interim + b"\r\n")
    request.answer(OK)
    assert client.message().line == "HTTP/1.1 200 OK"


def test_an_unrequested_101_is_an_error(client: Client, upstream: ScriptedUpstream) -> None:
    client.request()
    upstream.receive().answer(
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    )
    answer = client.message()
    assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (502, "upstream_unreachable")


@both_ways
@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_stream_is_forwarded_as_it_arrives(
    client: Client, upstream: ScriptedUpstream, framing: str
) -> None:
    """Head, then three times 10 bytes: each is there before the next is sent."""
    head, frame, end = FRAMINGS[framing]
    client.request("POST", "/v1/chat/completions", body=b"{}")
    request = upstream.receive().answer(head)
    answer = client.head()
    assert answer.status == 200
    for data in (b"0123456789", b"abcdefghij", b"ABCDEFGHIJ"):
        request.answer(frame(data))
        assert (client.exactly(10) if framing == "length" else client.chunk()) == data
    assert client.silent()
    request.answer(end)
    if framing == "close":
        request.connection.close()
    if framing != "length":
        assert client.chunk() == b""
    client.request()
    upstream.receive().answer()
    assert client.message().body == b"ok"


@both_ways
def test_chunks_that_arrive_byte_by_byte_are_forwarded(
    client: Client, upstream: ScriptedUpstream
) -> None:
    """Upstream's framing in pieces of one byte, extensions and trailers among it."""
    client.request()
    request = upstream.receive().answer(CHUNKED)
    for byte in b'00a;x="y"\r\n0123456789\r\n1\r\n\r\r\n0;z\r\nTrailer: x\r\n\r\n':
        request.answer(bytes([byte]))
    answer = client.message()
    assert answer.body == b"0123456789\r"
    client.request()
    assert upstream.receive().answer().connection.requests == 2
    assert client.message().body == b"ok"


# Upstream failures and timeouts


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        b"SSH-2.0-dropbear\r\n",
        b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 5\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 201 + b"\r\n",
    ],
)
def test_an_upstream_that_dies_before_the_end_of_its_head_is_502(
    client: Client, upstream: ScriptedUpstream, sent: bytes, how: str
) -> None:
    client.request("GET", "/v1/dies")
    request = upstream.receive().answer(sent)
    request.connection.close() if how == "fin" else request.connection.reset()
    answer = client.message()
    assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (502, "upstream_unreachable")
    happened, reasons = (
        b"broke off before it answered",
        [b"it closed the connection", b"reset by peer"],
    )
    if b"\r\n\r\n" in sent:
        happened, reasons = b"sent no valid answer", [b"is not HTTP"]
    assert upstream.origin.encode() + b" " + happened in answer.body
    assert any(reason in answer.body for reason in reasons)
    # A GET may be retried.
    assert answer.value("x-should-retry") == "true"
    # The proxy does not retry a request on a new connection.
    assert upstream.quiet()


@both_ways
# For the last framing, a FIN is the proper end.
@pytest.mark.parametrize(
    "framing, how",
    [
        ("chunked", "fin"),
        ("chunked", "reset"),
        ("length", "fin"),
        ("length", "reset"),
        ("close", "reset"),
    ],
)
def test_an_upstream_that_dies_in_the_body_truncates_the_response(
    client: Client, upstream: ScriptedUpstream, running: ProxyProcess, framing: str, how: str
) -> None:
    head, frame, _ = FRAMINGS[framing]
    client.request("GET", f"/v1/{framing}-{how}")
    request = upstream.receive().answer(head + frame(b"0123456789"))
    client.head()
    assert (client.exactly(10) if framing == "length" else client.chunk()) == b"0123456789"
    request.connection.close() if how == "fin" else request.connection.reset()
    # There is no last chunk, and fewer bytes than Content-Length.
    assert client.rest() == b""
    line = running.wait_for_request(f"/v1/{framing}-{how}")
    assert (line["status"], line["bytes"], line["ended_by"]) == (200, 10, "upstream")


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_an_upstream_that_dies_in_the_body_resets_an_http_1_0_client(
    client: Client, upstream: ScriptedUpstream, framing: str
) -> None:
    """A FIN would mark the response as complete."""
    head, frame, _ = FRAMINGS[framing]
    client.request(version="HTTP/1.0")
    request = upstream.receive().answer(head + frame(b"0123456789"))
    assert client.head().values("Transfer-Encoding") == []
    assert client.exactly(10) == b"0123456789"
    request.connection.reset()
    with pytest.raises(ConnectionResetError):
        client.rest()


def test_an_upstream_that_dies_resets_an_http_1_0_client_that_still_sends(
    client: Client, upstream: ScriptedUpstream
) -> None:
    """The proxy sends no FIN first, as it does after a complete refusal."""
    client.send(
        b"POST /v1/files HTTP/1.0\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n0123456789"
    )
    request = upstream.receive(body=False).answer(
        b"HTTP/1.1 413 No\r\nContent-Type: text/plain\r\n\r\n0123456789"
    )
    assert client.head().status == 413 and client.exactly(10) == b"0123456789"
    request.connection.reset()
    with pytest.raises(ConnectionResetError):
        client.rest()


def test_an_idle_timeout_before_the_head_is_504(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with short_timeout_proxy.client() as client:
        client.request("POST", "/v1/slow", body=b"{}")
        request = upstream.receive()
        answer = client.message()
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (504, "upstream_timeout")
        assert (
            answer.value("x-should-retry") == "false" and b"XAI_PROXY_IDLE_TIMEOUT" in answer.body
        )
        assert b"the-token" not in answer.body
        assert request.connection.closed_within()
        assert upstream.quiet()


@both_ways
@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_idle_timeout_in_the_body_truncates_the_response(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream, framing: str
) -> None:
    head, frame, _ = FRAMINGS[framing]
    with short_timeout_proxy.client() as client:
        client.request("GET", f"/v1/silent-{framing}")
        request = upstream.receive().answer(head + frame(b"0123456789"))
        client.head()
        assert (client.exactly(10) if framing == "length" else client.chunk()) == b"0123456789"
        assert client.rest() == b""
        assert request.connection.closed_within()
    assert short_timeout_proxy.wait_for_request(f"/v1/silent-{framing}")["ended_by"] == "upstream"


@both_ways
def test_each_byte_restarts_the_idle_timeout(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """It does not limit the whole response."""
    with short_timeout_proxy.client() as client:
        client.request()
        request = upstream.receive().answer(CHUNKED)
        for _ in range(4):
            time.sleep(0.2)
            request.answer(b"1\r\nx\r\n")
        request.answer(b"0\r\n\r\n")
        assert client.message().body == b"xxxx"


def long_upload(client: Client, upstream: ScriptedUpstream) -> Request:
    """Send an upload that takes longer than the idle timeout."""
    client.request("POST", "/v1/files", "Content-Length: 3")
    request = upstream.receive(body=False)
    for _ in range(3):
        time.sleep(0.2)
        client.send(b"x")
        assert request.connection.exactly(1) == b"x"
    return request


def test_the_idle_timeout_starts_after_the_upload(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with short_timeout_proxy.client() as client:
        request = long_upload(client, upstream)
        time.sleep(0.3)
        request.answer(CHUNKED)
        time.sleep(0.3)
        request.answer(b"2\r\nok\r\n0\r\n\r\n")
        assert client.message().body == b"ok"
        # This request uses the same connection to upstream.
        client.request()
        assert upstream.receive().connection is request.connection
        start = time.monotonic()
        assert client.message().status == 504 and 0.4 < time.monotonic() - start < 3


@pytest.mark.parametrize("answered", [False, True])
def test_the_idle_timeout_applies_after_a_long_upload(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream, answered: bool
) -> None:
    with short_timeout_proxy.client() as client:
        request = long_upload(client, upstream)
        start = time.monotonic()
        if answered:
            request.answer(CHUNKED)
        assert client.head().status == (200 if answered else 504)
        assert not answered or client.rest() == b""
        assert 0.4 < time.monotonic() - start < 3


def test_an_upstream_that_stops_reading_is_504(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with short_timeout_proxy.client() as client:
        client.request("POST", "/v1/files", "Content-Length: 30000000")
        # That is more than all buffers hold.
        sender = threading.Thread(target=client.send, args=(bytes(30_000_000),))
        sender.start()
        request = upstream.receive(body=False)
        start = time.monotonic()
        answer = client.message()
        assert answer.status == 504 and b"XAI_PROXY_IDLE_TIMEOUT" in answer.body
        assert 0.4 < time.monotonic() - start < 3
        sender.join()
        upstream.connections.remove(request.connection)
        request.connection.close()


# Early errors, and TLS


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_an_early_error_reaches_the_client_before_the_end_of_its_upload(
    tmp_path: Path, certificate: tuple, tls: bool
) -> None:
    """The proxy waits neither for the rest of the body nor for upstream to read it."""
    authority, context = certificate
    answer = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig"
    with (
        ScriptedUpstream(context if tls else None) as upstream,
        ProxyProcess(
            tmp_path, upstream=upstream.origin, environ={"SSL_CERT_FILE": str(authority)}
        ) as proxy,
    ):
        proxy.sign_in()
        # The last does not fit into the socket buffers.
        for sent in (
            b"",
            b"x" * 1000,
            b"x" * 30_000_000,
        ):
            with proxy.client() as client:
                client.send(
                    b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40000000\r\n\r\n"
                )
                sender = threading.Thread(target=client.sock.sendall, args=(sent,))
                sender.start()
                request = upstream.receive(body=False).answer(answer)
                start = time.monotonic()
                message = client.message()
                assert (message.status, message.body) == (
                    413,
                    b"big",
                ) and time.monotonic() - start < 1
                sender.join()
            # This connection stays open, but nothing reads from it.
            upstream.connections.remove(request.connection)
            # The next request uses another connection, and the rest of the body is not sent.
            with (
                request.connection,
                proxy.client() as client,
            ):
                client.request()
                upstream.receive().answer()
                assert client.message().body == b"ok"
            upstream.hang_up()
        # After an early response that is no error, the whole body is forwarded.
        with proxy.client() as client:
            client.send(
                b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n1234"
            )
            request = upstream.receive(body=False).answer()
            assert request.connection.exactly(4) == b"1234"
            client.send(b"5678")
            assert request.connection.exactly(4) == b"5678" and client.message().body == b"ok"


def test_requests_are_forwarded_over_tls(tmp_path: Path, certificate: tuple) -> None:
    authority, context = certificate
    with (
        ScriptedUpstream(context) as upstream,
        ProxyProcess(
            tmp_path, upstream=upstream.origin, environ={"SSL_CERT_FILE": str(authority)}
        ) as proxy,
    ):
        proxy.sign_in()
        with proxy.client() as client:
            for framing in ("chunked", "length"):
                head, frame, end = FRAMINGS[framing]
                client.request()
                request = upstream.receive().answer(head)
                client.head()
                for data in (b"0123456789", b"abcdefghij", b"ABCDEFGHIJ"):
                    request.answer(frame(data))
                    assert (client.exactly(10) if framing == "length" else client.chunk()) == data
                request.answer(end)
                assert framing == "length" or client.chunk() == b""
            assert request.connection.requests == 2
            request.connection.close()
            client.request()
            request = upstream.receive().answer(CHUNKED + b"1\r\nx\r\n")
            assert request.connection.requests == 1
            client.head()
            client.chunk()
            # The client cancels the request over TLS.
            client.reset()
            assert request.connection.sock.recv(1) == b""


# The pool


def make_pool(scripted: ScriptedUpstream, **keywords: float) -> Pool:
    return Pool(
        config.from_environ({"HOME": "/", "XAI_PROXY_UPSTREAM": scripted.origin}), **keywords
    )


def answered(pool: Pool, scripted: ScriptedUpstream) -> Request:
    request, done = perform(pool, scripted)
    assert b"".join(done.parts()) == b"ok"
    done.finish()
    return request


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_any_request_is_retried_if_the_pooled_connection_took_no_byte(body: bytes) -> None:
    """The close falls between the check of the connection and its use.

    Another process could not time that.
    """
    with ScriptedUpstream() as scripted, concurrent.futures.ThreadPoolExecutor(1) as threads:

        class Broken(Pool):
            def take(self) -> Connection | None:
                connection = super().take()
                first.connection.reset()
                received.append(threads.submit(lambda: scripted.receive().answer()))
                return connection

        received: list[concurrent.futures.Future[Request]] = []
        pool = make_pool(scripted)
        first = answered(pool, scripted)
        pool.__class__ = Broken
        request = exchange.Request(b"POST / HTTP/1.1\r\n", whole_body(body), "POST", False)
        sent = exchange.perform(pool, request)
        second = received[0].result()
        assert (second.method, second.body, second.connection.requests) == ("POST", body, 1)
        sent.close()
        assert second.connection.closed_within()


def test_a_tcp_timeout_of_the_kernel_is_no_clean_end() -> None:
    """The kernel reports it once. Then comes EOF, which would be a clean end of this response."""
    with ScriptedUpstream() as scripted:
        _, sent = perform(make_pool(scripted), scripted, CLOSED)
        sent.connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
        # Upstream reads nothing, so the send buffer fills up.
        while sent.connection.send(bytes(1 << 20)):
            pass
        with pytest.raises(UpstreamBroken, match="TCP gave up"):
            list(sent.parts(5))
        sent.close()


def test_pooled_connections_are_closed_after_the_idle_limit() -> None:
    with ScriptedUpstream() as scripted:
        pool = make_pool(scripted, idle_limit=0.3)
        first = answered(pool, scripted)
        gevent.sleep(0.1)
        assert answered(pool, scripted).connection is first.connection
        # The last request restarted the idle limit.
        gevent.sleep(0.25)
        assert answered(pool, scripted).connection is first.connection
        gevent.sleep(0.35)
        assert first.connection.closed_within(0)
        assert answered(pool, scripted).connection is not first.connection
        pool.close()


def test_the_idle_limit_is_a_minute() -> None:
    assert inspect.signature(Pool).parameters["idle_limit"].default == 60


@both_ways
def test_a_thousand_streams_run_at_once(
    running: ProxyProcess, upstream: ScriptedUpstream, many_files: None
) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.client()) for _ in range(1000)]
        for number, client in enumerate(clients):
            client.request("POST", f"/v1/{number}", body=b"{}")
        streams = {}
        for _ in clients:
            connection = upstream.accept()
            streams[connection.message().target] = connection
            connection.send(CHUNKED)
        # All streams are open; none waits for another.
        for client in clients:
            assert client.head().status == 200
        for number in range(len(clients)):
            data = b"%d" % number
            streams[f"/v1/{number}"].send(b"%x\r\n%b\r\n" % (len(data), data))
        for number, client in enumerate(clients):
            assert client.chunk() == b"%d" % number
        for connection in streams.values():
            connection.send(b"0\r\n\r\n")
        for client in clients:
            assert client.chunk() == b""


@both_ways
def test_connections_are_reused(client: Client, upstream: ScriptedUpstream) -> None:
    connections = set()
    for number in range(5):
        client.request("POST", "/v1/x", body=b"{}")
        request = upstream.receive().answer(CHUNKED + b"2\r\nok\r\n0\r\n\r\n" if number % 2 else OK)
        connections.add(request.connection)
        assert client.message().body == b"ok"
    assert len(connections) == 1


@both_ways
def test_connection_close_and_http_1_0_close_the_upstream_connection(
    client: Client, upstream: ScriptedUpstream
) -> None:
    for head in (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ):
        client.request()
        request = upstream.receive().answer(head)
        assert client.message().body == b"ok"
        assert request.connection.closed_within()


@both_ways
def test_bytes_after_a_response_end_the_connection(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request()
    first = upstream.receive().answer(OK)
    assert client.message().body == b"ok"
    first.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    client.request()
    second = upstream.receive()
    assert second.connection is not first.connection
    second.answer()
    assert client.message().body == b"ok"


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_connection_that_upstream_closed_while_idle_is_not_reused(
    client: Client, upstream: ScriptedUpstream, how: str
) -> None:
    """A failed POST is not retried, so each response here proves that the close was noticed first."""
    for _ in range(20):
        client.request("POST", "/v1/x", body=b"{}")
        request = upstream.receive().answer()
        assert request.connection.requests == 1
        assert client.message().body == b"ok"
        request.connection.close() if how == "fin" else request.connection.reset()


@contextlib.contextmanager
def stopped(proxy: ProxyProcess) -> Iterator[None]:
    """Stop the process, so that its loop meets all events of the block in one turn."""
    proxy.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        proxy.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("first", ["close", "request"])
def test_a_close_that_arrives_with_a_request_is_noticed_first(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream, first: str
) -> None:
    for _ in range(5):
        client.request("POST", "/v1/x", body=b"{}")
        request = upstream.receive().answer()
        assert client.message().body == b"ok"
        with stopped(running):
            for what in ("close", "request") if first == "close" else ("request", "close"):
                if what == "close":
                    request.connection.close()
                else:
                    client.request("POST", "/v1/x", body=b"{}")
        second = upstream.receive().answer()
        assert second.connection.requests == 1
        assert client.message().body == b"ok"


def test_closes_that_arrive_with_many_requests_are_noticed_first(
    running: ProxyProcess, upstream: ScriptedUpstream, many_files: None
) -> None:
    """There are more events than libev takes from epoll at a time, so most watchers fire too late."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.client()) for _ in range(200)]

        def ask_all() -> None:
            for client in clients:
                client.request("POST", "/v1/x", body=b"{}")

        def answer_all() -> None:
            requests = [upstream.receive() for _ in clients]
            assert {request.connection.requests for request in requests} == {1}
            for request in requests:
                request.answer()
            assert {client.message().body for client in clients} == {b"ok"}

        ask_all()
        answer_all()
        with stopped(running):
            ask_all()
            upstream.hang_up()
        answer_all()


def test_a_close_that_arrives_with_a_response_is_noticed_before_reuse(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    for _ in range(5):
        client.request("POST", "/v1/x", body=b"{}").request("POST", "/v1/x", body=b"{}")
        request = upstream.receive()
        with stopped(running):
            request.answer().connection.close()
        second = upstream.receive().answer()
        assert second.connection.requests == 1
        assert [client.message().body, client.message().body] == [b"ok", b"ok"]


@pytest.mark.parametrize("how", ["end", "bytes"])
def test_an_unusable_idle_connection_is_closed_at_once(
    client: Client, upstream: ScriptedUpstream, how: str
) -> None:
    client.request()
    request = upstream.receive().answer(OK)
    assert client.message().body == b"ok"
    request.connection.half_close() if how == "end" else request.answer(b"x")
    assert request.connection.closed_within()


@contextlib.contextmanager
def interactive_server(folder: Path) -> Iterator[subprocess.Popen]:
    """`openssl s_server` on `port`, which sends its standard input, and a key update for a `k`."""
    port = refused_port()
    with subprocess.Popen(
        [
            "openssl",
            "s_server",
            "-accept",
            f"127.0.0.1:{port}",
            "-tls1_3",
            "-crlf",
            "-naccept",
            "1",
            "-cert",
            folder / "server.pem",
            "-key",
            folder / "server.key",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as server:
        server.port = port
        try:
            assert b"ACCEPT\n" in iter(server.stdout.readline, b"")
            yield server
        finally:
            server.kill()


@pytest.mark.parametrize("end", [False, True])
def test_a_tls_record_without_content_does_not_end_an_idle_connection(
    tmp_path: Path, end: bool
) -> None:
    """It is a session ticket or a key update (RFC 8446 section 4.6), which EOF may follow."""
    authority, _ = make_certificate(tmp_path, "127.0.0.1")
    with interactive_server(tmp_path) as server:
        pool = Pool(
            config.from_environ(
                {
                    "HOME": "/",
                    "SSL_CERT_FILE": str(authority),
                    "XAI_PROXY_UPSTREAM": f"https://127.0.0.1:{server.port}",
                }
            )
        )
        server.stdin.write(b"HTTP/1.1 200 OK\nContent-Length: 0\n\n")
        request = exchange.Request(b"GET / HTTP/1.1\r\n", whole_body(), "GET", False)
        sent = exchange.perform(pool, request)
        connection = sent.connection
        assert b"".join(sent.parts()) == b""
        sent.finish()
        server.stdin.write(b"k\n")
        assert readable([connection.socket], TIMEOUT)
        if end:
            server.kill()
            server.wait()
            assert pool.take() is None
        else:
            # Let the loop take some turns.
            for _ in range(3):
                gevent.sleep(0.001)
            assert pool.take() is connection
            connection.close()


def test_an_upstream_restart_loses_no_post(tmp_path: Path) -> None:
    """No POST after the restart uses one of the ten pooled connections."""
    with (
        ScriptedUpstream() as before,
        ProxyProcess(tmp_path, upstream=before.origin) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        clients = [stack.enter_context(proxy.client()) for _ in range(10)]

        def ask_all(upstream: ScriptedUpstream) -> None:
            for client in clients:
                client.request("POST", "/v1/x", body=b"{}")
            requests = [upstream.receive() for _ in clients]
            assert [request.connection.requests for request in requests] == [1] * len(clients)
            for request in requests:
                request.answer()
            assert [client.message().body for client in clients] == [b"ok"] * len(clients)

        ask_all(before)
        before.close()
        for client in clients:
            client.request("POST", "/v1/x", body=b"{}")
            answer = client.message()
            assert answer.status == 502 and b"Connection refused" in answer.body
        with ScriptedUpstream(port=before.port) as after:
            ask_all(after)


def break_a_pooled_connection(
    client: Client, upstream: ScriptedUpstream, *request: str, body: bytes = b""
) -> None:
    """Reset a pooled connection in the middle of `request`, before any byte of the response."""
    client.request()
    first = upstream.receive().answer()
    assert client.message().body == b"ok"
    client.request(*request, body=body)
    second = upstream.receive()
    assert second.connection is first.connection
    second.connection.reset()


@pytest.mark.parametrize(
    "request_",
    [
        ("GET", "/v1/a"),
        ("HEAD", "/v1/a"),
        ("OPTIONS", "/v1/a"),
        ("POST", "/v1/a", "Idempotency-Key: 1"),
        ("POST", "/v1/a", "x-idempotency-key: 1"),
    ],
)
def test_an_idempotent_request_is_retried_if_its_pooled_connection_breaks(
    client: Client, upstream: ScriptedUpstream, request_: tuple
) -> None:
    body = b"{}" if request_[0] == "POST" else b""
    break_a_pooled_connection(client, upstream, *request_, body=body)
    again = upstream.receive()
    assert (again.method, again.target, again.body, again.connection.requests) == (
        *request_[:2],
        body,
        1,
    )
    # The proxy retries once.
    again.connection.reset()
    assert client.message(body=request_[0] != "HEAD").status == 502
    assert upstream.quiet()


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
@pytest.mark.parametrize("body", [b"{}", b""])
def test_other_requests_are_not_retried_if_their_pooled_connection_breaks(
    client: Client, upstream: ScriptedUpstream, method: str, body: bytes
) -> None:
    """Upstream may already have generated a paid image."""
    break_a_pooled_connection(client, upstream, method, "/v1/images/generations", body=body)
    answer = client.message()
    assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (502, "upstream_unreachable")
    assert b"may have been processed" in answer.body and answer.value("x-should-retry") == "false"
    assert upstream.quiet()


@pytest.mark.parametrize("field, again", [("X-a: 1", False), ("Idempotency-Key: 1", True)])
def test_a_pooled_connection_that_breaks_in_the_middle_of_the_body(
    client: Client, upstream: ScriptedUpstream, field: str, again: bool
) -> None:
    client.request()
    first = upstream.receive().answer()
    assert client.message().body == b"ok"
    client.request("POST", "/v1/files", field, "Content-Length: 6").send(b"abc")
    second = upstream.receive(body=False)
    assert second.connection is first.connection and second.connection.exactly(3) == b"abc"
    second.connection.reset()
    client.send(b"def")
    if again:
        third = upstream.receive()
        assert third.body == b"abcdef"
        third.answer()
        assert client.message().body == b"ok"
    else:
        assert client.message().status == 502 and upstream.quiet()


@both_ways
def test_small_requests_do_not_wait_for_delayed_acknowledgements(
    client: Client, upstream: ScriptedUpstream
) -> None:
    """Without TCP_NODELAY on both sides, each would wait 40 ms."""
    start = time.monotonic()
    for _ in range(40):
        client.request("POST", "/v1/x", "Transfer-Encoding: chunked")
        for data in (b"2\r\n{}\r\n", b"0\r\n\r\n"):
            client.send(data)
        upstream.receive().answer(CHUNKED).answer(b"2\r\nok\r\n").answer(b"0\r\n\r\n")
        assert client.message().body == b"ok"
    # With delays, it would be at least 1.6 s.
    assert time.monotonic() - start < 1.2


# No failure leaks a connection to upstream


def test_a_malformed_chunk_that_arrives_with_its_head_leaks_no_connection(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy:
        proxy.sign_in()
        before = proxy.open_files()
        for _ in range(5):
            with proxy.client() as client:
                client.request()
                upstream.receive().answer()
                assert client.message().status == 200
            with proxy.client() as client:
                client.send(
                    b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
                )
                assert client.message().status == 400
                assert client.rest() == b""
        # One connection may be in the pool; those of the clients close a moment later.
        deadline = time.monotonic() + TIMEOUT
        while proxy.open_files() > before + 1:
            assert time.monotonic() < deadline, f"{proxy.open_files()} descriptors, {before} before"
            time.sleep(0.05)


def test_a_client_that_closes_during_an_early_error_leaks_no_connection() -> None:
    """The close falls at the end of the upload, which another process could not time."""

    class Client:
        unread = b""

        def recv(self, limit: float) -> bytes:
            gevent.sleep(limit)
            return b""

    def close_soon(_head: object) -> None:
        gevent.get_hub().loop.run_callback(owner.throw, ClientGone)

    owner = gevent.getcurrent()
    head = request_head.parse(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    body = RequestBody(head, Client(), TIMEOUT)
    # It arrives in one read, so the proxy's first wait after it is for the end of the upload.
    refused = b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\nno"
    with ScriptedUpstream() as scripted, concurrent.futures.ThreadPoolExecutor(1) as threads:
        received = threads.submit(lambda: scripted.receive(body=False).answer(refused))
        request = exchange.Request(b"POST / HTTP/1.1\r\n", body, "POST", repeatable=False)
        with pytest.raises(ClientGone):
            exchange.perform(make_pool(scripted), request, on_interim=close_soon)
        assert received.result().connection.closed_within()
