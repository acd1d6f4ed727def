"""WebSockets: the handshake is forwarded with the token, then bytes pass both ways."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
import websockets.sync.client
import websockets.sync.server
from exchanges import perform
from proxy_process import Client, ProxyProcess
from raw_connection import KEPT, TIMEOUT, RawConnection
from scripted_upstream import PATTERN, Request, ScriptedUpstream, pour
from websocket_handshake import ACCEPTED, HANDSHAKE, LINES, handshake
from websockets.exceptions import ConnectionClosed, ConnectionClosedError

from xaiproxy import config
from xaiproxy.errors import UpstreamBroken
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.exchange import Exchange
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.tunnel import Tunnel

# In bytes, each way.
SIZE = 100 << 20
# In bytes: more than all socket buffers between the two ends hold.
FULL = 48 << 20
# In bytes: after reading so many, the socket at the other end takes more again.
STEP = 8 << 20

Ask = Callable[[str], "tuple[Client, Request]"]


@pytest.fixture
def client(running: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[Client]:
    with running.client() as connection:
        yield connection


# The handshake


@pytest.mark.parametrize(
    "target", ["/v1/realtime?model=grok-voice", "/v1/responses", "/v1/stt", "/v1/tts", "/v2/any"]
)
def test_a_handshake_is_forwarded_with_the_token(
    client: Client, upstream: ScriptedUpstream, target: str
) -> None:
    client.request("GET", target, *HANDSHAKE, "Authorization: Bearer none", "X-One: 1")
    request = upstream.receive()
    assert (request.target, request.token) == (target, "the-token")
    assert (request.value("Connection"), request.value("Upgrade")) == ("Upgrade", "websocket")
    for line in (*HANDSHAKE[2:], "X-One: 1"):
        name, _, value = line.partition(": ")
        assert request.value(name) == value
    request.answer(ACCEPTED)
    head = client.head()
    assert head.line == "HTTP/1.1 101 Switching Protocols"
    assert (head.value("Connection"), head.value("Upgrade")) == ("Upgrade", "websocket")
    for name in ("Sec-WebSocket-Accept", "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions"):
        assert f"{name}: {head.value(name)}".encode() in LINES
    assert head.value("Transfer-Encoding") is head.value("Content-Length") is None


def test_a_101_has_no_content_length(client: Client, upstream: ScriptedUpstream) -> None:
    """RFC 9110 section 8.6 forbids it.

    Clients would wait for that body, or take the 101 for the final response.
    """
    client.request("GET", "/v1/realtime", *HANDSHAKE)
    request = upstream.receive().answer(
        ACCEPTED.replace(b"Upgrade: websocket", b"Content-Length: 0\r\nUpgrade: websocket")
    )
    head = client.head()
    assert (
        head.status == 101
        and head.value("Content-Length") is head.value("Transfer-Encoding") is None
    )
    request.connection.send(b"frames")
    assert client.exactly(6) == b"frames"


def test_bytes_that_arrive_with_the_handshake_are_forwarded(
    client: Client, upstream: ScriptedUpstream
) -> None:
    lines = "\r\n".join(["GET /v1/realtime HTTP/1.1", "Host: localhost", *HANDSHAKE, "", ""])
    client.send(lines.encode() + b"too early")
    request = upstream.receive().answer(ACCEPTED + b"at once")
    assert client.head().status == 101 and client.exactly(7) == b"at once"
    assert request.connection.exactly(9) == b"too early"


@pytest.mark.parametrize(
    "fields",
    [
        ("Connection: Upgrade", "Upgrade: h2c"),
        ("Upgrade: websocket",),
        ("Connection: Upgrade",),
        ("Connection: Upgrade", "Upgrade: websocket, h2c"),
        ("Connection: Upgrade", "Upgrade: websocket", "Upgrade: h2c"),
    ],
)
def test_no_other_upgrade_is_forwarded(
    client: Client, upstream: ScriptedUpstream, fields: tuple[str, ...]
) -> None:
    client.request("GET", "/v1/x", *fields)
    request = upstream.receive().answer()
    assert request.value("Upgrade") is None and request.value("Connection") is None
    assert client.message().body == b"ok"


def test_handshakes_that_differ_only_in_their_length_are_distinguished(
    client: Client, upstream: ScriptedUpstream
) -> None:
    for body, upgrade in ((b"", "websocket"), (b"{}", None), (b"", "websocket")):
        client.request("GET", "/v1/lengths", *HANDSHAKE, f"Content-Length: {len(body)}").send(body)
        request = upstream.receive().answer()
        assert (request.body, request.value("Upgrade")) == (body, upgrade)
        assert client.message().body == b"ok"


def test_an_upgrade_with_a_body_or_another_method_is_not_forwarded(
    client: Client, upstream: ScriptedUpstream
) -> None:
    for method, body in (("POST", b""), ("GET", b"{}")):
        client.request(method, "/v1/x", *HANDSHAKE, body=body)
        assert upstream.receive().answer().value("Upgrade") is None
        assert client.message().body == b"ok"


@pytest.mark.parametrize(
    "answer",
    [
        ACCEPTED.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
        ACCEPTED.replace(b"Upgrade: websocket\r\n", b""),
    ],
)
def test_a_101_for_another_protocol_is_502(
    client: Client, upstream: ScriptedUpstream, answer: bytes
) -> None:
    client.request("GET", "/v1/realtime", *HANDSHAKE)
    request = upstream.receive().answer(answer)
    assert client.message().status == 502 and request.connection.closed_within()


def test_a_refused_handshake_passes_unchanged(client: Client, upstream: ScriptedUpstream) -> None:
    body = b'{"code":"permission-denied","error":"Team is not authorized"}'
    refusal = (
        b"HTTP/1.1 403 Forbidden\r\nDate: then\r\nX-One: 1\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    client.request("GET", "/v1/realtime", *HANDSHAKE)
    upstream.receive().answer(refusal)
    answer = client.message()
    assert answer.head.replace(KEPT, b"") + answer.body == refusal
    # The connection can be reused.
    handshake(client, upstream)


def test_a_handshake_is_retried_with_a_newer_token(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request("GET", "/v1/realtime", *HANDSHAKE)
    first = upstream.receive()
    running.sign_in("newer")
    first.answer(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 16\r\n\r\nunauthenticated:")
    second = upstream.receive()
    assert (second.token, second.value("Upgrade")) == ("newer", "websocket")
    second.answer(ACCEPTED)
    assert client.head().status == 101
    running.sign_in()


def test_a_web_page_of_another_site_gets_no_tunnel(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("GET", "/v1/realtime", *HANDSHAKE, "Origin: http://evil.example")
    assert client.message().status == 403 and upstream.quiet()


# The tunnel


def test_bytes_pass_both_ways_unchanged(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    request = handshake(client, upstream, "/v1/bytes")
    for size in (1, 2, 3, 1000, 65536, 200_000):
        data = (PATTERN * 4)[:size]
        client.send(data)
        assert request.connection.exactly(size) == data
        request.answer(data)
        assert client.exactly(size) == data
    request.connection.close()
    assert client.closed_within()
    client.close()
    line = running.wait_for_request("/v1/bytes")
    assert (line["status"], line["bytes"], line["ended_by"]) == (101, 266_542, "done")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_tunnel_applies_back_pressure_both_ways(
    tmp_path: Path, certificate: tuple, tls: bool
) -> None:
    with (
        ScriptedUpstream(certificate[1] if tls else None) as upstream,
        ProxyProcess(
            tmp_path, upstream=upstream.origin, environ={"SSL_CERT_FILE": str(certificate[0])}
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        request = handshake(client, upstream)
        before = proxy.resident_kib()
        down, up = pour(request.connection, 0, FULL), pour(client, 0, FULL)
        assert down < FULL * 3 / 4 and up < FULL * 3 / 4 and proxy.resident_kib() - before < 4096
        for source, sink, sent in (
            (request.connection, client, down),
            (client, request.connection, up),
        ):
            rest = threading.Thread(target=pour, args=(source, sent, FULL, 5))
            rest.start()
            assert sink.exactly(FULL) == PATTERN * (FULL // len(PATTERN))
            rest.join()
        request.connection.close()
        assert client.closed_within()


@pytest.mark.parametrize("end", [Client.close, Client.reset])
def test_upstream_is_closed_when_the_client_closes(
    client: Client, upstream: ScriptedUpstream, end: Callable[[Client], None]
) -> None:
    request = handshake(client, upstream)
    end(client)
    assert request.connection.closed_within(1)


def test_a_client_reset_ends_a_tunnel_whose_upstream_does_not_read(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """A FIN would wait in the client's kernel, after the bytes that the proxy does not read."""
    files = running.open_files()
    with running.client() as client:
        request = handshake(client, upstream, "/v1/unread")
        assert pour(client, 0, FULL) < FULL
        client.reset()
        running.wait_for_request("/v1/unread", 3)
        assert running.open_files() <= files
        request.connection.close()


def test_a_slow_client_does_not_use_up_the_idle_timeout(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    short_timeout_proxy = start_proxy(idle_timeout=1.5)
    with short_timeout_proxy.client() as client:
        request = handshake(client, upstream, "/v1/slow")
        sent = pour(request.connection, 0, FULL)
        assert sent < FULL
        rest = threading.Thread(target=pour, args=(request.connection, sent, FULL, 5))
        rest.start()
        for _ in range(4):
            time.sleep(0.5)
            assert client.exactly(STEP) == PATTERN * (STEP // len(PATTERN))
        client.exactly(FULL - 4 * STEP)
        rest.join()
        start = time.monotonic()
        # The proxy waits for the timeout first.
        assert client.closed_within(3) and time.monotonic() - start > 0.2


def test_a_client_that_reads_nothing_is_aborted(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    short_timeout_proxy = start_proxy(idle_timeout=1)
    with short_timeout_proxy.client() as client:
        request = handshake(client, upstream, "/v1/takes-nothing")
        assert pour(request.connection, 0, FULL, 0.2) < FULL
        start = time.monotonic()
        assert not request.connection.closed_within(0.1) and request.connection.closed_within(4)
        assert time.monotonic() - start < 3
        assert short_timeout_proxy.wait_for_request("/v1/takes-nothing")["ended_by"] == "client"


class NarrowClient(Client):
    """A client with a fixed receive buffer.

    The kernel takes about as many bytes for each one if it may not autotune their buffers.
    """

    def __init__(self, port: int):
        sock = socket.socket()
        sock.settimeout(TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        RawConnection.__init__(self, sock)


def test_a_client_that_does_not_read_its_101_is_aborted(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    """A response before it has filled the buffers, except for less than the 101's head."""
    short_timeout_proxy = start_proxy(idle_timeout=1)
    with NarrowClient(short_timeout_proxy.port) as client:
        client.request()
        request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % FULL)
        pour(request.connection, 0, FULL)
        assert request.connection.closed_within(4)
        room = len(client.rest())
    with NarrowClient(short_timeout_proxy.port) as client:
        client.request("GET", "/v1/fills")
        body = bytes(room - 30000)
        upstream.receive().answer(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        short_timeout_proxy.wait_for_request("/v1/fills")
        client.request("GET", "/v1/realtime", *HANDSHAKE)
        request = upstream.receive().answer(
            ACCEPTED[:-2] + 60 * (b"X: " + 1000 * b"x" + b"\r\n") + b"\r\n"
        )
        assert not request.connection.closed_within(0.1) and request.connection.closed_within(4)
        assert short_timeout_proxy.wait_for_request("/v1/realtime")["ended_by"] == "client"


def test_the_last_bytes_of_a_client_that_closes_arrive(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """Upstream keeps sending in the meantime, which the client no longer reads."""
    with running.client() as client:
        request = handshake(client, upstream)
        for _ in range(100):
            request.answer(PATTERN[:8192])
        client.send(b"last words")
        client.half_close()
        assert request.connection.rest() == b"last words"


def test_the_last_bytes_of_upstream_arrive(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with running.client() as client:
        request = handshake(client, upstream)
        request.answer(b"last words")
        request.connection.half_close()
        for _ in range(100):
            client.send(PATTERN[:8192])
        assert client.rest() == b"last words"


def test_a_reset_of_upstream_closes_the_client_connection(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    request = handshake(client, upstream, "/v1/breaks-off")
    request.answer(b"half a fra")
    assert client.exactly(10) == b"half a fra"
    request.connection.reset()
    assert client.closed_within()
    assert running.wait_for_request("/v1/breaks-off")["ended_by"] == "upstream"


def test_the_idle_timeout_ends_a_tunnel(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    short_timeout_proxy = start_proxy(idle_timeout=0.5)
    with short_timeout_proxy.client() as client:
        request = handshake(client, upstream, "/v1/silent")
        for _ in range(3):
            time.sleep(0.3)
            request.answer(b"x")
        assert client.exactly(3) == b"xxx"
        start = time.monotonic()
        assert client.closed_within(3) and time.monotonic() - start > 0.3
        assert short_timeout_proxy.wait_for_request("/v1/silent")["ended_by"] == "upstream"
        assert request.connection.closed_within()


@contextlib.contextmanager
def tunnel(
    upstream: ScriptedUpstream, limit: float
) -> Iterator[tuple[gevent.Greenlet, Request, Exchange]]:
    """A tunnel in this process, whose loop a test can block."""
    settings = config.from_environ(
        {"HOME": "/", "XAI_PROXY_UPSTREAM": upstream.origin, "XAI_PROXY_IDLE_TIMEOUT": str(limit)}
    )
    lines = "\r\n".join(["GET /v1/realtime HTTP/1.1", *HANDSHAKE, ""])
    request, answered = perform(Pool(settings), upstream, ACCEPTED, begin=lines, upgrade=True)
    ours, theirs = socket.socketpair()
    with (
        contextlib.closing(Connection(ours)) as client,
        theirs,
        contextlib.closing(answered),
        gevent.Timeout(TIMEOUT),
    ):
        theirs.settimeout(TIMEOUT)
        running = gevent.spawn(Tunnel(answered, client).run, b"")
        gevent.sleep(0)
        gevent.sleep(0)
        yield running, request, answered
        assert theirs.recv(2) == b"x"
        running.kill()


def hold_up(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def test_work_before_a_byte_does_not_shorten_the_idle_timeout_after_it(
    upstream: ScriptedUpstream,
) -> None:
    """The loop's clock stands still within a turn."""
    with tunnel(upstream, 1.5) as (running, request, exchange):
        busy = gevent.get_hub().loop.io(exchange.connection.socket.fileno(), 1)
        # This callback runs before the tunnel's, in the turn in which the byte arrives.
        busy.priority = busy.loop.MAXPRI
        worked_until = []

        def work() -> None:
            busy.stop()
            hold_up(1)
            worked_until.append(time.monotonic())

        busy.start(work)
        request.answer(b"x")
        with pytest.raises(UpstreamBroken):
            running.get()
        assert 1.5 <= time.monotonic() - worked_until[0] < 3
        busy.close()


def test_a_byte_that_arrived_before_the_idle_timeout_counts(upstream: ScriptedUpstream) -> None:
    with tunnel(upstream, 0.5) as (running, request, _):
        request.answer(b"x")
        hold_up(0.7)
        gevent.sleep(0.1)
        assert not running.ready()


def test_tunnels_get_the_drain_timeout(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, drain_timeout=0.5) as proxy,
        proxy.client() as short,
        proxy.client() as long,
    ):
        proxy.sign_in()
        one, other = handshake(short, upstream, "/v1/short"), handshake(long, upstream, "/v1/long")
        proxy.terminate()
        assert (
            "2 open responses"
            in proxy.wait_for_log(lambda line: line["message"].startswith("stopping"))["message"]
        )
        one.answer(b"bye")
        one.connection.close()
        assert short.rest() == b"bye"
        short.close()
        assert long.closed_within(3) and other.connection.closed_within()
        assert proxy.wait() == 0
        ended = {line["path"]: line["ended_by"] for line in proxy.log_lines() if "path" in line}
        assert ended == {"/v1/short": "done", "/v1/long": "drain"}


def test_five_hundred_tunnels_at_once_leak_nothing(
    running: ProxyProcess, upstream: ScriptedUpstream, many_files: None
) -> None:
    files = running.open_files()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.client()) for _ in range(500)]
        requests = [handshake(client, upstream) for client in clients]
        for number, (client, request) in enumerate(zip(clients, requests)):
            client.send(b"%04d" % number)
            request.answer(b"%04d" % number)
        for number, (client, request) in enumerate(zip(clients, requests)):
            assert client.exactly(4) == request.connection.exactly(4) == b"%04d" % number
        assert running.open_files() == files + 1000
    for request in requests:
        assert request.connection.closed_within()
        request.connection.close()
    deadline = time.monotonic() + 5
    while running.open_files() > files and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.open_files() <= files


# A real client and a real server


def serve(connection: websockets.sync.server.ServerConnection) -> None:
    """Echo each message; close the connection on request."""
    with contextlib.suppress(ConnectionClosed):
        for message in connection:
            if message == "close":
                connection.close(4321, "as you like")
                return
            if message == "cut":
                # close() would wait for the thread that reads.
                connection.socket.shutdown(socket.SHUT_RDWR)
                return
            connection.send(message)
    closes.append((connection.close_code, connection.close_reason))


closes: list[tuple[int | None, str | None]] = []


@pytest.fixture(scope="module", params=["plain", "tls"])
def address(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificate: tuple
) -> Iterator[tuple[ProxyProcess, str]]:
    """A proxy in front of an echo server, and the WebSocket URL through it."""
    context = certificate[1] if request.param == "tls" else None
    with websockets.sync.server.serve(serve, "127.0.0.1", 0, ssl=context, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        origin = f"http{'s' if context else ''}://127.0.0.1:{server.socket.getsockname()[1]}"
        with ProxyProcess(
            tmp_path_factory.mktemp("proxy"),
            upstream=origin,
            environ={"SSL_CERT_FILE": str(certificate[0])},
        ) as proxy:
            proxy.sign_in()
            yield proxy, f"ws://127.0.0.1:{proxy.port}/v1/realtime"
        server.shutdown()
        thread.join()


def connect(address: tuple[ProxyProcess, str]) -> websockets.sync.client.ClientConnection:
    return websockets.sync.client.connect(address[1], max_size=None, proxy=None, compression=None)


def test_a_hundred_megabytes_each_way_take_little_memory(address: tuple[ProxyProcess, str]) -> None:
    proxy, _ = address
    count = SIZE // len(PATTERN)
    # While this library waits to send, it reads nothing.
    ahead = threading.Semaphore(16)

    def send() -> None:
        for _ in range(count):
            ahead.acquire()
            connection.send(PATTERN)

    with connect(address) as connection:
        before = proxy.resident_kib()
        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(count):
            assert connection.recv(TIMEOUT) == PATTERN
            ahead.release()
        sender.join()
        assert proxy.resident_kib() - before < 8192


def test_close_codes_pass_unchanged(address: tuple[ProxyProcess, str]) -> None:
    with connect(address) as connection:
        connection.send("close")
        with pytest.raises(ConnectionClosedError):
            connection.recv()
        assert (connection.close_code, connection.close_reason) == (4321, "as you like")
    closes.clear()
    with connect(address) as connection:
        connection.send("hello")
        assert connection.recv() == "hello"
        connection.close(4000, "enough")
    deadline = time.monotonic() + 3
    while not closes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert closes == [(4000, "enough")]


def test_a_connection_without_a_close_frame_ends_with_1006(
    address: tuple[ProxyProcess, str],
) -> None:
    with connect(address) as connection:
        connection.send("cut")
        with pytest.raises(ConnectionClosedError):
            connection.recv()
        assert connection.close_code == 1006
