"""Ambiguous requests, sent to a real proxy in front of an upstream that records requests.

Two servers may parse these differently. Each is refused and its connection closed, or upstream
receives exactly its meaning, and a later request on the connection gets its own response. One proxy
and one upstream serve all tests, and another client sends a request in between, which would show
anything that is left on a connection.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
from proxy_process import Client, ProxyProcess
from recording_upstream import HANDSHAKE, RecordingUpstream, Seen

from xaiproxy.http1.framing import LINE_LIMIT
from xaiproxy.http1.request_head import SIZE_LIMIT

HOST = b"Host: localhost\r\n"
EVIL = b"GET /v1/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
LAST = b"0\r\n\r\n"


def post(
    *lines: bytes,
    body: bytes = b"",
    method: bytes = b"POST",
    target: bytes = b"/v1/x",
    version: bytes = b"HTTP/1.1",
) -> bytes:
    return b"\r\n".join(
        [method + b" " + target + b" " + version, b"Host: localhost", *lines, b"", body]
    )


def get(target: bytes, *lines: bytes, **how: bytes) -> bytes:
    return post(*lines, method=b"GET", target=target, **how)


def sized(body: bytes, *lines: bytes, **how: bytes) -> bytes:
    return post(*lines, b"Content-Length: %d" % len(body), body=body, **how)


def chunked(body: bytes, *lines: bytes) -> bytes:
    return post(*lines, CHUNKED, body=body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def both(*lines: bytes) -> bytes:
    """A body that is empty in chunks, and is the smuggled request by its length, or vice versa."""
    body = LAST + EVIL
    return post(*(line.replace(b"{}", b"%d" % len(body)) for line in lines), body=body)


# Refused. A server that overlooks the first error reads a request after it.

# CL.CL, and malformed lengths.
LENGTHS = {
    "two that agree": b"Content-Length: 5\r\nContent-Length: 5",
    "two that differ": b"Content-Length: 0\r\nContent-Length: 5",
    "two that differ in case": b"Content-Length: 0\r\ncontent-length: 5",
    "two with another between": b"Content-Length: 0\r\nX: y\r\nContent-Length: 5",
    "list that agrees": b"Content-Length: 5, 5",
    "list that differs": b"Content-Length: 0,5",
    "plus": b"Content-Length: +5",
    "minus": b"Content-Length: -5",
    "minus zero": b"Content-Length: -0",
    "hexadecimal": b"Content-Length: 0x5",
    "underscore": b"Content-Length: 0_5",
    "point": b"Content-Length: 5.0",
    "exponent": b"Content-Length: 5e0",
    "blank in it": b"Content-Length: 0 5",
    "quoted": b'Content-Length: "5"',
    "parameter": b"Content-Length: 5;q=1",
    "empty": b"Content-Length:",
    "word": b"Content-Length: five",
    "19 digits": b"Content-Length: 0000000000000000005",
    "2 ** 64 + 5": b"Content-Length: 18446744073709551621",
    "2 ** 32 and more": b"Content-Length: 4294967301, 5",
    "other digits": b"Content-Length: \xd9\xa5",
    "superscript": b"Content-Length: \xb2",
    "no-break space": b"Content-Length: 5\xa0",
    "vertical tab": b"Content-Length:\x0b5",
    "NUL": b"Content-Length: 5\0",
    "blank before the colon": b"Content-Length : 5",
    "tab before the colon": b"Content-Length\t: 5",
    "blank before the name": b"X: y\r\n Content-Length: 5",
    "twin": b"Content_Length: 5",
    "twin beside it": b"Content-Length: 0\r\nContent_Length: 5",
    "NUL in the name": b"Content-Length\0: 5",
    "folded": b"Content-Length:\r\n 5",
    "after a bare LF": b"X: y\nContent-Length: 5",
    "after a bare CR": b"X: y\rContent-Length: 5",
    "no-break space in the name": b"Content-Length\xa0: 5",
}
# TE.TE.
CODINGS = {
    "identity": b"Transfer-Encoding: identity",
    "identity first": b"Transfer-Encoding: identity, chunked",
    "gzip first": b"Transfer-Encoding: gzip, chunked",
    "gzip last": b"Transfer-Encoding: chunked, gzip",
    "twice in one": b"Transfer-Encoding: chunked, chunked",
    "empty element": b"Transfer-Encoding: chunked,",
    "empty element first": b"Transfer-Encoding: ,chunked",
    "empty": b"Transfer-Encoding:",
    "two lines": CHUNKED + b"\r\n" + CHUNKED,
    "another line": CHUNKED + b"\r\nTransfer-Encoding: x",
    "another line first": b"Transfer-Encoding: x\r\n" + CHUNKED,
    "case of the second": CHUNKED + b"\r\ntransfer-ENCODING: x",
    "parameter": b"Transfer-Encoding: chunked;q=1",
    "quoted": b'Transfer-Encoding: "chunked"',
    "single quotes": b"Transfer-Encoding: 'chunked'",
    "prefix": b"Transfer-Encoding: xchunked",
    "suffix": b"Transfer-Encoding: chunkedx",
    "words": b"Transfer-Encoding: x chunked",
    "cut": b"Transfer-Encoding: chunke",
    "blank before the colon": b"Transfer-Encoding : chunked",
    "tab before the colon": b"Transfer-Encoding\t: chunked",
    "vertical tab": b"Transfer-Encoding:\x0bchunked",
    "form feed": b"Transfer-Encoding:\x0cchunked",
    "no-break space": b"Transfer-Encoding: chunked\xa0",
    "NUL": b"Transfer-Encoding: chunked\0",
    "NUL in the name": b"Transfer-Encoding\0: chunked",
    "backspace": b"Transfer-Encoding: x\b\bchunked",
    "folded": b"Transfer-Encoding:\r\n chunked",
    "folded with a tab": b"Transfer-Encoding:\r\n\tchunked",
    "folded before the colon": b"Transfer-Encoding\r\n : chunked",
    "blank before the name": b"X: y\r\n " + CHUNKED,
    "tab before the name": b"X: y\r\n\t" + CHUNKED,
    "twin": b"Transfer_Encoding: chunked",
    "twin beside it": CHUNKED + b"\r\nTransfer_Encoding: x",
    "after a bare LF": b"X: y\n" + CHUNKED,
    "after a bare CR": b"X: y\r" + CHUNKED,
    "ends with LF": CHUNKED + b"\n",
    "ends with CR": CHUNKED + b"\r",
    "no-break space in the name": b"Transfer-Encoding\xa0: chunked",
    "long s": b"Transfer-Encoding: \xc5\xbfchunked",
}
# RFC 9112 section 7.
ANY_CASE = (
    b"Transfer-Encoding: Chunked",
    b"transfer-encoding: CHUNKED",
    b"Transfer-Encoding:cHUNKED",
)
# These are refused in the body, whatever precedes them.
CHUNKS = {
    "no size": b"\r\n\r\n",
    "plus": b"+1\r\na\r\n",
    "minus": b"-1\r\na\r\n",
    "0x": b"0x1\r\na\r\n",
    "0x of the last": b"0x0\r\n\r\n",
    "underscore": b"1_0\r\na\r\n",
    "blank before": b" 1\r\na\r\n",
    "blank after": b"1 \r\na\r\n",
    "tab after": b"1\t\r\na\r\n",
    "tab after the last": b"0\t\r\n\r\n",
    "letter after": b"1g\r\na\r\n",
    "decimal point": b"1.0\r\na\r\n",
    "comma": b"1,1\r\na\r\n",
    "quoted": b'"1"\r\na\r\n',
    "NUL after": b"1\0\r\na\r\n",
    "other digits": b"\xd9\xa1\r\na\r\n",
    "no-break space": b"1\xa0\r\na\r\n",
    "bare LF": b"1\na\r\n",
    "bare CR": b"1\ra\r\n",
    "CR CR LF": b"1\r\r\na\r\n",
    "bare LF after the last": b"0\n\n",
    "bare CR after the last": b"0\r\r\n",
    "bare LF for the empty line": b"0\r\n\n",
    "2 ** 64": b"10000000000000000\r\na\r\n",
    "2 ** 64 + 1 as 1": b"10000000000000001\r\na\r\n",
    "-1 of 64 bits": b"ffffffffffffffff\r\na\r\n",
    "zeros without end": b"0" * 20 + b"\r\n\r\n",
    "LF in an extension": b"1;a\nb\r\na\r\n",
    "CR in an extension": b"1;a\rb\r\na\r\n",
    "LF ends an extension": b"1;a\na\r\n",
    "LF in a quoted extension": b'1;a="\n"\r\na\r\n',
    "CRLF in a quoted extension": b'1;a="\r\n"\r\na\r\n',
    "NUL in an extension": b"1;\0\r\na\r\n",
    "LF ends the extension of the last": b"0;a\n\r\n",
    "huge extension": b"1;" + b"x" * LINE_LIMIT + b"\r\na\r\n",
    "huge extension of the last": b"0;" + b"x" * 70000 + b"\r\n\r\n",
    "longer than its size": b"1\r\nab\r\n",
    "shorter than its size": b"3\r\na\r\n0\r\n\r\n",
    "no end": b"1\r\na0\r\n\r\n",
    "LF as end": b"1\r\na\n0\r\n\r\n",
    "CR as end": b"1\r\na\r0\r\n\r\n",
    "blanks as end": b"1\r\na  0\r\n\r\n",
    "empty line after": b"1\r\na\r\n\r\n0\r\n\r\n",
}
TRAILERS = {
    "Content-Length": b"Content-Length: 5\r\n",
    "content-length": b"content-length: 0\r\n",
    "Transfer-Encoding": CHUNKED + b"\r\n",
    "among others": b"X: y\r\nTRANSFER-ENCODING: chunked\r\nZ: y\r\n",
    "folded": b"X: y\r\n Content-Length: 5\r\n",
    "no colon": b"X\r\n",
    "no name": b": y\r\n",
    "blank before the colon": b"X : y\r\n",
    "bare LF": b"X: y\n",
    "bare CR": b"X: y\rZ: a\r\n",
    "NUL": b"X: \0\r\n",
    "a request": b"GET /v1/smuggled HTTP/1.1\r\nHost: localhost\r\n",
    "101 of them": b"X: y\r\n" * 101,
    "a huge one": b"X: " + b"y" * 70000 + b"\r\n",
}
# Whole requests.
HEADS = {
    "CL.TE": both(b"Content-Length: {}", CHUNKED),
    "TE.CL": both(CHUNKED, b"Content-Length: {}"),
    "CL.TE of length 0": both(b"Content-Length: 0", CHUNKED),
    "TE.CL of no length": both(CHUNKED, b"Content-Length:"),
    "CL.TE of no coding": both(b"Content-Length: {}", b"Transfer-Encoding:"),
    "CL.TE in other cases": both(b"content-LENGTH: {}", b"TRANSFER-encoding: chunked"),
    "CL.TE with others between": both(
        b"Content-Length: {}", b"X: y", b"Connection: keep-alive", CHUNKED
    ),
    "CL.TE with Connection": both(b"Content-Length: {}", CHUNKED, b"Connection: transfer-encoding"),
    "TE.CL with Connection": both(CHUNKED, b"Content-Length: {}", b"Connection: content-length"),
    "chunked in HTTP/1.0": post(CHUNKED, body=LAST + EVIL, version=b"HTTP/1.0"),
    "bare LF everywhere": b"POST /v1/x HTTP/1.1\nHost: localhost\n\n",
    "bare LF after the request line": b"POST /v1/x HTTP/1.1\nHost: localhost\r\n\r\n",
    "bare LF for the empty line": b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\n\n",
    "LF LF in a value": post(b"X: y\n\nGET /v1/smuggled HTTP/1.1"),
    "bare CR in a value": post(b"X: y\rZ: a"),
    "bare CR for a line end": b"POST /v1/x HTTP/1.1\rHost: localhost\r\n\r\n",
    "CR CR LF": post(b"X: y\r"),
    "CR before the colon": post(b"X\r: y"),
    "obs-fold": post(b"X: y\r\n z"),
    "obs-fold of blanks": post(b"X: y\r\n \t"),
    "obs-fold of the first": b"POST /v1/x HTTP/1.1\r\n X: y\r\n" + HOST + b"\r\n",
    "obs-fold of a request": post(b"X: y\r\n GET /v1/smuggled HTTP/1.1"),
    "NUL in a value": post(b"X: a\0b"),
    "NUL in a name": post(b"X\0: y"),
    "NUL in the target": get(b"/v1/\0x"),
    "NUL in the method": post(method=b"PO\0ST"),
    "DEL": post(b"X: \x7f"),
    "escape": post(b"X: \x1b[2J"),
    "blank before the colon": post(b"X : y"),
    "no colon": post(b"X"),
    "no name": post(b": y"),
    "blank in a name": post(b"X Y: z"),
    "UTF-8 name": post(b"X\xc3\xa9: y"),
    "byte order mark": post(b"\xef\xbb\xbfX: y"),
    "twin of X-Api-Key": post(b"X_Api_Key: a"),
    "half a twin": post(b"X-Api_Key: a"),
    "twin of X-Forwarded-For": post(b"X_Forwarded_For: ::1"),
    "twin of Content-Type": post(b"Content_Type: a"),
    "twin of CF-Connecting-IP": post(b"CF_Connecting_IP: ::1"),
    "twin of Remote-User": post(b"Remote_User: root"),
    "twin of X-Real-IP": post(b"X-Real_IP: ::1"),
    "twin of Sec-Fetch-Site": post(b"Sec_Fetch_Site: none"),
    "twin of Proxy-Authorization": post(b"proxy_authorization: a"),
    "twin of User-Agent": post(b"User_Agent: a"),
    "twin of Keep-Alive": post(b"Keep_Alive: a"),
    "two Hosts": post(b"Host: localhost"),
    "two Hosts that differ": post(b"host: evil.example"),
    "an empty Host beside it": post(b"Host:"),
    "no Host": b"GET /v1/x HTTP/1.1\r\n\r\n",
    "X-Host for Host": b"GET /v1/x HTTP/1.1\r\nX-Host: localhost\r\n\r\n",
    "two Hosts in HTTP/1.0": post(b"Host: localhost", version=b"HTTP/1.0"),
    "Host before a blank": post(b"Host : evil.example"),
    "folded Host": post(b"X: y\r\n Host: evil.example"),
    "Host after a bare LF": post(b"X: y\nHost: evil.example"),
    "absolute form of another": get(b"http://evil.example/v1/x"),
    "absolute form of upstream": get(b"https://api.x.ai/v1/x"),
    "absolute form of another port": get(b"http://localhost:81/v1/x"),
    "absolute form of https on the port of http": get(b"https://localhost:80/v1/x"),
    "absolute form of ours beside another Host": b"GET http://localhost/v1/x HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "absolute form beside two Hosts": get(b"http://localhost/v1/x", b"Host: localhost"),
    "absolute form without Host": b"GET http://localhost/v1/x HTTP/1.1\r\n\r\n",
    "absolute form with a user": get(b"http://localhost@evil.example/v1/x"),
    "absolute form with a backslash": get(b"http://localhost\\@evil.example/v1/x"),
    "absolute form with a fragment": get(b"http://localhost/v1/x#y"),
    "absolute form without an authority": get(b"http:///v1/x"),
    "scheme before a path": get(b"http:/v1/x"),
    "absolute form of ftp": get(b"ftp://localhost/v1/x"),
    "authority form": post(method=b"CONNECT", target=b"localhost:80"),
    "asterisk form": post(method=b"OPTIONS", target=b"*"),
    "no slash": get(b"v1/x"),
    "encoded slash first": get(b"%2Fv1/x"),
    "backslash first": get(b"\\v1\\x"),
    "fragment": get(b"/v1/x#y"),
    "blank in the target": get(b"/v1/x y"),
    "tab in the target": get(b"/v1/x\ty"),
    "CR in the target": get(b"/v1/x\ry"),
    "LF in the target": get(b"/v1/x\ny"),
    "CRLF in the target": get(b"/v1/x\r\nX: y"),
    "UTF-8 in the target": get(b"/v1/\xc3\xa9"),
    "two blanks": get(b" /v1/x"),
    "blank after the version": get(b"/v1/x", version=b"HTTP/1.1 "),
    "HTTP/0.9": b"GET /v1/x\r\n\r\n",
    "HTTP/0.9 with its number": get(b"/v1/x", version=b"HTTP/0.9"),
    "HTTP/1.2": get(b"/v1/x", version=b"HTTP/1.2"),
    "HTTP/2": get(b"/v1/x", version=b"HTTP/2.0"),
    "HTTP/1.10": get(b"/v1/x", version=b"HTTP/1.10"),
    "http/1.1": get(b"/v1/x", version=b"http/1.1"),
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "TLS": b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00\r\n\r\n",
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "two empty lines before": b"\r\n\r\n" + get(b"/v1/x"),
    "LF before": b"\n" + get(b"/v1/x"),
    "blank before": b" " + get(b"/v1/x"),
    "CRLF in the method": b"GET\r\n" + get(b"/v1/x"),
    "colon in the method": post(method=b"GE:T"),
    "no method": b" /v1/x HTTP/1.1\r\n" + HOST + b"\r\n",
    "last chunk without its empty line": chunked(b"0\r\n"),
    "head without its empty line": b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n",
    "PROXY protocol": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n" + get(b"/v1/x"),
}
REFUSED = {
    **{f"length, {name}": post(line, body=EVIL) for name, line in LENGTHS.items()},
    **{f"coding, {name}": post(line, body=LAST + EVIL) for name, line in CODINGS.items()},
    **{
        f"coding beside a length, {line.decode()}": both(b"Content-Length: {}", line)
        for line in ANY_CASE
    },
    **{
        f"coding beside a length, {name}": both(b"Content-Length: {}", line)
        for name, line in CODINGS.items()
    },
    **{f"chunk, {name}": chunked(body + EVIL) for name, body in CHUNKS.items()},
    **{
        f"second chunk, {name}": chunked(chunk(b"ab") + body + EVIL)
        for name, body in CHUNKS.items()
    },
    **{
        f"trailers, {name}": chunked(b"0\r\n" + lines + b"\r\n" + EVIL)
        for name, lines in TRAILERS.items()
    },
    **HEADS,
}
TOO_LARGE = {
    "huge value": post(b"X: " + b"y" * SIZE_LIMIT),
    "huge target": get(b"/v1/" + b"x" * SIZE_LIMIT),
    "huge name": post(b"X" * SIZE_LIMIT + b": y"),
    "huge method": post(method=b"X" * SIZE_LIMIT),
    "201 lines": post(*[b"X: y"] * 200),
    "head without end": b"GET /v1/x HTTP/1.1\r\n" + b"X: y\r\n" * 20000,
    "huge line without colon": post(b"x" * SIZE_LIMIT),
    "megabytes": post(b"X: " + b"y" * (3 << 20)),
}
# Well-formed requests that the proxy does not serve; the connection stays open.
NOT_SERVED = {
    "TRACE": (405, post(method=b"TRACE")),
    "CONNECT in origin form": (405, post(method=b"CONNECT")),
    "/V1/": (404, get(b"/V1/x")),
    "encoded prefix": (404, get(b"/%76%31/x")),
    "two slashes before": (404, get(b"//v1/x")),
    "two slashes and a host": (404, get(b"//evil.example/v1/x")),
    "another prefix": (404, get(b"/x/../v1/x")),
    "encoded slash after the prefix": (404, get(b"/v1%2fx")),
    "backslash in the prefix": (404, get(b"/v1\\x")),
    "parameter in the prefix": (404, get(b"/v1;/x")),
    "own path with a dot segment": (404, get(b"/healthz/../v1/x")),
    "TRACE with a body": (405, sized(EVIL, method=b"TRACE")),
    "another Host": (403, b"GET /v1/x HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
    "absolute form of another and its Host": (
        403,
        b"GET http://evil.example/v1/x HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ),
    "absolute form without a path": (404, get(b"http://localhost", b"Accept: application/json")),
    "absolute form of a path that goes up": (400, get(b"http://localhost/v1/../x")),
    "absolute form of two slashes": (404, get(b"http://localhost//evil.example/v1/x")),
    "absolute form by TRACE": (405, post(method=b"TRACE", target=b"http://localhost/v1/x")),
    "Host of another after @": (
        403,
        b"GET /v1/x HTTP/1.1\r\nHost: localhost@evil.example\r\n\r\n",
    ),
    **{
        f"target {target.decode()}": (400, get(target))
        for target in (
            b"/v1/..",
            b"/v1/../x",
            b"/v1/./x",
            b"/v1/.",
            b"/v1/x/..",
            b"/v1/..?x",
            b"/v1/%2e%2e/x",
            b"/v1/%2E%2e/x",
            b"/v1/.%2e/x",
            b"/v1/%2e./x",
            b"/v1/%2e/x",
            b"/v1/..%2fx",
            b"/v1/x%2f..%2f..%2fy",
            b"/v1/%2e%2e%2fx",
            b"/v1/..\\x",
            b"/v1/..%5cx",
            b"/v1/%2e%2e%5Cx",
            b"/v1/..;/x",
            b"/v1/..;a=b/x",
            b"/v1/%2e%2e;/x",
            b"/v1/.;/x",
            b"/v1//../x",
            b"/v1/x/%2e%2e?y",
            b"/v2/../v1/x",
            b"/v1/a\\..\\..\\b",
            b"/v1/a/..%2F..;%2fb",
        )
    },
}


# Accepted


def seen(
    body: bytes = b"", *fields: tuple[str, str], method: str = "POST", target: str = "/v1/x"
) -> Seen:
    return Seen(method, target, body, fields)


def got(target: str = "/v1/x", *fields: tuple[str, str]) -> Seen:
    return Seen("GET", target, b"", fields)


WEBSOCKET = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13")
H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQ")
VERSION = ("Sec-WebSocket-Version", "13")
X = ("X", "y")
ACCEPTED = {
    # bodies that resemble requests
    "request in a sized body": (sized(EVIL), [seen(EVIL)]),
    "request in a chunk": (chunked(chunk(EVIL) + LAST), [seen(EVIL)]),
    "last chunk in a chunk": (chunked(chunk(LAST + EVIL) + LAST), [seen(LAST + EVIL)]),
    "chunks in a sized body": (sized(chunk(b"a") + LAST), [seen(chunk(b"a") + LAST)]),
    "request in a body of GET": (sized(EVIL, method=b"GET"), [seen(EVIL, method="GET")]),
    "body of HEAD": (sized(EVIL, method=b"HEAD"), [seen(EVIL, method="HEAD")]),
    "body of DELETE": (sized(EVIL, method=b"DELETE"), [seen(EVIL, method="DELETE")]),
    "body of OPTIONS": (sized(EVIL, method=b"OPTIONS"), [seen(EVIL, method="OPTIONS")]),
    "request after a length of 0": (
        post(b"Content-Length: 0", body=get(b"/v1/y")),
        [seen(), got("/v1/y")],
    ),
    "request after no length": (post(body=get(b"/v1/y")), [seen(), got("/v1/y")]),
    # lengths
    "zeros before": (post(b"Content-Length: 0003", body=b"abc"), [seen(b"abc")]),
    "blanks around": (post(b"Content-Length: \t 3 \t", body=b"abc"), [seen(b"abc")]),
    "no blank": (post(b"content-length:3", body=b"abc"), [seen(b"abc")]),
    "length first": (
        b"POST /v1/x HTTP/1.1\r\nContent-Length: 3\r\n" + HOST + b"\r\nabc",
        [seen(b"abc")],
    ),
    "lengths of equal heads": (
        sized(b"abc") + sized(b"") + sized(b"hello"),
        [seen(b"abc"), seen(), seen(b"hello")],
    ),
    # chunks
    "extensions": (chunked(b'2;a\r\nab\r\n1 ;\tb="c;d"\r\nc\r\n0;last\r\n\r\n'), [seen(b"abc")]),
    "zeros before a size": (chunked(b"0002\r\nab\r\n000\r\n\r\n"), [seen(b"ab")]),
    "capitals": (chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), [seen(b"0123456789")]),
    "blank before an extension": (chunked(b"2 ;a=b\r\nab\r\n0\r\n\r\n"), [seen(b"ab")]),
    "CRLF in a chunk": (chunked(chunk(b"\r\n\r\n") + LAST), [seen(b"\r\n\r\n")]),
    "chunked with blanks": (post(b"transfer-encoding:\t chunked \t", body=LAST), [seen()]),
    **{line.decode(): (post(line, body=chunk(EVIL) + LAST), [seen(EVIL)]) for line in ANY_CASE},
    "many small chunks": (chunked(chunk(b"a") * 500 + LAST), [seen(b"a" * 500)]),
    "extension at its limit": (
        chunked(b"1;" + b"x" * (LINE_LIMIT - 4) + b"\r\na\r\n0\r\n\r\n"),
        [seen(b"a")],
    ),
    "request after the last chunk": (chunked(LAST + get(b"/v1/y")), [seen(), got("/v1/y")]),
    # trailers never pass
    "trailers": (chunked(b"1\r\na\r\n0\r\nX-Sum: 1\r\n\r\n", b"Trailer: X-Sum"), [seen(b"a")]),
    "Host in a trailer": (chunked(b"0\r\nHost: evil.example\r\n\r\n"), [seen()]),
    "token in a trailer": (chunked(b"0\r\nAuthorization: Bearer evil\r\n\r\n"), [seen()]),
    "Connection in a trailer": (chunked(b"0\r\nConnection: close\r\n\r\n"), [seen()]),
    "request as a trailer's value": (
        chunked(b"0\r\nX: GET /v1/smuggled HTTP/1.1\r\n\r\n"),
        [seen()],
    ),
    # Connection names fields of the proxy, of the client, or of the framing
    **{
        f"Connection: {name!r}": (sized(b"abc", b"Connection: " + name, b"X: y"), [seen(b"abc", X)])
        for name in (
            b"authorization",
            b"Host",
            b"content-length",
            b"transfer-encoding",
            b"connection",
            b"User-Agent, Authorization, Host",
            b"keep-alive, ,",
            b"\xff",
            b"x-y",
        )
    },
    "Connection names both framings": (
        chunked(chunk(b"abc") + LAST, b"Connection: content-length, transfer-encoding"),
        [seen(b"abc")],
    ),
    "Connection names a header": (post(b"X: y", b"Connection: x, X"), [seen()]),
    "Connection twice": (
        post(b"connection: a", b"X: y", b"A: 1", b"CONNECTION: b", b"B: 1"),
        [seen(b"", X)],
    ),
    "hop's own": (
        post(
            b"Keep-Alive: 5",
            b"TE: trailers",
            b"Trailer: X",
            b"Proxy-Connection: close",
            b"Proxy-Authorization: a",
            b"Upgrade: h2c",
            b"X: y",
        ),
        [seen(b"", X)],
    ),
    # fields about the client itself are dropped
    "tokens of the client": (
        post(
            b"Authorization: Bearer evil",
            b"authorization: Basic x",
            b"X-Api-Key: evil",
            b"Cookie: a=b",
        ),
        [seen()],
    ),
    "where it sits": (
        post(
            b"Forwarded: host=evil.example",
            b"X-Forwarded-Host: evil.example",
            b"x-forwarded-proto: https",
        ),
        [seen()],
    ),
    "names similar to framing": (
        sized(b"abc", b"X-Content-Length: 9", b"Transfer.Encoding: chunked"),
        [seen(b"abc", ("X-Content-Length", "9"), ("Transfer.Encoding", "chunked"))],
    ),
    "names similar to Host": (
        post(b"X-Host: evil.example", b"Hos: a"),
        [seen(b"", ("X-Host", "evil.example"), ("Hos", "a"))],
    ),
    "insignificant twins": (
        post(b"session_id: 1", b"Session-Id: 2", b"X_Y: 3", b"X-Y: 4"),
        [seen(b"", ("session_id", "1"), ("Session-Id", "2"), ("X_Y", "3"), ("X-Y", "4"))],
    ),
    "underscore alone": (post(b"X_Y: 1"), [seen(b"", ("X_Y", "1"))]),
    "override of the method": (
        post(b"X-HTTP-Method-Override: TRACE"),
        [seen(b"", ("X-HTTP-Method-Override", "TRACE"))],
    ),
    # Upgrade
    "handshake": (get(b"/v1/x", *WEBSOCKET), [got("/v1/x", VERSION, *HANDSHAKE)]),
    "handshake of length 0": (
        sized(b"", *WEBSOCKET, method=b"GET"),
        [got("/v1/x", VERSION, *HANDSHAKE)],
    ),
    "handshake with a body": (
        sized(EVIL, *WEBSOCKET, method=b"GET"),
        [seen(EVIL, VERSION, method="GET")],
    ),
    "handshake with chunks": (
        get(b"/v1/x", *WEBSOCKET, CHUNKED, body=LAST),
        [got("/v1/x", VERSION)],
    ),
    "handshake by POST": (post(*WEBSOCKET), [seen(b"", VERSION)]),
    "handshake for two protocols": (
        get(b"/v1/x", *WEBSOCKET, b"Upgrade: h2c"),
        [got("/v1/x", VERSION)],
    ),
    "h2c": (get(b"/v1/x", *H2C), [got()]),
    "h2c with a body": (sized(EVIL, *H2C), [seen(EVIL)]),
    "Upgrade without Connection": (get(b"/v1/x", b"Upgrade: websocket"), [got()]),
    "Upgrade: TLS": (get(b"/v1/x", b"Connection: upgrade", b"Upgrade: TLS/1.2"), [got()]),
    # Expect
    "Expect": (sized(b"abc", b"Expect: 100-continue"), [seen(b"abc")]),
    "Expect without a body": (post(b"Expect: 100-continue"), [seen()]),
    "Expect of something else": (sized(b"abc", b"Expect: 200-ok"), [seen(b"abc")]),
    "Expect twice": (sized(EVIL, b"Expect: 100-continue", b"Expect: x"), [seen(EVIL)]),
    # Host and the absolute form
    "empty port": (b"GET /v1/x HTTP/1.1\r\nHost: localhost:\r\n\r\n", [got()]),
    "absolute form": (get(b"http://localhost/v1/x"), [got()]),
    "absolute form in other cases": (
        sized(EVIL, target=b"HTTP://LocalHost:80/v1/x?y"),
        [seen(EVIL, target="/v1/x?y")],
    ),
    "absolute form of https": (get(b"https://localhost/v1/x"), [got()]),
    "absolute form in the path": (
        get(b"http://localhost/v1/http://evil.example/"),
        [got("/v1/http://evil.example/")],
    ),
    "absolute form in HTTP/1.0": (
        get(b"http://localhost/v1/x", b"Connection: keep-alive", version=b"HTTP/1.0"),
        [got()],
    ),
    "absolute form without Host in HTTP/1.0": (
        b"GET http://localhost/v1/x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        [got()],
    ),
    "way to us": (
        post(
            b"CF-Connecting-IP: ::1",
            b"cf-ray: a",
            b"Via: 1.1 x",
            b"Remote-User: root",
            b"Referer: a",
            b"X: y",
        ),
        [seen(b"", X)],
    ),
    # targets that resemble dot segments, and pass unchanged
    **{
        f"target {target}": (get(target.encode()), [got(target)])
        for target in (
            "/v1/...",
            "/v1/..x",
            "/v1/x..",
            "/v1/%252e%252e/x",
            "/v1/..%252fx",
            "/v1/x?../../y",
            "/v1/x?%2e%2e%2f",
            "/v1//x",
            "/v1/x//",
            "/v1/a%2Fb%2fc",
            "/v1/%00",
            "/v1/%0d%0aX:%20y",
            "/v1/%0D%0A%0D%0AGET%20/v1/smuggled",
            "/v1/x?y=http://evil.example/",
            "/v1/http://evil.example/",
            "/v1/@evil.example",
            "/v1/%c0%ae%c0%ae/x",
            "/v1/%uff0e%uff0e/x",
            "/v1/~",
            "/v1/%",
            "/v1/x;jsessionid=1",
            "/v1/?",
            "/v1/",
            "/v2/x",
        )
    },
    # bytes before and after a request
    "empty line before": (b"\r\n" + get(b"/v1/x"), [got()]),
    "empty line between": (sized(b"abc") + b"\r\n" + get(b"/v1/y"), [seen(b"abc"), got("/v1/y")]),
    "ten pipelined": (
        b"".join(sized(b"%d" % number, target=b"/v1/%d" % number) for number in range(10)),
        [seen(b"%d" % number, target=f"/v1/{number}") for number in range(10)],
    ),
    "pipelined in both framings": (
        chunked(chunk(b"a") + LAST) + sized(b"b") + chunked(LAST) + post(),
        [seen(b"a"), seen(b"b"), seen(), seen()],
    ),
    "200 lines": (post(*[b"X: y"] * 199), [seen(b"", *[X] * 199)]),
    "huge target": (get(b"/v1/" + b"x" * 60000), [got("/v1/" + "x" * 60000)]),
    "HTTP/1.0 that stays": (get(b"/v1/x", b"Connection: keep-alive", version=b"HTTP/1.0"), [got()]),
    "HTTP/1.0 with a body that stays": (
        sized(EVIL, b"Connection: keep-alive", version=b"HTTP/1.0"),
        [seen(EVIL)],
    ),
}
# Accepted requests that end the connection; bytes after them are never read.
ENDING = {
    "HTTP/1.0": (get(b"/v1/x", version=b"HTTP/1.0"), [got()]),
    "HTTP/1.0 with a body": (sized(EVIL, version=b"HTTP/1.0"), [seen(EVIL)]),
    "close": (sized(EVIL, b"Connection: close"), [seen(EVIL)]),
    "close in other cases": (get(b"/v1/x", b"connection: Keep-Alive, CLOSE"), [got()]),
    "close in a second line": (get(b"/v1/x", b"Connection: x", b"Connection: close"), [got()]),
    "close after another request": (
        post() + get(b"/v1/y", b"Connection: close"),
        [seen(), got("/v1/y")],
    ),
    "keep-alive and close": (
        get(b"/v1/x", b"Connection: keep-alive, close", version=b"HTTP/1.0"),
        [got()],
    ),
}
# Their bodies swallow the bytes after them, and are incomplete when the client closes.
UNFINISHED = {
    "longest body": post(b"Content-Length: 999999999999999999", body=EVIL),
    "largest chunk": chunked(b"fffffffffffffff\r\n" + EVIL),
    "body of 2 ** 32 bytes": post(b"Content-Length: 4294967296", body=EVIL),
    "body of 2 ** 63 bytes less one": post(b"Content-Length: 92233720368547758"),
    "chunk of 2 ** 32 bytes": chunked(b"100000000\r\n" + EVIL),
}
# Bytes that are sent at once.
SPLITS = (1 << 30, 7)
numbers = itertools.count()
Clients = Callable[[bytes], Iterator[Client]]


@pytest.fixture(scope="module")
def upstream() -> Iterator[RecordingUpstream]:
    with RecordingUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, upstream: RecordingUpstream
) -> Iterator[ProxyProcess]:
    with ProxyProcess(tmp_path_factory.mktemp("proxy"), upstream=upstream.origin) as running:
        running.sign_in()
        yield running


@pytest.fixture(scope="module")
def witness(proxy: ProxyProcess) -> Iterator[Client]:
    with proxy.client() as client:
        yield client


@pytest.fixture
def clients(proxy: ProxyProcess, witness: Client, upstream: RecordingUpstream) -> Clients:
    """Send data and a request after it, whole and in pieces, each time as a client of its own.

    Afterwards, another client's request gets its own response, and upstream has received nothing
    else.
    """

    def send(data: bytes) -> Iterator[Client]:
        for split in SPLITS:
            # Long data is sent in few pieces.
            size = max(split, len(data) // 100)
            # What a test that failed has not taken.
            upstream.taken()
            with proxy.client() as client:
                # The proxy may reset the connection.
                with contextlib.suppress(ConnectionError):
                    for at in range(0, len(data), size):
                        client.send(data[at : at + size])
                    client.request("GET", "/v1/marker")
                yield client
                target = f"/v1/witness?{next(numbers)}"
                answer = witness.ask("GET", target)
                assert (answer.status, answer.body.decode()) == (200, f"GET {target}"), split
                assert upstream.taken() == [got(target)], split

    return send


def assert_answered(client: Client, requests: list[Seen]) -> None:
    for request in requests:
        answer = client.message(body=request.method != "HEAD")
        if answer.status == 100:
            answer = client.message()
        assert answer.status == 200
        assert answer.body.decode() == (
            "" if request.method == "HEAD" else f"{request.method} {request.target}"
        )


def parameters(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "entry", [pytest.param(entry, id=name) for name, entry in table.items()]
    )


@parameters(
    {
        **{name: (400, data) for name, data in REFUSED.items()},
        **{name: (431, data) for name, data in TOO_LARGE.items()},
    }
)
def test_an_ambiguous_request_is_refused_and_closes_the_connection(
    clients: Clients, entry: tuple[int, bytes]
) -> None:
    status, data = entry
    for client in clients(data):
        answer = client.message()
        assert (answer.status, answer.value("X-XAI-Proxy-Error")) == (status, "bad_request")
        assert answer.value("Connection") == "close" and client.closed_within()


@parameters(NOT_SERVED)
def test_a_refused_request_leaves_the_next_one_intact(
    clients: Clients, upstream: RecordingUpstream, entry: tuple[int, bytes]
) -> None:
    status, data = entry
    for client in clients(data):
        answer = client.message()
        assert answer.status == status and answer.value("X-XAI-Proxy-Error")
        # The body had not arrived yet.
        if answer.value("Connection") == "close":
            assert client.closed_within() and upstream.taken() == []
        else:
            assert_answered(client, [got("/v1/marker")])
            assert upstream.taken() == [got("/v1/marker")] and client.silent()


@parameters(ACCEPTED)
def test_an_accepted_request_is_forwarded_with_its_meaning(
    clients: Clients, upstream: RecordingUpstream, entry: tuple[bytes, list[Seen]]
) -> None:
    data, requests = entry
    requests = [*requests, got("/v1/marker")]
    for client in clients(data):
        assert_answered(client, requests)
        assert upstream.taken() == requests and client.silent()


@parameters(ENDING)
def test_bytes_after_a_last_request_are_never_read(
    clients: Clients, upstream: RecordingUpstream, entry: tuple[bytes, list[Seen]]
) -> None:
    data, requests = entry
    for client in clients(data):
        assert_answered(client, requests)
        assert client.closed_within() and upstream.taken() == requests


@parameters(UNFINISHED)
def test_an_incomplete_request_never_reaches_upstream(
    clients: Clients, upstream: RecordingUpstream, entry: bytes
) -> None:
    for client in clients(entry):
        client.half_close()
        assert client.closed_within() and upstream.taken() == []


def test_there_are_more_than_400_entries() -> None:
    assert sum(map(len, (REFUSED, TOO_LARGE, NOT_SERVED, ACCEPTED, ENDING, UNFINISHED))) > 400
