"""The body of a response in transit: framing, back-pressure, timeouts, leaks."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import gevent.event
import gevent.server
import gevent.socket
import greenlet
import pytest
from exchanges import perform
from proxy_process import ISSUER, Client, ProxyProcess, both_ways
from scripted_upstream import OK, PATTERN, Request, ScriptedUpstream, pour

from xaiproxy import client_keys, config, token_store
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.relay import Relay
from xaiproxy.proxy import access, app, forward, server

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n"
CONTENT = b"abc0123456789"
DECORATED = b'3;x="y;z"\r\nabc\r\n000A ;\tq=1\r\n0123456789\r\n00;last\r\nX-Sum: 1\r\nY:\r\n\r\n'
# In bytes: more than all socket buffers between the two ends hold.
SIZE = 48 << 20
# In bytes: after reading so many, the socket at the other end takes more again.
STEP = 8 << 20


@pytest.fixture
def client(running: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[Client]:
    with running.client() as connection:
        yield connection


# Framing


def in_one(data: bytes) -> list[bytes]:
    return [data]


def head_first(data: bytes) -> list[bytes]:
    head, _, body = data.partition(b"\r\n\r\n")
    return [head + b"\r\n\r\n", body]


def in_bytes(data: bytes) -> list[bytes]:
    head, body = head_first(data)
    return [head, *(bytes([byte]) for byte in body)]


def end_apart(data: bytes) -> list[bytes]:
    return [data[:-1], data[-1:]]


def head_and_end_apart(data: bytes) -> list[bytes]:
    head, body = head_first(data)
    return [head, body[:-1], body[-1:]]


SPLITS = (in_one, head_first, in_bytes, end_apart, head_and_end_apart)


@both_ways
@pytest.mark.parametrize("split", SPLITS)
def test_a_relayed_body_keeps_its_framing_and_an_iterated_one_is_reframed(
    client: Client,
    running: ProxyProcess,
    upstream: ScriptedUpstream,
    way: str,
    split: Callable[[bytes], list[bytes]],
) -> None:
    """A relayed body keeps its extensions and trailers."""
    client.request("GET", f"/v1/{split.__name__}")
    request = upstream.receive()
    parts = split(CHUNKED + DECORATED)
    request.answer(parts[0])
    head = client.head()
    for part in parts[1:]:
        request.answer(part)
    if way == "relayed":
        assert client.exactly(len(DECORATED)) == DECORATED
    else:
        content = b""
        while len(content) < len(CONTENT):
            # The line holds the size alone.
            size = int(client.until(b"\r\n"), 16)
            content += client.exactly(size)
            assert client.exactly(2) == b"\r\n"
        assert content == CONTENT and client.exactly(5) == b"0\r\n\r\n"
    assert head.value("Transfer-Encoding") == "chunked" and client.silent()
    line = running.wait_for_request(f"/v1/{split.__name__}")
    assert (line["bytes"], line["ended_by"]) == (len(CONTENT), "done")
    client.request()
    assert upstream.receive().answer().connection is request.connection
    assert client.message().body == b"ok"


@both_ways
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("whole", [SIZED + CONTENT, CHUNKED + DECORATED], ids=["length", "chunked"])
def test_bytes_after_the_end_of_a_response_are_dropped(
    client: Client,
    running: ProxyProcess,
    upstream: ScriptedUpstream,
    whole: bytes,
    split: Callable[[bytes], list[bytes]],
) -> None:
    path = f"/v1/extra-{split.__name__}-{len(whole)}"
    client.request("GET", path)
    request = upstream.receive()
    parts = split(whole)
    parts[-1] += b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    for part in parts:
        request.answer(part)
    assert client.message().body == CONTENT and client.silent()
    assert request.connection.closed_within()
    line = running.wait_for_request(path)
    assert (line["bytes"], line["ended_by"]) == (len(CONTENT), "done")
    client.request()
    upstream.receive().answer()
    assert client.message().body == b"ok"


@both_ways
@pytest.mark.parametrize("with_the_head", [True, False])
def test_a_malformed_chunk_truncates_the_response(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream, with_the_head: bool
) -> None:
    """The content before it may pass. The chunk itself and an end do not."""
    path = f"/v1/malformed-{with_the_head}"
    client.request("GET", path)
    request = upstream.receive()
    if not with_the_head:
        request.answer(CHUNKED)
        client.head()
    request.answer((CHUNKED if with_the_head else b"") + b"3\r\nabc\r\n+3\r\nevil\r\n0\r\n\r\n")
    came = client.rest()
    assert b"evil" not in came and b"0\r\n\r\n" not in came
    assert request.connection.closed_within()
    assert running.wait_for_request(path)["ended_by"] == "upstream"


# Back-pressure


@both_ways
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_response_that_the_client_does_not_read_stays_at_upstream(
    tmp_path: Path, certificate: tuple, way: str, tls: bool
) -> None:
    with (
        ScriptedUpstream(certificate[1] if tls else None) as upstream,
        ProxyProcess(
            tmp_path,
            way=way,
            upstream=upstream.origin,
            environ={"SSL_CERT_FILE": str(certificate[0])},
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        client.request()
        upstream.receive().answer(OK)
        client.message()
        before = proxy.resident_kib()
        client.request("GET", "/v1/unread")
        request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        sent = pour(request.connection, 0, SIZE)
        assert sent < SIZE * 3 / 4
        spent = proxy.cpu_seconds()
        time.sleep(0.2)
        # The proxy waits instead of polling.
        assert proxy.cpu_seconds() - spent < 0.05
        rest = threading.Thread(target=pour, args=(request.connection, sent, SIZE, 5))
        rest.start()
        client.head()
        assert client.exactly(SIZE) == PATTERN * (SIZE // len(PATTERN))
        rest.join()
        assert proxy.resident_kib() - before < 4096
        line = proxy.wait_for_request("/v1/unread")
        assert (line["bytes"], line["ended_by"]) == (SIZE, "done")
        client.request()
        assert upstream.receive().answer().connection is request.connection
        assert client.message().body == b"ok"


@both_ways
def test_ten_unread_responses_of_a_gigabyte_take_little_memory(
    running: ProxyProcess, upstream: ScriptedUpstream, way: str
) -> None:
    size = 1 << 30
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.client()) for _ in range(10)]
        running.ask("GET", "/healthz")
        before = running.resident_kib()
        requests = []
        for client in clients:
            client.request("GET", "/v1/gigabyte")
            requests.append(upstream.receive().answer(CHUNKED + b"%x\r\n" % size))
            # That is what the kernel buffers.
            assert pour(requests[-1].connection, 0, size, 0.1) < size / 20
        assert running.resident_kib() - before < 8192
    for request in requests:
        assert request.connection.closed_within(1)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_an_upload_that_upstream_does_not_read_stays_at_the_client(
    tmp_path: Path, certificate: tuple, tls: bool
) -> None:
    with (
        ScriptedUpstream(certificate[1] if tls else None) as upstream,
        ProxyProcess(
            tmp_path,
            upstream=upstream.origin,
            replay_limit=1,
            environ={"SSL_CERT_FILE": str(certificate[0])},
        ) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        client.request("POST", "/v1/files", body=b"{}")
        upstream.receive().answer(OK)
        client.message()
        before = proxy.resident_kib()
        client.request("POST", "/v1/files", f"Content-Length: {SIZE}")
        request = upstream.receive(body=False)
        sent = pour(client, 0, SIZE)
        assert sent < SIZE * 3 / 4
        rest = threading.Thread(target=pour, args=(client, sent, SIZE, 5))
        rest.start()
        assert request.connection.exactly(SIZE) == PATTERN * (SIZE // len(PATTERN))
        rest.join()
        assert proxy.resident_kib() - before < 4096
        request.answer()
        assert client.message().body == b"ok"


def test_a_response_during_an_upload_stays_at_upstream(
    running: ProxyProcess, client: Client, upstream: ScriptedUpstream
) -> None:
    """The proxy forwards it after the upload, and keeps little of it until then."""
    before = running.resident_kib()
    client.request("POST", "/v1/files", "Content-Length: 6").send(b"abc")
    request = upstream.receive(body=False)
    assert request.connection.exactly(3) == b"abc"
    request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
    sent = pour(request.connection, 0, SIZE)
    assert sent < SIZE * 3 / 4 and running.resident_kib() - before < 4096
    client.send(b"def")
    assert request.connection.exactly(3) == b"def"
    rest = threading.Thread(target=pour, args=(request.connection, sent, SIZE, 5))
    rest.start()
    client.head()
    assert client.exactly(SIZE) == PATTERN * (SIZE // len(PATTERN))
    rest.join()


@both_ways
def test_a_slow_client_does_not_use_up_the_idle_timeout(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream, way: str
) -> None:
    """The timeout pauses while the client does not read, and restarts with each byte it reads."""
    short_timeout_proxy = start_proxy(way=way, idle_timeout=1.5)
    with short_timeout_proxy.client() as client:
        client.request("GET", "/v1/slow-reader")
        request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        sent = pour(request.connection, 0, SIZE)
        assert sent < SIZE
        rest = threading.Thread(target=pour, args=(request.connection, sent, SIZE - 10, 5))
        rest.start()
        client.head()
        for _ in range(4):
            time.sleep(0.5)
            client.exactly(STEP)
        client.exactly(SIZE - 10 - 4 * STEP)
        rest.join()
        start = time.monotonic()
        # The proxy waits for the timeout first.
        assert client.rest() == b"" and 0.2 < time.monotonic() - start < 3
        line = short_timeout_proxy.wait_for_request("/v1/slow-reader")
        assert (line["bytes"], line["ended_by"]) == (SIZE - 10, "upstream")


def test_a_byte_that_arrived_before_the_idle_timeout_counts(upstream: ScriptedUpstream) -> None:
    """The loop, blocked here, meets the byte and the expired timer in the same turn."""
    settings = config.from_environ(
        {"HOME": "/", "XAI_PROXY_UPSTREAM": upstream.origin, "XAI_PROXY_IDLE_TIMEOUT": "0.5"}
    )
    request, answered = perform(Pool(settings), upstream, SIZED)
    ours, theirs = socket.socketpair()
    with (
        contextlib.closing(Connection(ours)) as client,
        theirs,
        contextlib.closing(answered),
        gevent.Timeout(8),
    ):
        theirs.settimeout(8)
        running = gevent.spawn(Relay(answered, client, None).run, b"")
        gevent.sleep(0)
        request.answer(CONTENT[:3])
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            sum(range(1000))
        gevent.sleep(0.1)
        assert not running.ready() and theirs.recv(100) == CONTENT[:3]
        request.answer(CONTENT[3:])
        running.get()
        assert theirs.recv(100) == CONTENT[3:]


@pytest.fixture
def short_timeout_proxy(
    start_proxy: Callable[..., ProxyProcess], way: str, upstream: ScriptedUpstream
) -> ProxyProcess:
    return start_proxy(way=way, idle_timeout=1)


def assert_aborted(proxy: ProxyProcess, request: Request, target: str) -> None:
    """Assert that the request ends after a while, as if the client had closed."""
    start = time.monotonic()
    assert not request.connection.closed_within(0.1) and request.connection.closed_within(4)
    assert time.monotonic() - start < 3
    assert proxy.wait_for_request(target)["ended_by"] == "client"


@both_ways
def test_a_client_that_reads_nothing_is_aborted(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """Otherwise it would hold its connections forever: its kernel answers window probes."""
    with short_timeout_proxy.client() as client:
        client.request("GET", "/v1/takes-nothing")
        request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        assert pour(request.connection, 0, SIZE, 0.2) < SIZE
        assert_aborted(short_timeout_proxy, request, "/v1/takes-nothing")
        assert len(client.rest()) < SIZE


@both_ways
def test_a_client_that_pipelines_and_reads_nothing_is_aborted(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """The start of a body, or all of a short one, is written together with the head."""
    body = b"x" * 20000
    with short_timeout_proxy.client() as client:
        client.send(b"GET /v1/pipelined HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        count = 0
        with pytest.raises(ConnectionError):
            while True:
                with contextlib.suppress(AssertionError):
                    # Without one the proxy is blocked, or the machine is busy.
                    request = upstream.receive(seconds=0.3)
                    request.answer(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                    )
                    count += 1
                    continue
                client.send(b"x")
        assert client.was_reset(1)
        assert 50 < count < 1000


@both_ways
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_the_death_of_upstream_after_unread_bytes_truncates_the_response(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream, how: str
) -> None:
    client.request("GET", f"/v1/dies-unread-{how}")
    request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
    sent = pour(request.connection, 0, SIZE)
    request.connection.close() if how == "fin" else request.connection.reset()
    client.head()
    came = client.rest()
    assert (
        PATTERN * (SIZE // len(PATTERN)) > came == (PATTERN * (SIZE // len(PATTERN)))[: len(came)]
    )
    assert len(came) == sent if how == "fin" else 0 < len(came) <= sent
    line = running.wait_for_request(f"/v1/dies-unread-{how}")
    assert (line["bytes"], line["ended_by"]) == (len(came), "upstream")


# Large and small


@both_ways
def test_an_event_of_eight_megabytes_passes_unchanged(
    client: Client, upstream: ScriptedUpstream
) -> None:
    event = b"data: " + PATTERN.replace(b"\n", b"") * 129 + b"\n\n"
    client.request("POST", "/v1/responses", body=b"{}")
    request = upstream.receive().answer(CHUNKED)
    sender = threading.Thread(
        target=request.answer, args=(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event),)
    )
    sender.start()
    assert client.message().body == event and len(event) > 8 << 20
    sender.join()


@both_ways
@pytest.mark.parametrize("body", [b"{}", b"x" * 300_000])
def test_a_delete_with_a_body_passes(
    client: Client, upstream: ScriptedUpstream, body: bytes
) -> None:
    client.request("DELETE", "/v1/files/one", body=body)
    request = upstream.receive()
    assert (request.method, request.body) == ("DELETE", body)
    request.answer(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert client.message().status == 204


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_longer_upload_takes_no_more_memory(
    tmp_path: Path, upstream: ScriptedUpstream, chunked: bool
) -> None:
    """There is no copy for a replay here, which a chunked upload begins before its length is known."""
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, replay_limit=0) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()

        def upload(size: int) -> int:
            client.request(
                "POST",
                "/v1/files",
                "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}",
            )
            part = b"%x\r\n%b\r\n" % (len(PATTERN), PATTERN) if chunked else PATTERN
            last = b"0\r\n\r\n" if chunked else b""
            sender = threading.Thread(
                target=lambda: [
                    *map(client.send, [part] * (size // len(PATTERN))),
                    client.send(last),
                ]
            )
            sender.start()
            request, came = upstream.receive(body=False), 0
            while came < size:
                data = (
                    request.connection.chunk()
                    if chunked
                    else request.connection.exactly(len(PATTERN))
                )
                assert data == (PATTERN * 3)[came % len(PATTERN) :][: len(data)]
                came += len(data)
            assert not chunked or request.connection.chunk() == b""
            sender.join()
            resident = proxy.resident_kib()
            request.answer()
            assert client.message().body == b"ok"
            return resident

        short = upload(300 * len(PATTERN))
        assert upload(6000 * len(PATTERN)) - short < 2048


# Leaks


def stream_for_ever(sock: gevent.socket.socket, address: object) -> None:
    """Serve one connection of an upstream."""
    with sock, contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in sock.recv(65536):
            pass
        sock.sendall(CHUNKED + b"2\r\nok\r\n")
        assert sock.recv(1) == b""


@contextlib.contextmanager
def serving(folder: Path, origin: str) -> Iterator[int]:
    """Run a proxy in this process, whose greenlets and objects a test can count; yield its port."""
    settings = config.from_environ(
        {
            "HOME": str(folder),
            "XAI_PROXY_UPSTREAM": origin,
            "XAI_PROXY_ISSUER": ISSUER,
            "XAI_PROXY_TOKEN_PATH": str(folder / "tokens.json"),
        }
    )
    (folder / "tokens.json").write_text(
        f'{{"access_token": "a", "expires_at": {time.time() + 3600}, "issuer": "{ISSUER}"}}'
    )
    pool = Pool(settings)
    with gevent.socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        keys = client_keys.ClientKeys(settings.client_keys_file)
        store, gate = token_store.TokenStore(settings), access.Access(settings, keys)
        proxy = forward.Proxy(settings, store, gate, pool)
        application = app.create_app(proxy, store, gate)
        running = server.Server(listener, application, proxy, settings, 5000, lambda record: None)
        running.start()
        yield listener.getsockname()[1]
        running.drain(gevent.event.Event())
    pool.close()


def test_hundreds_of_cancelled_streams_leak_nothing(tmp_path: Path, many_files: None) -> None:
    origin = gevent.server.StreamServer(("127.0.0.1", 0), stream_for_ever, backlog=1024)
    origin.start()

    def open_and_cancel(count: int) -> None:
        clients = []
        for _ in range(count):
            clients.append(gevent.socket.create_connection(("127.0.0.1", port)))
            clients[-1].sendall(
                b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
            )
        for client in clients:
            came = b""
            while not came.endswith(b"2\r\nok\r\n"):
                came += client.recv(65536)
            client.close()
        with gevent.Timeout(5):
            while len(os.listdir("/proc/self/fd")) > descriptors:
                gevent.sleep(0.01)

    def objects() -> tuple[int, int]:
        gc.collect()
        every = gc.get_objects()
        # Unlike isinstance, type() never calls into the object: a lazily loaded client library
        # would be imported.
        return sum(issubclass(type(one), greenlet.greenlet) for one in every), len(every)

    with (
        contextlib.closing(origin),
        serving(tmp_path, f"http://127.0.0.1:{origin.server_port}") as port,
    ):
        descriptors = len(os.listdir("/proc/self/fd"))
        open_and_cancel(100)
        greenlets, before = objects()
        for _ in range(4):
            open_and_cancel(100)
        assert objects()[0] == greenlets and objects()[1] - before < 200
