"""Request bodies that came whole with their heads, without a client."""

from xaiproxy.http1.request_body import RequestBody
from xaiproxy.http1.request_head import parse


class Came:
    """A connection that brought these bytes, and brings no more."""

    def __init__(self, data: bytes):
        self.unread = data


def whole_body(content: bytes = b"") -> RequestBody:
    length = f"Content-Length: {len(content)}\r\n" if content else ""
    head = parse(f"POST / HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode())
    return RequestBody(head, Came(content), 5)
