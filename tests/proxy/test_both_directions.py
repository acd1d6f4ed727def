"""Upload and response of one exchange move at the same time; neither blocks or ends the other."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess, both_ways
from scripted_upstream import PATTERN, Request, ScriptedUpstream, pour

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# Heads that end the connection after this response, which does not stop the upload.
CLOSING = {
    "close": b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    "1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "until close": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok",
    "redirect": b"HTTP/1.1 307 Temporary Redirect\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
}
MIB = 1 << 20
Either = Callable[..., "tuple[ProxyProcess, ScriptedUpstream]"]


@pytest.fixture
def client(running: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[Client]:
    with running.client() as connection:
        yield connection


@pytest.fixture
def short_timeout_proxy(
    start_proxy: Callable[..., ProxyProcess], way: str, upstream: ScriptedUpstream
) -> ProxyProcess:
    return start_proxy(way=way, idle_timeout=1.5, client_timeout=0.5)


def upload(
    client: Client, upstream: ScriptedUpstream, size: int, target: str = "/v1/stt"
) -> Request:
    """Send the head of an upload, and return it as upstream received it."""
    client.request("POST", target, f"Content-Length: {size}")
    return upstream.receive(body=False)


# The response during an upload


def alternate_chunks(client: Client, upstream: ScriptedUpstream) -> None:
    """Send each chunk after the response to the one before it."""
    client.request("POST", "/v1/stt", "Transfer-Encoding: chunked")
    request = upstream.receive(body=False)
    for number in range(3):
        client.send(b"3\r\nsay\r\n")
        assert request.connection.chunk() == b"say"
        if not number:
            request.answer(CHUNKED)
            head = client.head()
            assert (head.status, head.value("Connection")) == (200, "keep-alive")
        request.answer(b"5\r\nheard\r\n")
        assert client.chunk() == b"heard"
    client.send(b"0\r\n\r\n")
    assert request.connection.chunk() == b""
    request.answer(b"0\r\n\r\n")
    assert client.chunk() == b""


def test_each_chunk_is_forwarded_before_the_next_one_arrives(either: Either) -> None:
    proxy, upstream = either()
    with proxy.client() as client:
        # Both connections can be reused.
        for _ in range(3):
            alternate_chunks(client, upstream)
        assert len(upstream.connections) == 1


@both_ways
def test_relayed_and_iterated_chunks_are_forwarded_at_once(
    client: Client, upstream: ScriptedUpstream
) -> None:
    alternate_chunks(client, upstream)
    alternate_chunks(client, upstream)


def test_the_client_timeout_does_not_apply_after_the_response_has_begun(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with short_timeout_proxy.client() as client:
        request = upload(client, upstream, 6).answer(CHUNKED + b"2\r\nok\r\n")
        assert client.head().status == 200 and client.chunk() == b"ok"
        # That is longer than XAI_PROXY_CLIENT_TIMEOUT.
        time.sleep(0.8)
        client.send(b"abc")
        time.sleep(0.8)
        client.send(b"def")
        assert request.connection.exactly(6) == b"abcdef"
        request.answer(b"0\r\n\r\n")
        assert client.chunk() == b""


@both_ways
def test_bytes_in_either_direction_restart_the_idle_timeout(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """Upstream is silent for longer than it, 1.5 s, both before and after its head."""
    with short_timeout_proxy.client() as client:
        request = upload(client, upstream, 20)
        for number in range(20):
            client.send(b"%x" % (number % 16))
            request.connection.exactly(1)
            time.sleep(0.2)
            if number == 10:
                request.answer(CHUNKED)
                assert client.head().status == 200
        request.answer(b"2\r\nok\r\n0\r\n\r\n")
        assert (client.chunk(), client.chunk()) == (b"ok", b"")


@both_ways
def test_a_response_may_end_before_its_upload(client: Client, upstream: ScriptedUpstream) -> None:
    # Both connections can be reused.
    for _ in range(2):
        request = upload(client, upstream, 6).answer(CHUNKED + b"2\r\nok\r\n0\r\n\r\n")
        assert client.head().status == 200
        assert (client.chunk(), client.chunk()) == (b"ok", b"")
        client.send(b"abcdef")
        assert request.connection.exactly(6) == b"abcdef"
    assert request.connection.requests == 2


# The end of an upload


def test_connection_close_passes_to_a_client_that_still_sends(
    client: Client, upstream: ScriptedUpstream
) -> None:
    """The upload may be truncated, so no request can follow it."""
    request = upload(client, upstream, 6).answer(CLOSING["close"])
    head = client.head()
    assert (head.status, head.value("Connection")) == (200, "close") and client.exactly(2) == b"ok"
    request.connection.close()
    client.send(b"abcdef")
    assert client.closed_within(8)


@both_ways
def test_an_upstream_that_answers_but_does_not_read_is_aborted(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with short_timeout_proxy.client() as client:
        request = upload(client, upstream, 48 * MIB, "/v1/takes-nothing")
        pour(client, 0, 48 * MIB)
        start = len(short_timeout_proxy.log_lines())
        request.answer(CHUNKED)
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                request.answer(b"2\r\nok\r\n")
                time.sleep(0.2)
        line = short_timeout_proxy.wait_for_log(
            lambda line: line.get("path") == "/v1/takes-nothing", start=start
        )
        assert (line["status"], line["ended_by"]) == (200, "upstream")


@pytest.mark.parametrize("answer", CLOSING.values(), ids=CLOSING)
def test_an_early_response_does_not_stop_the_upload(either: Either, answer: bytes) -> None:
    proxy, upstream = either()
    body = PATTERN * 32
    with proxy.client() as client:
        request = upload(client, upstream, len(body)).answer(answer)
        with client.sending(body):
            assert request.connection.exactly(len(body)) == body
        if isinstance(request.connection.sock, ssl.SSLSocket):
            # The proxy closes without a close_notify.
            with contextlib.suppress(OSError):
                request.connection.sock.unwrap()
        request.connection.close()
        assert client.message().body == b"ok"


def test_a_response_is_forwarded_while_upstream_does_not_read(either: Either) -> None:
    """Upstream sends first and reads later."""
    proxy, upstream = either()
    with proxy.client() as client:
        request = upload(client, upstream, 48 * MIB)
        sent = pour(client, 0, 48 * MIB)
        assert sent < 48 * MIB
        answer = threading.Thread(
            target=request.answer,
            args=(b"HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\n\r\n" + PATTERN * 128,),
        )
        answer.start()
        assert client.message().body == PATTERN * 128
        answer.join()
        rest = threading.Thread(target=pour, args=(client, sent, 48 * MIB, 5))
        rest.start()
        assert request.connection.exactly(48 * MIB) == PATTERN * (48 * MIB // len(PATTERN))
        rest.join()
        alternate_chunks(client, upstream)


@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_close_by_upstream_stops_the_upload(
    running: ProxyProcess, upstream: ScriptedUpstream, end: str
) -> None:
    """The client gets the whole response, and may keep sending until it reads that."""
    with running.client() as client:
        request = upload(client, upstream, 16 * MIB, f"/v1/ends-by-{end}")
        client.send(PATTERN)
        request.connection.exactly(len(PATTERN))
        request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        assert client.message().body == b"ok"
        getattr(request.connection, end)()
        # The proxy closes the connection at some time, since it cannot be reused.
        with contextlib.suppress(ConnectionError):
            client.send(PATTERN * 255)
        line = running.wait_for_request(f"/v1/ends-by-{end}")
        assert (line["status"], line["ended_by"]) == (200, "done")


@pytest.mark.parametrize("tail", [b"", b"0\r\n\r\n"], ids=["cut", "whole"])
def test_a_client_that_closes_in_the_middle_of_its_upload_ends_the_request(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream, tail: bytes
) -> None:
    request = upload(client, upstream, 6, "/v1/leaves").answer(CHUNKED + b"2\r\nok\r\n" + tail)
    client.head()
    assert client.chunk() == b"ok"
    client.send(b"abc")
    assert request.connection.exactly(3) == b"abc"
    client.close()
    assert request.connection.closed_within(1)
    assert running.wait_for_request("/v1/leaves")["ended_by"] == "client"


def test_a_malformed_body_aborts_a_response_that_has_begun(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/malformed", "Transfer-Encoding: chunked").send(b"1\r\na\r\n")
    request = upstream.receive(body=False).answer(CHUNKED + b"2\r\nok\r\n")
    assert client.head().status == 200 and client.chunk() == b"ok"
    client.send(b"nonsense\r\n")
    assert request.connection.chunk() == b"a" and request.connection.closed_within(1)
    assert running.wait_for_request("/v1/malformed")["ended_by"] == "client"


def test_a_malformed_body_before_the_response_is_400(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/malformed", "Transfer-Encoding: chunked").send(
        b"1\r\na\r\nnonsense\r\n"
    )
    request = upstream.receive(body=False)
    assert client.message().status == 400
    assert request.connection.chunk() == b"a" and request.connection.closed_within(1)


def test_a_slow_upload_receives_its_refusal(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """Many clients read no response before they have sent everything, here for more than 5 s.

    One refusal is upstream's, the other the proxy's own.
    """
    refusal = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
    with running.client() as one, running.client() as other:
        request = upload(one, upstream, 16 * len(PATTERN))
        request.answer(refusal)
        other.send(
            b"POST /v1/stt HTTP/1.1\r\nHost: evil.example\r\nContent-Length: %d\r\n\r\n"
            % (16 * len(PATTERN))
        )
        for _ in range(16):
            one.send(PATTERN)
            other.send(PATTERN)
            time.sleep(0.4)
        assert one.message().body == b"no" and other.message().status == 403
        assert one.closed_within() and other.closed_within()


@both_ways
def test_a_long_refusal_reaches_a_client_that_sends_everything_first(
    client: Client, upstream: ScriptedUpstream
) -> None:
    """The proxy reads the rest of the body while the refusal waits for the client."""
    client.request("POST", "/v1/stt", f"Content-Length: {48 * MIB}")
    request = upstream.receive(body=False)
    refusal = threading.Thread(
        target=request.answer,
        args=(
            b"HTTP/1.1 413 Content Too Large\r\nContent-Length: %d\r\n\r\n" % (48 * MIB)
            + PATTERN * (48 * MIB // len(PATTERN)),
        ),
    )
    refusal.start()
    client.sock.settimeout(8)
    client.send(PATTERN * (48 * MIB // len(PATTERN)))
    assert client.message().body == PATTERN * (48 * MIB // len(PATTERN))
    refusal.join()


def test_a_refusal_passes_while_the_body_exceeds_the_socket_buffer(tmp_path: Path) -> None:
    """The body arrived with its head, and upstream answers before it reads the body."""
    with (
        ScriptedUpstream() as upstream,
        ProxyProcess(tmp_path, upstream=upstream.origin) as proxy,
        proxy.client() as client,
    ):
        # As on a network, the kernel takes less at once. Accepted sockets inherit both options.
        upstream.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 500)
        upstream.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        proxy.sign_in()
        client.request("POST", "/v1/stt", body=(PATTERN * 2)[:114_000])
        upstream.receive(body=False).answer(
            b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
        )
        assert client.message().body == b"no"
