"""The head of a client's request, read strictly (RFC 9112 sections 2 to 7).

A request that two servers could read differently is refused, not repaired: this is how one request
is smuggled inside another. So: CRLF line ends only, no folded lines, no space before the colon, one
Host, the same as in an absolute target, at most one Content-Length, no Transfer-Encoding except
`chunked`, never both, and no name that becomes a routing or framing name if its underscores are
read as hyphens.
"""

from __future__ import annotations

import re

from xaiproxy import errors
from xaiproxy.http1 import headers, message_head

SIZE_LIMIT = 65536  # bytes of the whole head
ABSOLUTE_FORM = re.compile(
    r"(https?)://((?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?)([/?][^#]*)?", re.IGNORECASE
)
REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) (HTTP/1\.[01])")
# Names that servers on the way act on: under CGI's rules content_length reads as content-length.
RESERVED = headers.NOT_SENT | {"content-type", "origin", "sec-fetch-site"}


class Head:
    """`target`: the request line's, byte for byte, in origin-form; `fields`: in order, as sent.

    `by_name`: the values of each name in lower case; `content_length`: None if there is no body or
    a chunked one. Text is Latin-1.
    """

    __slots__ = (
        "by_name",
        "chunked",
        "content_length",
        "fields",
        "keep_alive",
        "method",
        "path",
        "target",
        "version",
    )

    def __init__(
        self,
        method: str,
        target: str,
        path: str,
        version: str,
        fields: list[tuple[str, str]],
        values: dict[str, list[str]],
    ):
        self.method = method
        self.target = target
        self.path = path
        self.version = version
        self.fields = fields
        self.by_name = values
        self.content_length: int | None = None
        self.chunked = False
        self.keep_alive = False

    def values(self, name: str) -> list[str]:
        """All values of a field; `name` in lower case."""
        return self.by_name.get(name, [])


def parse(data: bytes) -> Head:
    """`data`: up to and with the empty line. Raises BadRequest, HeadTooLarge."""
    if data.startswith(b"\r\n"):
        # RFC 9112 section 2.2: one empty line before a request is ignored.
        data = data[2:]
    try:
        lines = message_head.lines(data)
        method, target, version = _request_line(lines[0] if lines else "")
        fields, values = message_head.fields(lines[1:])
    except message_head.Malformed as error:
        raise refusal(error) from None
    if not target.startswith("/") or "#" in target:
        target = _origin_form(target, version, values)
    head = Head(method, target, target.partition("?")[0], version, fields, values)
    _check_names(values)
    _frame(head, values)
    return head


def refusal(error: message_head.Malformed) -> errors.BadRequest:
    kind = errors.HeadTooLarge if isinstance(error, message_head.TooLong) else errors.BadRequest
    return kind(f"the request head {error}")


def _request_line(line: str) -> tuple[str, str, str]:
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise errors.BadRequest("the request line is malformed: expected METHOD /target HTTP/1.1")
    return match[1], match[2], match[3]


def _origin_form(target: str, version: str, values: dict[str, list[str]]) -> str:
    """An absolute target without its scheme and authority (RFC 9112 section 3.2.2).

    That authority would override Host, so the two must be the same: all servers on the way then
    agree on it.
    """
    match = ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        raise errors.BadRequest("the request target must be a path, such as /v1/models")
    scheme, authority, rest = match.groups("")
    if version == "HTTP/1.0":
        values.setdefault("host", [authority])
    hosts = [message_head.normal_authority(scheme.lower(), host) for host in values.get("host", ())]
    if hosts != [message_head.normal_authority(scheme.lower(), authority)]:
        raise errors.BadRequest(
            "an absolute request target must name the same host as one Host header"
        )
    return rest if rest.startswith("/") else "/" + rest


def _check_names(names: dict[str, list[str]]) -> None:
    """Only names that servers act on matter: clients send session_id and session-id together."""
    for name in names:
        if "_" in name:
            twin = name.replace("_", "-")
            if twin in RESERVED or twin.startswith(headers.PREFIXES_NOT_SENT):
                raise errors.BadRequest(f"a header with _ in its name could be taken for {twin}")


def _frame(head: Head, values: dict[str, list[str]]) -> None:
    """RFC 9112 section 6.3, for requests."""
    hosts = values.get("host", ())
    if len(hosts) > 1 or (not hosts and head.version == "HTTP/1.1"):
        raise errors.BadRequest("a request needs exactly one Host header")
    lengths, codings = values.get("content-length", ()), values.get("transfer-encoding", ())
    if len(lengths) + len(codings) > 1:
        raise errors.BadRequest("a request may have one Content-Length or one Transfer-Encoding")
    if codings:
        if codings[0].lower() != "chunked" or head.version == "HTTP/1.0":
            raise errors.BadRequest("the only Transfer-Encoding supported is chunked, in HTTP/1.1")
        head.chunked = True
    if lengths:
        if not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise errors.BadRequest("Content-Length must be a number")
        head.content_length = int(lengths[0])
    head.keep_alive = message_head.keep_alive(values, head.version == "HTTP/1.0")
