"""Responses of a malicious upstream are refused, or passed on unambiguously, and bounded.

After each one, another request gets its own response: nothing of a bad response is left on a
connection.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator

import pytest
from proxy_process import Client, ProxyProcess, both_ways
from raw_connection import RawConnection
from scripted_upstream import OK, Request, ScriptedUpstream

EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
START = b"HTTP/1.1 200 OK\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
END = b"Content-Length: 2\r\n\r\nok"


@pytest.fixture
def client(running: ProxyProcess, upstream: ScriptedUpstream) -> Iterator[Client]:
    with running.client() as connection:
        yield connection


def assert_next_request_gets_its_own_response(
    running: ProxyProcess, upstream: ScriptedUpstream, bad: Request
) -> None:
    """The request uses another connection to upstream than the `bad` response."""
    with running.client() as client:
        client.request("GET", "/v1/next")
        request = upstream.receive()
        assert request.target == "/v1/next" and request.connection is not bad.connection
        request.answer()
        assert client.message().body == b"ok" and client.silent()


# Heads

# Some parsers read one response here, others another one or two.
AMBIGUOUS = {
    "bare LF": START + b"X: y\nSet-Cookie: evil=1\r\n" + END,
    "bare CR": START + b"X: y\rSet-Cookie: evil=1\r\n" + END,
    "LF LF": START + b"X: y\n\n" + EVIL,
    "CR CR LF": START + b"X: y\r\r\n" + END,
    "CR LF CR": START + b"X: y\r\n\r" + EVIL,
    "bare LF in the status line": b"HTTP/1.1 200 OK\nX: y\r\n" + END,
    "CR in the status line": b"HTTP/1.1 200 OK\rX: y\r\n" + END,
    "NUL in a value": START + b"X: a\0b\r\n" + END,
    "NUL in a name": START + b"X\0: y\r\n" + END,
    "NUL in the reason": b"HTTP/1.1 200 O\0K\r\n" + END,
    "escape": START + b"X: \x1b[2J\r\n" + END,
    "DEL": START + b"X: \x7f\r\n" + END,
    "fold of the first line": START + b" X: y\r\n" + END,
    "fold of the status line": b"HTTP/1.1 200\r\n OK\r\n" + END,
    "fold before the colon": START + b"Set-Cookie\r\n : evil=1\r\n" + END,
    "blank before the colon": START + b"Content-Length : 9\r\n" + END,
    "no colon": START + b"X\r\n" + END,
    "no name": START + b": y\r\n" + END,
    "UTF-8 name": START + b"X\xc3\xa9: y\r\n" + END,
    "HTTP/2": b"HTTP/2 200\r\n" + END,
    "HTTP/0.9": b"evil" + b"\r\n" * 2,
    "LF before": b"\n" + OK,
    "CRLF before": b"\r\n" + OK,
    "status of two digits": b"HTTP/1.1 20 OK\r\n" + END,
    "status of four digits": b"HTTP/1.1 2000 OK\r\n" + END,
    "two blanks": b"HTTP/1.1  200 OK\r\n" + END,
    "a request": b"GET /v1/evil HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two lengths": START + b"Content-Length: 1\r\n" + END,
    "list of lengths": START + b"Content-Length: 2, 2\r\n\r\nok",
    "signed length": START + b"Content-Length: +2\r\n\r\nok",
    "length of 30 digits": START + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nok",
    "hexadecimal length": START + b"Content-Length: 0x2\r\n\r\nok",
    "empty length": START + b"Content-Length:\r\n\r\nok",
    "folded lengths": START + b"Content-Length: 1\r\n 2\r\n\r\nok",
    "gzip coding": START + b"Transfer-Encoding: gzip\r\n\r\nok",
    "two codings": START + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding twice": START
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding with a tab in it": START + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n",
    "201 lines": START + b"X: y\r\n" * 201 + END,
    "unrequested 101": SWITCH + b"Upgrade: websocket\r\n\r\nevil",
    "101 to h2c": SWITCH + b"Upgrade: h2c\r\n\r\nPRI * HTTP/2.0\r\n\r\n",
    "bad interim one": b"HTTP/1.1 103 Early Hints\r\nX: a\0b\r\n\r\n" + OK,
    "interim one with two codings": b"HTTP/1.1 103 x\r\nTransfer-Encoding: gzip\r\n\r\n" + OK,
    "interim one with a bare LF": b"HTTP/1.1 103 x\r\nX: a\nSet-Cookie: evil=1\r\n\r\n" + OK,
    "21 interim ones": b"HTTP/1.1 103 x\r\n\r\n" * 21 + OK,
    "1000 times 100": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + OK,
}


def by_name(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "answer", [pytest.param(answer, id=name) for name, answer in table.items()]
    )


@by_name(AMBIGUOUS)
def test_an_ambiguous_head_is_502(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream, answer: bytes
) -> None:
    client.request("GET", "/v1/x")
    request = upstream.receive().answer(answer)
    came = client.message()
    # Interim responses precede the bad one.
    while came.status == 103:
        assert came.value("Set-Cookie") is None
        came = client.message()
    assert (came.status, came.value("X-XAI-Proxy-Error")) == (502, "upstream_unreachable")
    assert (
        b"evil" not in came.head + came.body
        and client.silent()
        and request.connection.closed_within()
    )
    assert_next_request_gets_its_own_response(running, upstream, request)


# Folded lines become one line (RFC 9112 section 5.2).
FOLDED = {
    "in a value": (b"X: a\r\n b\r\n\t c\r\n", [("X", "a b c")]),
    "of blanks": (b"X: a\r\n \t \r\nY: b\r\n", [("X", "a "), ("Y", "b")]),
    "a field in it": (b"X: a\r\n Set-Cookie: b\r\n", [("X", "a Set-Cookie: b")]),
    "a status line in it": (b"X: a\r\n HTTP/1.1 200 OK\r\n", [("X", "a HTTP/1.1 200 OK")]),
    "an empty line that is none": (b"X: a\r\n \r\n\t\r\nY: b\r\n", [("X", "a  "), ("Y", "b")]),
    "a cookie": (b"Set-Cookie:\r\n evil=1\r\n", []),
    "another cookie": (b"SET-cookie: evil=1;\r\n\tSecure\r\nX: y\r\n", [("X", "y")]),
}


@pytest.mark.parametrize("lines, passed", FOLDED.values(), ids=FOLDED)
def test_a_folded_line_is_unfolded(
    client: Client, upstream: ScriptedUpstream, lines: bytes, passed: list[tuple[str, str]]
) -> None:
    client.request("GET", "/v1/x")
    upstream.receive().answer(b"HTTP/1.1 200 OK\r\nDate: then\r\n" + lines + END)
    answer = client.message()
    kept = [("Connection", "keep-alive"), ("Keep-Alive", "timeout=595")]
    assert (
        answer.fields == [("Date", "then"), *passed, ("Content-Length", "2"), *kept]
        and answer.body == b"ok"
    )


# Fields that a client would apply to the proxy's origin, or take for the proxy's own.
OF_UPSTREAM = [
    b"Set-Cookie: evil=1\r\n",
    b"set-cookie: evil=1\r\nSET-COOKIE: evil=2\r\n",
    b"Connection: set-cookie\r\nSet-Cookie: evil=1\r\n",
    b"Set-Cookie:\tevil=1\r\nX: y\r\nSet-Cookie: evil=2\r\n",
    b'Alt-Svc: h3="evil.example:443"; ma=86400\r\n',
    b"strict-transport-security: max-age=31536000; evil\r\n",
    b'Clear-Site-Data: "evil"\r\n',
    b'NEL: {"report_to":"evil"}\r\nReport-To: {"group":"evil"}\r\n',
    b"X-XAI-Proxy-Error: evil\r\n",
]


@both_ways
@pytest.mark.parametrize("lines", OF_UPSTREAM)
def test_fields_about_upstream_itself_are_dropped(
    client: Client, upstream: ScriptedUpstream, lines: bytes
) -> None:
    for status in (200, 403, 404, 500):
        client.request("GET", "/v1/x")
        interim = b"HTTP/1.1 103 x\r\nLink: <a>\r\n%b\r\n" % lines
        upstream.receive().answer(interim + b"HTTP/1.1 %d x\r\n%b" % (status, lines) + END)
        interim, answer = client.message(), client.message()
        assert (interim.status, interim.values("Link"), answer.status, answer.body) == (
            103,
            ["<a>"],
            status,
            b"ok",
        )
        assert b"evil" not in interim.head + answer.head


TRAILERS = [
    b"X-Sum: 1\r\n",
    b"sET-cOOKIE:evil=1\r\n",
    b"Set-Cookie-Not: y\r\n",
    b"Connection: evil\r\n",
    b"Alt-Svc: evil\r\n",
    b"Y:\r\n",
    b"X-XAI-Proxy-Error: evil\r\n",
    b"Set-Cookie: evil=" + b"x" * 4000 + b"\r\n",
    b"Set-Cookie: evil=2\r\n",
]
STEPS = {
    "at once": [b"2\r\nok\r\n0;z\r\n" + b"".join(TRAILERS) + b"\r\n"],
    "by lines": [b"2\r\nok\r\n", b"0;z\r\n", *TRAILERS, b"\r\n"],
    "cut in lines": [
        b"2\r\nok\r\n0;z\r\nX-Sum: 1\r\nsET-",
        b"cOOKIE:ev",
        b"il=1\r",
        b"\n" + b"".join(TRAILERS[2:]) + b"\r",
        b"\n",
    ],
    "by bytes": [bytes([byte]) for byte in b"2\r\nok\r\n0;z\r\n" + b"".join(TRAILERS) + b"\r\n"],
}


@both_ways
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("with_the_head", [True, False])
def test_trailers_that_a_head_may_not_contain_are_dropped(
    client: Client, upstream: ScriptedUpstream, way: str, steps: list[bytes], with_the_head: bool
) -> None:
    client.request("GET", "/v1/x")
    request = upstream.receive().answer(CHUNKED + steps[0] if with_the_head else CHUNKED)
    assert client.head().status == 200
    for step in steps[with_the_head:]:
        request.answer(step)
    if way == "relayed":
        expected = b"2\r\nok\r\n0;z\r\nX-Sum: 1\r\nSet-Cookie-Not: y\r\nY:\r\n\r\n"
        assert client.exactly(len(expected)) == expected
    else:
        assert re.fullmatch(
            rb"2\r\nok\r\n0\r\n\r\n|1\r\no\r\n1\r\nk\r\n0\r\n\r\n", client.until(b"\r\n0\r\n\r\n")
        )
    client.request("GET", "/v1/next")
    assert (
        upstream.receive().answer().connection is request.connection
        and client.message().body == b"ok"
    )


@both_ways
def test_a_last_chunk_without_trailers_passes_however_it_is_split(
    client: Client, upstream: ScriptedUpstream
) -> None:
    for steps in (
        (b"2\r\nok\r\n0\r\n", b"\r\n"),
        (b"2\r\nok\r\n0", b"\r\n\r\n"),
        (b"2\r\nok\r\n0\r\n\r", b"\n"),
        (b"2\r\nok\r\n", b"0\r\n", b"\r", b"\n"),
    ):
        client.request("GET", "/v1/x")
        request = upstream.receive().answer(CHUNKED + steps[0])
        assert client.head().status == 200 and client.exactly(7) == b"2\r\nok\r\n"
        for step in steps[1:]:
            request.answer(step)
        assert client.exactly(5) == b"0\r\n\r\n"


def test_a_cookie_in_a_trailer_is_dropped(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", "--max-time", "8", "-c", "-", "--raw", f"{running.url}/v1/x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        upstream.receive().answer(CHUNKED + b"2\r\nok\r\n0\r\nSet-Cookie: evil=1\r\nX: y\r\n\r\n")
        came, _ = curl.communicate()
    assert curl.returncode == 0 and b"ok" in came and b"X: y" in came and b"evil" not in came


@both_ways
def test_a_redirect_to_upstream_is_redirected_to_the_proxy(
    running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    command = [
        "curl",
        "-sS",
        "--max-time",
        "8",
        "-L",
        "-w",
        "%{url_effective}",
        f"{running.url}/v1/x",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        location = f"Location: {upstream.origin}/v1/files/1?a=b\r\n".encode()
        upstream.receive().answer(b"HTTP/1.1 307 x\r\n" + location + END)
        request = upstream.receive().answer()
        came, _ = curl.communicate()
    assert (request.target, request.token) == ("/v1/files/1?a=b", "the-token")
    assert came == f"ok{running.url}/v1/files/1?a=b".encode()


@both_ways
def test_a_426_keeps_its_upgrade(client: Client, upstream: ScriptedUpstream) -> None:
    """RFC 9110 section 15.5.22. The proxy supports the upgrade to a WebSocket."""
    for lines, upgrade, option in (
        (b"Connection: upgrade\r\nUpgrade: websocket\r\n", "websocket", "Upgrade"),
        (b"Upgrade: TLS/1.3, HTTP/2.0\r\n", "TLS/1.3, HTTP/2.0", "Upgrade"),
        (b"", None, None),
    ):
        client.request("GET", "/v1/realtime")
        upstream.receive().answer(b"HTTP/1.1 426 Upgrade Required\r\n" + lines + END)
        refusal = client.message()
        assert (refusal.status, refusal.body) == (426, b"ok")
        options = [value for value in refusal.values("Connection") if value != "keep-alive"]
        assert (refusal.value("Upgrade"), options) == (upgrade, [option] if option else [])


@both_ways
def test_an_event_stream_gets_x_accel_buffering_no(
    client: Client, upstream: ScriptedUpstream
) -> None:
    stream = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    for lines, values in ((b"", ["no"]), (b"x-accel-buffering: yes\r\n", ["yes"])):
        client.request("GET", "/v1/x")
        upstream.receive().answer(START + stream + lines + b"\r\n9\r\ndata: a\n\n\r\n0\r\n\r\n")
        answer = client.message()
        assert answer.values("X-Accel-Buffering") == values and answer.body == b"data: a\n\n"
    client.request("GET", "/v1/x")
    upstream.receive().answer()
    assert client.message().values("X-Accel-Buffering") == []


# Bodies

# They are in the middle of the response, so the truncation is visible.
MALFORMED = {
    "plus": b"+4\r\nevil\r\n0\r\n\r\n",
    "0x": b"0x4\r\nevil\r\n0\r\n\r\n",
    "blank after the size": b"4 \r\nevil\r\n0\r\n\r\n",
    "bare LF": b"4\nevil\n0\n\n",
    "empty size": b"\r\nevil\r\n0\r\n\r\n",
    "2 ** 64 and 4": b"10000000000000004\r\nevil\r\n0\r\n\r\n",
    "LF in an extension": b"4;\nevil\r\n0\r\n\r\n",
    "huge extension": b"4;" + b"x" * 5000 + b"\r\nevil\r\n0\r\n\r\n",
    "NUL in an extension": b"4;\0\r\nevil\r\n0\r\n\r\n",
    "length in a trailer": b"0\r\nContent-Length: 4\r\n\r\n" + EVIL,
    "coding in a trailer": b"0\r\ntransfer-encoding: chunked\r\n\r\n" + EVIL,
    "fold in a trailer": b"0\r\nX: y\r\n z\r\n\r\n" + EVIL,
    "answer as a trailer": b"0\r\n" + EVIL,
    "bare LF in a trailer": b"0\r\nX: y\n\r\n" + EVIL,
    "101 trailers": b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n" + EVIL,
}


@both_ways
@pytest.mark.parametrize("with_the_head", [True, False])
@by_name(MALFORMED)
def test_ambiguous_chunks_truncate_the_response(
    client: Client,
    running: ProxyProcess,
    upstream: ScriptedUpstream,
    answer: bytes,
    with_the_head: bool,
) -> None:
    client.request("GET", "/v1/x")
    request, start = upstream.receive(), CHUNKED + b"2\r\nok\r\n"
    if with_the_head:
        request.answer(start + answer)
    else:
        request.answer(start)
        client.head()
        assert client.chunk() == b"ok"
        request.answer(answer)
    came = client.rest()
    assert (
        b"evil" not in came
        and not came.endswith(b"0\r\n\r\n")
        and request.connection.closed_within()
    )
    assert_next_request_gets_its_own_response(running, upstream, request)


# Complete responses; the bytes after them belong to no request.
COMPLETE = {
    "length": START + END,
    "chunks": CHUNKED + b"2\r\nok\r\n0\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "204 with a length": b"HTTP/1.1 204 No Content\r\nContent-Length: 90\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 90\r\n\r\n",
    "304 in chunks": b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
    "length and chunks": START
    + b"Content-Length: 90\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunks and length": START
    + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "length twice": START + b"Content-Length: 2\r\n" + END,
}


@both_ways
@by_name(COMPLETE)
def test_a_second_response_on_a_connection_is_dropped(
    client: Client, upstream: ScriptedUpstream, answer: bytes
) -> None:
    client.request("GET", "/v1/x").request("GET", "/v1/pipelined")
    request = upstream.receive().answer(answer + EVIL)
    came = client.message()
    assert came.body == (b"" if came.status in (204, 304) else b"ok")
    assert len(came.values("Content-Length") + came.values("Transfer-Encoding")) == (
        came.status == 200
    )
    following = upstream.receive()
    assert following.target == "/v1/pipelined" and following.connection is not request.connection
    following.answer()
    assert client.message().body == b"ok" and client.silent()


@pytest.mark.parametrize(
    "answer",
    [
        START + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        *(b"HTTP/1.1 %d x\r\nTransfer-Encoding: chunked\r\n\r\n" % status for status in (204, 304)),
    ],
)
def test_a_response_with_an_ambiguous_end_closes_the_connection(
    client: Client, upstream: ScriptedUpstream, answer: bytes
) -> None:
    """No bytes follow it, but a proxy in between may have seen another end."""
    client.request("GET", "/v1/x")
    request = upstream.receive().answer(answer)
    assert client.message().body == b""
    assert request.connection.closed_within()


def test_twenty_interim_responses_pass_and_one_more_is_502(
    client: Client, upstream: ScriptedUpstream
) -> None:
    for count, status in ((20, 200), (21, 502)):
        client.request("POST", "/v1/x")
        upstream.receive().answer(b"HTTP/1.1 103 x\r\n\r\n" * count + OK)
        assert [client.message().status for _ in range(21)] == [103] * 20 + [status]


def test_an_unrequested_response_on_a_pooled_connection_is_dropped(
    client: Client, running: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    client.request("GET", "/v1/x")
    request = upstream.receive().answer()
    client.message()
    # The connection is in the pool.
    request.answer(EVIL)
    assert request.connection.closed_within()
    assert_next_request_gets_its_own_response(running, upstream, request)


# Endless responses


def send_repeatedly(raw: RawConnection, part: bytes, size: int) -> int:
    """Send `part` again and again. Return the bytes that the other side took before it closed."""
    sent = 0
    try:
        while sent < size:
            raw.send(part)
            sent += len(part)
    except OSError:
        pass
    return sent


SIZE = 200 << 20


ENDLESS = {
    "fields": (START, b"X: " + b"y" * 8000 + b"\r\n"),
    "value": (START + b"X: ", b"y" * 65536),
    "reason": (b"HTTP/1.1 200 ", b"y" * 65536),
    "line": (b"", b"y" * 65536),
    "folds": (START + b"X: y\r\n", b" folded\r\n" * 1000),
    "103": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" * 1000),
    "100": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
}


@pytest.mark.parametrize("start, part", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize(
    "during_an_upload", [False, True], ids=["after an upload", "during an upload"]
)
def test_an_endless_head_is_refused(
    client: Client,
    running: ProxyProcess,
    upstream: ScriptedUpstream,
    start: bytes,
    part: bytes,
    during_an_upload: bool,
) -> None:
    before = running.resident_kib()
    client.request("POST", "/v1/x", "Content-Length: 6").send(
        b"abc" if during_an_upload else b"abcdef"
    )
    request = upstream.receive(body=False)
    request.connection.exactly(3 if during_an_upload else 6)
    sent: list[int] = []
    pouring = threading.Thread(
        target=lambda: sent.append(send_repeatedly(request.answer(start).connection, part, SIZE))
    )
    pouring.start()
    if during_an_upload:
        # Nothing reads the response in the meantime.
        pouring.join(0.3)
        client.send(b"def")
    answer = client.message()
    interim = 0
    while answer.status == 103:
        interim += 1
        answer = client.message()
    pouring.join()
    assert answer.status == 502 and interim in (0, 20)
    assert sent[0] < 16 << 20 and running.resident_kib() - before < 4096
    request.connection.close()
    assert_next_request_gets_its_own_response(running, upstream, request)
