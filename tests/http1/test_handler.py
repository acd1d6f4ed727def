"""A client's connection: reading requests, answering them, timeouts, and noticing a disconnect."""

from __future__ import annotations

import contextlib
import email.utils
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess, both_ways
from raw_connection import TIMEOUT, RawConnection, readable
from scripted_upstream import Request, ScriptedUpstream, pour

from xaiproxy.http1.connection import READ

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
NODE = """
const http = require("http"), [port, pause] = process.argv.slice(1).map(Number);
const agent = new http.Agent({keepAlive: true, timeout: 60000});
const ask = then => {
    const request = http.request({port, agent, host: "127.0.0.1", path: "/nowhere", method: "POST"}, answer => {
        console.log(answer.statusCode, request.reusedSocket);
        answer.on("end", then).resume();
    }).end("{}");
};
ask(() => setTimeout(() => ask(() => setTimeout(() => ask(() => agent.destroy()), pause)), 1));
"""


@pytest.fixture
def proxy(running: ProxyProcess, upstream: ScriptedUpstream) -> ProxyProcess:
    running.sign_in()
    return running


@pytest.fixture
def short_timeout_proxy(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream, way: str
) -> ProxyProcess:
    """A proxy with a client timeout of half a second."""
    return start_proxy(way=way, client_timeout=0.5, keepalive_timeout=0.2)


@pytest.fixture
def client(proxy: ProxyProcess) -> Iterator[Client]:
    with proxy.client() as connection:
        yield connection


# Answers


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
def test_an_http_1_0_client_gets_no_chunks(
    client: Client, upstream: ScriptedUpstream, fields: tuple
) -> None:
    client.request("GET", "/v1/x", *fields, version="HTTP/1.0")
    request = upstream.receive().answer(CHUNKED + b"2\r\nok\r\n")
    head = client.head()
    assert head.value("Connection") == "close" and head.value("Transfer-Encoding") is None
    # The response is still being sent.
    assert client.exactly(2) == b"ok"
    request.answer(b"1\r\n!\r\n0\r\n\r\n")
    assert client.rest() == b"!"


@both_ways
def test_an_http_1_0_client_may_keep_its_connection(
    client: Client, upstream: ScriptedUpstream
) -> None:
    for _ in range(2):
        client.request("GET", "/v1/x", "Connection: keep-alive", version="HTTP/1.0")
        upstream.receive().answer()
        answer = client.message()
        assert (answer.body, answer.value("Connection")) == (b"ok", "keep-alive")
        assert answer.value("Keep-Alive") == "timeout=595"
    client.request(version="HTTP/1.0")
    upstream.receive().answer()
    answer = client.message()
    assert (answer.value("Connection"), answer.value("Keep-Alive")) == (
        "close",
        None,
    ) and client.closed_within()


@pytest.mark.parametrize(
    "timeout, announced", [(600, "timeout=595"), (7, "timeout=2"), (2.5, "timeout=1"), (1.9, None)]
)
def test_keep_alive_announces_a_shorter_timeout_than_the_proxys_own(
    start_proxy: Callable[..., ProxyProcess],
    upstream: ScriptedUpstream,
    timeout: float,
    announced: str | None,
) -> None:
    with start_proxy(keepalive_timeout=timeout).client() as client:
        client.request("GET", "/v1/x")
        upstream.receive().answer(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nKeep-Alive: timeout=5\r\n\r\nok"
        )
        for answer in (
            client.message(),
            client.ask("GET", "/healthz"),
            client.ask("GET", "/nowhere"),
        ):
            assert (answer.value("Connection"), answer.value("Keep-Alive")) == (
                "keep-alive",
                announced,
            )
        if timeout < 3:
            assert not client.closed_within(timeout - 0.5) and client.closed_within(1)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_closes_an_idle_connection_before_the_proxy_does(
    start_proxy: Callable[..., ProxyProcess],
) -> None:
    port = start_proxy(keepalive_timeout=8).port
    done = subprocess.run(
        ["node", "-e", NODE, str(port), "4000"], capture_output=True, text=True, timeout=20
    )
    assert (done.stdout.splitlines(), done.stderr) == (["404 false", "404 true", "404 false"], "")


def test_a_request_that_arrives_as_the_keep_alive_ends_is_answered(
    short_timeout_proxy: ProxyProcess,
) -> None:
    with short_timeout_proxy.client() as client:
        assert client.ask("GET", "/healthz").status == 200
        short_timeout_proxy.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(0.3)
            client.request("GET", "/healthz")
        finally:
            short_timeout_proxy.process.send_signal(signal.SIGCONT)
        assert client.message().status == 200


@both_ways
def test_connection_close_closes_the_connection(client: Client, upstream: ScriptedUpstream) -> None:
    client.request("GET", "/v1/x", "Connection: close")
    upstream.receive().answer()
    answer = client.message()
    assert (answer.body, answer.value("Connection")) == (b"ok", "close")
    assert client.closed_within()


@both_ways
def test_pipelined_requests_are_answered_in_order(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/1", body=b"one").request("POST", "/v1/2", body=b"two")
    for target, body in (("/v1/1", b"one"), ("/v1/2", b"two")):
        request = upstream.receive()
        assert (request.target, request.body) == (target, body)
        request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + body)
        assert client.message().body == body


@pytest.mark.parametrize("target", ["/v1/models", "/", "/nowhere", "/healthz"])
def test_the_proxys_own_response_to_head_has_no_body(
    client: Client, proxy: ProxyProcess, target: str
) -> None:
    proxy.token_path.unlink()
    assert int(client.ask("HEAD", target).value("Content-Length")) > 0
    # The next response follows immediately.
    assert client.ask("GET", "/healthz").status == 200


def test_a_refused_body_is_read_and_dropped(client: Client, proxy: ProxyProcess) -> None:
    """Closing with unread bytes sends a reset, which can destroy the response in transit."""
    proxy.token_path.unlink()
    size = 32 << 20
    client.request("POST", "/v1/files", f"Content-Length: {size}")
    client.send(bytes(size))
    answer = client.message()
    assert (answer.status, answer.value("Connection")) == (401, "close")
    assert client.closed_within()


@pytest.mark.parametrize(
    "start, status",
    [
        (b"GET /v1/x HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70000, 431),
        (b"GET /v1/x HTTP/1.1\r\nHost: a\r\n" + b"X: x\r\n" * 201, 431),
        (b"GET /v1/x HTTP/1.1\r\nHost: a\n\r\n" + b"x" * 70000, 400),
        (
            b"GET /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"
            + b"x" * 70000,
            400,
        ),
    ],
)
def test_a_refused_head_is_answered_and_closes_the_connection(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream, start: bytes, status: int
) -> None:
    client.send(start + bytes(8 << 20))
    answer = client.message()
    assert (answer.status, answer.value("Connection")) == (status, "close")
    assert answer.value("X-XAI-Proxy-Error") == "bad_request"
    assert client.closed_within() and upstream.quiet()
    line = proxy.wait_for_log(lambda line: line.get("status") == status)
    assert (line["method"], line["path"], line["ended_by"]) == ("-", "-", "proxy")


def test_a_client_that_resets_before_its_400_causes_no_error(proxy: ProxyProcess) -> None:
    """The module's proxy asserts at its end that nothing unexpected was logged."""
    for _ in range(20):
        with proxy.client() as client:
            client.send(b"nonsense\r\n\r\n")
            client.reset()
    assert proxy.ask("GET", "/healthz").status == 200


def test_a_malformed_chunk_closes_both_connections(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/x", "Transfer-Encoding: chunked")
    client.send(b"3\r\nabc\r\n")
    request = upstream.receive(body=False)
    assert request.connection.chunk() == b"abc"
    client.send(b"+1\r\n")
    answer = client.message()
    assert (answer.status, answer.value("Connection")) == (400, "close")
    assert request.connection.closed_within()


def test_100_continue_is_sent_once_the_body_is_needed(
    client: Client, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/x", "Expect: 100-continue", "Content-Length: 2")
    assert client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"{}")
    request = upstream.receive()
    assert request.body == b"{}" and request.values("Expect") == []
    request.answer()
    assert client.message().body == b"ok"


def test_100_continue_is_not_sent_for_a_refused_request(
    client: Client, proxy: ProxyProcess
) -> None:
    proxy.token_path.unlink()
    client.request("POST", "/v1/x", "Expect: 100-continue", "Content-Length: 2")
    assert client.message().status == 401


BAD_HEADS = {
    "field": (b"/v1/x HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", 400),
    "no Host": (b"/v1/x HTTP/1.1\r\n\r\n", 400),
    "bare LF": (b"/v1/x HTTP/1.1\nHost: a\n\n", 400),
    "no path": (b"* HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "too large": (b"/v1/x HTTP/1.1\r\nX: " + b"y" * 66000, 431),
    "too slow": (b"/v1/x HTTP/1.1\r\nHost: a\r\n", 408),
}


@pytest.mark.parametrize("rest, status", BAD_HEADS.values(), ids=BAD_HEADS)
def test_the_response_to_a_refused_head_is_complete(
    short_timeout_proxy: ProxyProcess, rest: bytes, status: int
) -> None:
    for start in (b"HEAD ", b"\r\nHEAD ", b"GET ", b"HEADER "):
        with short_timeout_proxy.client() as client:
            client.send(start + rest)
            answer, body = client.head(), client.rest()
            assert (answer.status, answer.value("Connection"), answer.value("x-should-retry")) == (
                status,
                "close",
                "false",
            )
            assert email.utils.parsedate_to_datetime(answer.value("Date"))
            if b"HEAD " in start:
                assert body == b"" and int(answer.value("Content-Length")) > 0
            else:
                assert len(body) == int(answer.value("Content-Length"))


# Fairness


def count_received_before(answer: Client, other: RawConnection) -> int:
    """Count the bytes that arrive on `other` until something arrives on `answer`."""
    count, ready = 0, []
    while answer.sock not in ready:
        ready = readable([answer.sock, other.sock], TIMEOUT)
        assert ready, "nothing arrived on either connection"
        if other.sock in ready:
            count += len(other.sock.recv(1 << 20))
    return count


def test_pipelined_requests_do_not_starve_other_clients(proxy: ProxyProcess) -> None:
    # All of them arrive in one read.
    requests = READ // 50
    with proxy.client() as greedy, proxy.client() as other:
        other.ask("GET", "/healthz")
        greedy.send(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" * requests)
        size = len(greedy.message().head) + 100
        other.request("GET", "/healthz")
        assert count_received_before(other, greedy) < size * requests / 10
        assert other.message().status == 200


def test_tiny_chunks_do_not_starve_other_clients(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    tiny = b"1\r\nx\r\n"
    with proxy.client() as greedy, proxy.client() as other:
        other.ask("GET", "/healthz")
        greedy.request("POST", "/v1/x", "Transfer-Encoding: chunked")
        request = upstream.receive(body=False)

        def pour() -> None:
            # The test closes the connection.
            with contextlib.suppress(OSError):
                while True:
                    greedy.send(tiny * (READ // len(tiny)))

        thread = threading.Thread(target=pour)
        thread.start()
        most = 0
        for _ in range(10):
            other.request("GET", "/healthz")
            most = max(most, count_received_before(other, request.connection))
            assert other.message().status == 200
        greedy.half_close()
        thread.join()
    assert most < 3 * READ / len(tiny)


# Timeouts


@pytest.mark.parametrize("steps", [[b"\r\n"], [b"\r", b"\n"], [b"\r"]])
@both_ways
def test_an_empty_line_after_a_body_begins_no_request(
    start_proxy: Callable[..., ProxyProcess],
    upstream: ScriptedUpstream,
    way: str,
    steps: list[bytes],
) -> None:
    """Old clients send one after a POST. The connection stays idle and is closed without a 408."""
    with start_proxy(way=way, client_timeout=0.2, keepalive_timeout=1.2).client() as client:
        for _ in range(2):
            client.request("POST", "/v1/x", body=b"{}").send(steps[0])
            upstream.receive().answer()
            assert client.message().body == b"ok"
            for step in steps[1:]:
                client.send(step)
            assert not client.closed_within(0.5) and client.silent()
            if steps == [b"\r"]:
                client.send(b"\n")
        assert not client.closed_within(0.4) and client.closed_within(5)


def test_an_empty_line_on_a_new_connection_begins_no_request(
    short_timeout_proxy: ProxyProcess,
) -> None:
    with short_timeout_proxy.client() as client:
        client.send(b"\r\n")
        assert client.closed_within(5)


def test_a_head_after_an_empty_line_times_out(short_timeout_proxy: ProxyProcess) -> None:
    with short_timeout_proxy.client() as client:
        client.send(b"\r\nG")
        assert client.message().status == 408


def test_the_timeout_of_a_head_covers_all_of_it(short_timeout_proxy: ProxyProcess) -> None:
    start = time.monotonic()
    with short_timeout_proxy.client() as client:
        client.send(b"GET /v1/x HTTP/1.1\r\n")
        time.sleep(0.45)
        client.send(b"Host: localhost\r\n")
        answer = client.message()
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (408, "client_timeout")
        assert (answer.value("x-should-retry"), answer.value("Connection")) == ("false", "close")
        assert 0.4 < time.monotonic() - start < 0.9
        assert client.closed_within()


def test_the_timeout_of_a_body_restarts_with_each_read(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with short_timeout_proxy.client() as client:
        client.request("POST", "/v1/x", "Content-Length: 5")
        request = upstream.receive(body=False)
        # In total, this takes longer than the timeout.
        for _ in range(3):
            time.sleep(0.25)
            client.send(b"x")
            assert request.connection.exactly(1) == b"x"
        answer = client.message()
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (408, "client_timeout")
        assert (answer.value("x-should-retry"), answer.value("Connection")) == ("false", "close")
        assert request.connection.closed_within()


def test_the_client_timeout_does_not_limit_the_response(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with short_timeout_proxy.client() as client:
        client.request("POST", "/v1/x", body=b"{}")
        request = upstream.receive()
        time.sleep(0.7)
        request.answer()
        assert client.message().body == b"ok"


@pytest.mark.parametrize("target", ["/nowhere", "/v1/v1/models"])
def test_a_client_that_does_not_read_the_proxys_own_responses_is_closed(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream, target: str
) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with short_timeout_proxy.client() as client:
        client.request()
        # This fills most of the socket buffer, so that fewer of the proxy's own responses do the
        # rest.
        size = 2 << 20
        pour(
            upstream.receive()
            .answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            .connection,
            0,
            size,
        )
        client.sock.settimeout(30)
        with pytest.raises(ConnectionError):
            while True:
                client.send(request * 100)


@both_ways
def test_a_client_may_read_a_response_of_upstream_slowly(
    short_timeout_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """That holds even if the socket holds all of it (up to 3.5 MB) and the next request is waiting."""
    with short_timeout_proxy.client() as client:
        for size in (3500 << 10, 32 << 20):
            client.request().request()
            request = upstream.receive().answer(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
            )
            sent = pour(request.connection, 0, size)
            time.sleep(1)
            thread = threading.Thread(target=pour, args=(request.connection, sent, size, TIMEOUT))
            thread.start()
            assert len(client.message().body) == size
            thread.join()
            upstream.receive().answer()
            assert client.message().body == b"ok"


def test_idle_connections_are_closed_without_a_response(short_timeout_proxy: ProxyProcess) -> None:
    """New ones after CLIENT_TIMEOUT, those between two requests after KEEPALIVE_TIMEOUT."""
    with short_timeout_proxy.client() as new, short_timeout_proxy.client() as used:
        start = time.monotonic()
        assert used.ask("GET", "/healthz").status == 200
        assert used.closed_within(1) and 0.15 < time.monotonic() - start < 0.45
        assert new.closed_within(1) and time.monotonic() - start < 0.8


# Cancelled requests


def before_the_head(client: Client, upstream: ScriptedUpstream) -> Request:
    client.request("POST", "/v1/cancelled", body=b"{}")
    return upstream.receive()


def while_streaming(client: Client, upstream: ScriptedUpstream) -> Request:
    client.request("POST", "/v1/cancelled", body=b"{}")
    request = upstream.receive().answer(CHUNKED + b"2\r\nok\r\n")
    client.head()
    client.chunk()
    request.answer(b"1\r\n!\r\n")
    return request


def in_silence(client: Client, upstream: ScriptedUpstream) -> Request:
    request = while_streaming(client, upstream)
    client.chunk()
    return request


def in_a_plain_answer(client: Client, upstream: ScriptedUpstream) -> Request:
    client.request("GET", "/v1/cancelled")
    request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok")
    client.head()
    client.exactly(2)
    return request


def while_an_error_is_read(client: Client, upstream: ScriptedUpstream) -> Request:
    client.request("GET", "/v1/cancelled")
    return upstream.receive().answer(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 5\r\n\r\nun")


def with_the_next_request_unread(client: Client, upstream: ScriptedUpstream) -> Request:
    request = in_silence(client, upstream)
    client.request("GET", "/v1/pipelined")
    return request


def with_the_next_request_sent_along(client: Client, upstream: ScriptedUpstream) -> Request:
    client.request("POST", "/v1/cancelled", body=b"{}").request("GET", "/v1/pipelined")
    return upstream.receive()


def while_it_does_not_read(client: Client, upstream: ScriptedUpstream) -> Request:
    client.request("GET", "/v1/cancelled")
    request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
    request.connection.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            request.connection.send(bytes(1 << 20))
    return request


def during_an_upload(client: Client, upstream: ScriptedUpstream) -> Request:
    client.request("POST", "/v1/cancelled", "Content-Length: 5")
    client.send(b"abc")
    request = upstream.receive(body=False)
    assert request.connection.exactly(3) == b"abc"
    return request


IN_THE_BODY = [
    while_streaming,
    in_silence,
    in_a_plain_answer,
    with_the_next_request_unread,
    while_it_does_not_read,
]
MOMENTS = [
    before_the_head,
    while_an_error_is_read,
    with_the_next_request_sent_along,
    during_an_upload,
    *IN_THE_BODY,
]


@pytest.mark.parametrize("how", [Client.close, Client.reset, Client.half_close])
@pytest.mark.parametrize(
    "way, moment",
    [
        *(("relayed", moment) for moment in MOMENTS),
        *(("iterated", moment) for moment in IN_THE_BODY),
    ],
)
def test_a_cancelled_request_closes_the_upstream_connection(
    client: Client,
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    moment: Callable[[Client, ScriptedUpstream], Request],
    how: Callable[[Client], None],
) -> None:
    client.ask("GET", "/healthz")
    seen = len(proxy.log_lines())
    request = moment(client, upstream)
    how(client)
    assert request.connection.closed_within(1)
    line = proxy.wait_for_log(lambda line: line.get("path") == "/v1/cancelled", start=seen)
    assert line["ended_by"] == "client"
    if moment not in IN_THE_BODY:
        assert (line["status"], line["first_byte_ms"], line["bytes"]) == (499, None, 0)
    elif moment is not while_it_does_not_read:
        # Only content is counted, whatever its framing.
        assert line["bytes"] in (2, 3)
    assert upstream.quiet()


def test_a_cancelled_request_with_a_large_body_closes_upstream_at_once(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """The watcher is started again after the body. A poll twice a second would take two seconds."""
    waited = 0.0
    for _ in range(8):
        with proxy.client() as client:
            client.request("POST", "/v1/cancelled", body=bytes(100000))
            request = upstream.receive()
        start = time.monotonic()
        assert request.connection.closed_within(1)
        waited += time.monotonic() - start
    assert waited < 0.8


# The large body hides the close that follows it.
@pytest.mark.parametrize("body", [b"", bytes(100000)])
@pytest.mark.parametrize("how", [Client.close, Client.reset, Client.half_close])
def test_a_request_that_waits_for_a_token_can_be_cancelled(
    client: Client,
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    body: bytes,
    how: Callable[[Client], None],
) -> None:
    proxy.sign_in(expires_in=-5)
    proxy.refresher_lives()
    seen = len(proxy.log_lines())
    client.request("POST" if body else "GET", "/v1/waits", body=body)
    # The request waits by then, which nothing outside the proxy shows.
    time.sleep(0.2)
    how(client)
    line = proxy.wait_for_log(lambda line: line.get("path") == "/v1/waits", 1, start=seen)
    assert (line["ended_by"], line["status"]) == ("client", 499)
    assert upstream.quiet()


@both_ways
def test_watching_a_client_takes_no_cpu_time(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    """A level-triggered watcher would fire all the time, because the client's bytes stay unread."""
    with_the_next_request_unread(client, upstream)
    before = proxy.cpu_seconds()
    time.sleep(1)
    assert proxy.cpu_seconds() - before < 0.1


@both_ways
def test_cancelled_requests_leak_nothing(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    quick = [
        before_the_head,
        while_streaming,
        in_silence,
        in_a_plain_answer,
        while_an_error_is_read,
    ]

    def cancel(number: int) -> None:
        moment, how = quick[number % 5], (Client.close, Client.reset, Client.half_close)[number % 3]
        with proxy.client() as client:
            request = moment(client, upstream)
            how(client)
            assert request.connection.closed_within(1)
            request.connection.close()

    def wait_until_closed(limit: int) -> None:
        deadline = time.monotonic() + 2
        while proxy.open_files() > limit:
            assert time.monotonic() < deadline, f"{proxy.open_files()} open files, were {limit}"
            time.sleep(0.02)

    upstream.hang_up()
    proxy.ask("GET", "/healthz")
    base = proxy.open_files()
    for number in range(15):
        cancel(number)
    wait_until_closed(base)
    memory = proxy.resident_kib()
    for number in range(150):
        cancel(number)
    wait_until_closed(base)
    assert proxy.resident_kib() - memory < 4096


# The log


@both_ways
def test_each_request_logs_one_line(
    client: Client, proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request("POST", "/v1/logged?secret=1", body=b"a prompt")
    request = upstream.receive()
    time.sleep(0.1)
    request.answer(CHUNKED)
    client.head()
    time.sleep(0.1)
    request.answer(b"2\r\nok\r\n0\r\n\r\n")
    while client.chunk():
        pass
    line = proxy.wait_for_request("/v1/logged")
    assert set(line) == {
        "time",
        "level",
        "process",
        "message",
        "method",
        "path",
        "status",
        "request_bytes",
        "bytes",
        "first_byte_ms",
        "duration_ms",
        "ended_by",
        "key",
        "client",
        "user_agent",
        "request_id",
        "upstream_request_id",
    }
    assert (
        line["message"],
        line["level"],
        line["method"],
        line["status"],
        line["bytes"],
        line["ended_by"],
        line["key"],
    ) == ("POST /v1/logged 200", "info", "POST", 200, 2, "done", None)
    assert 95 < line["first_byte_ms"] < line["duration_ms"] - 95 < 1000
    log = str(proxy.log_lines())
    assert not any(
        secret in log for secret in ("secret=", "a prompt", "the-token", "the-refresh-token")
    )


def test_successful_probes_are_not_logged(proxy: ProxyProcess) -> None:
    polled = ("/healthz", "/readyz", "/metrics", "/status.json")
    assert [proxy.ask("GET", path).status for path in polled] == [200] * 4
    proxy.ask("GET", "/after")
    proxy.wait_for_request("/after")
    assert not [
        line for line in proxy.log_lines() if line.get("path") in polled and line["status"] == 200
    ]


# Memory


def distinct_heads() -> Iterator[bytes]:
    """Heads of 70 MB in all, large in each part of a head that a client controls."""

    def head(target: str, *lines: str) -> bytes:
        return "\r\n".join([f"GET {target} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()

    for number in range(128):
        yield head(
            "/x",
            "Connection: " + ",".join(f"{number:x}-{option:x}" for option in range(8000))[:65000],
        )
    for number in range(256):
        yield head(f"/{number}" + "x" * 65000)
        yield head("/v1/x", f"Accept-Encoding: gzip;{number}" + "x" * 64000)
    for number in range(150):
        yield head(f"/v1/{number}", *[f"{number}-{line}: y" for line in range(198)])
        yield head(f"/v1/{number}", *[f"{number}-{line}: y" for line in range(99)])
        yield head(
            f"/v1/{number}", *[f"x{number}-{line}".ljust(250, "x") + ": y" for line in range(198)]
        )


def test_heads_of_unauthorized_clients_leave_nothing_in_memory(tmp_path: Path) -> None:
    with ProxyProcess(tmp_path) as proxy:
        proxy.ask()
        before = proxy.resident_kib()
        for data in distinct_heads():
            with proxy.client() as client:
                client.send(data)
                assert client.message().status in (401, 404)
        assert proxy.resident_kib() - before < 16 << 10


def test_an_unread_body_is_freed_with_its_response(proxy: ProxyProcess) -> None:
    with contextlib.ExitStack() as stack:
        before = proxy.resident_kib()
        for _ in range(400):
            client = stack.enter_context(proxy.client())
            client.send(
                b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n"
                + bytes(60000)
            )
            assert client.message().status == 404
        assert proxy.resident_kib() - before < 12 << 10
