"""An answer's bytes from upstream's socket to the client's, in the framing that they came in.

A callback in the hub passes on what comes; the greenlet of the request sleeps until the end. So an event costs a read,
a look at its framing and a write, and no greenlet switch.
"""

import time
from typing import Any

import gevent

from xaiproxy.errors import ClientGone
from xaiproxy.http1.connection import BROKEN, Connection
from xaiproxy.http1.exchange import Exchange


class Relay:
    __slots__ = (
        "content",
        "_exchange",
        "_upstream",
        "_body",
        "_client",
        "_unsent",
        "_greenlet",
        "_timer",
        "_heard",
    )

    def __init__(self, exchange: Exchange, client: Connection):
        self.content = 0  # bytes that were passed on, without their framing
        self._exchange = exchange
        self._upstream = exchange.connection
        self._body = exchange.body
        self._client = client

    def run(self, head: bytes) -> None:
        """Send `head` and the body behind it. Raises ClientGone, UpstreamBroken, and what is thrown in."""
        upstream, body = self._upstream, self._body
        came, fault = upstream.unread, None
        if came:
            try:
                self._look_at(came)
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
        self._unsent: Any = b""  # what the client has not taken; until it has, nothing more is read
        self._read_on()
        self._watch_silence(self._exchange.idle_timeout)
        try:
            gevent.get_hub().switch()
        except BROKEN as error:
            raise self._exchange.broken(error) from error
        finally:
            self._upstream.readable.stop()
            self._timer.stop()
            self._timer.close()
            self._client.stop_writing()

    def _read_on(self) -> None:
        self._heard = time.monotonic()
        self._upstream.readable.start(self._pass_on)

    def _watch_silence(self, seconds: float) -> None:
        loop = gevent.get_hub().loop
        self._timer = loop.timer(
            seconds, priority=loop.MINPRI
        )  # after bytes that came in time: see Connection
        self._timer.start(self._on_silence)

    # In the hub, whose callbacks must not raise

    def _on_silence(self) -> None:
        """Time is over, if nothing came meanwhile: to note when something comes costs less than to begin anew each time."""
        self._timer.close()
        left = self._exchange.time_left(self._heard)
        if left > 0:
            self._watch_silence(left)
        else:
            self._greenlet.throw(ClientGone if self._unsent else TimeoutError)

    def _pass_on(self) -> None:
        try:
            data = self._upstream.receive()
            self._look_at(data)
        except BlockingIOError:
            return
        except Exception as error:
            self._greenlet.throw(error)
            return
        body = self._body
        if body.passes < len(data):  # at the end, or in the trailers before it
            self._upstream.unread = data[body.used :]
            data = data[: body.passes] + body.trailers
        try:
            sent = self._client.send(data)
        except OSError:
            self._greenlet.throw(ClientGone)
            return
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._heard = time.monotonic()
            self._upstream.readable.stop()
            self._client.writable.start(self._send_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        """All that came has been sent."""
        if self._body.ended:
            self._greenlet.switch()
            return
        self._heard = time.monotonic()
        if self._upstream.unread:
            try:
                self._check_unread()
            except BROKEN as error:
                self._greenlet.throw(error)

    def _check_unread(self) -> None:
        """Raise Malformed if that is why a body that goes on has left bytes."""
        if self._upstream.unread and not self._body.ended:
            self._body.feed(self._upstream.unread)

    def _send_on(self) -> None:
        try:
            self._unsent = self._unsent[self._client.send(self._unsent) :]
        except OSError:
            self._greenlet.throw(ClientGone)
            return
        if self._unsent:
            self._heard = time.monotonic()  # from the client: it is there
            return
        self._client.stop_writing()
        if not self._body.ended:
            self._read_on()
        self._go_on()

    def _look_at(self, data: bytes) -> None:
        if not data:
            self._body.end_of_connection()
        for start, end in self._body.feed(data):
            self.content += end - start
