"""An answer's bytes from upstream's socket to the client's, in the framing that they came in.

A callback in the hub passes on what comes; the greenlet of the request sleeps until the end. So an event costs a read,
a look at its framing and a write, and no greenlet switch.
"""

from collections.abc import Callable
from typing import Any

import gevent

from xaiproxy.connection import Connection
from xaiproxy.errors import ClientGone
from xaiproxy.upstream import BROKEN, Exchange


class Relay:
    def __init__(self, exchange: Exchange, client: Connection, count: "Callable[[int], None]"):
        """`count` is told how many bytes of content each part had."""
        self._exchange = exchange
        self._upstream = exchange.connection
        self._body = exchange.body
        self._client = client
        self._count = count
        self._unsent: Any = b""  # what the client has not taken; until it has, nothing more is read
        self._greenlet = gevent.getcurrent()
        self._timer: Any = None

    def run(self, head: bytes) -> None:
        """Send `head` and the body behind it. Raises ClientGone, UpstreamBroken, and what is thrown in."""
        came, self._upstream.unread = self._upstream.unread, b""
        try:
            self._count_content(came)
        except BROKEN as error:
            raise self._exchange.broken(error) from error
        try:
            self._client.send_all(head + came[:self._body.used] if came else head)
        except OSError:
            raise ClientGone from None
        self._upstream.unread = came[self._body.used:]
        if not self._body.ended:
            self._wait()
        self._exchange.release()

    def _wait(self) -> None:
        hub = gevent.get_hub()
        limit = self._exchange.idle_timeout
        self._timer = hub.loop.timer(limit, limit)
        self._read_on()
        try:
            hub.switch()
        except BROKEN as error:
            raise self._exchange.broken(error) from error
        finally:
            self._upstream.readable.stop()
            self._timer.stop()
            self._timer.close()
            self._client.stop_writing()

    def _read_on(self) -> None:
        self._upstream.readable.start(self._in_hub, self._pass_on)
        self._timer.again(self._greenlet.throw, TimeoutError)

    def _in_hub(self, step: "Callable[[], None]") -> None:
        try:
            step()
        except Exception as error:
            self._greenlet.throw(error)

    def _pass_on(self) -> None:
        try:
            data = self._upstream.receive()
        except BlockingIOError:
            return
        if not data:
            self._body.end_of_connection()
        self._count_content(data)
        used = self._body.used
        if used < len(data):
            self._upstream.unread = data[used:]  # behind the end
            data = data[:used]
        try:
            sent = self._client.send(data)
        except OSError:
            raise ClientGone from None
        if sent < used:
            self._unsent = memoryview(data)[sent:]
            self._upstream.readable.stop()
            self._timer.stop()
            self._client.writable.start(self._in_hub, self._send_on)
        elif self._body.ended:
            self._greenlet.switch()
        else:
            self._timer.again(self._greenlet.throw, TimeoutError)

    def _send_on(self) -> None:
        try:
            self._unsent = self._unsent[self._client.send(self._unsent):]
        except OSError:
            raise ClientGone from None
        if self._unsent:
            return
        self._client.writable.stop()
        if self._body.ended:
            self._greenlet.switch()
        else:
            self._read_on()

    def _count_content(self, data: bytes) -> None:
        spans = self._body.feed(data)
        self._count(sum([end - start for start, end in spans]))
