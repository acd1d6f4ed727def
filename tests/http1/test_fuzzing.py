"""Whole conversations, good and bad, in pieces of any size, compared with h11.

This parser may be stricter than h11. Every message that it accepts, h11 must accept too, with the
same content and the same end: otherwise the bytes after it would be another message to one of two
servers. FUZZ=20000 tries that many messages of each kind instead of the default; FUZZ_SEED=n tries
others.
"""

import os
import random
import re

import h11
import pytest

from xaiproxy import errors
from xaiproxy.http1 import headers, message_head, request_head, response_head
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.framing import Chunked
from xaiproxy.http1.message_head import Malformed
from xaiproxy.http1.request_body import RequestBody

CASES = int(os.environ.get("FUZZ", "1500"))
SEED = os.environ.get("FUZZ_SEED", "1")
NO_LIMIT = 1 << 30
# The maximum bytes of a head or a line; the proxy's own limits are lower.
H11_LIMIT = 1 << 20

# Outcomes of a connection
# It ended between two messages.
END = "end"
# It ended in the middle of a message.
CUT = "cut"
REFUSED = "refused"
# The parser closes it after a message.
CLOSED = "closed"


class Pieces(Connection):
    """A connection on which these pieces arrive."""

    def __init__(self, pieces: list[bytes]):
        self.unread = b""
        self._pieces = iter(pieces)

    def recv(self, limit: float | None) -> bytes:
        data, self.unread = self.unread or next(self._pieces, b""), b""
        return data

    def send_all(self, data: bytes, limit: float | None = None) -> None:
        assert data == b"HTTP/1.1 100 Continue\r\n\r\n"

    def rest(self) -> bytes:
        self.unread = b"".join([self.unread, *self._pieces])
        return self.unread


def message(start: tuple[str, ...], fields: list[tuple[str, str]], content: bytes, stays: bool):
    """Return the comparable parts of a message.

    Framing is compared by its effect, since h11 rewrites those fields.
    """
    passed_fields = [(name.lower(), value) for name, value in fields]
    passed_fields = [
        field for field in passed_fields if field[0] not in headers.NOT_PASSED | {"content-length"}
    ]
    return start, passed_fields, content, stays


def our_requests(pieces: list[bytes]) -> tuple[list, str, bytes]:
    """Return the requests in these bytes, the connection's outcome, and the bytes left on it."""
    connection, found = Pieces(pieces), []
    while True:
        try:
            data = connection.recv_head(request_head.SIZE_LIMIT, 5)
            if not data:
                return found, END, b""
            head = request_head.parse(data)
            content = RequestBody(head, connection, 5).read()
        except (Malformed, errors.BadRequest):
            return found, REFUSED, b""
        except (EOFError, errors.ClientGone):
            return found, CUT, b""
        start = head.method, head.target, head.version[5:]
        found.append(message(start, head.fields, content, head.keep_alive))
        if not head.keep_alive:
            return found, CLOSED, connection.rest()


def our_answers(pieces: list[bytes], methods: list[str]) -> tuple[list, str, bytes]:
    """Parse responses to requests with these methods, one after the other, as Exchange does.

    Return the responses, the connection's outcome, and the bytes left on it.
    """
    connection, found = Pieces(pieces), []
    for method in methods:
        try:
            status = 0
            # Interim responses come first.
            while status < 200:
                data = connection.recv_head(response_head.SIZE_LIMIT, 5)
                if not data:
                    return found, CUT if status else END, b""
                head = response_head.parse(data, method)
                status = head.status
                if status == 101:
                    return found, REFUSED, b""
            content = b""
            while not head.body.ended:
                data = connection.recv(5)
                if not data:
                    head.body.end_of_connection()
                content += b"".join([data[start:end] for start, end in head.body.feed(data)])
                connection.unread = data[head.body.used :]
        except Malformed:
            return found, REFUSED, b""
        except EOFError:
            return found, CUT, b""
        passed, _ = message_head.fields(head.lines.split("\r\n")[1:])
        found.append(message((str(status), head.reason), passed, content, head.keep_alive))
        if not head.keep_alive:
            return found, CLOSED, connection.rest()
    return found, CLOSED, connection.rest()


# What h11 reads


def text(data: bytes) -> str:
    return bytes(data).decode("latin-1")


def read_by_h11(connection: h11.Connection, data: bytes) -> tuple[tuple | None, bytes]:
    """Return h11's first message in `data`, or None if it refuses that, and the bytes after it."""
    start, fields, content = (), [], b""
    connection.receive_data(data)
    connection.receive_data(b"")
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return None, b""
        if isinstance(event, h11.Request):
            start = text(event.method), origin_form(text(event.target)), text(event.http_version)
        elif isinstance(event, h11.Response):
            start = str(event.status_code), text(event.reason)
        elif isinstance(event, h11.Data):
            content += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            if connection.their_state is h11.MIGHT_SWITCH_PROTOCOL:
                # The protocol does not change.
                connection.send(h11.Response(status_code=404, headers=[]))
            stays = connection.their_state is h11.DONE
            return message(start, fields, content, stays), connection.trailing_data[0]
        elif not isinstance(event, h11.InformationalResponse):
            # It is ConnectionClosed, or PAUSED before a protocol change.
            return None, b""
        if isinstance(event, (h11.Request, h11.Response)):
            fields = [(text(name), text(value)) for name, value in event.headers]


def origin_form(target: str) -> str:
    """Remove the authority of a target, which is that of Host."""
    if target.startswith("/") or "://" not in target:
        return target
    rest = target.partition("://")[2]
    path = rest[min(rest.find(mark) if mark in rest else len(rest) for mark in "/?") :]
    return path if path.startswith("/") else "/" + path


def h11_request(data: bytes, _method: str) -> tuple[tuple | None, bytes]:
    # RFC 9112 section 2.2 allows an empty line before a request; h11 refuses it.
    if data.startswith(b"\r\n"):
        data = data[2:]
    return read_by_h11(h11.Connection(h11.SERVER, H11_LIMIT), data)


def h11_answer(data: bytes, method: str) -> tuple[tuple | None, bytes]:
    connection = h11.Connection(h11.CLIENT, H11_LIMIT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    return read_by_h11(connection, data)


BLANK_BEFORE_EXTENSION = re.compile(rb"(?<=[0-9A-Fa-f])[ \t]+(?=;)")


def without_blanks(data: bytes) -> bytes:
    """Remove the blanks after the chunk sizes of the first message.

    RFC 9112 section 7.1.1 allows them; h11 does not.
    """
    at, is_interim = 0, True
    while is_interim:
        is_interim = re.match(rb"HTTP/1\.[01] 1", data[at:])
        at = data.index(b"\r\n\r\n", at + 2) + 4
    body, last, parts = Chunked(), at, [data[:at]]
    try:
        spans = body.feed(data[at:])
    # The body is not chunked.
    except Malformed:
        return data
    for start, end in (*spans, (body.used, body.used)):
        parts += [
            BLANK_BEFORE_EXTENSION.sub(b"", data[last : at + start]),
            data[at + start : at + end],
        ]
        last = at + end
    return b"".join([*parts, data[last:]])


def is_http_1_0(data: bytes) -> bool:
    return re.match(rb"(\r\n)?(HTTP/1\.0|[^\n]*HTTP/1\.0\r\n)", data) is not None


def compare(data: bytes, ours: tuple[list, str, bytes], read_one, methods: list[str]) -> None:
    """Assert that h11 reads the same messages, `ours`, from `data`."""
    found, end, left = ours
    for number, taken in enumerate(found):
        theirs, rest = read_one(data, methods[number])
        if theirs is None:
            theirs, rest = read_one(without_blanks(data), methods[number])
        assert theirs is not None, f"h11 refuses message {number} in {data!r}"
        assert taken[:3] == theirs[:3], f"message {number} of {data!r}"
        # h11 closes every HTTP/1.0 connection, even with Connection: keep-alive.
        assert theirs[3] or not taken[3] or is_http_1_0(data), (
            f"h11 closes after message {number} of {data!r}"
        )
        data = rest
    if end == CLOSED:
        assert data == left, f"h11 ends {len(data) - len(left)} bytes earlier"
    elif end == END:
        assert data in (b"", b"\r\n")
    elif end == CUT:
        assert read_one(data, methods[len(found)])[0] is None, (
            f"an incomplete message is complete to h11: {data!r}"
        )


def requests_compared(data: bytes, *splits: list[bytes]) -> tuple[list, str, bytes]:
    ours = our_requests([data])
    for pieces in splits:
        assert our_requests(pieces) == ours, f"{pieces!r} differ from the same bytes in one piece"
    compare(data, ours, h11_request, [""] * (len(ours[0]) + 1))
    return ours


def answers_compared(
    data: bytes, methods: list[str], *splits: list[bytes]
) -> tuple[list, str, bytes]:
    ours = our_answers([data], methods)
    for pieces in splits:
        assert our_answers(pieces, methods) == ours, (
            f"{pieces!r} differ from the same bytes in one piece"
        )
    compare(data, ours, h11_answer, methods)
    return ours


def every_split(data: bytes) -> list[list[bytes]]:
    return [
        [data[at : at + 1] for at in range(len(data))],
        *([data[:at], data[at:]] for at in range(1, len(data))),
    ]


# The corpus

POST = b"POST /v1/x HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKED_POST = POST + CHUNKED + b"\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
NEXT_OK = OK + b"Content-Length: 4\r\n\r\nnext"
CHUNKED_OK = OK + CHUNKED + b"\r\n"

# Chunked bodies: the bytes, and the content, or None if refused.
BODIES = [
    (b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"05\r\nhello\r\n00\r\n\r\n", b"hello"),
    (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    (b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n", b"ab"),
    (b"5;x=y\r\nhello\r\n0;z\r\n\r\n", b"hello"),
    (b'5 ;x = "y;z"\r\nhello\r\n0\t;\r\n\r\n', b"hello"),
    (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    (b"7\r\n0\r\n\r\nGE\r\n0\r\n\r\n", b"0\r\n\r\nGE"),
    (b"1\r\na\r\n0\r\nX: y\r\nZ:\r\n\r\n", b"a"),
    (b"000000000000001\r\na\r\n0\r\n\r\n", b"a"),
    *(
        (b"5\r\nhello\r\n" + size + b"\r\nx\r\n0\r\n\r\n", None)
        for size in (
            b"+1",
            b"-1",
            b"1_0",
            b"0x1",
            b" 1",
            b"1 ",
            b"\t1",
            b"1\t",
            b"",
            b" ",
            b";",
            b"1,",
            b"1 1",
            b"g",
            b"1.0",
            b"0000000000000001",
            b"fffffffffffffffff",
            b"\xb9",
            b"1\xa0",
            b"1\0",
            b"1\r",
            b"\r1",
            b"\n1",
            b"1\n",
            b"1\rx",
            b"1;\r",
            b"1;\n",
            b"1;a\0b",
            b"1;\x7f",
            b'1;a="\r\n"',
            b"1;" + b"a" * 5000,
        )
    ),
    *((b"1" + end + b"a\r\n0\r\n\r\n", None) for end in (b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"")),
    *(
        (b"5\r\nhello" + end + b"0\r\n\r\n", None)
        for end in (b"", b"\n", b"\r", b"\r\r\n", b"x\r\n", b"\r\n\r\n")
    ),
    *(
        (b"0\r\n" + trailer + b"\r\n", None)
        for trailer in (
            b"X\r\n",
            b"X : y\r\n",
            b" X: y\r\n",
            b": y\r\n",
            b"X: y\n",
            b"X: y\r",
            b"X: \ry\n",
            b"X: y\r\n z\r\n",
            b"X: \0\r\n",
            b"X Y: z\r\n",
            b"X\xe9: y\r\n",
            b"\n",
            b"X: y\r\n" * 101,
            b"GET / HTTP/1.1\r\n",
            b"X: " + b"y" * 5000 + b"\r\n",
            CHUNKED,
            b"content-length: 0\r\n",
        )
    ),
]
# The bytes, the content of each message, the outcome, the bytes left.
GOOD_REQUESTS = [
    (b"", [], END, b""),
    (b"\r\n", [], CUT, b""),
    (NEXT + NEXT, [b"", b""], END, b""),
    (b"\r\n" + NEXT, [b""], END, b""),
    (NEXT + b"\r\n" + NEXT, [b"", b""], END, b""),
    (NEXT[:-1], [], CUT, b""),
    (POST + b"Content-Length: 5\r\n\r\nhello" + NEXT, [b"hello", b""], END, b""),
    (POST + b"Content-Length: 005\r\n\r\nhello", [b"hello"], END, b""),
    (POST + b"Content-Length: 0\r\n\r\n" + NEXT, [b"", b""], END, b""),
    (POST + b"Content-Length: 5\r\n\r\nhell", [], CUT, b""),
    (POST + b"Transfer-Encoding: CHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n" + NEXT, [b"a", b""], END, b""),
    (POST + b"session_id: 1\r\nsession-id: 2\r\n\r\n", [b""], END, b""),
    (b"GET http://A:80/x HTTP/1.1\r\nHost: a\r\n\r\n" + NEXT, [b"", b""], END, b""),
    (b"GET https://a?x HTTP/1.1\r\nHost: a:443\r\n\r\n" + NEXT, [b"", b""], END, b""),
    (b"GET http://a HTTP/1.0\r\n\r\n" + NEXT, [b""], CLOSED, NEXT),
    (POST + b"Content-Length: 999999999999999999\r\n\r\nhello", [], CUT, b""),
    (
        POST + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello" + NEXT,
        [b"hello"],
        CLOSED,
        NEXT,
    ),
    (POST + b"Connection: close\xa0, x\r\n\r\n" + NEXT, [b"", b""], END, b""),
    (POST + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\na", [b"a"], END, b""),
    (POST + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n", [b""], END, b""),
    (b"GET / HTTP/1.0\r\n\r\n" + NEXT, [b""], CLOSED, NEXT),
    (
        b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\na" + NEXT,
        [b"a", b""],
        END,
        b"",
    ),
]
# Lines between the start line with Host (or the status line) and the empty line. They are refused
# in requests and responses.
BAD_HEADS = [
    b" folded: first\r\n",
    b"\tfolded: first\r\n",
    b"X: a\n",
    b"X: a\rb\r\n",
    b"X: a\r\r\n",
    b"X\r\n",
    b"X : a\r\n",
    b": a\r\n",
    b"X: \0\r\n",
    b"X: \x0b\r\n",
    b"X: \x7f\r\n",
    b"X\0: a\r\n",
    b"\xe9: a\r\n",
    b"X Y: a\r\n",
    b"X\xa0: a\r\n",
    b"X: " + b"a" * 66000 + b"\r\n",
    b"X: a\r\n" * 201,
    *(
        b"Content-Length:" + value + b"\r\n"
        for value in (
            b"",
            b" +1",
            b" -1",
            b" 1_0",
            b" 0x1",
            b" 1 1",
            b" 1.0",
            b" 1,",
            b" 1, 1",
            b" 1,2",
            b" \xb9",
            b" 1\xa0",
            b" 1;",
            b'"1"',
            b" 1000000000000000000",
            b" " + b"9" * 30,
        )
    ),
    b"Content-Length: 1\r\nContent-Length: 2\r\n",
    b"Content-Length: 1\r\nContent-Length: 01\r\n",
    *(
        b"Transfer-Encoding:" + value + b"\r\n"
        for value in (
            b"",
            b" gzip",
            b" gzip, chunked",
            b" chunked, gzip",
            b" chunked, chunked",
            b" chunked,",
            b" identity",
            b" chunked;x",
            b" xchunked",
            b" chunked\xa0",
            b" \x0bchunked",
            b' "chunked"',
        )
    ),
    CHUNKED + CHUNKED,
    b"Transfer-Encoding: gzip\r\n" + CHUNKED,
    b"Transfer-Encoding : chunked\r\n",
    b"Content-Length : 1\r\n",
]
BAD_REQUESTS = [
    b"\r\n\r\n" + NEXT,
    b"\n" + NEXT,
    b" " + NEXT,
    b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x00\n",
    POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
    POST + b"Content-Length: 1\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    POST + CHUNKED + b"Content-Length: 1\r\n\r\n0\r\n\r\n",
    POST + b"Content-Length: 1\r\nTransfer-Encoding: CHUNKED\r\n\r\n0\r\n\r\n",
    b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a/ HTTP/1.1\r\n\r\n",
    b"GET http://a@b/ HTTP/1.1\r\nHost: b\r\n\r\n",
    POST + b"X: a\r\n b\r\n\r\n",
    POST + b"Transfer_Encoding: chunked\r\n\r\n",
    POST + b"Content_Length: 1\r\n\r\n",
    b"POST / HTTP/1.0\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    b"A" * 70000,
]
# The bytes, the method, the content of each message, the outcome, the bytes left.
GOOD_ANSWERS = [
    (b"", "GET", [], END, b""),
    (NEXT_OK + NEXT_OK, "GET", [b"next"] * 2, CLOSED, b""),
    (OK + b"\r\nhello", "GET", [b"hello"], CLOSED, b""),
    (OK + b"\r\n", "GET", [b""], CLOSED, b""),
    (OK + b"Connection: keep-alive\r\n\r\n" + NEXT_OK, "GET", [NEXT_OK], CLOSED, b""),
    (b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\na", "GET", [b"a"], END, b""),
    (OK + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na", "GET", [b"a"], END, b""),
    (OK + b"Content-Length: 9\r\n\r\na", "GET", [], CUT, b""),
    (OK[:-1], "GET", [], CUT, b""),
    (
        OK + b"Content-Length: 1\r\nConnection: close\r\n\r\na" + NEXT_OK,
        "GET",
        [b"a"],
        CLOSED,
        NEXT_OK,
    ),
    (
        OK + b"Content-Length: 9\r\n" + CHUNKED + b"\r\n1\r\na\r\n0\r\n\r\n" + NEXT_OK,
        "GET",
        [b"a"],
        CLOSED,
        NEXT_OK,
    ),
    (OK + b"Transfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", "GET", [b"a"], END, b""),
    (OK + b"Content-Length: 9\r\n\r\n" + OK + CHUNKED + b"\r\n", "HEAD", [b"", b""], CLOSED, b""),
    (b"HTTP/1.1 204 x\r\nContent-Length: 9\r\n\r\n" + NEXT_OK, "GET", [b"", b"next"], CLOSED, b""),
    # h11 would keep these two connections open: it expects no body here, whatever is announced.
    (b"HTTP/1.1 204 x\r\n" + CHUNKED + b"\r\n" + NEXT_OK, "GET", [b""], CLOSED, NEXT_OK),
    (b"HTTP/1.1 304 x\r\n" + CHUNKED + b"\r\n" + NEXT_OK, "GET", [b""], CLOSED, NEXT_OK),
    (
        b"HTTP/1.1 100 x\r\n\r\nHTTP/1.1 103 x\r\nContent-Length: 9\r\n\r\n" + NEXT_OK,
        "POST",
        [b"next"],
        END,
        b"",
    ),
    (b"HTTP/1.1 100 x\r\n\r\n", "GET", [], CUT, b""),
    (OK + b"X: a\r\n b\r\n\tc\r\nContent-Length:\r\n 1\r\n\r\na", "GET", [b"a"], END, b""),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na" + NEXT_OK, "GET", [b"a"], CLOSED, NEXT_OK),
    (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\na" + NEXT_OK,
        "GET",
        [b"a", b"next"],
        CLOSED,
        b"",
    ),
    (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nhello", "GET", [b"hello"], CLOSED, b""),
]
BAD_ANSWERS = [
    b"\r\n" + NEXT_OK,
    b"\n",
    b"HTTP/1.1 2000 x\r\n\r\n",
    b"HTTP/1.1 20 x\r\n\r\n",
    b"HTTP/1.1 099 x\r\n\r\n",
    b"ICY 200 OK\r\n\r\n",
    b"HTTP/2.0 200 OK\r\n\r\n",
    b"HTTP/1.1 +20 x\r\n\r\n",
    b"HTTP/1.1  200 x\r\n\r\n",
    b"HTTP/1.1 200\tx\r\n\r\n",
    b"HTTP/1.1 200 a\0b\r\n\r\n",
    b"HTTP/1.1 101 x\r\n\r\n",
    b"HTTP/1.1 200 OK\n\n",
    b"\x15\x03\x01\x00\x02\x02\x0a\n",
    b"HTTP/1.0 200 OK\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked,\r\n gzip\r\n\r\n",
    OK + b"Content-Length: 1\r\n 2\r\n\r\n",
    b"HTTP/1.1 100 x\r\nContent-Length: x\r\n\r\n" + NEXT_OK,
    b"HTTP/1.1 204 x\r\nTransfer-Encoding: gzip\r\n\r\n",
    NEXT_OK[:-1] + b"\n" + OK[:-2] + b"\n\n",
]
CORPUS_REQUESTS = [
    *(data for data, *_ in GOOD_REQUESTS),
    *BAD_REQUESTS,
    *(CHUNKED_POST + body for body, _ in BODIES),
    *(POST + lines + b"\r\n" for lines in BAD_HEADS),
]
CORPUS_ANSWERS = [
    *(data for data, *_ in GOOD_ANSWERS),
    *BAD_ANSWERS,
    *(CHUNKED_OK + body for body, _ in BODIES),
    *(OK + lines + b"\r\n" for lines in BAD_HEADS),
]


def few_splits(data: bytes) -> list[list[bytes]]:
    return (
        every_split(data)
        if len(data) < 300
        else [[data[at : at + 999] for at in range(0, len(data), 999)]]
    )


def contents(ours: tuple[list, str, bytes]) -> tuple[list[bytes], str, bytes]:
    return [taken[2] for taken in ours[0]], *ours[1:]


@pytest.mark.parametrize("data, found, end, left", GOOD_REQUESTS)
def test_h11_reads_good_requests_alike(data, found, end, left):
    assert contents(requests_compared(data, *few_splits(data))) == (found, end, left)


@pytest.mark.parametrize("data, method, found, end, left", GOOD_ANSWERS)
def test_h11_reads_good_responses_alike(data, method, found, end, left):
    methods = [method] * (2 if b"HTTP/" in data[1:] else 1)
    if end == END:
        methods.append("GET")
    assert contents(answers_compared(data, methods, *few_splits(data))) == (found, end, left)


def test_bad_requests_are_refused():
    for data in (*BAD_REQUESTS, *(POST + lines + b"\r\n" for lines in BAD_HEADS)):
        assert requests_compared(data + NEXT, *few_splits(data + NEXT)) == ([], REFUSED, b""), data


def test_bad_responses_are_refused():
    for data in (*BAD_ANSWERS[:-1], *(OK + lines + b"\r\n" for lines in BAD_HEADS)):
        for method in ("GET", "HEAD"):
            ours = answers_compared(data + NEXT_OK, [method], *few_splits(data + NEXT_OK))
            assert ours == ([], REFUSED, b""), data


def test_h11_reads_chunked_bodies_alike():
    for body, content in BODIES:
        data = CHUNKED_POST + body + NEXT
        assert contents(requests_compared(data, *few_splits(data))) == (
            ([], REFUSED, b"") if content is None else ([content, b""], END, b"")
        ), body
        data = CHUNKED_OK + body + NEXT_OK
        assert contents(answers_compared(data, ["GET"] * 2, *few_splits(data))) == (
            ([], REFUSED, b"") if content is None else ([content, b"next"], CLOSED, b"")
        ), body


# Generated


def pick(chance: random.Random, *choices):
    return chance.choice(choices)


def in_pieces(chance: random.Random, data: bytes) -> list[bytes]:
    if len(data) < 2:
        return [data]
    at = sorted({chance.randrange(1, len(data)) for _ in range(chance.randrange(1, 12))})
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)])]


def a_field(chance: random.Random) -> bytes:
    name = pick(chance, b"X", b"x-y", b"Accept", b"!#$%&'*+-.^`|~", b"Date", b"TE", b"Content-Type")
    value = pick(
        chance,
        b"",
        b"a",
        b"a, b",
        b"\xe9\xff\x80",
        b"a\tb",
        b'a:b;c="d"',
        b"x" * chance.randrange(400),
    )
    return (
        name + b":" + pick(chance, b"", b" ", b"\t ") + value + pick(chance, b"", b" \t") + b"\r\n"
    )


def fields(chance: random.Random) -> bytes:
    lines = [a_field(chance) for _ in range(chance.randrange(4))]
    if chance.random() < 0.2:
        lines.append(
            b"Connection: " + pick(chance, b"close", b"keep-alive", b"x, Close", b"te") + b"\r\n"
        )
    return b"".join(lines)


def content(chance: random.Random) -> bytes:
    return pick(
        chance, b"", b"a", b"0\r\n\r\n", NEXT, NEXT_OK, chance.randbytes(chance.randrange(2000))
    )


def in_chunks(chance: random.Random, data: bytes) -> bytes:
    extension = pick(chance, b"", b"", b";", b";a=b", b' ; a="b;"', b";\xff")
    sizes = pick(chance, b"%x%b\r\n", b"%X%b\r\n", b"%05x%b\r\n")
    pieces = [piece for piece in in_pieces(chance, data) if piece]
    chunks = b"".join(sizes % (len(piece), extension) + piece + b"\r\n" for piece in pieces)
    trailers = b"".join(a_field(chance) for _ in range(pick(chance, 0, 0, 3)))
    return chunks + pick(chance, b"0", b"000") + extension + b"\r\n" + trailers + b"\r\n"


def framed(chance: random.Random, data: bytes) -> bytes:
    """Return the end of a head, and the body."""
    if chance.random() < 0.5:
        return (
            pick(chance, CHUNKED, CHUNKED.upper(), CHUNKED.title())
            + fields(chance)
            + b"\r\n"
            + in_chunks(chance, data)
        )
    return b"Content-Length: %d\r\n" % len(data) + fields(chance) + b"\r\n" + data


def a_request(chance: random.Random) -> tuple[bytes, bytes]:
    """Return a valid request and its content."""
    method, target = (
        pick(chance, b"GET", b"POST", b"M-S"),
        pick(chance, b"/", b"/a%2F?b=c", b"http://a/a?b", b"HTTP://A:80?b://c"),
    )
    start = pick(chance, b"", b"", b"\r\n") + method + b" " + target + b" HTTP/1.1\r\n"
    start += fields(chance) + b"Host: a\r\n"
    data = content(chance)
    if chance.random() < 0.2:
        return start + b"\r\n", b""
    return start + framed(chance, data), data


def an_answer(chance: random.Random, method: str) -> tuple[bytes, bytes]:
    interim = pick(
        chance,
        b"",
        b"",
        b"",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 x\r\nLink: a\r\n\r\n",
    )
    status = pick(chance, b"200", b"200", b"200", b"204", b"304", b"404", b"500", b"403")
    reason = pick(chance, b"", b" ", b" OK", b" Not \xe9")
    start = interim + b"HTTP/1.1 " + status + reason + b"\r\n" + fields(chance)
    data = content(chance)
    if status in (b"204", b"304") or method == "HEAD":
        folded = a_field(chance) + b" folded\r\n"
        return start + pick(chance, b"", CHUNKED, b"Content-Length: 9\r\n", folded) + b"\r\n", b""
    if chance.random() < 0.1:
        return start + b"Connection: close\r\n\r\n" + data, data
    return start + framed(chance, data), data


def generators(kind: str) -> list[random.Random]:
    return (random.Random(f"{kind} {SEED} {number}") for number in range(CASES))


def test_generated_requests_in_any_pieces_are_read():
    for chance in generators("requests"):
        made = [a_request(chance) for _ in range(chance.randrange(1, 4))]
        data = b"".join(request for request, _ in made)
        found, end, left = requests_compared(data, in_pieces(chance, data))
        assert [taken[2] for taken in found] == [content for _, content in made[: len(found)]], data
        assert end in (END, CLOSED) and left == b"".join(
            request for request, _ in made[len(found) :]
        ), data


def test_generated_responses_in_any_pieces_are_read():
    for chance in generators("answers"):
        methods = [pick(chance, "GET", "POST", "HEAD") for _ in range(chance.randrange(1, 4))]
        made = [an_answer(chance, method) for method in methods]
        data = b"".join(answer for answer, _ in made)
        found, end, left = answers_compared(data, methods, in_pieces(chance, data))
        # The end of the connection ended the body.
        if end == CLOSED and not left and len(found) < len(made):
            last = found.pop()
            assert last[2].endswith(b"".join(answer for answer, _ in made[len(found) + 1 :])), data
        else:
            assert end == CLOSED and left == b"".join(answer for answer, _ in made[len(found) :]), (
                data
            )
        assert [taken[2] for taken in found] == [content for _, content in made[: len(found)]], data


# Mutated

SPLICES = [
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\0",
    b"\x0b",
    b"\x0c",
    b"\x1c",
    b"\x7f",
    b"\x85",
    b"\xa0",
    b":",
    b";",
    b",",
    b"_",
    b"+",
    b"-",
    b"0",
    b"1",
    b"a",
    b"0x",
    b'"',
    b"\r\n ",
    b"\r\n\t",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n",
    b"HTTP/1.0",
    b"HTTP/1.1",
    b"chunked",
    b"gzip, ",
    b"close",
    b"keep-alive",
    b"Content-Length: 5\r\n",
    b"Content-Length: 1\r\n",
    CHUNKED,
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Host: b\r\n",
    b"X: y\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: x\r\nConnection: upgrade\r\n",
    b"100",
    b"101",
    b"204",
    b"304",
    b"HEAD",
    b"CONNECT",
    b"http://a",
    b"https://b/",
    b"://",
    b"Host: a\r\n",
    NEXT,
    NEXT_OK,
    b";" * 300,
]


def mutated(chance: random.Random, data: bytes, corpus: list[bytes]) -> bytes:
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data) + 1)
        # Line ends matter most.
        if chance.random() < 0.3:
            at = data.find(b"\r\n", at) + pick(chance, 0, 1, 2)
        to = at + pick(chance, 0, 0, 1, 2, chance.randrange(20))
        put = pick(
            chance,
            b"",
            chance.choice(SPLICES),
            chance.choice(SPLICES),
            data[at:to].swapcase(),
            data[at:to] * 2,
            chance.randbytes(1),
        )
        data = data[:at] + put + data[to:]
    if chance.random() < 0.1:
        data += chance.choice(corpus)
    return data


def test_h11_accepts_what_the_proxy_accepts_of_mutated_requests():
    whole = 0
    for chance in generators("broken requests"):
        start = (
            chance.choice(CORPUS_REQUESTS)
            if chance.random() < 0.4
            else b"".join(a_request(chance)[0] for _ in range(chance.randrange(1, 3)))
        )
        data = mutated(chance, start, CORPUS_REQUESTS)
        whole += len(requests_compared(data, in_pieces(chance, data), in_pieces(chance, data))[0])
    assert whole > CASES / 10, "too few mutated messages are valid to prove anything"


def test_h11_accepts_what_the_proxy_accepts_of_mutated_responses():
    whole = 0
    for chance in generators("broken answers"):
        methods = [pick(chance, "GET", "GET", "POST", "HEAD") for _ in range(3)]
        start = (
            chance.choice(CORPUS_ANSWERS)
            if chance.random() < 0.4
            else b"".join(an_answer(chance, method)[0] for method in methods[:2])
        )
        data = mutated(chance, start, CORPUS_ANSWERS)
        whole += len(
            answers_compared(data, methods, in_pieces(chance, data), in_pieces(chance, data))[0]
        )
    assert whole > CASES / 10, "too few mutated messages are valid to prove anything"


# The only messages that h11 refuses and the proxy accepts


@pytest.mark.parametrize(
    "data",
    [
        # RFC 9112 section 2.2.
        b"\r\n" + NEXT,
        # RFC 9112 section 7.1.1.
        CHUNKED_POST + b"1 ;a\r\na\r\n0\r\n\r\n",
    ],
)
def test_h11_refuses_these_requests_that_the_proxy_accepts(data):
    assert len(our_requests([data])[0]) == 1
    assert read_by_h11(h11.Connection(h11.SERVER, H11_LIMIT), data)[0] is None


def test_h11_closes_an_http_1_0_connection_despite_keep_alive():
    data = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    assert our_requests([data])[0][0][3] and not h11_request(data, "")[0][3]
