"""Request bodies that arrived with their heads, without a client."""

from xaiproxy.http1.request_body import RequestBody
from xaiproxy.http1.request_head import parse


class Received:
    """A connection on which these bytes have arrived, and no more will."""

    def __init__(self, data: bytes):
        self.unread = data


def whole_body(content: bytes = b"") -> RequestBody:
    length = f"Content-Length: {len(content)}\r\n" if content else ""
    head = parse(f"POST / HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode())
    return RequestBody(head, Received(content), 5)
