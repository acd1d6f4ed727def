"""The head of a client's request, read strictly (RFC 9112 sections 2 to 7).

A request that two servers could read differently is refused, not repaired: it is how one request is smuggled inside
another. So: CRLF line ends only, no folded lines, no space before the colon, one Host, at most one Content-Length,
no Transfer-Encoding but exactly `chunked`, never both, and no name that an underscore makes look like another.
"""

import dataclasses
import re
from typing import BinaryIO

from xaiproxy import errors, headers

SIZE_LIMIT = 65536  # bytes of the whole head
FIELD_LIMIT = 200
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])\r\n")
# Blanks around the value are stripped later: a pattern that did it could take time exponential in the line's length.
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r\n")
# Names that steer somebody on the way: content_length reads as content-length behind CGI's rules.
RESERVED = headers.NOT_SENT | {"content-type", "origin", "sec-fetch-site"}


@dataclasses.dataclass
class Head:
    """`target` is the request line's, byte for byte; `fields` are in order, as sent. Text is Latin-1."""

    method: str
    target: str
    version: str
    fields: "list[tuple[str, str]]"
    content_length: "int | None"  # None: no body, or a chunked one
    chunked: bool
    keep_alive: bool

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def values(self, name: str) -> "list[str]":
        """All values of a field; `name` in lower case."""
        return [value for field, value in self.fields if field.lower() == name]


def read(stream: BinaryIO) -> "Head | None":
    """Read one head; None when the connection ended before it began. Raises BadRequest, HeadTooLarge, OSError."""
    line = _line(stream, SIZE_LIMIT)
    if line == b"\r\n":  # RFC 9112 section 2.2: one empty line before a request is to be forgiven
        line = _line(stream, SIZE_LIMIT)
    if not line:
        return None
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise errors.BadRequest("the request line is malformed: expected METHOD /target HTTP/1.1", close=True)
    method, target, minor = match[1].decode(), match[2].decode(), match[3]
    fields = _fields(stream, SIZE_LIMIT - len(line))
    head = Head(method, target, "HTTP/1." + minor.decode(), fields, None, False, False)
    _check_target(target)
    _check_names(fields)
    _frame(head)
    return head


def _line(stream: BinaryIO, limit: int) -> bytes:
    line = stream.readline(limit + 1)
    if len(line) > limit:
        raise errors.HeadTooLarge(f"the request head is longer than {SIZE_LIMIT} bytes", close=True)
    if line and not line.endswith(b"\n"):
        raise ConnectionError("the client closed in the middle of a request head")
    return line


def _fields(stream: BinaryIO, left: int) -> "list[tuple[str, str]]":
    fields: "list[tuple[str, str]]" = []
    while True:
        line = _line(stream, left)
        left -= len(line)
        if line == b"\r\n":
            return fields
        if not line:
            raise ConnectionError("the client closed in the middle of a request head")
        match = FIELD_LINE.fullmatch(line)
        if match is None:
            raise errors.BadRequest("a header line is malformed: expected Name: value and CRLF", close=True)
        if len(fields) == FIELD_LIMIT:
            raise errors.HeadTooLarge(f"the request has more than {FIELD_LIMIT} header lines", close=True)
        fields.append((match[1].decode(), match[2].strip(b" \t").decode("latin-1")))


def _check_target(target: str) -> None:
    # Only origin-form (RFC 9112 section 3.2.1): a host in the target could contradict Host.
    if not target.startswith("/") or "#" in target:
        raise errors.BadRequest("the request target must be a path, such as /v1/models", close=True)


def _check_names(fields: "list[tuple[str, str]]") -> None:
    names = {name.lower() for name, _ in fields}
    read_as: "set[str]" = set()
    for name in names:
        twin = name.replace("_", "-")
        if twin in read_as or twin != name and (twin in RESERVED or twin.startswith(headers.PREFIXES_NOT_SENT)):
            raise errors.BadRequest(f"a header with _ in its name could be taken for {twin}", close=True)
        read_as.add(twin)


def _frame(head: Head) -> None:
    """RFC 9112 section 6.3, for requests."""
    hosts = head.values("host")
    if len(hosts) > 1 or (not hosts and head.version == "HTTP/1.1"):
        raise errors.BadRequest("a request needs exactly one Host header", close=True)
    lengths, codings = head.values("content-length"), head.values("transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise errors.BadRequest("a request may have one Content-Length or one Transfer-Encoding", close=True)
    if codings:
        if codings != ["chunked"] or head.version == "HTTP/1.0":
            raise errors.BadRequest("the only Transfer-Encoding taken is chunked, in HTTP/1.1", close=True)
        head.chunked = True
    if lengths:
        if not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise errors.BadRequest("Content-Length must be a number", close=True)
        head.content_length = int(lengths[0])
    options = {option.strip().lower() for value in head.values("connection") for option in value.split(",")}
    head.keep_alive = "close" not in options and (head.version == "HTTP/1.1" or "keep-alive" in options)
