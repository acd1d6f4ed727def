"""A retried request is the same request, whatever its size, framing and pace.

The proxy retries after a refused token and after a pooled connection that broke.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from proxy_process import Client, ProxyProcess
from scripted_upstream import Request, ScriptedUpstream

from xaiproxy.http1.connection import READ

# XAI_PROXY_REPLAY_LIMIT of this proxy.
LIMIT = 5 * READ
SIZES = [0, 1, READ - 1, READ, READ + 1, 200_000, 3 * READ + 7, LIMIT]
REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 16\r\n\r\nunauthenticated:"
kinds = pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])


@pytest.fixture
def pair(
    either: Callable[..., tuple[ProxyProcess, ScriptedUpstream]],
) -> tuple[ProxyProcess, ScriptedUpstream]:
    return either(replay_limit=LIMIT)


def content(size: int) -> bytes:
    return (b"%07d\n" * (size // 8 + 1) % tuple(range(size // 8 + 1)))[:size]


def framed(data: bytes, chunked: bool, last: bool = True) -> bytes:
    if not chunked:
        return data
    return (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + (b"0\r\n\r\n" if last else b"")


def begin(client: Client, size: int, chunked: bool, *fields: str) -> None:
    client.request(
        "POST",
        "/v1/x",
        *fields,
        "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}",
    )


def pool_a_connection(client: Client, upstream: ScriptedUpstream) -> None:
    client.request()
    upstream.receive().answer()
    assert client.message().body == b"ok"


def assert_retried(
    client: Client, upstream: ScriptedUpstream, body: bytes, token: str = "newer"
) -> None:
    second = upstream.receive()
    assert (second.token, second.body == body, len(second.body)) == (token, True, len(body))
    second.answer()
    assert client.message().body == b"ok"


@kinds
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("early", [False, True], ids=["after the body", "after the head"])
def test_a_request_whose_token_is_refused_is_retried_unchanged(
    pair: tuple, chunked: bool, size: int, early: bool
) -> None:
    proxy, upstream = pair
    body = content(size)
    with proxy.client() as client, contextlib.ExitStack() as stack:
        begin(client, size, chunked)
        with client.sending(framed(body, chunked)):
            first = upstream.receive(body=not early)
            assert first.token == "the-token"
            # The rest of the body is no further request on this connection.
            if early:
                upstream.connections.remove(first.connection)
                stack.enter_context(first.connection)
            proxy.sign_in("newer")
            first.answer(REFUSED)
            assert_retried(client, upstream, body)
        # The connection can be reused.
        client.request()
        upstream.receive().answer()
        assert client.message().body == b"ok"


@kinds
@pytest.mark.parametrize("half", [1, READ, READ + 1, 200_000])
def test_an_upload_refused_in_the_middle_is_retried_unchanged(
    pair: tuple, chunked: bool, half: int
) -> None:
    """The bytes so far are replayed at once, then the rest is forwarded as it arrives."""
    proxy, upstream = pair
    body = content(2 * half)
    with proxy.client() as client:
        begin(client, 2 * half, chunked)
        client.send(framed(body[:half], chunked, last=False))
        first = upstream.receive(body=False)
        assert read(first, half, chunked) == body[:half]
        proxy.sign_in("newer")
        first.answer(REFUSED)
        second = upstream.receive(body=False)
        assert second.token == "newer" and read(second, half, chunked) == body[:half]
        with client.sending(framed(body[half:], chunked)):
            assert read(second, half, chunked) == body[half:]
        if chunked:
            assert second.connection.chunk() == b""
        second.answer()
        assert client.message().body == b"ok"


def read(request: Request, size: int, chunked: bool) -> bytes:
    if not chunked:
        return request.connection.exactly(size)
    data = b""
    while len(data) < size:
        data += request.connection.chunk()
    return data


@kinds
def test_the_refusal_of_a_body_beyond_the_limit_passes(pair: tuple, chunked: bool) -> None:
    proxy, upstream = pair
    body = content(LIMIT + 1)
    with proxy.client() as client:
        begin(client, len(body), chunked)
        with client.sending(framed(body, chunked)):
            first = upstream.receive()
            assert first.body == body
            proxy.sign_in("newer")
            first.answer(REFUSED)
            assert client.message().status == 403
        assert upstream.quiet()


@kinds
@pytest.mark.parametrize("size", SIZES)
def test_a_request_whose_pooled_connection_breaks_is_retried_unchanged(
    pair: tuple, chunked: bool, size: int
) -> None:
    proxy, upstream = pair
    body = content(size)
    with proxy.client() as client:
        pool_a_connection(client, upstream)
        begin(client, size, chunked, "Idempotency-Key: 1")
        with client.sending(framed(body, chunked)):
            first = upstream.receive()
            assert first.connection.requests == 2 and first.body == body
            first.connection.close()
            assert_retried(client, upstream, body, "the-token")


@kinds
@pytest.mark.parametrize("size", [1, READ + 1, 200_000])
def test_a_request_is_retried_after_both_failures(pair: tuple, chunked: bool, size: int) -> None:
    """The pooled connection breaks, and then the token is refused on the new one."""
    proxy, upstream = pair
    body = content(size)
    with proxy.client() as client:
        pool_a_connection(client, upstream)
        begin(client, size, chunked, "Idempotency-Key: 1")
        with client.sending(framed(body, chunked)):
            upstream.receive().connection.close()
            second = upstream.receive()
            assert second.body == body
            proxy.sign_in("newer")
            second.answer(REFUSED)
            assert_retried(client, upstream, body)


def test_concurrent_retries_keep_their_bodies(pair: tuple) -> None:
    proxy, upstream = pair
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(proxy.client()) for _ in range(5)]
        bodies = [content(200_000 + number)[number:] for number in range(5)]
        for client, body in zip(clients, bodies):
            begin(client, len(body), False)
            stack.enter_context(client.sending(body))
        firsts = [upstream.receive() for _ in clients]
        proxy.sign_in("newer")
        for first in firsts:
            first.answer(REFUSED)
        again = [upstream.receive() for _ in clients]
        assert sorted(request.body for request in again) == sorted(bodies)
        for request in again:
            request.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n" + request.body[:8])
        for client, body in zip(clients, bodies):
            assert client.message().body == body[:8]


def test_a_failed_retry_reports_that_the_first_try_may_have_succeeded(tmp_path: Path) -> None:
    """Upstream has received the whole request, and is gone at the retry."""
    with (
        ScriptedUpstream() as upstream,
        ProxyProcess(tmp_path, upstream=upstream.origin) as proxy,
        proxy.client() as client,
    ):
        proxy.sign_in()
        pool_a_connection(client, upstream)
        client.request("POST", "/v1/x", "Idempotency-Key: 1", body=b"{}")
        upstream.receive()
        upstream.close()
        answer = client.message()
        assert (answer.status, answer.value("x-should-retry")) == (502, "false")
        assert b"may have been processed" in answer.body
