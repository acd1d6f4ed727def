"""The connection to upstream: one request out, one answer back, whose body is read as it comes and surely closed.

urllib3 and http.client would do that too, but re-quote the target, hide whether any byte was written, keep upstream's
framing to themselves, and take ten times as long.
"""

from __future__ import annotations

import contextlib
import copy
import ssl
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gevent

from xaiproxy import __version__, config, errors, trust
from xaiproxy.http1 import response_head
from xaiproxy.http1.connection import Connection, DeadPath
from xaiproxy.http1.dialler import BROKEN, Dialler, TooLate
from xaiproxy.http1.framing import LAST, content_of
from xaiproxy.http1.message_head import Malformed
from xaiproxy.http1.request_body import ReplayableBody, WholeBody

USER_AGENT = f"xaiproxy/{__version__}"  # our own: Cloudflare turns some clients' away
IDLE_LIMIT = 60  # seconds that a connection waits for its next request
INTERIM_LIMIT = 20  # 1xx answers before the final one
PEEK_LIMIT = 65536  # bytes of an error that are looked at
PEEK_TIME = 2.0  # seconds for them to come
# To repeat these changes nothing (RFC 9110 section 9.2.1). PUT and DELETE are idempotent too (section 9.2.2), but what
# they do here may be paid for.
SAFE = frozenset(("GET", "HEAD", "OPTIONS"))


class Upstream:
    """All connections to the one origin."""

    def __init__(self, settings: config.Config, idle_limit: float = IDLE_LIMIT):
        self.origin = settings.upstream
        self.host = urllib.parse.urlsplit(settings.upstream).netloc
        self.idle_timeout = settings.idle_timeout
        self.client_timeout = settings.client_timeout
        self._settings = settings
        self._idle_limit = idle_limit
        self._idle: deque[tuple[float, Connection]] = (
            deque()
        )  # with the time since when; the last is the latest
        self._sweeper: gevent.Greenlet | None = None
        self.dialler = Dialler(settings)

    def send(
        self,
        request: bytes,
        body: ReplayableBody | WholeBody,
        *,
        method: str,
        repeatable: bool,
        upgrade: bool = False,
        on_sent: Callable[[], object] = lambda: None,
    ) -> Exchange:
        """Send a request, on a pooled connection if there is a live one.

        `request`: its head, but for the framing of the body and the empty line; `repeatable`: whether to send it again
        when a pooled connection breaks; `upgrade`: whether it asks for a WebSocket; `on_sent`: called once the body was
        sent. Raises UpstreamUnreachable, and what reading the client's body raises.
        """
        exchange = Exchange(self, request, body, method, repeatable, upgrade, on_sent)
        connection = self._take()
        exchange.send(connection or self.connect(), pooled=connection is not None)
        return exchange

    def _take(self) -> Connection | None:
        while self._idle:
            _, connection = self._idle.pop()
            connection.readable.stop()
            # Its watcher alone would not do: libev reports 64 descriptors at a time, and a close may be yet to come.
            if connection.is_quiet():
                return connection
            connection.close()
        return None

    def keep(self, connection: Connection) -> None:
        """Pool a connection whose last answer was read to its end."""
        kept = (time.monotonic(), connection)
        self._idle.append(kept)
        connection.readable.start(self._look, kept)
        if not self._sweeper:
            self._sweeper = gevent.spawn(self._sweep)

    def _look(self, kept: tuple[float, Connection]) -> None:
        """Drop a pooled connection that was closed, or that brings bytes which answer nothing."""
        if not kept[1].is_quiet():
            self._idle.remove(kept)
            kept[1].close()

    def _sweep(self) -> None:
        """Close what has been idle for too long, until nothing is left."""
        while self._idle:
            due = self._idle[0][0] + self._idle_limit - time.monotonic()
            if due > 0:
                gevent.sleep(due)
            else:
                self._idle.popleft()[1].close()

    def close(self) -> None:
        """Close the pooled connections."""
        while self._idle:
            self._idle.pop()[1].close()

    def connect(self) -> Connection:
        """A new connection, within CONNECT_TIMEOUT all in all. Raises UpstreamUnreachable."""
        limit = self._settings.connect_timeout
        try:
            with gevent.Timeout(limit, TooLate):
                return self.dialler.connect()
        except TooLate as error:
            raise errors.UpstreamUnreachable(
                f"no connection to {self.origin} within {limit:g} s; check the network, or "
                "raise XAI_PROXY_CONNECT_TIMEOUT",
                may_retry=True,
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise errors.UpstreamUnreachable(
                f"no connection to {self.origin}: its certificate is not trusted "
                f"{trust.refusal(error, self._settings.egress)}",
                may_retry=True,
            ) from error
        except BROKEN as error:
            raise errors.UpstreamUnreachable(
                f"no connection to {self.origin}: {_reason(error)}", may_retry=True
            ) from error


class Exchange:
    """A request that was sent and the answer to it. `close` may be called twice, and at any time.

    Both directions move at the same time: what does not fit into the first write is uploaded by a greenlet of its own,
    while the request's greenlet waits for the answer and passes it on. The upload ends early at an error status, a
    reset or an end of upstream; what ends the request (the client is gone, its body is malformed) the upload throws
    into the request's greenlet. `body`, one of framing's, says where on `connection` the answer ends.
    """

    __slots__ = (
        "connection",
        "head",
        "body",
        "length",
        "sent_at",
        "_upstream",
        "_method",
        "_request",
        "_repeatable",
        "_upgrade",
        "_request_body",
        "_on_sent",
        "_pooled",
        "_whole",
        "_greenlet",
        "_upload",
        "_failure",
    )

    def __init__(
        self,
        upstream: Upstream,
        request: bytes,
        body: ReplayableBody | WholeBody,
        method: str,
        repeatable: bool,
        upgrade: bool = False,
        on_sent: Callable[[], object] = lambda: None,
    ):
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
        self._on_sent = on_sent
        self._pooled = False
        self._whole = True  # whether all of the request was written
        self._greenlet: Any = None
        self._upload: gevent.Greenlet | None = None
        self._failure: Any = None  # the callback that will throw what ended the upload
        self.sent_at = (
            0.0  # when upstream last took bytes of an upload, in time.monotonic's seconds
        )
        self.connection: Connection | None = None
        self.head: response_head.Head | None = None
        self.body: Any = None
        self.length: int | None = None  # of the body that the client is to be told

    def send(self, connection: Connection, pooled: bool) -> None:
        """Write the head, and what is there of the body; the rest is uploaded while the answer is waited for.

        A pooled connection that took no byte is replaced by a new one. Raises UpstreamUnreachable, and what reading
        the client's body raises.
        """
        body = self._request_body
        self.connection, self._pooled, self._whole = connection, pooled, True
        try:
            body.rewind()
            start = self._request
            if body.has_come:  # with the head: most bodies are short
                start += self._framed(body.read1())
            elif body.chunked and body.at_end:
                start += LAST
            try:
                sent = connection.send(start)
            except ConnectionError:
                if not pooled:
                    raise
                connection.close()
                self.connection, self._pooled = connection, _ = self._upstream.connect(), False
                sent = connection.send(start)
            if sent == len(start) and not connection.holds_back and body.at_end:
                self._on_sent()
                return
            body.invite()
        except OSError as error:
            self.close()
            raise errors.UpstreamUnreachable(
                f"{self._upstream.origin} closed the connection at once: {_reason(error)}",
                may_retry=True,
            ) from error
        except BaseException:
            self.close()
            raise
        self._whole = False
        self._greenlet = gevent.getcurrent()
        rest = start[sent:]
        # Not as an argument, of which gevent prints the beginning if the greenlet dies of an exception.
        self._upload = gevent.spawn(lambda: self._upload_rest(connection, rest))

    def _framed(self, part: bytes) -> bytes:
        """`part` as it is sent: with the last chunk, if nothing follows."""
        body = self._request_body
        if not body.chunked:
            return part
        return (b"%x\r\n%b\r\n" % (len(part), part) if part else b"") + (
            LAST if body.at_end else b""
        )

    # The upload, in its own greenlet

    def _upload_rest(self, connection: Connection, rest: bytes) -> None:
        body, limit = self._request_body, self._upstream.idle_timeout
        try:
            connection.send_all(rest, limit)
            while not body.at_end:
                connection.send_all(self._framed(self._next_part()), limit)
                self.sent_at = time.monotonic()
            if (
                self._upload is gevent.getcurrent()
            ):  # else it has been stopped, and what follows may be another request
                self._whole = True
                self._on_sent()
        except OSError as error:
            # Upstream may have answered before it had read everything: the receiver sees that, or the error.
            if isinstance(error, TimeoutError):
                self._fail(self._timed_out())
        except (errors.Refusal, errors.ClientGone) as error:
            self._fail(error)

    def _next_part(self) -> bytes:
        """The next part of the client's body, for which a client that is being answered has IDLE_TIMEOUT.

        It may wait for the answer to what it has sent so far.
        """
        start = time.monotonic()
        while True:
            try:
                return self._request_body.read1()
            except errors.ClientTimeout:
                if self.head is None or time.monotonic() - start >= self.idle_timeout:
                    raise

    def _fail(self, error: Exception) -> None:
        if (
            self._upload is gevent.getcurrent()
        ):  # else it has been stopped, and nobody waits for its outcome
            self._failure = gevent.get_hub().loop.run_callback(self._throw, error)

    def _throw(self, error: Exception) -> None:
        if self.head is not None:  # too late for an answer of ours
            error = (
                errors.UpstreamBroken(str(error))
                if isinstance(error, errors.UpstreamTimeout)
                else errors.ClientGone()
            )
        self._greenlet.throw(error)

    def _stop_upload(self) -> None:
        if self._failure is not None:
            self._failure.stop()
        if self._upload is not None:
            upload, self._upload = self._upload, None
            upload.kill()

    @property
    def uploads(self) -> bool:
        """Whether the client's body is still being sent."""
        return self._upload is not None and not self._upload.dead

    def discard_upload(self) -> None:
        """Read what the client still sends of a refused body, since many read no answer before they have sent it."""
        if not (self.uploads or self._request_body.at_end):
            self._upload = gevent.spawn(self._discard)

    def _discard(self) -> None:
        with contextlib.suppress(errors.Refusal, errors.ClientGone):  # the answer is not affected
            while not self._request_body.at_end:
                self._request_body.read1()

    # The answer

    def receive(self, on_interim: Callable[[response_head.Head], None] = lambda head: None) -> None:
        """Wait for the answer's head; `on_interim` gets those before it. Raises UpstreamTimeout, UpstreamUnreachable."""
        try:
            head = self._receive_head(on_interim)
        except TimeoutError as error:
            self.close()
            raise self._timed_out() from error
        except BROKEN as error:
            self.close()
            if (
                (self._pooled or isinstance(error, DeadPath))
                and self._repeatable
                and self._request_body.replayable
            ):
                self._repeatable = False  # once
                try:
                    self.send(self._upstream.connect(), pooled=False)
                except errors.UpstreamUnreachable as again:
                    raise self._broke_off(error) from again  # the first try may have been processed
                return self.receive(on_interim)
            raise self._broke_off(error) from error
        except BaseException:
            self.close()
            raise
        if not self._pooled:
            self._upstream.dialler.answered(self.connection)
        self.head, self.body = head, head.body
        self.length = None if head.status in (101, 204, 304) else head.length
        if head.status >= 400:
            self._stop_upload()

    def _receive_head(self, on_interim: Callable[[response_head.Head], None]) -> response_head.Head:
        for number in range(INTERIM_LIMIT + 1):
            data = self._head_bytes()
            if not data:
                raise EOFError
            head = response_head.parse(data, self._method)
            if head.status >= 200:
                return head
            if head.status == 101:
                if self._upgrade and [
                    value.lower() for value in head.values.get("upgrade", ())
                ] == ["websocket"]:
                    return head
                raise Malformed("switches to another protocol, which nobody asked for")
            if number < INTERIM_LIMIT:
                on_interim(head)
        raise Malformed("is preceded by too many interim ones")

    def _head_bytes(self) -> bytes:
        limit = self.idle_timeout
        while True:
            try:
                return self.connection.recv_head(response_head.SIZE_LIMIT, limit)
            except TimeoutError:
                limit = self.time_left(0)
                if limit <= 0:
                    raise

    @property
    def idle_timeout(self) -> float:
        return self._upstream.idle_timeout

    @property
    def client_timeout(self) -> float:
        return self._upstream.client_timeout

    def time_left(self, heard: float) -> float:
        """Seconds until IDLE_TIMEOUT without progress in either direction; `heard`: when the last byte came."""
        return max(heard, self.sent_at) + self.idle_timeout - time.monotonic()

    def parts(self, pause: float | None = None) -> Iterator[bytes]:
        """The body as it comes; b"" whenever nothing has come for `pause` seconds. Raises UpstreamBroken."""
        heard, limit = time.monotonic(), pause or self.idle_timeout
        while not self.body.ended:
            try:
                data = self.connection.recv(limit)
                heard, limit = time.monotonic(), pause or self.idle_timeout
                if not data:
                    self.body.end_of_connection()
                    break
                yield from content_of(self.body, data)
            except BROKEN as error:
                left = self.time_left(heard)
                if not isinstance(error, TimeoutError) or left <= 0:
                    raise self.broken(error) from error
                if pause:
                    yield b""
                limit = min(pause or left, left)
                continue
            self.connection.unread = data[self.body.used :]

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts()
        self.finish()

    def broken(self, error: Exception) -> errors.UpstreamBroken:
        if isinstance(error, TimeoutError):
            return errors.UpstreamBroken(f"no byte for {self._upstream.idle_timeout:g} s")
        return errors.UpstreamBroken(_reason(error))

    def finish(self) -> None:
        """The answer was passed on to its end: let the upload end too, then pool the connection if it is reusable."""
        if self.uploads and self.head.status < 400:
            self._finish_upload()
        self._stop_upload()
        connection, self.connection = self.connection, None
        if connection is None:
            return
        if self.head.keep_alive and self._whole and not connection.unread:
            self._upstream.keep(connection)
        else:
            connection.close()

    def _finish_upload(self) -> None:
        """Wait for the end of the upload, which an end of upstream brings about too."""
        readable, upload = self.connection.readable, self._upload

        def look() -> None:
            with contextlib.suppress(OSError):  # a reset: the fault does not matter any more
                try:
                    self.connection.unread += self.connection.receive()
                except BlockingIOError:
                    return
            readable.stop()
            upload.kill(block=False)

        readable.start(look)
        try:
            upload.join()
        finally:
            readable.stop()

    def peek(self) -> bytes:
        """The beginning of the body, at most PEEK_LIMIT bytes and PEEK_TIME seconds of it; it stays unread."""
        connection, body = self.connection, copy.copy(self.body)
        deadline = time.monotonic() + PEEK_TIME
        data, seen, content = connection.unread, 0, b""
        try:
            while True:
                content += b"".join(content_of(body, data[seen:]))
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
        self._stop_upload()  # last, since it lets others run, which may throw into this greenlet

    def _timed_out(self) -> errors.UpstreamTimeout:
        return errors.UpstreamTimeout(
            f"{self._upstream.origin} sent no byte for {self._upstream.idle_timeout:g} s "
            "(XAI_PROXY_IDLE_TIMEOUT); the request may have been processed"
        )

    def _broke_off(self, error: Exception) -> errors.UpstreamTimeout | errors.UpstreamUnreachable:
        if isinstance(error, DeadPath):
            return errors.UpstreamTimeout(
                f"the network path to {self._upstream.origin} is dead ({error}); the request may "
                "have been processed"
            )
        happened = (
            "sent no valid answer"
            if isinstance(error, Malformed)
            else "broke off before it answered"
        )
        return errors.UpstreamUnreachable(
            f"{self._upstream.origin} {happened}: {_reason(error)}; the request may have "
            "been processed",
            may_retry=self._method in SAFE,
        )


def _reason(error: Exception) -> str:
    """What went wrong, in words."""
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({(error.reason or 'closed').lower().replace('_', ' ')})"
    if isinstance(error, EOFError):
        return "it closed the connection"
    if isinstance(error, Malformed):
        return f"what it sent is not HTTP/1.1: it {error}"
    return error.strerror or str(error)
