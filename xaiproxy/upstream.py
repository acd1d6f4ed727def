"""The connection to upstream: one request out, one answer back, whose body is read as it comes and surely closed.

urllib3 and http.client would do that too, but re-quote the target, hide whether any byte was written, keep upstream's
framing to themselves, and take ten times as long.
"""

import copy
import ssl
import time
import urllib.parse
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gevent

from xaiproxy import __version__, config, errors, message_head, response_head, tokens
from xaiproxy.connection import Connection
from xaiproxy.dialling import Dialler
from xaiproxy.message_head import Malformed
from xaiproxy.request_body import ReplayableBody, WholeBody

USER_AGENT = f"xaiproxy/{__version__}"  # our own: Cloudflare turns some clients' away
IDLE_LIMIT = 60  # seconds that a connection waits for its next request
INTERIM_LIMIT = 20  # 1xx answers before the final one
PEEK_LIMIT = 65536  # bytes of an error that are looked at
PEEK_TIME = 2.0  # seconds for them to come
BROKEN = (OSError, EOFError, Malformed)


class _TooLate(Exception):
    """CONNECT_TIMEOUT is over. No OSError: the next address must not be tried."""


class Upstream:
    """All connections to the one origin."""

    def __init__(self, settings: config.Config, idle_limit: float = IDLE_LIMIT):
        self.origin = settings.upstream
        self.host = urllib.parse.urlsplit(settings.upstream).netloc
        self.idle_timeout = settings.idle_timeout
        self._settings = settings
        self._idle_limit = idle_limit
        self._loop = gevent.get_hub().loop
        self._idle: "deque[tuple[float, int, Connection]]" = deque()  # since when and which turn; the last is the latest
        self._sweeper: "gevent.Greenlet | None" = None
        self.dialler = Dialler(settings)

    def send(self, request: bytes, body: "ReplayableBody | WholeBody", *, method: str, repeatable: bool,
             upgrade: bool = False) -> "Exchange":
        """Send a request, on a pooled connection if there is a live one.

        `request`: its head, but for the framing of the body and the empty line; `repeatable`: whether to send it again
        when a pooled connection breaks; `upgrade`: whether it asks for a WebSocket. Raises UpstreamUnreachable,
        UpstreamTimeout, and what reading the client's body raises.
        """
        exchange = Exchange(self, request, body, method, repeatable, upgrade)
        connection = self._take()
        exchange.send(connection or self.connect(), pooled=connection is not None)
        return exchange

    def _take(self) -> "Connection | None":
        while self._idle:
            _, turn, connection = self._idle.pop()
            connection.readable.stop()
            connection.readable.priority = 0
            if turn != self._loop.iteration or connection.is_quiet():  # none but this turn's can have hidden an end
                return connection
            connection.close()
        return None

    def keep(self, connection: Connection) -> None:
        """Pool a connection whose last answer was read to its end."""
        kept = (time.monotonic(), self._loop.iteration, connection)
        self._idle.append(kept)
        # A close, or bytes that answer nothing: told before any request that came in the same turn of the loop.
        connection.readable.priority = self._loop.MAXPRI
        connection.readable.start(self._drop, kept)
        if not self._sweeper:
            self._sweeper = gevent.spawn(self._sweep)

    def _drop(self, kept: "tuple[float, int, Connection]") -> None:
        self._idle.remove(kept)
        kept[-1].close()

    def _sweep(self) -> None:
        """Close what has been idle for too long, until nothing is left."""
        while self._idle:
            due = self._idle[0][0] + self._idle_limit - time.monotonic()
            if due > 0:
                gevent.sleep(due)
            else:
                self._idle.popleft()[-1].close()

    def close(self) -> None:
        """Close the pooled connections."""
        while self._idle:
            self._idle.pop()[-1].close()

    def connect(self) -> Connection:
        """A new connection, within CONNECT_TIMEOUT all in all. Raises UpstreamUnreachable."""
        limit = self._settings.connect_timeout
        try:
            with gevent.Timeout(limit, _TooLate):
                return self.dialler.connect()
        except _TooLate as error:
            raise errors.UpstreamUnreachable(f"no connection to {self.origin} within {limit:g} s; look at the network, or "
                                             "raise XAI_PROXY_CONNECT_TIMEOUT") from error
        except BROKEN as error:
            raise errors.UpstreamUnreachable(f"no connection to {self.origin}: {_reason(error)}") from error


class _AnsweredEarly(Exception):
    """Thrown into the greenlet that still writes a body which upstream has refused already."""


class Exchange:
    """A request that was sent and the answer to it. `close` may be called twice, and at any time.

    `body`, one of framing's, says where on `connection` the answer ends.
    """

    __slots__ = ("connection", "head", "body", "length", "_upstream", "_method", "_request",
                 "_repeatable", "_upgrade", "_request_body", "_pooled", "_whole", "_reset", "_writer")

    def __init__(self, upstream: Upstream, request: bytes, body: "ReplayableBody | WholeBody", method: str,
                 repeatable: bool, upgrade: bool = False):
        if body.chunked:
            request += b"Transfer-Encoding: chunked\r\n"
        elif body.content_length is not None:
            request += b"Content-Length: %d\r\n" % body.content_length
        self._request = request + b"\r\n"
        self._upstream = upstream
        self._method = method
        self._repeatable = repeatable
        self._upgrade = upgrade
        self._request_body = body
        self._pooled = False
        self._whole = True  # whether all of the request was written
        self._reset = False  # whether a write was told so: a read then meets but an end, which is no clean one
        self._writer: "gevent.Greenlet | None" = None  # while it writes a body
        self.connection: "Connection | None" = None
        self.head: "response_head.Head | None" = None
        self.body: Any = None
        self.length: "int | None" = None  # of the body that the client is to be told

    def send(self, connection: Connection, pooled: bool) -> None:
        """Write head and body, or as much of it as upstream takes before it answers with an error.

        A pooled connection that took no byte is replaced by a new one.
        """
        self.connection, self._pooled, self._whole, self._reset = connection, pooled, True, False
        body, limit = self._request_body, self._upstream.idle_timeout
        started = False
        try:
            parts = iter(body)
            start = self._request
            if body.has_come:  # with the head: most bodies are short
                start += self._framed(next(parts, b""))
            try:
                sent = connection.send(start)
            except ConnectionError:
                if not pooled:
                    raise
                connection.close()
                self.connection, self._pooled = connection, _ = self._upstream.connect(), False
                sent = connection.send(start)
            started = True
            if sent < len(start) or connection.holds_back:  # to send nothing could take a reset for itself: see _reset
                connection.send_all(start[sent:], limit)
            if not body.ended or body.chunked:
                self._send_rest(connection, parts, limit)
        except (_AnsweredEarly, BrokenPipeError, ConnectionResetError) as error:
            self._whole = False
            self._reset |= isinstance(error, ConnectionResetError)  # a broken pipe comes behind a FIN
            if not started:
                self.close()
                raise self._broke_off(error) from error
            # else upstream may have answered before it had read everything: receive tells
        except TimeoutError as error:
            self.close()
            raise self._timed_out() from error
        except OSError as error:
            self.close()
            raise self._broke_off(error) from error
        except BaseException:
            self.close()
            raise

    def _framed(self, part: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(part), part) if self._request_body.chunked else part

    def _send_rest(self, connection: Connection, parts: "Iterator[bytes]", limit: float) -> None:
        self._writer = gevent.getcurrent()
        connection.readable.start(self._look_for_answer)
        try:
            for part in parts:
                connection.send_all(self._framed(part), limit)
            if self._request_body.chunked:
                connection.send_all(b"0\r\n\r\n", limit)
        finally:
            self._writer = None
            connection.readable.stop()

    def _look_for_answer(self) -> None:
        """In the hub, while a body is written: who refuses it may not read it to its end."""
        connection = self.connection
        try:
            data = connection.receive()
        except BlockingIOError:
            return
        except OSError:  # as an end: who writes will hear of it
            self._reset, data = True, b""
        connection.unread += data
        refused = bool(data) and self._is_refused_early(connection.unread)
        if refused or not data or len(connection.unread) > response_head.SIZE_LIMIT:
            connection.readable.stop()  # the rest waits in the kernel until the body was sent
            if refused:
                self._writer.throw(_AnsweredEarly)

    def _is_refused_early(self, data: bytes) -> bool:
        try:
            while end := message_head.end(data, 0, response_head.SIZE_LIMIT):
                head = response_head.parse(data[:end], self._method)
                if head.status >= 200:
                    return head.status >= 400 or not head.keep_alive
                data = data[end:]
        except Malformed:
            return True
        return False

    def receive(self, on_interim: "Callable[[response_head.Head], None]" = lambda head: None) -> None:
        """Wait for the answer's head; `on_interim` gets those before it. Raises UpstreamTimeout, UpstreamUnreachable."""
        try:
            head = self._receive_head(on_interim)
        except TimeoutError as error:
            self.close()
            raise self._timed_out() from error
        except BROKEN as error:
            self.close()
            if self._pooled and self._repeatable and self._request_body.replayable:
                self.send(self._upstream.connect(), pooled=False)
                return self.receive(on_interim)
            raise self._broke_off(error) from error
        except BaseException:
            self.close()
            raise
        if not self._pooled:
            self._upstream.dialler.answered(self.connection)
        self.head, self.body = head, head.body
        self.length = None if head.status in (204, 304) else head.length

    def _receive_head(self, on_interim: "Callable[[response_head.Head], None]") -> response_head.Head:
        for number in range(INTERIM_LIMIT + 1):
            data = self.connection.recv_head(response_head.SIZE_LIMIT, self._upstream.idle_timeout)
            if not data:
                raise EOFError
            head = response_head.parse(data, self._method)
            if head.status >= 200:
                return head
            if head.status == 101:
                if self._upgrade and [value.lower() for value in head.values.get("upgrade", ())] == ["websocket"]:
                    return head
                raise Malformed("switches to another protocol, which nobody asked for")
            if number < INTERIM_LIMIT:
                on_interim(head)
        raise Malformed("is preceded by too many interim ones")

    @property
    def idle_timeout(self) -> float:
        return self._upstream.idle_timeout

    def parts(self, pause: "float | None" = None) -> Iterator[bytes]:
        """The body as it comes; b"" whenever nothing has come for `pause` seconds. Raises UpstreamBroken."""
        left = self.idle_timeout
        while not self.body.ended:
            limit = min(pause or left, left)
            try:
                data = self.connection.recv(limit)
                left = self.idle_timeout
                if not data:
                    if self._reset:
                        raise EOFError
                    self.body.end_of_connection()
                    break
                for start, end in self.body.feed(data):
                    yield data[start:end]
            except BROKEN as error:
                if not isinstance(error, TimeoutError) or error.errno or limit == left:  # the kernel's has a number
                    raise self.broken(error) from error
                left -= limit
                yield b""
                continue
            self.connection.unread = data[self.body.used:]
        self.release()

    __iter__ = parts

    def broken(self, error: Exception) -> errors.UpstreamBroken:
        if isinstance(error, TimeoutError):
            return errors.UpstreamBroken(f"no byte for {self._upstream.idle_timeout:g} s")
        return errors.UpstreamBroken(_reason(error))

    def release(self) -> None:
        """The answer was read to its end: pool its connection, if nothing speaks against it."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        if self.head.keep_alive and self._whole and not connection.unread:
            self._upstream.keep(connection)
        else:
            connection.close()

    def peek(self) -> bytes:
        """The beginning of the body, at most PEEK_LIMIT bytes and PEEK_TIME seconds of it; it stays unread."""
        connection, body = self.connection, copy.copy(self.body)
        deadline = time.monotonic() + PEEK_TIME
        data, seen, content = connection.unread, 0, b""
        try:
            while True:
                content += b"".join([data[seen:][start:end] for start, end in body.feed(data[seen:])])
                seen = len(data)
                if body.ended or len(content) >= PEEK_LIMIT:
                    break
                connection.unread = b""
                more = connection.recv(deadline - time.monotonic())
                data += more
                if not more:
                    break
        except BROKEN:
            pass  # in time, or for ever: __iter__ tells
        connection.unread = data
        return content[:PEEK_LIMIT]

    def close(self) -> None:
        """Break off: unless the answer was read to its end, the connection is closed and not used again."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    def _timed_out(self) -> errors.UpstreamTimeout:
        return errors.UpstreamTimeout(f"{self._upstream.origin} sent no byte for {self._upstream.idle_timeout:g} s "
                                      "(XAI_PROXY_IDLE_TIMEOUT); the request may have been worked on")

    def _broke_off(self, error: Exception) -> errors.UpstreamUnreachable:
        return errors.UpstreamUnreachable(f"{self._upstream.origin} broke off before it answered: {_reason(error)}; "
                                          "the request may have been worked on")


def is_refused_token(exchange: Exchange) -> bool:
    """Whether the answer says that the access token is dead: xAI does so with 403, whose other causes are not ours."""
    if exchange.head.status == 401:
        return True
    if exchange.head.status != 403:
        return False
    codings = [value.lower() for value in exchange.head.values.get("content-encoding", ())]
    return tokens.is_refusal(_decoded(exchange.peek(), codings))


def _decoded(data: bytes, codings: "list[str]") -> bytes:
    """As much as can be decoded of what may be only the beginning of a body."""
    if not codings or codings == ["identity"]:
        return data
    for window in (47, -15):  # gzip or zlib, told by their headers; raw deflate, which some servers send
        try:
            return zlib.decompressobj(window).decompress(data, PEEK_LIMIT)
        except zlib.error:
            continue
    return data


def _reason(error: Exception) -> str:
    """What went wrong, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); set SSL_CERT_FILE if a CA of your own signed it"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({(error.reason or 'closed').lower().replace('_', ' ')})"
    if isinstance(error, EOFError):
        return "it closed the connection"
    if isinstance(error, Malformed):
        return f"what it sent is not HTTP/1.1: it {error}"
    return error.strerror or str(error)
