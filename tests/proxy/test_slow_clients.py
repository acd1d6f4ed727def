"""Clients that take their time, a thousand of them, beside one that does not and must not notice."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess
from raw_connection import readable
from recording_upstream import RecordingUpstream

from xaiproxy.http1.handler import LINGER_WHOLE

# Clients of each kind.
COUNT = 125
# In seconds: CLIENT_TIMEOUT and KEEPALIVE_TIMEOUT.
LIMIT = 4.0
# In seconds, for two good requests, which usually take hundredths.
PROMPT = 3.0
HEAD = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, upstream: RecordingUpstream
) -> Iterator[ProxyProcess]:
    with ProxyProcess(
        tmp_path_factory.mktemp("proxy"),
        upstream=upstream.origin,
        client_timeout=LIMIT,
        keepalive_timeout=LIMIT,
    ) as running:
        running.sign_in()
        yield running


def starved(task: int | str) -> float:
    """Return the seconds in which a thread was runnable without a processor, from proc(5)."""
    return int(Path(f"/proc/{task}/schedstat").read_text().split()[1]) / 1e9


class GoodClient:
    """Sends one request after the other while it is entered.

    `slowest`: the longest time of a response in seconds, minus the time in which the proxy or this
    client was runnable without a processor.
    """

    def __init__(self, proxy: ProxyProcess):
        self._proxy = proxy
        self._thread = threading.Thread(target=self._ask)
        self._stopped = threading.Event()
        self.answers = 0
        self.slowest = 0.0

    def __enter__(self) -> GoodClient:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stopped.wait(0.05):
            began = time.monotonic() - self._starved()
            # A new connection waits in the listen queue, too.
            with self._proxy.client() as client:
                for body in (b"", b"{}"):
                    answer = client.ask("POST", "/v1/chat/completions", body=body)
                    assert (answer.status, answer.body) == (200, b"POST /v1/chat/completions")
                    self.answers += 1
            self.slowest = max(self.slowest, time.monotonic() - self._starved() - began)

    def _starved(self) -> float:
        return starved(self._proxy.process.pid) + starved("thread-self")


def nothing(client: Client) -> None:
    pass


def half_a_head(client: Client) -> None:
    client.send(HEAD + b"X: ")


def half_a_body(client: Client) -> None:
    client.send(HEAD + b"Content-Length: 100\r\n\r\nx")


def half_a_chunk(client: Client) -> None:
    client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nx")


def chunk_size_without_end(client: Client) -> None:
    client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=")


def one_request(client: Client) -> None:
    assert client.ask("GET", "/healthz").status == 200


STAYS = "stays"
# How each begins, what it keeps sending, and the status that it gets in the end.
KINDS = [
    (nothing, b"", None),
    (one_request, b"", None),
    (half_a_head, b"", 408),
    (half_a_head, b"x", 408),
    (half_a_body, b"", 408),
    (half_a_chunk, b"", 408),
    # Bytes that are no content do not extend the timeout.
    (chunk_size_without_end, b"x", 408),
    # An upload may be slow. It is the last, so that its first byte is not late.
    (
        half_a_body,
        b"x",
        STAYS,
    ),
]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_thousand_slow_clients_do_not_slow_down_a_good_one(
    proxy: ProxyProcess, upstream: RecordingUpstream, many_files: None
) -> None:
    before = proxy.open_files()
    with contextlib.ExitStack() as stack, GoodClient(proxy) as good:
        slow: dict[socket.socket, tuple[Client, bytes, int | str | None]] = {}
        for begin, drip, status in (kind for kind in KINDS for _ in range(COUNT)):
            client = stack.enter_context(proxy.client())
            begin(client)
            slow[client.sock] = client, drip, status
        # Half of the kinds have a connection to upstream as well. On a slow machine, the first
        # clients may be gone already.
        wait_for(lambda: proxy.open_files() - before > COUNT * len(KINDS), LIMIT)
        end = time.monotonic() + 3 * LIMIT
        while {status for _, _, status in slow.values()} != {STAYS}:
            assert time.monotonic() < end, f"{len(slow)} slow clients are still connected"
            for sock in readable(slow, LIMIT / 4):
                client, drip, status = slow.pop(sock)
                # The client may have sent bytes after the close.
                with contextlib.suppress(*[ConnectionError] if drip else []):
                    came = client.rest()
                    assert came.startswith(b"HTTP/1.1 %d " % status) if status else came == b""
                client.close()
            for client, drip, _ in slow.values():
                with contextlib.suppress(ConnectionError):
                    client.sock.send(drip, socket.MSG_DONTWAIT)
        assert len(slow) == COUNT
    assert good.answers > 20 and good.slowest < PROMPT
    assert {request.target for request in upstream.taken()} == {"/v1/chat/completions"}
    # Some connections to upstream stay in the pool.
    wait_for(lambda: proxy.open_files() < before + 20, LIMIT)


ENDLESS = [
    ("Content-Length: 999999999999999999", b"x" * 65536),
    ("Transfer-Encoding: chunked", b"ffff\r\n" + b"x" * 65535 + b"\r\n"),
    ("Transfer-Encoding: chunked", (b"1;" + b"x" * 4000 + b"\r\nx\r\n") * 16),
]


def test_endless_unread_bodies_are_cut_off(proxy: ProxyProcess) -> None:
    before, began = proxy.resident_kib(), time.monotonic()

    def send_endlessly(fields: str, part: bytes) -> None:
        with proxy.client() as client, contextlib.suppress(ConnectionError):
            client.request("POST", "/nothing", fields)
            while time.monotonic() - began < LINGER_WHOLE + 5:
                client.send(part)
                # This leaves a processor for the other processes on this machine.
                time.sleep(0.05)

    with GoodClient(proxy) as good:
        senders = [threading.Thread(target=send_endlessly, args=how) for how in ENDLESS]
        for thread in senders:
            thread.start()
        for thread in senders:
            thread.join()
    assert LINGER_WHOLE - 1 < time.monotonic() - began < LINGER_WHOLE + 5
    assert good.answers > 20 and good.slowest < PROMPT and proxy.resident_kib() - before < 8192
