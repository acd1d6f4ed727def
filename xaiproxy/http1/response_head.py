"""The head of upstream's response, read strictly (RFC 9112 sections 4 to 6).

If two readers could disagree on where the response ends, the next one on the connection would be
taken for another request's: such a head is Malformed, or its connection is not used again. Most
lines are only checked, and forwarded byte for byte.
"""

from __future__ import annotations

import re

from xaiproxy.http1 import framing, headers, message_head
from xaiproxy.http1.message_head import Malformed

SIZE_LIMIT = 65536  # bytes of the whole head
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (.*))?")
READ = headers.NOT_PASSED | {
    "content-length",
    "content-type",
    "content-encoding",
    "content-location",
    "date",
    "location",
    "access-control-allow-origin",
    "x-accel-buffering",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-request-id",
}
FOLD = re.compile(rb"\r\n[ \t]+")
LENGTH = re.compile("[0-9]{1,18}")


class Head:
    """`lines`: the header lines to forward, as they came, each preceded by its CRLF.

    `values`: the values of the names in READ; `length`: the Content-Length; `body`: one of
    framing's; `keep_alive`: another response may follow on the connection.
    """

    __slots__ = ("body", "keep_alive", "length", "lines", "reason", "status", "values")

    def __init__(self, status: int, reason: str, lines: str, values: dict[str, list[str]]):
        self.status = status
        self.reason = reason
        self.lines = lines
        self.values = values
        self.length: int | None = None
        self.body: framing.Sized | framing.Chunked | framing.UntilClose = framing.Sized(0)
        self.keep_alive = False


def parse(data: bytes, method: str) -> Head:
    """`data`: up to and with the empty line; `method`: the request's. Raises Malformed."""
    if b"\r\n " in data or b"\r\n\t" in data:
        first, _, rest = data.partition(b"\r\n")
        # Section 5.2: a line fold becomes a space.
        data = first + b"\r\n" + FOLD.sub(b" ", rest)
    status_line, *lines = message_head.lines(data)
    is_1_0, status, reason = _status_line(status_line)
    passed = [""]
    values: dict[str, list[str]] = {}
    for name, part, line in zip(*message_head.parted(lines), lines, strict=True):
        if name in READ:
            values.setdefault(name, []).append(part[2].strip(" \t"))
            # A 426 without Upgrade would be of no use (RFC 9110 section 15.5.22).
            if name in headers.NOT_PASSED and not (name == "upgrade" and status == 426):
                continue
        passed.append(line)
    head = Head(status, reason, "\r\n".join(passed), values)
    _frame(head, method, is_1_0)
    return head


def _status_line(line: str) -> tuple[bool, int, str]:
    match = STATUS_LINE.fullmatch(line)
    if match is None:
        raise Malformed("has no status line of HTTP/1")
    return match[1] == "0", int(match[2]), match[3] or ""


def _frame(head: Head, method: str, is_1_0: bool) -> None:
    """Section 6.3, for responses."""
    codings, lengths = (
        head.values.get("transfer-encoding", ()),
        head.values.get("content-length", ()),
    )
    if codings and ([coding.lower() for coding in codings] != ["chunked"] or is_1_0):
        raise Malformed("has a Transfer-Encoding other than chunked")
    if lengths:
        if len(set(lengths)) > 1 or not LENGTH.fullmatch(lengths[0]):
            raise Malformed("has a Content-Length that is not a number")
        if not codings:
            head.length = int(lengths[0])
    # After a coding that is not allowed there, chunks may follow all the same.
    head.keep_alive = message_head.keep_alive(head.values, is_1_0) and not (
        codings and (lengths or head.status in (204, 304))
    )
    if method == "HEAD" or head.status < 200 or head.status in (204, 304):
        return
    if codings:
        head.body = framing.Chunked()
    elif head.length is not None:
        head.body = framing.Sized(head.length)
    else:
        head.body = framing.UntilClose()
        head.keep_alive = False
