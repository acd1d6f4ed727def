"""No close overtakes the bytes before it: to a client, from upstream, or through a tunnel."""

from __future__ import annotations

import contextlib
import fcntl
import re
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess, both_ways
from raw_connection import RawConnection
from scripted_upstream import PATTERN, ScriptedUpstream, pour
from websocket_handshake import handshake

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# In bytes: as much as the kernel takes from the proxy while the client reads nothing.
LONG = (PATTERN * 64)[:3_000_100]
LONG_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LONG) + LONG
NEXT = b"GET /v1/next HTTP/1.1\r\nHost: localhost\r\n\r\n"
SIX_MB = PATTERN * 96
Either = Callable[..., "tuple[ProxyProcess, ScriptedUpstream]"]


@pytest.fixture
def client(running: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[Client]:
    with running.client() as connection:
        yield connection


# A client's connection


def check_answer(client: Client) -> None:
    message = client.message()
    assert message.status == 200 and message.body == LONG
    assert client.closed_within()


@both_ways
@pytest.mark.parametrize("extra", [b"\r\n", NEXT], ids=["line end", "request"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize(
    "version, field",
    [("HTTP/1.1", "Connection: close"), ("HTTP/1.0", "X-a: 1")],
    ids=["close", "1.0"],
)
def test_bytes_after_the_last_request_do_not_truncate_its_response(
    client: Client,
    running: ProxyProcess,
    upstream: ScriptedUpstream,
    extra: bytes,
    late: bool,
    version: str,
    field: str,
) -> None:
    start = len(running.log_lines())
    client.request("GET", "/v1/last", field, version=version)
    if not late:
        client.send(extra)
    upstream.receive().answer(LONG_ANSWER)
    running.wait_for_log(lambda line: line.get("path") == "/v1/last", start=start)
    if late:
        client.send(extra)
    check_answer(client)


def test_bytes_after_the_last_request_do_not_truncate_it_in_a_drain(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy, proxy.client() as client:
        proxy.sign_in()
        client.request("GET", "/v1/last")
        request = upstream.receive()
        client.send(NEXT)
        proxy.terminate()
        proxy.wait_for_log(lambda line: line["message"].startswith("stopping"))
        request.answer(LONG_ANSWER)
        proxy.wait_for_request("/v1/last")
        check_answer(client)
        assert proxy.wait() == 0


def test_half_a_head_does_not_delay_a_drain(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy, proxy.client() as client:
        proxy.sign_in()
        client.request("GET", "/v1/open")
        request = upstream.receive().answer(CHUNKED + b"2\r\nok\r\n")
        assert client.head().status == 200 and client.chunk() == b"ok"
        client.send(NEXT[:20])
        proxy.terminate()
        proxy.wait_for_log(lambda line: line["message"].startswith("stopping"))
        # Requests that the drain had to wait for have ended by then.
        time.sleep(1.5)
        request.answer(b"0\r\n\r\n")
        assert client.chunk() == b""
        start = time.monotonic()
        assert proxy.wait(10) == 0 and time.monotonic() - start < 5


@pytest.mark.parametrize("framing", ["sized", "until close"])
def test_bytes_before_a_cut_arrive(
    running: ProxyProcess, upstream: ScriptedUpstream, framing: str
) -> None:
    """The cut is a reset only where nothing else makes it visible, and follows the last byte."""
    with running.client() as client:
        version = "HTTP/1.0" if framing == "until close" else "HTTP/1.1"
        head = (
            CHUNKED
            if framing == "until close"
            else b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n"
        )
        data = b"%x\r\n%b\r\n" % (len(LONG), LONG) if framing == "until close" else LONG
        start = len(running.log_lines())
        client.request("GET", "/v1/cut", version=version)
        request = upstream.receive().answer(head + data)
        client.send(NEXT)
        # Otherwise the reset would destroy bytes before they reach the proxy.
        while unacknowledged(request.connection):
            time.sleep(0.01)
        request.connection.reset()
        line = running.wait_for_log(lambda line: line.get("path") == "/v1/cut", start=start)
        assert (line["ended_by"], line["bytes"]) == ("upstream", len(LONG))
        assert client.head().status == 200
        assert client.exactly(len(LONG)) == LONG
        if framing == "until close":
            with pytest.raises(ConnectionResetError):
                client.rest()
        else:
            assert client.rest() == b""


# From upstream


@both_ways
def test_a_refusal_that_is_reset_is_truncated(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """The proxy searches the body for a refused token, and meets the reset there."""
    client.request("GET", "/v1/refused")
    request = upstream.receive().answer(
        b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\nNo ent"
    )
    # The proxy reads these bytes first, and waits for more for two seconds.
    time.sleep(0.2)
    request.connection.reset()
    assert client.head().status == 403 and client.chunk() == b"No ent"
    assert client.closed_within()
    assert running.wait_for_request("/v1/refused")["ended_by"] == "upstream"


@both_ways
def test_chunks_before_a_malformed_one_arrive(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request("GET", "/v1/malformed")
    upstream.receive().answer(CHUNKED + b"2\r\nok\r\n" * 5 + b"nonsense\r\n")
    assert client.head().status == 200
    assert [client.chunk() for _ in range(5)] == [b"ok"] * 5
    assert client.closed_within()
    assert running.wait_for_request("/v1/malformed")["ended_by"] == "upstream"


@both_ways
def test_chunks_before_a_malformed_one_arrive_later_in_the_response(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request("GET", "/v1/malformed-later")
    request = upstream.receive().answer(CHUNKED + b"2\r\nok\r\n")
    assert client.head().status == 200 and client.chunk() == b"ok"
    request.answer(b"1\r\na\r\n1\r\nb\r\nnonsense\r\n")
    assert (client.chunk(), client.chunk()) == (b"a", b"b")
    assert client.closed_within()
    assert running.wait_for_request("/v1/malformed-later")["ended_by"] == "upstream"


# Through a tunnel


def unacknowledged(raw: RawConnection) -> int:
    """Return the number of bytes that the peer's kernel has not received."""
    return int.from_bytes(fcntl.ioctl(raw.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def read_slowly(raw: RawConnection) -> bytes:
    """Return all bytes until EOF."""
    data, pause = b"", 1 << 18
    while more := raw.sock.recv(1 << 18):
        data += more
        if len(data) >= pause:
            pause += 1 << 18
            time.sleep(0.1)
    return data


def test_all_bytes_of_a_client_that_closes_arrive(either: Either) -> None:
    proxy, upstream = either()
    with proxy.client() as client:
        request = handshake(client, upstream)
        client.send(SIX_MB)
    assert read_slowly(request.connection) == SIX_MB


def test_all_bytes_of_an_upstream_that_closes_arrive(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with running.client() as client:
        request = handshake(client, upstream)
        request.answer(SIX_MB)
        request.connection.close()
        assert read_slowly(client) == SIX_MB


@pytest.mark.parametrize("end", ["close", "half_close"])
def test_all_bytes_of_a_client_arrive_while_upstream_keeps_sending(
    running: ProxyProcess, upstream: ScriptedUpstream, end: str
) -> None:
    with running.client() as client:
        request = handshake(client, upstream)
        client.send(SIX_MB[: 1 << 20])
        # Otherwise bytes from upstream would reset the closed socket, and its unsent bytes would be
        # lost.
        while unacknowledged(client):
            time.sleep(0.01)
        getattr(client, end)()
        data = b""
        # The proxy closes the connection after the last byte, which can be while upstream sends.
        with contextlib.suppress(ConnectionError):
            while more := request.connection.sock.recv(1 << 18):
                data += more
                with contextlib.suppress(ConnectionError):
                    request.answer(b"still sending")
        assert data == SIX_MB[: 1 << 20]


def unread(proxy: ProxyProcess, client: Client) -> int:
    """Return the number of the client's bytes in the proxy's receive buffer, from proc(5)."""
    ours, theirs = proxy.port, client.sock.getsockname()[1]
    state = "[0-9A-F]{2} [0-9A-F]{8}"
    ends = f"[0-9A-F]{{8}}:{ours:04X} [0-9A-F]{{8}}:{theirs:04X} {state}:([0-9A-F]{{8}})"
    queue = re.search(ends, Path("/proc/net/tcp").read_text())
    assert queue is not None
    return int(queue[1], 16)


def fill(proxy: ProxyProcess, client: Client) -> None:
    """Send until the proxy reads no more.

    Then all bytes have left the client's kernel, so that a FIN can follow them.
    """
    # Less than the buffers to upstream hold.
    client.send(PATTERN * 32)
    while True:
        client.send(PATTERN)
        deadline = time.monotonic() + 0.5
        while unread(proxy, client):
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)


@pytest.mark.parametrize("full", [False, True])
def test_an_upstream_that_does_not_read_is_reset_after_the_client_closes(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream, full: bool
) -> None:
    short_timeout_proxy = start_proxy(client_timeout=0.5)
    path = f"/v1/takes-none-{full}"
    with short_timeout_proxy.client() as client:
        request = handshake(client, upstream, path)
        if full:
            fill(short_timeout_proxy, client)
        else:
            client.send(b"x")
        start = time.monotonic()
        client.half_close()
        line = short_timeout_proxy.wait_for_request(path)
        assert 0.4 < time.monotonic() - start < 4
        # Only upstream's own FIN is missing.
        if not full:
            assert line["ended_by"] == "client" and request.connection.rest() == b"x"
            return
        assert line["ended_by"] == "upstream"
        with pytest.raises(ConnectionResetError):
            request.connection.rest()


def test_a_client_that_does_not_read_is_reset_after_upstream_closes(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    short_timeout_proxy = start_proxy(client_timeout=0.5)
    with short_timeout_proxy.client() as client:
        # Fewer bytes would wait in the client's kernel, and more in upstream's, which would hide
        # the FIN.
        handshake(client, upstream, "/v1/takes-none").answer(PATTERN * 64).connection.close()
        start = time.monotonic()
        short_timeout_proxy.wait_for_request("/v1/takes-none")
        assert 0.4 < time.monotonic() - start < 4
        with pytest.raises(ConnectionResetError):
            client.rest()


@pytest.mark.parametrize("blocked", [False, True], ids=["read", "unread"])
def test_a_reset_by_the_client_ends_a_tunnel_at_once(
    running: ProxyProcess, upstream: ScriptedUpstream, blocked: bool
) -> None:
    files = running.open_files()
    with running.client() as client:
        request = handshake(client, upstream, f"/v1/reset-{blocked}")
        client.send(b"x")
        request.connection.exactly(1)
        if blocked:
            pour(client, 0, 48 << 20)
        client.reset()
        start = time.monotonic()
        assert running.wait_for_request(f"/v1/reset-{blocked}")["ended_by"] == "client"
        assert time.monotonic() - start < 2 and running.open_files() <= files
