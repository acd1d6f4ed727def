"""The sending of a request, at the same time as its response is received."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import gevent

from xaiproxy import errors
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.framing import LAST
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.request_body import RequestBody


class Upload:
    """A request that is being sent on `connection`.

    What does not fit into the first write is sent by a greenlet of its own, while the request's
    greenlet waits for the response and passes it on. The upload ends early at an error status, a
    reset or an end of upstream; what ends the request (the client has closed, its body is
    malformed) it throws into the request's greenlet.

    `complete`: all of the request was written. `answered`: the final response head has arrived.
    `sent_at`: when upstream last took bytes of the body, `started_at`: when it took the first of
    the request, both in the seconds of time.monotonic. `connecting`: seconds that the connection
    took.
    """

    __slots__ = (
        "_body",
        "_failure",
        "_greenlet",
        "_idle_timeout",
        "_on_sent",
        "_owner",
        "_pool",
        "answered",
        "complete",
        "connecting",
        "connection",
        "sent_at",
        "started_at",
    )

    def __init__(
        self,
        connection: Connection,
        body: RequestBody,
        pool: Pool,
        on_sent: Callable[[], object],
        connecting: float,
    ):
        """`on_sent`: called once the body was sent."""
        self.connection = connection
        self.connecting = connecting
        self.sent_at = 0.0
        self.started_at = time.monotonic()
        self.complete = True
        self.answered = False
        self._body = body
        self._pool = pool
        self._idle_timeout = pool.settings.idle_timeout
        self._on_sent = on_sent
        self._owner: Any = gevent.getcurrent()
        self._greenlet: gevent.Greenlet | None = None
        # The callback that will throw what ended the upload.
        self._failure: Any = None

    @property
    def running(self) -> bool:
        return self._greenlet is not None and not self._greenlet.dead

    def start(self, unsent: bytes) -> None:
        """Send `unsent`, then the rest of the body. Raises ClientGone."""
        if not unsent and not self.connection.holds_back and self._body.at_end:
            self._on_sent()
            return
        self._body.invite()
        self.complete = False
        # Not as an argument: gevent prints its beginning if the greenlet dies of an exception.
        self._greenlet = gevent.spawn(lambda: self._run(unsent))

    def _run(self, unsent: bytes) -> None:
        try:
            self.connection.send_all(unsent, self._idle_timeout)
            while not self._body.at_end:
                part = framed(self._body, self._next_part())
                self.connection.send_all(part, self._idle_timeout)
                self.sent_at = time.monotonic()
            if self._is_current():
                self.complete = True
                self._on_sent()
        except TimeoutError:
            self._fail(self._pool.timed_out())
        except OSError:
            # Upstream may have answered before it had read everything: the receiver meets that
            # answer, or the error.
            pass
        except (errors.ErrorResponse, errors.ClientGone) as error:
            self._fail(error)

    def _is_current(self) -> bool:
        """Whether it was not stopped: the request's greenlet may serve another request by now."""
        return self._greenlet is gevent.getcurrent()

    def _next_part(self) -> bytes:
        """The next part of the body; IDLE_TIMEOUT applies while the client is being answered.

        Such a client may wait for the answer to what it has sent so far.
        """
        start = time.monotonic()
        while True:
            try:
                return self._body.read1()
            except errors.ClientTimeout:
                if not self.answered or time.monotonic() - start >= self._idle_timeout:
                    raise

    def _fail(self, error: Exception) -> None:
        if self._is_current():
            self._failure = gevent.get_hub().loop.run_callback(self._throw, error)

    def _throw(self, error: Exception) -> None:
        if self.answered:
            # Too late for an answer of the proxy's own.
            is_timeout = isinstance(error, errors.UpstreamTimeout)
            error = (
                errors.UpstreamBroken(str(error), "timeout") if is_timeout else errors.ClientGone()
            )
        self._owner.throw(error)

    def discard(self) -> None:
        """Read the rest of a refused body: many clients send it all before they read."""
        if not (self.running or self._body.at_end):
            self._greenlet = gevent.spawn(self._discard)

    def _discard(self) -> None:
        with contextlib.suppress(errors.ErrorResponse, errors.ClientGone):
            while not self._body.at_end:
                self._body.read1()

    def join(self) -> None:
        """Wait until it has ended, which an end of upstream brings about too."""
        assert self._greenlet is not None
        readable, greenlet = self.connection.readable, self._greenlet

        def on_readable() -> None:
            # After the response a reset no longer matters.
            with contextlib.suppress(OSError):
                try:
                    self.connection.unread += self.connection.receive()
                except BlockingIOError:
                    return
            readable.stop()
            greenlet.kill(block=False)

        readable.start(on_readable)
        try:
            greenlet.join()
        finally:
            readable.stop()

    def stop(self) -> None:
        if self._failure is not None:
            self._failure.stop()
        if self._greenlet is not None:
            greenlet, self._greenlet = self._greenlet, None
            greenlet.kill()

    def close(self) -> None:
        """Close the connection and stop. May be called twice."""
        self.connection.close()
        # Last, since it lets other greenlets run, which may throw into this one.
        self.stop()


def framed(body: RequestBody, part: bytes) -> bytes:
    """`part` of `body` as it is sent: with the last chunk, if nothing follows."""
    if not body.chunked:
        return part
    chunk = b"%x\r\n%b\r\n" % (len(part), part) if part else b""
    return chunk + (LAST if body.at_end else b"")
