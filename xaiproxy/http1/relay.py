"""A response's bytes from upstream's socket to the client's, in upstream's framing.

A callback in the hub forwards what arrives; the request's greenlet sleeps until the end. So an
event costs a read, a check of its framing and a write, and no greenlet switch.
"""

from __future__ import annotations

import time
from typing import Any

import gevent

from xaiproxy.errors import ClientGone
from xaiproxy.http1.connection import BROKEN, Connection
from xaiproxy.http1.exchange import Exchange
from xaiproxy.http1.sample import Sample


class Relay:
    __slots__ = (
        "_body",
        "_client",
        "_exchange",
        "_greenlet",
        "_progress_at",
        "_sample",
        "_timer",
        "_unsent",
        "_upstream",
        "content",
    )

    def __init__(self, exchange: Exchange, client: Connection, sample: Sample | None):
        """`sample`: gets the content."""
        # Bytes that were forwarded, without their framing.
        self.content = 0
        self._exchange = exchange
        self._upstream = exchange.connection
        self._body = exchange.body
        self._client = client
        self._sample = sample

    def run(self, head: bytes) -> None:
        """Send `head` and the body. Raises ClientGone, UpstreamBroken, and what is thrown in."""
        upstream, body = self._upstream, self._body
        came = upstream.unread
        fault: Exception | None = None
        if came:
            try:
                self._feed(came)
                upstream.unread = came[body.used :]
                head += came[: body.passes] + body.trailers
                self._check_unread()
            except BROKEN as error:
                fault = error
        try:
            self._client.send_all(head, self._exchange.idle_timeout)
        except OSError:
            raise ClientGone from None
        if fault is not None:
            raise self._exchange.broken(fault) from fault
        if not body.ended:
            self._wait()
        self._exchange.finish()

    def _wait(self) -> None:
        self._greenlet = gevent.getcurrent()
        # What the client has not taken; until it has, nothing more is read.
        self._unsent: Any = b""
        self._resume_reading()
        self._start_timeout(self._exchange.idle_timeout)
        try:
            gevent.get_hub().switch()
        except BROKEN as error:
            raise self._exchange.broken(error) from error
        finally:
            self._upstream.readable.stop()
            self._timer.stop()
            self._timer.close()
            self._client.stop_writing()

    def _resume_reading(self) -> None:
        self._progress_at = time.monotonic()
        self._upstream.readable.start(self._on_readable)

    def _start_timeout(self, seconds: float) -> None:
        loop = gevent.get_hub().loop
        # The priority: see Connection.
        self._timer = loop.timer(seconds, priority=loop.MINPRI)
        self._timer.start(self._on_timeout)

    # In the hub, whose callbacks must not raise

    def _on_timeout(self) -> None:
        """Restart the timer if there was progress, instead of at each byte."""
        self._timer.close()
        left = self._exchange.time_left(self._progress_at)
        if left > 0:
            self._start_timeout(left)
        else:
            self._greenlet.throw(ClientGone if self._unsent else TimeoutError)

    def _on_readable(self) -> None:
        try:
            data = self._upstream.receive()
            self._feed(data)
        except BlockingIOError:
            return
        except Exception as error:
            self._greenlet.throw(error)
            return
        body = self._body
        if body.passes < len(data):
            # At the end, or in the trailers before it.
            self._upstream.unread = data[body.used :]
            data = data[: body.passes] + body.trailers
        try:
            sent = self._client.send(data)
        except OSError:
            self._greenlet.throw(ClientGone)
            return
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._progress_at = time.monotonic()
            self._upstream.readable.stop()
            self._client.writable.start(self._on_writable)
        else:
            self._after_send()

    def _after_send(self) -> None:
        """All that arrived has been sent."""
        if self._body.ended:
            self._greenlet.switch()
            return
        self._progress_at = time.monotonic()
        if self._upstream.unread:
            try:
                self._check_unread()
            except BROKEN as error:
                self._greenlet.throw(error)

    def _check_unread(self) -> None:
        """Raise Malformed if that is why an unfinished body has left bytes unread."""
        if self._upstream.unread and not self._body.ended:
            self._body.feed(self._upstream.unread)

    def _on_writable(self) -> None:
        try:
            self._unsent = self._unsent[self._client.send(self._unsent) :]
        except OSError:
            self._greenlet.throw(ClientGone)
            return
        if self._unsent:
            # The client is alive.
            self._progress_at = time.monotonic()
            return
        self._client.stop_writing()
        if not self._body.ended:
            self._resume_reading()
        self._after_send()

    def _feed(self, data: bytes) -> None:
        if not data:
            self._body.end_of_connection()
        for start, end in self._body.feed(data):
            self.content += end - start
            if self._sample is not None:
                self._sample.add(data[start:end])
