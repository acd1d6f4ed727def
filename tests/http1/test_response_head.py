"""The head of a response: an ambiguous end is refused, or ends the connection."""

import contextlib
import time

import pytest

from xaiproxy.http1 import headers, response_head
from xaiproxy.http1.framing import Chunked, Sized, UntilClose
from xaiproxy.http1.message_head import FIELD_LIMIT, Malformed


def parse(
    *lines: bytes, status_line: bytes = b"HTTP/1.1 200 OK", method: str = "GET"
) -> response_head.Head:
    return response_head.parse(
        b"".join(line + b"\r\n" for line in (status_line, *lines, b"")), method
    )


def passed_lines(head: response_head.Head) -> list[bytes]:
    first, *lines = head.lines.encode("latin-1").split(b"\r\n")
    assert first == b""
    return lines


def test_a_head_is_preserved():
    lines = [
        b"x-B: 2",
        b"Server:cloudflare",
        b"X-b:  a\tb \t",
        b"empty:",
        b"latin: \xe9\xff",
        b"x-B: 2",
    ]
    head = parse(*lines)
    assert (head.status, head.reason, passed_lines(head), head.values) == (200, "OK", lines, {})


def test_values_holds_the_fields_that_the_proxy_uses():
    head = parse(
        b"content-ENCODING: \tgzip \t",
        b"X: y",
        b"Date: now",
        b"Content-Encoding:br",
        b"Connection: a, b",
    )
    assert head.values == {
        "content-encoding": ["gzip", "br"],
        "date": ["now"],
        "connection": ["a, b"],
    }


@pytest.mark.parametrize("name", sorted(headers.NOT_PASSED - {"transfer-encoding"}))
def test_lines_that_must_not_pass_are_removed(name):
    for spelling in (name, name.upper(), name.title()):
        field = f"{spelling}: x".encode()
        head = parse(field, b"X: y", field, b"X-" + field, field)
        assert passed_lines(head) == [b"X: y", b"X-" + field]
        assert head.values == {name: ["x", "x", "x"]}


@pytest.mark.parametrize(
    "line, status, reason",
    [
        (b"HTTP/1.1 200 OK", 200, "OK"),
        (b"HTTP/1.0 404 Not Found", 404, "Not Found"),
        (b"HTTP/1.1 204 ", 204, ""),
        (b"HTTP/1.1 204", 204, ""),
        (b"HTTP/1.1 599 a  b\t\xe9", 599, "a  b\t\xe9"),
        (b"HTTP/1.1 999 x", 999, "x"),
        (b"HTTP/1.1 100 Continue", 100, "Continue"),
        (b"HTTP/1.1 200  OK", 200, " OK"),
    ],
)
def test_a_status_line_is_parsed(line, status, reason):
    head = parse(status_line=line)
    assert (head.status, head.reason) == (status, reason)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"HTTP/1.1",
        b"HTTP/1.1 ",
        b"HTTP/1.1 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 200OK",
        b"HTTP/1.1 099 x",
        b"HTTP/1.1 000 x",
        b"HTTP/1.1 +20 OK",
        b"HTTP/1.1 2_0 OK",
        b"HTTP/1.1 20\xb2 OK",
        b"HTTP/1.1\t200 OK",
        b"HTTP/1.1 200\tOK",
        b" HTTP/1.1 200 OK",
        b"http/1.1 200 OK",
        b"HTTP/2 200 OK",
        b"HTTP/1.2 200 OK",
        b"HTTP/0.9 200 OK",
        b"HTTP/1.10 200 OK",
        b"HTTP/1 200 OK",
        b"HTTPS/1.1 200 OK",
        b"ICY 200 OK",
        b"<html>",
        b"GET / HTTP/1.1",
        b"\x15\x03\x03",
    ],
)
def test_a_malformed_status_line_is_refused(line):
    with pytest.raises(Malformed):
        parse(status_line=line)


def test_an_empty_line_before_the_status_line_is_refused():
    with pytest.raises(Malformed):
        response_head.parse(b"\r\nHTTP/1.1 200 OK\r\n\r\n", "GET")


# where the response ends

NO_BODY = [
    ("HEAD", 200),
    ("GET", 204),
    ("GET", 304),
    ("GET", 100),
    ("GET", 103),
    ("POST", 199),
    ("HEAD", 304),
]


@pytest.mark.parametrize(
    "lines, kind, length, keep_alive",
    [
        ([b"Content-Length: 5"], Sized, 5, True),
        ([b"content-length:\t005 "], Sized, 5, True),
        ([b"Content-Length: 0"], Sized, 0, True),
        ([b"Content-Length: 999999999999999999"], Sized, 10**18 - 1, True),
        ([b"Content-Length: 5", b"X: y", b"CONTENT-LENGTH: 5"], Sized, 5, True),
        ([b"Content-Length: 5", b"Connection: close"], Sized, 5, False),
        ([b"Transfer-Encoding: chunked"], Chunked, None, True),
        ([b"TRANSFER-ENCODING:\tChunked "], Chunked, None, True),
        ([b"Transfer-Encoding: chunked", b"Connection: x, Close"], Chunked, None, False),
        ([b"Transfer-Encoding: chunked", b"Content-Length: 5"], Chunked, None, False),
        (
            [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Connection: keep-alive"],
            Chunked,
            None,
            False,
        ),
        ([], UntilClose, None, False),
        ([b"Connection: keep-alive"], UntilClose, None, False),
    ],
)
def test_the_fields_decide_where_a_response_ends(lines, kind, length, keep_alive):
    head = parse(*lines)
    assert (type(head.body), head.length, head.keep_alive) == (kind, length, keep_alive)
    assert head.body.ended is (length == 0)
    if kind is Sized and length:
        head.body.feed(b"x" * 10)
        assert head.body.used == min(length, 10)


@pytest.mark.parametrize("method, status", NO_BODY)
def test_some_responses_have_no_body_despite_their_fields(method, status):
    line = b"HTTP/1.1 %d x" % status
    for lines, length in (
        ([b"Content-Length: 5"], 5),
        ([b"Transfer-Encoding: chunked"], None),
        ([], None),
    ):
        head = parse(*lines, status_line=line, method=method)
        assert type(head.body) is Sized and head.body.ended
        assert head.keep_alive is not (status in (204, 304) and "transfer-encoding" in head.values)
        # The response to a GET would have this length.
        assert head.length == length
    assert not parse(b"Connection: close", status_line=line, method=method).keep_alive


@pytest.mark.parametrize("method", ["GET", "POST", "head", "CONNECT-NOT"])
def test_every_other_response_has_a_body(method):
    for status in (200, 201, 205, 301, 401, 500):
        head = parse(b"Content-Length: 5", status_line=b"HTTP/1.1 %d x" % status, method=method)
        assert not head.body.ended


@pytest.mark.parametrize(
    "line, keep_alive",
    [
        (b"X: y", False),
        (b"Connection: keep-alive", True),
        (b"Connection: keep-alive, close", False),
    ],
)
def test_an_http_1_0_connection_stays_open_only_with_keep_alive(line, keep_alive):
    head = parse(b"Content-Length: 5", line, status_line=b"HTTP/1.0 200 OK")
    assert (type(head.body), head.keep_alive) == (Sized, keep_alive)


@pytest.mark.parametrize(
    "lines",
    [
        *(
            [b"Content-Length:" + value]
            for value in (
                b"",
                b" +5",
                b" -5",
                b" -0",
                b" 5.0",
                b" 5e1",
                b" 0x5",
                b" 1_0",
                b" 5 5",
                b" 5, 5",
                b" 5,",
                b" 5;x",
                b' "5"',
                b" \xb2",
                b" \xa05",
                b" 1000000000000000000",
                b" " + b"9" * 400,
            )
        ),
        [b"Content-Length: 5", b"Content-Length: 6"],
        [b"Content-Length: 5", b"Content-Length: 05"],
        [b"Content-Length: five", b"Content-Length: five"],
        [b"Content-Length: x", b"Transfer-Encoding: chunked"],
        *(
            [b"Transfer-Encoding:" + value]
            for value in (
                b"",
                b" identity",
                b" gzip",
                b" gzip, chunked",
                b" chunked, gzip",
                b" chunked, chunked",
                b" chunked,",
                b" ,chunked",
                b" chunked;q=1",
                b" xchunked",
                b" chunked \xa0",
                b' "chunked"',
                b" chun ked",
            )
        ),
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked"],
        [b"Content-Length: 5", b"Transfer-Encoding: identity"],
    ],
)
def test_a_response_with_an_ambiguous_end_is_refused(lines):
    for status, method in ((200, "GET"), (200, "HEAD"), (204, "GET")):
        with pytest.raises(Malformed, match="Content-Length|Transfer-Encoding"):
            parse(*lines, status_line=b"HTTP/1.1 %d x" % status, method=method)


def test_an_http_1_0_response_with_chunks_is_refused():
    with pytest.raises(Malformed, match="Transfer-Encoding"):
        parse(b"Transfer-Encoding: chunked", status_line=b"HTTP/1.0 200 OK")


# the lines


@pytest.mark.parametrize(
    "lines, value",
    [
        ([b"X: a", b" b"], "a b"),
        ([b"X: a", b"\tb"], "a b"),
        ([b"X: a", b" \t b"], "a b"),
        ([b"X: a", b" b", b"\tc"], "a b c"),
        ([b"X:", b" a"], "a"),
        ([b"X: a", b" "], "a"),
        ([b"X: a", b" ", b" b"], "a  b"),
        ([b"X: a", b" Y: b"], "a Y: b"),
    ],
)
def test_a_fold_becomes_a_space(lines, value):
    folded, other = passed_lines(parse(*lines, b"Z: z"))
    assert (folded.decode().rstrip(), other) == (f"X: {value}", b"Z: z")


@pytest.mark.parametrize(
    "lines",
    [
        [b"Content-Length: 5", b" 6"],
        [b"Content-", b" Length: 5"],
        [b"Transfer-Encoding: chunked,", b" gzip"],
        [b"Transfer-Encoding", b" : chunked"],
    ],
)
def test_a_fold_cannot_hide_framing(lines):
    with pytest.raises(Malformed):
        parse(*lines)
    assert parse(b"Transfer-Encoding:", b" chunked").body.ended is False


@pytest.mark.parametrize(
    "lines", [[b" X: y"], [b"\tX: y"], [b" "], [b" OK", b"X: y"], [b" ", b" Content-Length: 5"]]
)
def test_a_folded_status_line_is_refused(lines):
    with pytest.raises(Malformed):
        parse(*lines)


@pytest.mark.parametrize(
    "line",
    [
        b"X: a\rb",
        b"X: a\nb",
        b"X: a\nSet-Cookie: b",
        b"X: a\0",
        b"X: \x1b[31m",
        b"X: \x7f",
        b"X: a\r",
        b"X: a\n",
        b"X: a\n\n b",
        b"X: a\n b",
        b"X: a\x0b",
        b": a",
        b"X Y: a",
        b"X : a",
        b"X\r: a",
        b"X\nY: a",
        b"X\xe9: a",
        b"X\0: a",
        b"(X): a",
        b"X",
        b"Content-Length : 5",
        b"Transfer-Encoding\t: chunked",
        b"Set-Cookie: a\0b",
    ],
)
def test_an_ambiguous_line_is_refused(line):
    for lines in ([line], [b"A: 1", line, b"B: 2"]):
        with pytest.raises(Malformed):
            parse(*lines)


def test_200_fields_are_accepted_and_201_refused():
    assert len(passed_lines(parse(*[b"X: y"] * FIELD_LIMIT))) == FIELD_LIMIT
    with pytest.raises(Malformed):
        parse(*[b"X: y"] * (FIELD_LIMIT + 1))


def test_an_error_repeats_nothing_of_the_response():
    for line in (
        b"Content-Length: abcdefgh",
        b"abcdefgh",
        b"X: abcdefgh\0",
        b"Transfer-Encoding: abcdefgh",
    ):
        with pytest.raises(Malformed) as caught:
            parse(line)
        assert "abcdefgh" not in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        [b"Y: " + b" " * 60000 + b"x"],
        [b"Y: " + b" \t" * 30000, b" x"],
        [b"Y: a", *[b" " * 300] * 200],
        [b" " * 60000],
        [b"Y: a", *[b" a"] * 15000],
    ],
)
def test_a_long_line_is_parsed_in_linear_time(lines):
    began = time.process_time()
    with contextlib.suppress(Malformed):
        parse(b"X: a", b" b", *lines)
    assert time.process_time() - began < 0.2
