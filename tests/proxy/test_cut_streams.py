"""Responses that upstream cuts at any byte, in every framing, are complete or visibly truncated.

Two parsers decide what a client would take for complete: http.client, which is too lenient, and
h11.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import pytest
import requests
from proxy_process import Client, ProxyProcess
from scripted_upstream import Connection, Request, ScriptedUpstream, pour

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENTS = (b"data: one\n\n", b"data: [DONE]\n\n")
CONTENT = b"".join(EVENTS)
# The second chunk's size begins with a zero, as the last chunk's does.
CHUNKS = b"b\r\n%b\r\n00e;x=y\r\n%b\r\n" % EVENTS
ANSWERS = {
    "length": OK + b"Content-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT,
    "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS + b"0\r\n\r\n",
    "trailers": OK
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + CHUNKS
    + b"0;z\r\nX-Sum: 1\r\nY:\r\n\r\n",
    "close": OK + b"\r\n" + CONTENT,
    "HTTP/1.0": OK.replace(b"1.1", b"1.0") + b"\r\n" + CONTENT,
    "HTTP/1.0 length": OK.replace(b"1.1", b"1.0")
    + b"Content-Length: %d\r\n\r\n" % len(CONTENT)
    + CONTENT,
}
FRAMED = [
    name for name, answer in ANSWERS.items() if b"Content-Length" in answer or b"chunked" in answer
]
LAST_SIZE = re.compile(rb"\r\n0(;[^\r]*)?\r\n")
CLIENTS = {
    "keep-alive": ("1.1",),
    "close": ("1.1", "Connection: close"),
    "1.0": ("1.0",),
    "1.0 keep-alive": ("1.0", "Connection: keep-alive"),
}


def content_of(body: bytes) -> bytes:
    """Return the content of the chunks that have arrived."""
    parts = []
    while size := re.match(rb"([0-9a-f]+)[^\r\n]*\r\n", body):
        end = size.end() + int(size[1], 16)
        parts.append(body[size.end() : end])
        body = body[end + 2 :]
    return b"".join(parts)


class RecordedSocket(io.RawIOBase):
    """A socket that keeps all that it received, with the methods that http.client uses."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self.data = b""
        self.ended = False

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._sock.recv(len(buffer))
        self.ended = not data
        self.data += data
        buffer[: len(data)] = data
        return len(data)


class Outcome:
    """What a client makes of a response that it reads from its socket."""

    def __init__(self, client: Client):
        came = RecordedSocket(client.sock)
        answer = http.client.HTTPResponse(came, method="POST")
        self.complete = True
        try:
            answer.begin()
            answer.read()
        except (http.client.IncompleteRead, ConnectionResetError):
            self.complete = False
        self.status = answer.status
        head, _, body = came.data.partition(b"\r\n\r\n")
        self.error = answer.getheader("X-XAI-Proxy-Error")
        self.content = content_of(body) if b"\r\nTransfer-Encoding: chunked" in head else body
        self.strictly_complete = is_complete_to_h11(came)


def is_complete_to_h11(came: RecordedSocket) -> bool:
    connection = h11.Connection(h11.CLIENT)
    connection.send(
        h11.Request(method="POST", target="/", headers=[("Host", "a"), ("Content-Length", "0")])
    )
    connection.send(h11.EndOfMessage())
    connection.receive_data(came.data)
    if came.ended:
        connection.receive_data(b"")
    try:
        event: Any = None
        while event is not h11.NEED_DATA:
            event = connection.next_event()
            if isinstance(event, h11.EndOfMessage):
                return True
    except h11.RemoteProtocolError:
        pass
    return False


# Ways to end the connection


def fin(connection: Connection) -> None:
    """Close without a close_notify, even over TLS."""
    connection.close()


reset = Connection.reset


def close_notify(connection: Connection) -> None:
    connection.sock.settimeout(0)
    with contextlib.suppress(OSError):
        # unwrap() sends it, and would wait for the peer's, unless that is there.
        connection.sock.unwrap()
    connection.close()


@pytest.fixture(scope="module")
def tls_upstream(certificate: tuple) -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(certificate[1]) as running:
        yield running


@pytest.fixture(scope="module")
def tls_proxy(
    tls_upstream: ScriptedUpstream, certificate: tuple, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    with ProxyProcess(
        tmp_path_factory.mktemp("tls"),
        upstream=tls_upstream.origin,
        environ={"SSL_CERT_FILE": str(certificate[0])},
    ) as proxy:
        proxy.sign_in()
        yield proxy


def cut(
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    answer: bytes,
    client: str,
    how: Callable[[Connection], None],
    offsets: range,
    first: int = 0,
) -> list[tuple[int, Outcome]]:
    """Send each client a longer part of `answer` and cut it; return what each client made of it.

    `first`: bytes that the clients receive before the rest is sent.
    """
    version, *fields = CLIENTS[client]
    clients = [proxy.client() for _ in offsets]
    try:
        for offset, one in zip(offsets, clients):
            one.request("POST", f"/v1/{offset}", *fields, body=b"{}", version=f"HTTP/{version}")
        came: list[Request] = [upstream.receive() for _ in offsets]
        if first:
            for request in came:
                request.answer(answer[:first])
            # The proxy has sent the head.
            for one in clients:
                while b"\r\n\r\n" not in one.sock.recv(4096, socket.MSG_PEEK):
                    pass
        for request in came:
            request.answer(answer[first : int(request.target[4:])])
            how(request.connection)
        return [(offset, Outcome(one)) for offset, one in zip(offsets, clients)]
    finally:
        for one in clients:
            one.close()


def assert_visible(name: str, outcomes: list[tuple[int, Outcome]], legal_end: bool) -> None:
    answer = ANSWERS[name]
    body = answer.index(b"\r\n\r\n") + 4
    last = LAST_SIZE.search(answer, body)
    # From there on, the client may know that the response is complete.
    known = last.end() if last else len(answer)
    for offset, got in outcomes:
        where = f"{answer[:offset]!r}, and then EOF"
        if offset < body:
            assert (
                (got.status, got.error) == (502, "upstream_unreachable")
                and got.complete
                and got.strictly_complete
            ), where
            continue
        sent = answer[body:offset]
        assert got.status == 200 and got.error is None, where
        assert got.content == (content_of(sent) if last else sent), where
        if (offset == len(answer) and name in FRAMED) or (legal_end and name not in FRAMED):
            assert got.complete and got.strictly_complete, where
        elif offset < known or name not in FRAMED:
            assert not got.complete and not got.strictly_complete, where


def assert_serves(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with proxy.client() as client:
        client.request("POST", "/v1/next", body=b"{}")
        request = upstream.receive()
        assert request.target == "/v1/next"
        request.answer()
        assert client.message().body == b"ok" and upstream.quiet()
    upstream.hang_up()


def assert_cuts(
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    name: str,
    client: str,
    how: Callable[[Connection], None],
    legal_end: bool,
) -> None:
    """Cut the whole response, and then its body alone, after the head has passed.

    In the middle of the head, one kind of client is enough: all get the same 502.
    """
    answer = ANSWERS[name]
    body = answer.index(b"\r\n\r\n") + 4
    begin = 0 if client == "keep-alive" else body - 4
    for offsets, first in (
        (range(begin, len(answer) + 1), 0),
        (range(body, len(answer) + 1), body),
    ):
        assert_visible(name, cut(proxy, upstream, answer, client, how, offsets, first), legal_end)
    assert_serves(proxy, upstream)


@pytest.mark.parametrize(
    "client, how", [*[(client, fin) for client in CLIENTS], ("keep-alive", reset), ("1.0", reset)]
)
@pytest.mark.parametrize("name", ANSWERS)
def test_a_response_cut_at_any_byte_is_visibly_truncated(
    running: ProxyProcess,
    upstream: ScriptedUpstream,
    name: str,
    client: str,
    how: Callable[[Connection], None],
) -> None:
    assert_cuts(running, upstream, name, client, how, how is fin)


@pytest.mark.parametrize("how", [fin, reset])
@pytest.mark.parametrize("client", ["keep-alive", "1.0"])
@pytest.mark.parametrize("name", ["chunked", "trailers", "close"])
def test_a_cut_event_stream_with_heartbeats_is_visibly_truncated(
    start_proxy: Callable[..., ProxyProcess],
    upstream: ScriptedUpstream,
    name: str,
    client: str,
    how: Callable[[Connection], None],
) -> None:
    """No heartbeat is due within the test, nor when a stream ends."""
    assert_cuts(start_proxy(sse_keepalive=600), upstream, name, client, how, how is fin)


@pytest.mark.parametrize("how", [fin, reset, close_notify])
@pytest.mark.parametrize("name", ["length", "chunked", "close"])
def test_a_response_cut_over_tls_is_visibly_truncated(
    tls_proxy: ProxyProcess,
    tls_upstream: ScriptedUpstream,
    name: str,
    how: Callable[[Connection], None],
) -> None:
    """Anybody on the network can forge a FIN without a close_notify (RFC 9112 section 9.8)."""
    assert_cuts(tls_proxy, tls_upstream, name, "keep-alive", how, how is close_notify)


@pytest.mark.parametrize("cut_short", [b"0", b"00", b"0;x=y", b"0\r"])
def test_a_malformed_last_chunk_whose_zero_has_passed_resets_the_client(
    running: ProxyProcess, upstream: ScriptedUpstream, cut_short: bytes
) -> None:
    with running.client() as client:
        client.request("POST", "/v1/zero", body=b"{}")
        request = upstream.receive().answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + cut_short)
        client.head()
        assert client.exactly(len(cut_short)) == cut_short
        request.answer(b"\0\r\n")
        with pytest.raises(ConnectionResetError):
            client.rest()


def test_a_reset_that_a_write_met_is_no_clean_end(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """The kernel reports it once.

    The response, which only the end of the connection delimits, precedes the end of the upload.
    """
    answer, size = OK.replace(b"200 OK", b"413 Too Large") + b"\r\ndata: on", 30_000_000

    def upload() -> None:
        with contextlib.suppress(ConnectionError):
            pour(client, 0, size)

    for _ in range(20):
        with running.client() as client:
            client.request("POST", "/v1/files", f"Content-Length: {size}")
            # That is more than all buffers hold.
            sender = threading.Thread(target=upload)
            sender.start()
            request = upstream.receive(body=False)
            request.connection.exactly(10_000)
            upstream.connections.remove(request.connection)
            request.answer(answer).connection.reset()
            assert not Outcome(client).complete
            sender.join()


# Real clients

CUTS = [
    (name, at)
    for name in ANSWERS
    for at in (ANSWERS[name].index(b"one") + 1, ANSWERS[name].index(b"DONE"))
] + [
    ("chunked", ANSWERS["chunked"].index(end) + len(end))
    for end in (b"\n\r\n00", b"]\n\n\r\n", b"]\n\n\r\n0")
]


def by_requests(url: str) -> bytes:
    return requests.get(url, timeout=8).content


def by_httpx(url: str) -> bytes:
    import httpx2

    return httpx2.get(url, timeout=8, trust_env=False).content


def by_curl(url: str, *options: str) -> bytes:
    return subprocess.run(
        ["curl", "-sS", "--max-time", "8", *options, url], check=True, capture_output=True
    ).stdout


def by_old_curl(url: str) -> bytes:
    return by_curl(url, "--http1.0")


@pytest.mark.parametrize("get", [by_requests, by_httpx, by_curl, by_old_curl])
def test_real_clients_report_truncated_responses(
    running: ProxyProcess, upstream: ScriptedUpstream, get: Callable[[str], bytes]
) -> None:
    if "curl" in get.__name__ and not shutil.which("curl"):
        pytest.skip("curl is not installed")
    errors = [requests.RequestException, subprocess.CalledProcessError]
    if get is by_httpx:
        errors.append(
            pytest.importorskip(
                "httpx2", reason="comes with openai, of the extra clients"
            ).HTTPError
        )

    def serve() -> None:
        for name, offset in CUTS:
            upstream.receive().answer(ANSWERS[name][:offset]).connection.reset()

    server = threading.Thread(target=serve)
    server.start()
    for name, offset in CUTS:
        with pytest.raises(tuple(errors)):
            pytest.fail(f"{ANSWERS[name][:offset]!r} is complete: {get(f'{running.url}/v1/x')!r}")
    server.join()
