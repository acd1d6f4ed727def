"""The response to a client's request: its head, its content and its log line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gevent import pywsgi

from xaiproxy import errors, log
from xaiproxy.http1 import framing
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.exchange import Exchange
from xaiproxy.http1.relay import Relay
from xaiproxy.http1.request_body import RequestBody
from xaiproxy.http1.tunnel import Tunnel

logger = logging.getLogger("xaiproxy.request")

HEALTH_CHECKS = ("/healthz", "/readyz")


class Answer(NamedTuple):
    """Upstream's response, ready to be forwarded.

    `text`: the lines of the head for the client, each but the first preceded by a CRLF. `content`:
    what is sent instead of the content as it comes, or None.
    """

    exchange: Exchange
    text: str
    content: Iterator[bytes] | None


class ClientResponse:
    """`close`: the connection ends with it. `headers_sent`: too late for another response.

    `cut_short`: its content was not sent to the end. `client_gone`: the client has closed the
    connection.
    """

    __slots__ = (
        "_body",
        "_chunks",
        "_connection",
        "_content_bytes",
        "_ended_by",
        "_ends_with_connection",
        "_head",
        "_is_1_0",
        "_is_head",
        "_sent_at",
        "_server",
        "_status",
        "client_gone",
        "close",
        "cut_short",
        "headers_sent",
        "send_limit",
    )

    def __init__(
        self,
        connection: Connection,
        server: Any,
        body: RequestBody | None,
        method: str = "",
        version: str = "HTTP/1.1",
        close: bool = False,
    ):
        """`server`: the handler's. `body`, `method`, `version`: the request's."""
        self.close = close
        # Seconds in which the client must take a byte.
        self.send_limit: float = server.settings.client_timeout
        self.headers_sent = self.cut_short = self.client_gone = False
        self._connection = connection
        self._is_head = method == "HEAD"
        self._is_1_0 = version == "HTTP/1.0"
        self._server = server
        self._body = body
        self._head = b""
        self._status = self._content_bytes = 0
        self._sent_at = 0.0
        self._chunks = self._ends_with_connection = False
        self._ended_by = "done"

    @property
    def is_end_ambiguous(self) -> bool:
        """Whether, without a reset, a client could take the cut content for complete."""
        return self.cut_short and self.headers_sent and self._ends_with_connection

    # From a WSGI application

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """PEP 3333's. Raises ValueError at a line end in what would become a header line."""
        if exc_info and self.headers_sent:
            raise exc_info[1]
        text = f"HTTP/1.1 {status}" + "".join([f"\r\n{name}: {value}" for name, value in headers])
        if not text.count("\r\n") == text.count("\r") == text.count("\n") == len(headers):
            raise ValueError("a line end in a header field")
        names = {name.lower() for name, _ in headers}
        if "x-xai-proxy-error" in names:
            self._ended_by = "proxy"
        self._start(int(status[:3]), text, "content-length" in names, "date" in names)
        return self.write

    def write(self, data: bytes) -> None:
        """PEP 3333's. Raises ClientGone."""
        if self._is_head:
            data = b""
        self._content_bytes += len(data)
        if self._chunks and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._send(data if self.headers_sent else self._take_head() + data)

    def send(self, content: Iterable[bytes]) -> None:
        """Send the content of a response that was started. Raises ClientGone."""
        for data in content:
            if data:
                self.write(data)
        if not self.headers_sent:
            self.write(b"")
        if self._chunks:
            self._send(b"0\r\n\r\n")

    def refuse(self, refusal: errors.ErrorResponse) -> None:
        """Send a whole response of the proxy's own. Raises ClientGone."""
        status, fields, body = refusal.rendered()
        self.start_response(status, fields)
        self.send([body])

    # From upstream

    def send_interim(self, status: int, text: str) -> None:
        """A head before the final one (RFC 9110 section 15.2). Raises ClientGone."""
        # The proxy sends a 100 of its own.
        if status != 100 and not self._is_1_0:
            self._send(f"{text}\r\n\r\n".encode("latin-1"))

    def pass_on(self, answer: Answer) -> None:
        """Forward upstream's response as it arrives. Raises ClientGone, UpstreamBroken."""
        exchange = answer.exchange
        head = exchange.head
        self.send_limit = exchange.idle_timeout
        is_uploaded = exchange.upload.running and head.keep_alive
        self._start(
            head.status,
            answer.text,
            exchange.length is not None,
            "date" in head.values,
            is_uploaded,
        )
        exchange.upload.discard()
        if head.status == 101:
            self._relay(Tunnel(exchange, self._connection), answer)
        elif answer.content is None and type(exchange.body) is self._framing():
            self._relay(Relay(exchange, self._connection), answer)
        else:
            # The head is sent now, even if no byte of the content follows for an hour.
            self.write(b"")
            self.send(answer.content or exchange.parts())
            exchange.finish()

    def _framing(self) -> type:
        """The framing that upstream's bytes must have to be forwarded unchanged."""
        return framing.Chunked if self._chunks else framing.Sized

    def _relay(self, relay: Relay | Tunnel, answer: Answer) -> None:
        try:
            relay.run(self._take_head())
        finally:
            self._content_bytes = relay.content
            self._ends_with_connection |= answer.exchange.body.seems_ended

    # The head

    def _start(
        self, status: int, text: str, has_length: bool, has_date: bool, is_uploaded: bool = False
    ) -> None:
        """Take the head, to be sent with the first bytes of the content.

        `text`: its lines, each but the first preceded by a CRLF, without those that depend on this
        connection. `is_uploaded`: the request's body is being read to its end at the same time.
        """
        no_content = self._is_head or status in (101, 204, 304)
        self._status = status
        self._chunks = not (has_length or no_content or self._is_1_0)
        # The only end that content of unknown length has in HTTP/1.0.
        self._ends_with_connection = not (has_length or self._chunks or no_content)
        # Unread bytes of the body would be parsed as the next request.
        has_body_left = self._body is not None and not (self._body.ended or is_uploaded)
        self.close |= self._ends_with_connection or has_body_left or self._server.draining
        if not has_date:
            text += f"\r\nDate: {pywsgi.format_date_time(time.time()).decode()}"
        if self._chunks:
            text += "\r\nTransfer-Encoding: chunked"
        if status == 101:
            # What follows on this connection is not HTTP.
            text += "\r\nConnection: Upgrade\r\nUpgrade: websocket"
            self.close = True
        else:
            text += "\r\nConnection: close" if self.close else self._server.keep_alive
        self._head = f"{text}\r\n\r\n".encode("latin-1")

    def _take_head(self) -> bytes:
        self.headers_sent = True
        self._sent_at = time.time()
        return self._head

    def _send(self, data: bytes) -> None:
        try:
            self._connection.send_all(data, self.send_limit)
        except OSError:
            raise errors.ClientGone from None

    # The end

    def abort(self, error: BaseException) -> None:
        """`error`: what ended the response before its end."""
        self.client_gone = isinstance(error, errors.ClientGone)
        by_upstream = isinstance(error, errors.UpstreamBroken)
        self._ended_by = "client" if self.client_gone else "upstream" if by_upstream else "proxy"
        self.cut_short = self.close = True

    def log(self, method: str, path: str, key: str | None, started_at: float) -> None:
        """`started_at`: when the request's head was complete, in the seconds of time.time."""
        first_byte = self._sent_at - started_at if self._sent_at else None
        fields = {
            "method": method,
            "path": path,
            "status": self._status,
            "bytes": self._content_bytes,
            "first_byte_ms": None if first_byte is None else int(first_byte * 10000) / 10,
            "duration_ms": int((time.time() - started_at) * 10000) / 10,
            "ended_by": self._ended_by,
            "key": key,
        }
        is_routine = path in HEALTH_CHECKS and self._status == 200
        log.event(logger, logging.DEBUG if is_routine else logging.INFO, "request", fields)
