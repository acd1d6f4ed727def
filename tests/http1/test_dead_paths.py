"""Network paths that die without a FIN or RST, on either side of the proxy.

Live peers that read nothing keep their connections. The proxy, its client and upstream each have a
network of their own. The sweep's limits are shorter than the real ones.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import SUPPORT
from namespaces import Network, needs_network
from proxy_process import COMMAND, PYTHON, Client, ProxyProcess
from raw_connection import Message, RawConnection, readable
from scripted_upstream import OK, PATTERN, Request, ScriptedUpstream, make_certificate, pour
from websocket_handshake import handshake

from xaiproxy.http1 import dead_paths

pytestmark = needs_network

# In seconds.
INTERVAL, SILENCE = 0.2, 1.0
# In seconds. A dead path is found within it after SILENCE, also on a loaded machine.
SOON = 8
# In bytes: more than all socket buffers between the two ends hold (namespaces.BUFFER).
SIZE = 12 << 20
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Site:
    """A network with an upstream and a proxy that is signed in."""

    def __init__(self, folder: Path, command: list[str] | None = None, **settings: object):
        self.network = Network()
        certificate, context = make_certificate(folder, Network.ADDRESSES["upstream"])
        with self.network.upstream.entered():
            self.upstream = ScriptedUpstream(context, Network.ADDRESSES["upstream"])
        with self.network.proxy.entered():
            self.proxy = ProxyProcess(
                folder,
                command=command or COMMAND,
                bind=Network.ADDRESSES["proxy"],
                allow_anonymous=1,
                upstream=self.upstream.origin,
                environ={"SSL_CERT_FILE": str(certificate)},
                **settings,
            )
        self.proxy.sign_in()

    def close(self) -> None:
        self.network.restore()
        self.upstream.close()
        self.proxy.close()
        self.network.close()

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        with self.network.client.entered():
            client = Client(self.proxy.port, Network.ADDRESSES["proxy"])
        client.sock.settimeout(SOON)
        with client:
            yield client

    def pooled(self) -> Request:
        """Return an answered request whose upstream connection is in the proxy's pool."""
        with self.client() as client:
            client.request()
            request = self.upstream.receive().answer()
            assert client.message().status == 200
            return request

    def cut_connection(self, request: Request, action: str = "blackhole") -> None:
        """Drop all packets of this connection to upstream, as a NAT that has lost its entry does."""
        self.network.cut("proxy", request.connection.sock.getpeername()[1], action)


def quick_sweep(interval: float = INTERVAL, silence: float = SILENCE) -> list[str]:
    return [*PYTHON, str(SUPPORT / "quick_sweep_proxy.py"), str(interval), str(silence)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"), quick_sweep(), sse_keepalive=600)
    with contextlib.closing(site):
        yield site


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    yield shared
    shared.network.restore()
    shared.upstream.hang_up()


def assert_dead_path(answer: Message) -> None:
    assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (504, "upstream_timeout")
    assert answer.value("x-should-retry") == "false"
    assert b"no acknowledgement for 1 s" in answer.body and b"IDLE_TIMEOUT" not in answer.body


# Upstream's path


def test_a_post_on_a_dead_pooled_connection_is_504_and_never_reaches_upstream(site: Site) -> None:
    """Upstream may have received it, so it is not retried, not even once the path is restored."""
    pooled = site.pooled()
    site.cut_connection(pooled)
    with site.client() as client:
        assert_dead_path(client.ask("POST", "/v1/paid", body=b"{}"))
    site.network.restore()
    # A reset may arrive.
    readable([pooled.connection.sock, site.upstream.listener], 3 * SILENCE)
    assert site.upstream.quiet()


@pytest.mark.parametrize(
    "method, fields",
    [
        ("GET", ()),
        ("HEAD", ()),
        ("OPTIONS", ()),
        ("POST", ("Idempotency-Key: 1", "Content-Length: 0")),
    ],
)
def test_an_idempotent_request_is_retried_on_a_new_connection(
    site: Site, method: str, fields: tuple[str, ...]
) -> None:
    pooled = site.pooled()
    site.cut_connection(pooled)
    with site.client() as client:
        client.request(method, "/v1/again", *fields)
        request = site.upstream.receive(seconds=SOON).answer(b"HTTP/1.1 204 No Content\r\n\r\n")
        assert (request.method, request.connection.requests) == (method, 1)
        assert client.message().status == 204


def test_an_idempotent_request_is_retried_only_once(site: Site) -> None:
    """The same holds on a new connection, and when the path dies in the middle of the body."""
    with contextlib.ExitStack() as stack, site.client() as client:
        client.request("GET", "/v1/twice", "Transfer-Encoding: chunked")
        client.send(b"%x\r\n" % SIZE)
        assert pour(client, 0, SIZE) < SIZE
        client.sock.settimeout(2 * SOON)
        for _ in range(2):
            request = site.upstream.receive(body=False, seconds=SOON)
            assert request.connection.requests == 1
            site.cut_connection(request)
            site.upstream.connections.remove(request.connection)
            stack.callback(request.connection.close)
        assert_dead_path(client.message())
        assert site.upstream.quiet()


def test_an_upload_with_bytes_in_flight_is_504(site: Site) -> None:
    """The proxy is waiting for its client at that time."""
    with site.client() as client:
        client.request("POST", "/v1/upload", "Content-Length: 3")
        client.send(b"x")
        request = site.upstream.receive(body=False)
        assert request.connection.exactly(1) == b"x"
        site.cut_connection(request)
        client.send(b"x")
        assert_dead_path(client.message())


def test_an_upload_with_a_full_window_is_504(site: Site) -> None:
    with site.client() as client:
        client.request("POST", "/v1/upload", f"Content-Length: {SIZE}")
        assert pour(client, 0, SIZE) < SIZE
        client.sock.settimeout(SOON)
        request = site.upstream.receive(body=False)
        site.cut_connection(request)
        assert_dead_path(client.message())


@pytest.mark.parametrize("full", [False, True])
def test_a_dead_path_to_upstream_closes_a_tunnel(site: Site, full: bool) -> None:
    with site.client() as client:
        request = handshake(client, site.upstream, f"/v1/tunnel-{full}")
        request.answer(b"last words")
        assert not full or pour(client, 0, SIZE) < SIZE
        site.cut_connection(request)
        client.send(b"x") if not full else None
        client.sock.settimeout(SOON)
        # The proxy may not have read what the client sent.
        with contextlib.suppress(ConnectionResetError):
            assert client.rest() == b"last words"
    assert site.proxy.wait_for_request(f"/v1/tunnel-{full}")["ended_by"] == "upstream"


# The client's path

# A body keeps upstream's framing, or gets the proxy's own: see SSE_KEEPALIVE.
KINDS = {"relayed": b"application/json", "iterated": b"text/event-stream"}


def stream(client: Client, upstream: ScriptedUpstream, target: str, kind: str) -> Request:
    client.request("GET", target)
    request = upstream.receive().answer(CHUNKED[:-2] + b"Content-Type: %b\r\n\r\n" % KINDS[kind])
    request.answer(b"5\r\nhello\r\n")
    assert client.head().status == 200 and client.chunk() == b"hello"
    return request


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "tunnelled", "pipelined"])
def test_a_dead_path_to_the_client_closes_the_upstream_connection(
    site: Site, kind: str, full: bool
) -> None:
    target = f"/v1/{kind}-{full}"
    with site.client() as client:
        if kind == "tunnelled":
            request = handshake(client, site.upstream, target)
        else:
            request = stream(client, site.upstream, target, kind if kind in KINDS else "relayed")
        if kind == "pipelined":
            # The proxy does not read this request, which hides the end of the connection.
            client.request()
        if full:
            request.answer(b"%x\r\n" % SIZE)
            assert pour(request.connection, 0, SIZE) < SIZE
        site.network.cut("client")
        if not full:
            request.answer(b"5\r\nhello\r\n")
        assert request.connection.closed_within(SOON)
    assert site.proxy.wait_for_request(target)["ended_by"] == "client"


# Live peers


def send_rest(raw: RawConnection, at: int, is_chunked: bool) -> None:
    assert pour(raw, at, SIZE, 60) == SIZE
    if is_chunked:
        raw.send(b"\r\n")


def content(raw: RawConnection, is_chunked: bool) -> bytes:
    if not is_chunked:
        return raw.exactly(SIZE)
    chunks, size = [], 0
    while size < SIZE:
        chunks.append(raw.chunk())
        size += len(chunks[-1])
    return b"".join(chunks)


def test_a_live_peer_that_does_not_read_loses_nothing(site: Site) -> None:
    """The peer acknowledges window probes. An idle connection stays open as well."""
    with contextlib.ExitStack() as stack:
        idle, relayed, iterated, tunnelled, tunnelling, uploading = (
            stack.enter_context(site.client()) for _ in range(6)
        )
        upstream = site.upstream
        idle.request()
        upstream.receive().answer()
        assert idle.message().status == 200
        ways = [
            (stream(client, upstream, "/v1/unread", kind).connection, client)
            for kind, client in (("relayed", relayed), ("iterated", iterated))
        ]
        for sender, _ in ways:
            sender.send(b"%x\r\n" % SIZE)
        ways.append((handshake(tunnelled, upstream).connection, tunnelled))
        ways.append((tunnelling, handshake(tunnelling, upstream).connection))
        uploading.request("POST", "/v1/unread", f"Content-Length: {SIZE}")
        ways.append((uploading, upstream.receive(body=False).connection))
        senders = []
        for sender, reader in ways:
            sent = pour(sender, 0, SIZE)
            assert sent < SIZE
            is_chunked = reader in (relayed, iterated)
            senders.append(threading.Thread(target=send_rest, args=(sender, sent, is_chunked)))
            senders[-1].start()
        # By then, the kernel's window probes are further apart than SILENCE.
        time.sleep(4 * SILENCE)
        for _, reader in ways:
            data = content(reader, reader in (relayed, iterated))
            assert data == PATTERN * (SIZE // len(PATTERN))
        for thread in senders:
            thread.join()
        idle.request()
        assert upstream.receive().answer() and idle.message().body == b"ok"


# Timeouts of the kernel


@pytest.fixture
def hasty_kernel(tmp_path: Path) -> Iterator[Site]:
    """TCP itself gives up after two seconds. The sweep has its real limits."""
    with contextlib.closing(Site(tmp_path)) as site:
        site.network.proxy.set("tcp_retries2", 2)
        yield site


def test_a_timeout_of_the_kernel_is_504_or_retried(hasty_kernel: Site) -> None:
    """After an ICMP error, TCP retries and then gives up with that error."""
    site = hasty_kernel
    with site.client() as client:
        site.cut_connection(site.pooled(), "unreachable")
        answer = client.ask("POST", "/v1/x", body=b"{}")
        assert answer.status == 504 and b"TCP gave up: Network is unreachable" in answer.body
    for method in ("POST", "GET"):
        site.cut_connection(site.pooled())
        with site.client() as client:
            client.request(method, "/v1/x", body=b"{}")
            if method == "GET":
                site.upstream.receive(seconds=SOON).answer(OK)
                assert client.message().body == b"ok"
                continue
            answer = client.message()
            assert answer.status == 504
            assert b"TCP gave up: " in answer.body and b"IDLE_TIMEOUT" not in answer.body


def test_the_sweep_does_nothing_without_tcp_info() -> None:
    """macOS has no TCP_INFO."""
    code = "import socket; del socket.TCP_INFO; from xaiproxy.http1 import dead_paths; dead_paths.sweep()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=20)


def test_the_default_limits_are_15_and_120_seconds() -> None:
    assert (dead_paths.INTERVAL, dead_paths.SILENCE) == (15, 120)
