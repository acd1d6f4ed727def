"""Heartbeats of an event stream: comments in its silences, between two events and nowhere else."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable

import pytest
from proxy_process import ProxyProcess, both_ways
from scripted_upstream import ScriptedUpstream

from xaiproxy.proxy.event_stream import with_comments

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
BOM = b"\xef\xbb\xbf"
COMMENT = b": keepalive\n\n"


def events(stream: bytes) -> list[tuple[str, str, str, str]]:
    """Return type, data, ID and reconnection time of each event, by the WHATWG's rules."""
    found = []
    kind, data, last_id, retry = "", "", "", ""
    for line in re.split("\r\n|\n|\r", stream.decode("utf-8").removeprefix("\ufeff"))[:-1]:
        name, _colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                found.append((kind or "message", data.removesuffix("\n"), last_id, retry))
            kind = data = ""
        elif name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            retry = value
    return found


LINES = [
    "data: one",
    "",
    ": theirs",
    "event: two",
    "data: a:b",
    "data",
    "data:  é",
    "",
    "",
    "id: 7",
    "retry: 10",
    "data: x",
    "",
    "datum: no",
    "data: three",
    "",
    "data: cut",
]
STREAMS = {
    name: (BOM if name.startswith("BOM") else b"") + end.join(LINES).encode()
    for name, end in (
        ("LF", "\n"),
        ("CR", "\r"),
        ("CRLF", "\r\n"),
        ("BOM and LF", "\n"),
        ("BOM and CRLF", "\r\n"),
    )
}
STREAMS["mixed"] = b"data: 1\r\ndata: 2\rdata: 3\n\r\ndata: 4\r\r\ndata: 5\n\rdata: 6\n\n\r\n"


def silent_at(stream: bytes, *places: int, times: int = 1) -> list[bytes]:
    """Split a stream at each place, with `times` empty parts (silences) there."""
    cuts = [0, *places, len(stream)]
    parts = [stream[start:end] for start, end in itertools.pairwise(cuts)]
    return [
        part
        for number, data in enumerate(parts)
        for part in ([data] if data else []) + times * [b""] * (number < len(places))
    ]


def begins_a_line(stream: bytes, at: int) -> bool:
    return at == 0 or stream[at - 1 : at] in (b"\n", b"\r")


def test_the_parser_of_this_test_splits_an_event_at_an_empty_line() -> None:
    stream = STREAMS["LF"]
    assert len(events(stream)) == 4 and events(stream)[1] == ("two", "a:b\n\n é", "", "")
    at = stream.index(b"data: a:b") + len(b"data: a:b\n")
    assert events(stream[:at] + b":\n\n" + stream[at:]) != events(stream)
    assert events(stream[:at] + b":\n" + stream[at:]) == events(stream)


@pytest.mark.parametrize("name", STREAMS)
def test_heartbeats_at_any_place_change_no_event(name: str) -> None:
    """Silence is at each byte, once and twice, and at each pair of bytes of a stream.

    Every line begins with a heartbeat.
    """
    stream = STREAMS[name]
    expected = events(stream)
    assert len(expected) >= 4
    for at in range(len(stream) + 1):
        for times in (1, 2):
            filled = b"".join(with_comments(silent_at(stream, at, times=times)))
            assert events(filled) == expected, at
            assert (len(filled) > len(stream)) is begins_a_line(stream, at), at
        for second in range(at, len(stream) + 1):
            assert events(b"".join(with_comments(silent_at(stream, at, second)))) == expected, (
                at,
                second,
            )
    assert (
        events(b"".join(with_comments(silent_at(stream, *range(len(stream) + 1), times=2))))
        == expected
    )


@pytest.mark.parametrize("name", STREAMS)
def test_the_openai_library_decodes_the_same_events(name: str) -> None:
    streaming = pytest.importorskip("openai._streaming")

    def decoded(parts: list[bytes]) -> list[tuple[str | None, str]]:
        return [
            (event.event, event.data) for event in streaming.SSEDecoder().iter_bytes(iter(parts))
        ]

    stream = re.sub(rb"id: 7[\r\n]+retry: 10", b"data: no id", STREAMS[name].removeprefix(BOM))
    for at in range(len(stream) + 1):
        assert decoded(list(with_comments(silent_at(stream, at)))) == decoded([stream]), at


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\n\n"])
def test_a_heartbeat_after_an_event_is_a_block_of_its_own(end: bytes) -> None:
    for parts in (
        [b"data: x" + end],
        [b"data: x", *(end[at : at + 1] for at in range(len(end)))],
        [end],
    ):
        assert b"".join(with_comments([*parts, b"", b""])) == b"".join(parts) + 2 * COMMENT


@pytest.mark.parametrize(
    "end, comment",
    [
        (b"\r\r", b": keepalive\r\r"),
        (b"\n\r", b": keepalive\r\r"),
        (b"\n", b":\n"),
        (b"\r\n", b":\n"),
        (b"\r", b":\r"),
    ],
)
def test_a_heartbeat_after_other_line_ends_is_a_line(end: bytes, comment: bytes) -> None:
    for parts in ([b"data: x" + end], [b"data: x", *(end[at : at + 1] for at in range(len(end)))]):
        assert b"".join(with_comments([*parts, b"", b""])) == b"".join(parts) + 2 * comment


@pytest.mark.parametrize("start", [b"d", b"data: x", b"\ndata", b"\n\n:", b"x\n\r\nx", BOM])
def test_no_heartbeat_is_inserted_in_the_middle_of_a_line(start: bytes) -> None:
    for parts in ([start], [start[at : at + 1] for at in range(len(start))]):
        assert b"".join(with_comments([b"data: 1\n\n", *parts, b"", b""])) == b"data: 1\n\n" + start
    assert b"".join(with_comments([b"x" + start, b""])) == b"x" + start


def test_a_byte_order_mark_is_dropped_after_a_heartbeat() -> None:
    assert list(with_comments([BOM + b"data: x\n\n", b""])) == [BOM + b"data: x\n\n", COMMENT]
    assert list(with_comments([b"", BOM + b"data: x\n\n"])) == [COMMENT, b"data: x\n\n"]
    assert list(with_comments([b"", b"data: x\n\n", BOM])) == [COMMENT, b"data: x\n\n", BOM]
    assert list(with_comments([b"", BOM[:1], b"", BOM[1:2], BOM[2:] + b"data: x\n\n"])) == [
        COMMENT,
        COMMENT,
        b"data: x\n\n",
    ]
    assert list(with_comments([b"", BOM[:2], b"x\n\n", b""])) == [
        COMMENT,
        BOM[:2] + b"x\n\n",
        COMMENT,
    ]
    assert list(with_comments([b"", BOM[:2]])) == [COMMENT, BOM[:2]]


@pytest.fixture
def heartbeat_proxy(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> ProxyProcess:
    return start_proxy(sse_keepalive=0.2, idle_timeout=0.9)


def test_heartbeats_fill_silences_from_the_beginning(
    heartbeat_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with heartbeat_proxy.client() as client:
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
        request.answer(b"2\r\ny\n\r\n")
        assert client.chunk() == b"y\n" and client.chunk() == client.chunk() == b":\n"
        request.answer(b"1\r\n\n\r\n0\r\n\r\n")
        assert (client.chunk(), client.chunk()) == (b"\n", b"")
        # The connection can be reused.
        client.request()
        assert upstream.receive().answer().connection is request.connection
        assert client.message().body == b"ok"


def test_heartbeats_do_not_extend_the_idle_timeout(
    heartbeat_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with heartbeat_proxy.client() as client:
        client.request("POST", "/v1/dead", body=b"{}")
        began = time.monotonic()
        upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        # The response has no last chunk.
        comments = client.rest()
        assert 3 <= comments.count(COMMENT) <= 4 and not comments.endswith(b"0\r\n\r\n")
        assert 0.8 < time.monotonic() - began < 3
        assert heartbeat_proxy.wait_for_request("/v1/dead")["ended_by"] == "upstream"


def test_the_idle_timeout_need_not_be_a_multiple_of_the_heartbeat_interval(
    start_proxy: Callable[..., ProxyProcess], upstream: ScriptedUpstream
) -> None:
    with start_proxy(sse_keepalive=1, idle_timeout=1.1).client() as client:
        client.request("POST", "/v1/dead", body=b"{}")
        began = time.monotonic()
        upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        assert client.rest().count(COMMENT) == 1 and 1 < time.monotonic() - began < 1.9


def test_upstream_is_closed_when_the_client_closes_between_heartbeats(
    heartbeat_proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    with heartbeat_proxy.client() as client:
        client.request("POST", "/v1/leaves", body=b"{}")
        request = upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        client.chunk()
    assert request.connection.closed_within(0.7)


@pytest.mark.parametrize(
    "fields, body",
    [
        (b"Content-Type: text/event-stream\r\nContent-Length: 9\r\n", b"data: x\n\n"),
        (
            b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
            b"1\r\nx\r\n0\r\n\r\n",
        ),
        (
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n",
            b"1\r\nx\r\n0\r\n\r\n",
        ),
        (b"Transfer-Encoding: chunked\r\n", b"1\r\nx\r\n0\r\n\r\n"),
    ],
)
def test_only_plain_event_streams_get_heartbeats(
    heartbeat_proxy: ProxyProcess, upstream: ScriptedUpstream, fields: bytes, body: bytes
) -> None:
    with heartbeat_proxy.client() as client:
        client.request("POST", "/v1/other", body=b"{}")
        request = upstream.receive().answer(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
        client.head()
        time.sleep(0.5)
        assert client.silent()
        request.answer(body)
        assert client.exactly(len(body)) == body


@pytest.mark.parametrize(
    "lines, by_default",
    [
        ([], None),
        (["Accept-Encoding: gzip, deflate"], "gzip, deflate"),
        (["Accept-Encoding: gzip", "accept-encoding: br"], "gzip"),
        (["ACCEPT-ENCODING: identity;q=0"], "identity;q=0"),
    ],
)
def test_heartbeats_request_uncompressed_responses(
    heartbeat_proxy: ProxyProcess,
    running: ProxyProcess,
    upstream: ScriptedUpstream,
    lines: list[str],
    by_default: str | None,
) -> None:
    """Most SDKs allow gzip, into which no comment can be inserted."""
    for proxy, asked in ((heartbeat_proxy, "identity"), (running, by_default)):
        with proxy.client() as client:
            client.request("POST", "/v1/compressed", *lines, body=b"{}")
            assert upstream.receive().answer().value("Accept-Encoding") == asked
            assert client.message().body == b"ok"


@both_ways
def test_heartbeats_are_off_by_default(running: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with running.client() as client:
        client.request("POST", "/v1/quiet", body=b"{}")
        request = upstream.receive().answer(SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        client.head()
        time.sleep(0.5)
        assert client.silent()
        request.answer(b"0\r\n\r\n")
        assert client.chunk() == b""
