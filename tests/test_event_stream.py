"""Comments in the silences of a stream: between two events, and nowhere else."""
from __future__ import annotations

import time
from typing import Callable

import pytest
from proxy_process import ProxyProcess, both_ways
from scripted_upstream import ScriptedUpstream

from xaiproxy.event_stream import COMMENT, kept_alive

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\n\r"])
def test_a_blank_line_of_any_kind_ends_an_event(end: bytes) -> None:
    for parts in ([b"data: x" + end], [b"data: x", *(end[at:at + 1] for at in range(len(end)))], [end]):
        assert b"".join(kept_alive([*parts, b"", b""])) == b"".join(parts) + 2 * COMMENT


@pytest.mark.parametrize("amid", [b"d", b"data: x\n", b"data: x\r\n", b"data: x\r", b"\ndata", b"\n\n:", b"x\n\r\nx",
                                  BOM])
def test_nothing_comes_amid_an_event(amid: bytes) -> None:
    for parts in ([amid], [amid[at:at + 1] for at in range(len(amid))]):
        assert b"".join(kept_alive([b"data: 1\n\n", *parts, b"", b""])) == b"data: 1\n\n" + amid
    assert b"".join(kept_alive([b"x" + amid, b""])) == b"x" + amid


def test_a_byte_order_mark_is_one_only_at_the_beginning() -> None:
    assert list(kept_alive([BOM + b"data: x\n\n", b""])) == [BOM + b"data: x\n\n", COMMENT]
    assert list(kept_alive([b"", BOM + b"data: x\n\n"])) == [COMMENT, b"data: x\n\n"]
    assert list(kept_alive([b"", b"data: x\n\n", BOM])) == [COMMENT, b"data: x\n\n", BOM]
    assert list(kept_alive([b"", BOM[:1], b"", BOM[1:2], BOM[2:] + b"data: x\n\n"])) == [
        COMMENT, COMMENT, b"data: x\n\n"]
    assert list(kept_alive([b"", BOM[:2], b"x\n\n", b""])) == [COMMENT, BOM[:2] + b"x\n\n", COMMENT]
    assert list(kept_alive([b"", BOM[:2]])) == [COMMENT, BOM[:2]]


@pytest.fixture
def talkative(start_proxy: "Callable[..., ProxyProcess]", upstream: ScriptedUpstream) -> ProxyProcess:
    return start_proxy(sse_keepalive=0.2, idle_timeout=0.9)


def test_silence_is_filled_from_the_beginning(talkative: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with talkative.client() as client:
        client.request("POST", "/v1/reasoning", body=b"{}")
        request = upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        began = time.monotonic()
        client.head()
        assert client.chunk() == client.chunk() == COMMENT and time.monotonic() - began > 0.3
        request.answer(b"9\r\ndata: x\n\n\r\n")
        assert client.chunk() == b"data: x\n\n" and client.chunk() == COMMENT
        request.answer(b"6\r\ndata: \r\n")
        assert client.chunk() == b"data: "
        time.sleep(0.5)
        assert client.silent()
        request.answer(b"3\r\ny\n\n\r\n0\r\n\r\n")
        assert (client.chunk(), client.chunk()) == (b"y\n\n", b"")
        client.request()  # the connection is as good as before
        assert upstream.receive().answer().connection is request.connection
        assert client.message().body == b"ok"


def test_comments_do_not_keep_a_dead_upstream_alive(talkative: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with talkative.client() as client:
        client.request("POST", "/v1/dead", body=b"{}")
        began = time.monotonic()
        upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        comments = client.rest()  # and no last chunk
        assert 3 <= comments.count(COMMENT) <= 4 and not comments.endswith(b"0\r\n\r\n")
        assert 0.8 < time.monotonic() - began < 3
        assert talkative.wait_for_request("/v1/dead")["ended_by"] == "upstream"


def test_limit_of_silence_is_no_multiple_of_the_pause(start_proxy: "Callable[..., ProxyProcess]",
                                                      upstream: ScriptedUpstream) -> None:
    with start_proxy(sse_keepalive=1, idle_timeout=1.1).client() as client:
        client.request("POST", "/v1/dead", body=b"{}")
        began = time.monotonic()
        upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        assert client.rest().count(COMMENT) == 1 and 1 < time.monotonic() - began < 1.9


def test_upstream_is_closed_when_the_client_leaves_amid_comments(talkative: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with talkative.client() as client:
        client.request("POST", "/v1/leaves", body=b"{}")
        request = upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        client.chunk()
    assert request.connection.closed_within(0.7)


@pytest.mark.parametrize("fields, body", [
    (b"Content-Type: text/event-stream\r\nContent-Length: 9\r\n", b"data: x\n\n"),
    (b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", b"1\r\nx\r\n0\r\n\r\n"),
    (b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", b"1\r\nx\r\n0\r\n\r\n"),
    (b"Transfer-Encoding: chunked\r\n", b"1\r\nx\r\n0\r\n\r\n")])
def test_nothing_is_put_into_what_is_no_open_stream_of_text(talkative: ProxyProcess, upstream: ScriptedUpstream,
                                                            fields: bytes, body: bytes) -> None:
    with talkative.client() as client:
        client.request("POST", "/v1/other", body=b"{}")
        request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
        client.head()
        time.sleep(0.5)
        assert client.silent()
        request.answer(body)
        assert client.exactly(len(body)) == body


@both_ways
def test_by_default_silence_is_left_alone(running: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with running.client() as client:
        client.request("POST", "/v1/quiet", body=b"{}")
        request = upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        time.sleep(0.5)
        assert client.silent()
        request.answer(b"0\r\n\r\n")
        assert client.chunk() == b""
