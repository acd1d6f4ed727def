"""A request to upstream and its response: one connection, both directions at the same time.

urllib3 and http.client would do that too, but they re-quote the target, hide whether any byte was
written, keep upstream's framing to themselves, and take ten times as long.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from xaiproxy import errors
from xaiproxy.http1 import response_head
from xaiproxy.http1.connection import BROKEN, DeadPath, reason
from xaiproxy.http1.framing import LAST, content_of
from xaiproxy.http1.message_head import Malformed
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.request_body import RequestBody
from xaiproxy.http1.upload import Upload, framed

INTERIM_LIMIT = 20  # 1xx responses before the final one
PEEK_LIMIT = 65536  # bytes of an error's content that are read ahead
PEEK_TIME = 2.0  # seconds for them to come
# To repeat these changes nothing (RFC 9110 section 9.2.1). PUT and DELETE are idempotent too
# (section 9.2.2), but what they do here may be paid for.
SAFE = frozenset(("GET", "HEAD", "OPTIONS"))


class Request(NamedTuple):
    """`head`: the request line and fields, except the framing of the body and the empty line.

    `repeatable`: send it again when the connection breaks before the response. `upgrade`: it asks
    for a WebSocket.
    """

    head: bytes
    body: RequestBody
    method: str
    repeatable: bool
    upgrade: bool = False

    def beginning(self) -> bytes:
        """The head and what has come of the body: most bodies are short. Raises BadRequest."""
        body = self.body
        body.rewind()
        if body.chunked:
            begin = self.head + b"Transfer-Encoding: chunked\r\n\r\n"
        elif body.content_length is not None:
            begin = b"%bContent-Length: %d\r\n\r\n" % (self.head, body.content_length)
        else:
            begin = self.head + b"\r\n"
        if body.has_come:
            begin += framed(body, body.read1())
        elif body.chunked and body.at_end:
            begin += LAST
        return begin


def perform(
    pool: Pool,
    request: Request,
    on_sent: Callable[[], object] = lambda: None,
    on_interim: Callable[[response_head.Head], object] = lambda head: None,
) -> Exchange:
    """Send a request and wait for the head of its response.

    `on_sent`: called once the body was sent; `on_interim`: gets the heads of 1xx responses. A
    repeatable request whose pooled connection breaks is sent once more, on a new one. Raises
    UpstreamTimeout, UpstreamUnreachable, and what reading the client's body raises.
    """
    failed: Exception | None = None
    began_at = time.monotonic()
    own_share = None
    while True:
        try:
            upload, pooled = _send(pool, request, on_sent, may_reuse=failed is None)
        except errors.UpstreamUnreachable as error:
            if failed is None:
                raise
            # The first attempt may have been processed.
            raise _broke_off(pool, request, failed) from error
        if own_share is None:
            own_share = upload.started_at - began_at - upload.connecting
        try:
            head = _receive_head(pool, request, upload, on_interim)
            upload.answered = True
            if head.status >= 400:
                # Lets other greenlets run, which may throw into this one.
                upload.stop()
        except TimeoutError as error:
            upload.close()
            raise pool.timed_out() from error
        except BROKEN as error:
            upload.close()
            may_repeat = pooled or isinstance(error, DeadPath)
            if not (may_repeat and request.repeatable and request.body.replayable) or failed:
                raise _broke_off(pool, request, error) from error
            failed = error
        except BaseException:
            upload.close()
            raise
        else:
            if not pooled:
                pool.answered(upload.connection)
            return Exchange(pool, upload, head, time.monotonic() - began_at - own_share)


def _send(
    pool: Pool, request: Request, on_sent: Callable[[], object], *, may_reuse: bool
) -> tuple[Upload, bool]:
    """Begin to send; and whether on a pooled connection.

    A pooled connection that takes no byte is replaced by a new one.
    """
    begin = request.beginning()
    # After what may raise: it is no longer in the pool.
    connection = pool.take() if may_reuse else None
    sent = 0
    if connection is not None:
        try:
            sent = connection.send(begin)
        except OSError:
            connection.close()
            connection = None
    pooled = connection is not None
    connecting = 0.0
    if connection is None:
        began_at = time.monotonic()
        connection = pool.connect()
        connecting = time.monotonic() - began_at
        try:
            sent = connection.send(begin)
        except OSError as error:
            connection.close()
            raise errors.UpstreamUnreachable(
                f"{pool.origin} closed the connection at once: {reason(error)}",
                kind="reset_before_head",
                may_retry=True,
            ) from error
    upload = Upload(connection, request.body, pool, on_sent, connecting)
    try:
        upload.start(begin[sent:])
    except BaseException:
        upload.close()
        raise
    return upload, pooled


def _receive_head(
    pool: Pool,
    request: Request,
    upload: Upload,
    on_interim: Callable[[response_head.Head], object],
) -> response_head.Head:
    for number in range(INTERIM_LIMIT + 1):
        data = _head_bytes(upload, pool.settings.idle_timeout)
        if not data:
            raise EOFError
        head = response_head.parse(data, request.method)
        if head.status >= 200:
            return head
        if head.status == 101:
            protocols = [value.lower() for value in head.values.get("upgrade", ())]
            if request.upgrade and protocols == ["websocket"]:
                return head
            raise Malformed("switches to another protocol, which was not asked for")
        if number < INTERIM_LIMIT:
            on_interim(head)
    raise Malformed("is preceded by too many interim ones")


def _head_bytes(upload: Upload, idle_timeout: float) -> bytes:
    """A head, within `idle_timeout` seconds after the last byte of the upload."""
    limit = idle_timeout
    while True:
        try:
            return upload.connection.recv_head(response_head.SIZE_LIMIT, limit)
        except TimeoutError:
            limit = upload.sent_at + idle_timeout - time.monotonic()
            if limit <= 0:
                raise


def _broke_off(
    pool: Pool, request: Request, error: Exception
) -> errors.UpstreamTimeout | errors.UpstreamUnreachable:
    if isinstance(error, DeadPath):
        return errors.UpstreamTimeout(
            f"the network path to {pool.origin} is dead ({error}); the request may "
            "have been processed"
        )
    invalid = isinstance(error, Malformed)
    happened = "sent no valid answer" if invalid else "broke off before it answered"
    return errors.UpstreamUnreachable(
        f"{pool.origin} {happened}: {reason(error)}; the request may have been processed",
        kind="reset_before_head",
        may_retry=request.method in SAFE,
    )


class Exchange:
    """A response whose head has arrived; its content comes from `parts`.

    `close` may be called twice, at any time.

    `body`, one of framing's, finds where on `connection` the response ends. `length`: of the
    content, for the client, or None if unknown. `waited`: seconds for a connection and for the
    head, of all attempts.
    """

    __slots__ = (
        "_closed",
        "_pool",
        "body",
        "client_timeout",
        "connection",
        "head",
        "idle_timeout",
        "length",
        "upload",
        "waited",
    )

    def __init__(self, pool: Pool, upload: Upload, head: response_head.Head, waited: float):
        self.upload = upload
        self.connection = upload.connection
        self.head = head
        self.waited = waited
        self.body = head.body
        self.length = None if head.status in (101, 204, 304) else head.length
        self.idle_timeout = pool.settings.idle_timeout
        self.client_timeout = pool.settings.client_timeout
        self._pool = pool
        self._closed = False

    def time_left(self, received_at: float) -> float:
        """Seconds until IDLE_TIMEOUT without progress in either direction.

        `received_at`: when the last byte arrived."""
        return max(received_at, self.upload.sent_at) + self.idle_timeout - time.monotonic()

    def parts(self, pause: float | None = None) -> Iterator[bytes]:
        """The content as it comes; b"" whenever nothing has come for `pause` seconds.

        Raises UpstreamBroken.
        """
        received_at, limit = time.monotonic(), pause or self.idle_timeout
        while not self.body.ended:
            try:
                data = self.connection.recv(limit)
                received_at, limit = time.monotonic(), pause or self.idle_timeout
                if not data:
                    self.body.end_of_connection()
                    break
                yield from content_of(self.body, data)
            except BROKEN as error:
                left = self.time_left(received_at)
                if not isinstance(error, TimeoutError) or left <= 0:
                    raise self.broken(error) from error
                if pause:
                    yield b""
                limit = min(pause or left, left)
                continue
            self.connection.unread = data[self.body.used :]

    def broken(self, error: Exception) -> errors.UpstreamBroken:
        if isinstance(error, TimeoutError):
            return errors.UpstreamBroken(
                f"no byte came for {self.idle_timeout:g} s (XAI_PROXY_IDLE_TIMEOUT)", "timeout"
            )
        return errors.UpstreamBroken(reason(error))

    def finish(self) -> None:
        """After the response was forwarded: let the upload end too, then pool the connection."""
        if self._closed:
            return
        if self.upload.running and self.head.status < 400:
            self.upload.join()
        self.upload.stop()
        self._closed = True
        if self.head.keep_alive and self.upload.complete and not self.connection.unread:
            self._pool.keep(self.connection)
        else:
            self.connection.close()

    def peek(self) -> bytes:
        """The beginning of the content, which stays unread: PEEK_LIMIT, PEEK_TIME."""
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
            # `parts` will raise if the connection has ended, and wait if bytes are only late.
            pass
        connection.unread = data
        return content[:PEEK_LIMIT]

    def close(self) -> None:
        """Abort: unless the response was read to its end, close the connection."""
        if not self._closed:
            self._closed = True
            self.upload.close()
