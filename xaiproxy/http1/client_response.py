"""The response to a client's request: its head, its content and the record of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gevent import pywsgi

from xaiproxy import errors
from xaiproxy.http1 import framing, headers, response_head
from xaiproxy.http1.client_request import ClientRequest
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.exchange import Exchange
from xaiproxy.http1.relay import Relay
from xaiproxy.http1.request_body import RequestBody
from xaiproxy.http1.request_record import CLIENT_CLOSED_REQUEST, RequestRecord
from xaiproxy.http1.sample import Sample
from xaiproxy.http1.tunnel import Tunnel


class Cut(Exception):
    """Thrown into a request that has outlived the drain."""


class Answer(NamedTuple):
    """Upstream's response, ready to be forwarded.

    `text`: the lines of the head for the client, each but the first preceded by a CRLF. `content`:
    what is sent instead of the content as it comes, or None. `sample`: gets the content, or None.
    """

    exchange: Exchange
    text: str
    content: Iterator[bytes] | None
    sample: Sample | None = None


class ClientResponse:
    """`close`: the connection ends with it. `headers_sent`: too late for another response.

    `cut_short`: its content was not sent to the end. `client_gone`: the client has closed the
    connection.
    """

    __slots__ = (
        "_body",
        "_broken",
        "_chunks",
        "_connection",
        "_content_bytes",
        "_ended_by",
        "_ends_with_connection",
        "_head",
        "_is_1_0",
        "_is_head",
        "_request_id",
        "_sample",
        "_sent_at",
        "_server",
        "_status",
        "_upstream",
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
        request_id: str,
        method: str = "",
        version: str = "HTTP/1.1",
        close: bool = False,
    ):
        """`server`: the handler's. `body`, `request_id`, `method`, `version`: the request's."""
        self.close = close
        # Seconds in which the client must take a byte.
        self.send_limit: float = server.settings.client_timeout
        self.headers_sent = self.cut_short = self.client_gone = False
        self._connection = connection
        self._is_head = method == "HEAD"
        self._is_1_0 = version == "HTTP/1.0"
        self._server = server
        self._body = body
        self._request_id = request_id
        self._head = b""
        self._status = self._content_bytes = 0
        self._sent_at = 0.0
        self._chunks = self._ends_with_connection = False
        self._ended_by = "done"
        self._upstream: response_head.Head | None = None
        self._sample: Sample | None = None
        self._broken: errors.UpstreamBroken | None = None

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
            text += f"\r\nX-Request-Id: {self._request_id}"
        self._start(int(status[:3]), text, "content-length" in names, "date" in names)
        return self.write

    def write(self, data: bytes) -> None:
        """PEP 3333's. Raises ClientGone."""
        if self._is_head:
            data = b""
        self._content_bytes += len(data)
        if self._sample is not None:
            self._sample.add(data)
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
        self._upstream = head = exchange.head
        self._sample = answer.sample
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
            self._tunnel(Tunnel(exchange, self._connection), answer)
        elif headers.media_type(head.values) == "text/event-stream":
            with self._server.count_open("streams"):
                self._stream(answer)
        else:
            self._stream(answer)

    def _stream(self, answer: Answer) -> None:
        exchange = answer.exchange
        if answer.content is None and type(exchange.body) is self._framing():
            self._relay(Relay(exchange, self._connection, answer.sample), answer)
        else:
            # The head is sent now, even if no byte of the content follows for an hour.
            self.write(b"")
            self.send(answer.content or exchange.parts())
            exchange.finish()

    def _tunnel(self, tunnel: Tunnel, answer: Answer) -> None:
        try:
            with self._server.count_open("websockets"):
                self._relay(tunnel, answer)
        finally:
            assert self._body is not None
            self._body.received += tunnel.received

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
        self.close |= self._ends_with_connection or has_body_left or self._server.stopping
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
        self._sent_at = time.monotonic()
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
        if self.client_gone:
            self._ended_by = "client"
        elif isinstance(error, errors.UpstreamBroken):
            self._ended_by, self._broken = "upstream", error
        else:
            self._ended_by = "drain" if isinstance(error, Cut) else "proxy"
        self.cut_short = self.close = True

    def record(
        self,
        request: ClientRequest | None,
        client: str,
        user_agent: str,
        began_at: float,
        refusal: errors.ErrorResponse | None = None,
    ) -> RequestRecord:
        """`request`: None if no valid head came. `client`: its IP address.

        `began_at`: when the head was complete, in the seconds of time.monotonic. `refusal`: of a
        head that is not valid.
        """
        duration = time.monotonic() - began_at
        first_byte = self._sent_at - began_at if self._sent_at else None
        overhead = None
        if request is not None and self._upstream is not None and first_byte is not None:
            overhead = first_byte - request.waited
        left_early = self._ended_by == "client" and not self.headers_sent
        return RequestRecord(
            "-" if request is None else request.head.method,
            "-" if request is None else request.head.path,
            time.time() - duration,
            CLIENT_CLOSED_REQUEST if left_early else self._status,
            0 if self._body is None else self._body.received,
            self._content_bytes,
            first_byte,
            duration,
            overhead,
            self._ended_by,
            None if request is None else request.key,
            client,
            user_agent,
            self._request_id,
            self._upstream,
            refusal if request is None else request.refusal,
            self._broken,
            "" if request is None else request.token_refused,
            self._sample,
            None if request is None else request.span,
        )
