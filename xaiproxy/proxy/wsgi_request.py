"""The client_request.ClientRequest of a WSGI environ, of the handler or of another server."""

from __future__ import annotations

import urllib.parse
from typing import Any

from xaiproxy.http1 import request_head
from xaiproxy.http1.client_request import ClientRequest
from xaiproxy.http1.connection import READ
from xaiproxy.http1.framing import LAST
from xaiproxy.http1.request_body import RequestBody

# Other servers handle Expect themselves, and do not forward WebSockets.
NOT_TAKEN = frozenset(("expect", "upgrade", "transfer-encoding", "content-length"))


def of(environ: dict[str, Any]) -> ClientRequest:
    """The request that the handler has put there, or one made of PEP 3333's members."""
    request = environ.get("xaiproxy.request")
    if request is None:
        head = _head(environ)
        body = RequestBody(head, _Input(environ["wsgi.input"], head.chunked), timeout=0)  # type: ignore[arg-type]
        request = environ["xaiproxy.request"] = ClientRequest(
            head, body, _NoWatch(), lambda status, text: None
        )
    return request


def _head(environ: dict[str, Any]) -> request_head.Head:
    path = urllib.parse.quote(environ["PATH_INFO"].encode("latin-1"), safe="/!$&'()*+,;=:@~")
    query = environ.get("QUERY_STRING", "")
    fields = [
        (key.removeprefix("HTTP_").replace("_", "-").title(), value)
        for key, value in environ.items()
        if key.startswith("HTTP_") or key == "CONTENT_TYPE"
    ]
    fields = [field for field in fields if field[0].lower() not in NOT_TAKEN]
    values: dict[str, list[str]] = {}
    for name, value in fields:
        values.setdefault(name.lower(), []).append(value)
    head = request_head.Head(
        environ["REQUEST_METHOD"],
        f"{path}?{query}" if query else path,
        path,
        "HTTP/1.1",
        fields,
        values,
    )
    length = environ.get("CONTENT_LENGTH")
    head.chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    head.content_length = int(length) if length and not head.chunked else None
    return head


class _NoWatch:
    def start(self) -> None:
        """A WSGI server tells an application of a client that has gone only when it writes."""


class _Input:
    """A WSGI input as RequestBody reads a connection."""

    def __init__(self, source: Any, chunked: bool):
        self.unread = b""
        self._source = source
        self._chunked = chunked

    def recv(self, limit: float | None) -> bytes:
        data, self.unread = self.unread or self._source.read(READ), b""
        if not self._chunked:
            return data
        return b"%x\r\n%b\r\n" % (len(data), data) if data else LAST

    def wait_before_reading(self) -> None:
        """The server decides who runs."""
