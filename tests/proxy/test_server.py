"""The proxy as a process: its limits and its shutdown."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import resource
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess, both_ways
from raw_connection import Message, readable
from scripted_upstream import Request, ScriptedUpstream, pour

from xaiproxy import config
from xaiproxy.proxy import server

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
KEY = "the-client-key"


@pytest.fixture
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as running:
        yield running


def write_keys(path: Path) -> None:
    path.write_text(f"me {hashlib.sha256(KEY.encode()).hexdigest()}\n")


# Limits


def test_a_low_limit_of_file_descriptors_lowers_max_connections(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with ProxyProcess(
        tmp_path, upstream=upstream.origin, prefix=("prlimit", "--nofile=180:180")
    ) as proxy:
        line = proxy.wait_for_log(lambda line: "file descriptor" in line["message"])
        assert line["level"] == "warning" and "50 client connections, not 10000" in line["message"]
        proxy.sign_in()
        with contextlib.ExitStack() as stack:
            # The proxy accepts so many.
            open_streams(proxy, upstream, stack, 50)
            for _ in range(2 * config.RESERVE):
                stack.enter_context(proxy.client())
            assert is_refused_by_the_reserve(proxy.ask())
        assert not [line for line in proxy.log_lines() if "open files" in line["message"]]


def test_running_out_of_descriptors_is_logged_once_and_recovers(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin) as proxy,
        contextlib.ExitStack() as waiting,
    ):
        proxy.sign_in()
        limits = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        clients = [
            waiting.enter_context(proxy.client()).request("GET", "/healthz") for _ in range(20)
        ]
        proxy.wait_for_log(
            lambda line: line["message"].startswith("Too many open files, with 0 connections")
        )
        before = proxy.cpu_seconds()
        assert not readable([client.sock for client in clients], 1)
        assert proxy.cpu_seconds() - before < 0.3
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, limits)
        for client in clients:
            assert client.message().status == 200
        proxy.wait_for_log(lambda line: line["message"] == "connections are accepted again")
        assert len([line for line in proxy.log_lines() if "open files" in line["message"]]) == 1


def open_streams(
    proxy: ProxyProcess, upstream: ScriptedUpstream, stack: contextlib.ExitStack, count: int
) -> list[tuple[Client, Request]]:
    streams = []
    for _ in range(count):
        client = stack.enter_context(proxy.client()).request()
        streams.append((client, upstream.receive().answer(CHUNKED)))
        client.head()
    return streams


def is_refused_by_the_reserve(answer: Message) -> bool:
    fields = [
        answer.value(name)
        for name in ("X-XAI-Proxy-Error", "Retry-After", "x-should-retry", "Connection")
    ]
    return [answer.status, *fields] == [503, "too_many_connections", "5", "true", "close"]


def test_the_longest_idle_connection_is_closed_for_a_new_one(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=5) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        open_streams(proxy, upstream, stack, 2)
        idle = [stack.enter_context(proxy.client()) for _ in range(3)]
        # Now the second has been idle for the longest time.
        for client in (*idle, idle[0]):
            assert client.ask("GET", "/healthz").status == 200
        for longest in (idle[1], idle[2], idle[0]):
            began = time.monotonic()
            newcomer = stack.enter_context(proxy.client()).request()
            upstream.receive().answer(CHUNKED)
            assert newcomer.head().status == 200 and time.monotonic() - began < server.HEAD_TIMEOUT
            assert longest.closed_within()
            still = idle[1:] + idle[:1]
            assert all(client.silent() for client in still[still.index(longest) + 1 :])


@pytest.mark.parametrize(
    "start", [b"", b"GET /v1/models HTTP/1.1\r\nHost:"], ids=["nothing", "half a head"]
)
def test_connections_without_a_request_do_not_block_new_ones(
    tmp_path: Path, upstream: ScriptedUpstream, start: bytes
) -> None:
    """Connections without a request are closed after a second; the others keep their slots."""
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=5) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        ((busy, stream),) = open_streams(proxy, upstream, stack, 1)
        silent = [stack.enter_context(proxy.client()) for _ in range(4)]
        began = time.monotonic()
        for client in silent:
            client.send(start)
        newcomer = stack.enter_context(proxy.client()).request()
        upstream.receive().answer()
        assert newcomer.message().status == 200 and time.monotonic() - began < server.HEAD_TIMEOUT
        assert all(client.closed_within(3 * server.HEAD_TIMEOUT) for client in silent)
        # The crowd is gone, so this connection stays open.
        assert not readable([newcomer.sock], 2 * server.HEAD_TIMEOUT)
        stream.answer(b"0\r\n\r\n")
        assert busy.chunk() == b""


def test_a_connection_in_use_survives_a_flood_of_silent_ones(tmp_path: Path) -> None:
    with (
        ProxyProcess(tmp_path, max_connections=10) as proxy,
        proxy.client() as used,
        contextlib.ExitStack() as stack,
    ):
        for number in range(100):
            stack.enter_context(proxy.client())
            if not number % 5:
                assert used.ask("GET", "/healthz").status == 200


def silent(client: Client) -> None:
    pass


def half_a_head(client: Client) -> None:
    client.send(HEALTH[:20])


def endless_body(client: Client) -> None:
    """Send a body that is refused, without end, and read nothing."""
    # The proxy may have closed it for another one.
    with contextlib.suppress(ConnectionError):
        client.request("POST", "/v1/files", "Content-Length: 999999999999").send(bytes(1 << 20))


@pytest.mark.parametrize("act", [silent, half_a_head, endless_body])
def test_the_reserve_answers_health_checks_while_all_slots_are_busy(
    tmp_path: Path, upstream: ScriptedUpstream, act: Callable[[Client], None]
) -> None:
    """Unauthorized clients fill all of the reserve as well, again and again."""
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=3) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        streams = open_streams(proxy, upstream, stack, 3)
        took = []
        for round_ in range(3):
            strangers = [
                stack.enter_context(proxy.client()) for _ in range(config.RESERVE + round_)
            ]
            for client in strangers:
                act(client)
            began = time.monotonic()
            for target in ("/healthz", "/readyz", "/", "/status.json"):
                answer = proxy.ask("GET", target)
                assert (answer.status, answer.value("Connection")) == (200, "close")
            for target in ("/v1/models", "/nowhere"):
                assert is_refused_by_the_reserve(proxy.ask("GET", target))
            took.append(time.monotonic() - began)
        assert min(took) < server.HEAD_TIMEOUT / 2 and upstream.quiet(), took
        for client, stream in streams:
            stream.answer(b"2\r\nok\r\n0\r\n\r\n")
            assert (client.chunk(), client.chunk()) == (b"ok", b"")
        # A slot is free again.
        with proxy.client().request() as client:
            upstream.receive().answer()
            assert client.message().body == b"ok"
        proxy.wait_for_log(lambda line: "XAI_PROXY_MAX_CONNECTIONS" in line["message"])
        lines = [
            line for line in proxy.log_lines() if "XAI_PROXY_MAX_CONNECTIONS" in line["message"]
        ]
        assert [line["level"] for line in lines] == ["warning"]


def test_clients_that_do_not_read_do_not_fill_the_reserve(tmp_path: Path) -> None:
    """They have all slots, and more responses pending than their sockets hold."""
    with ProxyProcess(tmp_path, max_connections=2) as proxy, contextlib.ExitStack() as stack:
        for _ in range(2 + config.RESERVE):
            sock = stack.enter_context(socket.socket())
            # The kernel buffers few responses then.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 500)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", proxy.port))
            sock.sendall(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1500)
        used = -1.0
        # Wait until all of them block.
        while used != proxy.cpu_seconds():
            used = proxy.cpu_seconds()
            time.sleep(0.3)
        for _ in range(3):
            assert proxy.ask("GET", "/healthz").status == 200


def test_a_request_after_a_pause_gets_its_full_timeout_in_a_crowd(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=2) as proxy,
        proxy.client() as client,
        contextlib.ExitStack() as stack,
    ):
        assert client.ask("GET", "/healthz").status == 200
        # The connection is idle.
        time.sleep(2 * server.HEAD_TIMEOUT)
        client.send(b"GET /healthz HTTP/1.1\r\n")
        for _ in range(2):
            stack.enter_context(proxy.client())
        time.sleep(0.3 * server.HEAD_TIMEOUT)
        client.send(b"Host: localhost\r\n\r\n")
        assert client.message().status == 200


def test_slowly_read_truncated_responses_do_not_fill_the_reserve(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """In HTTP/1.0, a reset marks the truncation, once the client has read everything before it."""
    size = 300_000
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=2) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        for _ in range(2 + config.RESERVE):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", proxy.port))
            sock.sendall(b"GET /v1/x HTTP/1.0\r\nHost: localhost\r\n\r\n")
            request = upstream.receive().answer(
                b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\n\r\n" + bytes(size)
            )
            while int.from_bytes(
                fcntl.ioctl(request.connection.sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder
            ):
                time.sleep(0.01)
            request.connection.reset()
        began = time.monotonic()
        for _ in range(3):
            assert proxy.ask("GET", "/healthz").status == 200
        assert time.monotonic() - began < 3


def test_a_request_that_the_reserve_refuses_gets_its_response(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """Its body stays unread, and a request after it gets no response."""
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=1) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        open_streams(proxy, upstream, stack, 1)
        for _ in range(2 * config.RESERVE):
            with proxy.client() as client:
                client.request("POST", "/v1/files", body=bytes(4 << 20))
                assert is_refused_by_the_reserve(client.message()) and client.closed_within()
            with proxy.client() as client:
                client.send(HEALTH + HEALTH)
                assert client.message().status == 200 and client.rest() == b""


def test_access_rules_hold_in_the_reserve(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    write_keys(tmp_path / "client-keys")
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=1) as proxy,
        proxy.client() as streaming,
    ):
        proxy.sign_in()
        streaming.request("GET", "/v1/models", f"X-Api-Key: {KEY}")
        upstream.receive().answer(CHUNKED)
        streaming.head()
        assert proxy.ask("GET", "/v1/models").status == 401
        assert proxy.ask("GET", "/nowhere", "Origin: https://evil.example").status == 403
        assert is_refused_by_the_reserve(proxy.ask("GET", "/v1/models", f"X-Api-Key: {KEY}"))
        assert proxy.ask("GET", "/healthz", "Origin: https://evil.example").status == 200


def test_idle_connections_are_closed_once_no_descriptor_is_left(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path) as proxy, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(proxy.client()) for _ in range(10)]
        for client in idle:
            assert client.ask("GET", "/healthz").status == 200
        limits = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (proxy.open_files(), limits[1]))
        began = time.monotonic()
        for longest in idle[:5]:
            newcomer = stack.enter_context(proxy.client())
            assert newcomer.ask("GET", "/healthz").status == 200 and longest.closed_within()
        assert time.monotonic() - began < server.HEAD_TIMEOUT and all(
            client.silent() for client in idle[5:]
        )
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, limits)


def test_both_connections_use_tcp_keepalive(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """SO_KEEPALIVE probes first after 60 s: proc(5) shows the kernel's timer for it."""
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy, proxy.client() as client:
        proxy.sign_in()
        client.request()
        request = upstream.receive().answer()
        client.message()
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        timers = {
            (int(local[-4:], 16), int(remote[-4:], 16)): timer
            for _, local, remote, _, _, timer, *_ in rows
        }
        for ports in (
            (proxy.port, client.sock.getsockname()[1]),
            (request.connection.sock.getpeername()[1], upstream.port),
        ):
            kind, left = timers[ports].split(":")
            assert kind == "02" and 50 * 100 < int(left, 16) <= 60 * 100


# Shutdown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_connections_are_closed_at_once(tmp_path: Path, number: int) -> None:
    with ProxyProcess(tmp_path) as proxy, proxy.client() as used, proxy.client() as new:
        used.ask("GET", "/healthz")
        start = time.monotonic()
        proxy.process.send_signal(number)
        assert used.closed_within(server.HEAD_TIMEOUT / 2) and new.closed_within(
            2 * server.HEAD_TIMEOUT
        )
        assert proxy.wait() == 0 and time.monotonic() - start < 5
        assert proxy.log_lines()[-1]["message"] == "stopped"
        with pytest.raises(ConnectionRefusedError):
            proxy.client()


def test_requests_sent_before_the_signal_are_answered(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """The proxy, stopped by a signal, has not yet read them from its old and new connections."""
    with ProxyProcess(tmp_path, upstream=upstream.origin) as proxy, proxy.client() as idle:
        proxy.sign_in()
        old = [proxy.client() for _ in range(20)]
        for client in (idle, *old):
            assert client.ask("GET", "/healthz").status == 200
        proxy.process.send_signal(signal.SIGSTOP)
        # That is more than the proxy accepts at once.
        new, silent = (
            [proxy.client() for _ in range(120)],
            proxy.client(),
        )
        for client in (*old, *new):
            client.request("POST", "/v1/x", body=b"{}")
        proxy.terminate()
        proxy.process.send_signal(signal.SIGCONT)
        for _ in (*old, *new):
            upstream.receive().answer()
        for client in (*old, *new):
            answer = client.message()
            assert (answer.body, answer.value("Connection")) == (b"ok", "close")
            assert client.closed_within()
            client.close()
        assert idle.closed_within() and silent.closed_within(2 * server.HEAD_TIMEOUT)
        silent.close()
        assert proxy.wait() == 0


@both_ways
def test_a_drain_finishes_open_responses(
    tmp_path: Path, upstream: ScriptedUpstream, way: str
) -> None:
    with (
        ProxyProcess(tmp_path, way=way, upstream=upstream.origin) as proxy,
        proxy.client() as streaming,
        proxy.client() as waiting,
        proxy.client() as uploading,
        proxy.client() as beginning,
    ):
        proxy.sign_in()
        streaming.request("GET", "/v1/stream")
        stream = upstream.receive().answer(CHUNKED + b"3\r\none\r\n")
        assert streaming.head().value("Connection") == "keep-alive" and streaming.chunk() == b"one"
        waiting.request("GET", "/v1/wait")
        wait = upstream.receive()
        uploading.request("POST", "/v1/upload", "Content-Length: 4").send(b"ab")
        upload = upstream.receive(body=False)
        beginning.send(b"GET /v1/begin HTTP/1.1\r\nHo")
        # Its response proves that everything sent before has been read.
        with proxy.client() as marker:
            assert marker.ask("GET", "/healthz").status == 200
        proxy.terminate()
        line = proxy.wait_for_log(lambda line: line["message"].startswith("stopping"))
        assert "4 open responses have 25 s" in line["message"]
        with pytest.raises(ConnectionRefusedError):
            proxy.client()

        wait.answer()
        answer = waiting.message()
        assert (answer.body, answer.value("Connection")) == (
            b"ok",
            "close",
        ) and waiting.closed_within()
        uploading.send(b"cd")
        assert upload.connection.exactly(4) == b"abcd"
        upload.answer()
        answer = uploading.message()
        assert (answer.body, answer.value("Connection")) == (
            b"ok",
            "close",
        ) and uploading.closed_within()
        beginning.send(b"st: localhost\r\n\r\n")
        upstream.receive().answer()
        answer = beginning.message()
        assert (answer.body, answer.value("Connection")) == (
            b"ok",
            "close",
        ) and beginning.closed_within()
        assert proxy.process.poll() is None
        stream.answer(b"3\r\ntwo\r\n0\r\n\r\n")
        assert (streaming.chunk(), streaming.chunk()) == (b"two", b"") and streaming.closed_within()
        assert proxy.wait() == 0
        assert not [line for line in proxy.log_lines() if "aborting" in line["message"]]


@both_ways
@pytest.mark.parametrize("again", [False, True])
def test_responses_that_outlast_the_drain_are_visibly_truncated(
    tmp_path: Path, upstream: ScriptedUpstream, way: str, again: bool
) -> None:
    """The drain ends after DRAIN_TIMEOUT, or with the second signal."""
    with (
        ProxyProcess(
            tmp_path, way=way, upstream=upstream.origin, drain_timeout=30 if again else 0.3
        ) as proxy,
        proxy.client() as chunked,
        proxy.client() as old,
        proxy.client() as sized,
        proxy.client() as unread,
        proxy.client() as waiting,
        proxy.client() as beginning,
        proxy.client() as refused,
    ):
        proxy.sign_in()
        streams = []
        for client, version, head in (
            (chunked, "1.1", CHUNKED + b"2\r\nok\r\n"),
            (old, "1.0", CHUNKED + b"2\r\nok\r\n"),
            (sized, "1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok"),
        ):
            client.request("GET", "/v1/cut", version=f"HTTP/{version}")
            streams.append(upstream.receive().answer(head))
            client.head()
        assert chunked.chunk() == old.exactly(2) == sized.exactly(2) == b"ok"
        unread.request("GET", "/v1/unread")
        streams.append(upstream.receive().answer(CHUNKED + b"5000000\r\n"))
        pour(streams[-1].connection, 0, 0x5000000)
        waiting.request("GET", "/v1/cut")
        streams.append(upstream.receive())
        beginning.send(b"GET /v1/begin HTTP/1.1\r\nHo")
        # The proxy would read the rest of this body.
        refused.request("POST", "/nowhere", "Content-Length: 9")
        assert refused.message().status == 404
        start = time.monotonic()
        proxy.terminate()
        proxy.wait_for_log(lambda line: line["message"].startswith("stopping"))
        if again:
            proxy.terminate()
        assert chunked.rest() == sized.rest() == waiting.rest() == beginning.rest() == b""
        with pytest.raises(ConnectionResetError):
            old.rest()
        assert (0 if again else 0.25) < time.monotonic() - start < 5
        assert 0 < len(unread.rest()) < 0x5000000
        assert all(stream.connection.closed_within() for stream in streams)
        assert proxy.wait() == 0
        assert [
            line for line in proxy.log_lines() if "aborting 7 open responses" in line["message"]
        ]
        cut = [line for line in proxy.log_lines() if line.get("path") == "/v1/cut"]
        assert {line["ended_by"] for line in cut} == {"drain"}
        assert sorted(line["bytes"] for line in cut) == [0, 2, 2, 2]
        assert proxy.wait_for_request("/v1/unread")["ended_by"] == "drain"


def test_a_client_that_does_not_close_does_not_delay_a_drain(
    tmp_path: Path,
) -> None:
    with ProxyProcess(tmp_path) as proxy, proxy.client() as client:
        assert client.ask("GET", "/healthz", "Connection: close").status == 200
        began = time.monotonic()
        proxy.terminate()
        assert proxy.wait() == 0 and time.monotonic() - began < 3


def test_a_drain_answers_requests_in_the_reserve(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """Silent connections delay nothing. The proxy is stopped while the requests arrive."""
    with (
        ProxyProcess(tmp_path, upstream=upstream.origin, max_connections=2) as proxy,
        contextlib.ExitStack() as stack,
    ):
        proxy.sign_in()
        streams = open_streams(proxy, upstream, stack, 2)
        silent = [stack.enter_context(proxy.client()) for _ in range(config.RESERVE)]
        proxy.process.send_signal(signal.SIGSTOP)
        asking = [stack.enter_context(proxy.client()).request() for _ in range(3 * config.RESERVE)]
        checking = stack.enter_context(proxy.client()).request("GET", "/healthz")
        proxy.terminate()
        proxy.process.send_signal(signal.SIGCONT)
        assert all(is_refused_by_the_reserve(client.message()) for client in asking)
        assert checking.message().status == 200
        assert all(client.closed_within(3 * server.HEAD_TIMEOUT) for client in silent)
        for client, stream in streams:
            stream.answer(b"2\r\nok\r\n0\r\n\r\n")
            assert (client.chunk(), client.chunk()) == (b"ok", b"")
        assert proxy.wait() == 0


def test_requests_that_wait_for_a_token_are_aborted_after_the_drain(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path, drain_timeout=0) as proxy, proxy.client() as client:
        proxy.sign_in(expires_in=-5)
        proxy.refresher_lives()
        client.request("GET", "/v1/waits")
        with proxy.client() as marker:
            marker.ask("GET", "/healthz")
        proxy.terminate()
        assert client.rest() == b"" and proxy.wait() == 0
        assert proxy.wait_for_request("/v1/waits")["ended_by"] == "drain"
