"""A WebSocket connection behind its handshake: bytes both ways, until either side ends (RFC 6455).

Frames are not read. So a side that ended amid one, or without a Close frame, looks so to the other.
"""

import functools
from collections.abc import Callable
from typing import Any

import gevent

from xaiproxy.connection import Connection
from xaiproxy.errors import ClientGone
from xaiproxy.upstream import BROKEN, Exchange

LOOK = 0.5  # seconds between two looks at a client whose bytes upstream does not take
LINGER_TIME = 0.5  # seconds that upstream gets to read what a client sent before it left


class Tunnel:
    """Sent as a relay.Relay is."""

    def __init__(self, exchange: Exchange, client: Connection):
        self.content = 0  # bytes that came from upstream
        self._exchange = exchange
        self._client = client

    def run(self, head: bytes) -> None:
        """Send `head` and pass on bytes. Raises ClientGone, UpstreamBroken, and what is thrown in."""
        client, upstream = self._client, self._exchange.connection
        try:
            client.send_all(head, self._exchange.idle_timeout)
        except OSError:
            raise ClientGone from None
        who, error = self._wait(client, upstream)
        if error is None:
            if who is client:
                upstream.linger(LINGER_TIME)
        elif who is upstream and isinstance(error, BROKEN):
            raise self._exchange.broken(error) from error
        elif isinstance(error, OSError):
            raise ClientGone from None
        else:
            raise error

    def _wait(self, client: Connection, upstream: Connection) -> "tuple[Connection, Exception | None]":
        """Who ended, and of what."""
        hub, end, limit = gevent.get_hub(), gevent.getcurrent().switch, self._exchange.idle_timeout
        silence, looks = hub.loop.timer(limit, limit), hub.loop.timer(LOOK, LOOK)

        def heard(size: int) -> None:
            self.content += size
            silence.again(end, upstream, TimeoutError(), update=False)

        def unheard() -> None:  # by a client that takes nothing
            silence.again(end, client, TimeoutError(), update=False)

        def look_behind() -> None:  # what it sent is unread, and hides its leaving
            if not client.is_established():
                end(client, None)
        pipes = (_Pipe(upstream, client, end, functools.partial(end, client), heard, unheard),
                 # To an upstream that takes no more the rest is not sent; what it still says comes first, then its end.
                 _Pipe(client, upstream, end, lambda error: None, lambda size: looks.stop(),
                       lambda: looks.active or looks.again(look_behind)))
        try:
            heard(0)
            for pipe in pipes:
                hub.loop.run_callback(pipe.start)
            return hub.switch()
        finally:
            for timer in (silence, looks):
                timer.stop()
                timer.close()
            for pipe in pipes:
                pipe.stop()


class _Pipe:
    """One way. Works in the hub, whose callbacks must not raise; while the sink takes nothing, nothing is read.

    `end(source, error)` is called at the end of the source, `refused(error)` at that of the sink, `heard` with the size
    of all that came, and with 0 when the sink has taken all of it behind a `blocked`, which tells each time that it has not.
    """

    __slots__ = ("_source", "_sink", "_end", "_refused", "_heard", "_blocked", "_is_blocked", "_unsent", "_stopped")

    def __init__(self, source: Connection, sink: Connection, end: "Callable[..., Any]",
                 refused: "Callable[[Exception], Any]", heard: "Callable[[int], Any]", blocked: "Callable[[], Any]"):
        self._source = source
        self._sink = sink
        self._end = end
        self._refused = refused
        self._heard = heard
        self._blocked = blocked
        self._is_blocked = False
        self._unsent: Any = b""
        self._stopped = False

    def start(self) -> None:
        if self._stopped:
            return
        self._unsent, self._source.unread = self._source.unread, b""  # what came with the handshake
        self._heard(len(self._unsent))
        self._send_on()

    def stop(self) -> None:
        self._stopped = True
        self._source.readable.stop()
        self._sink.stop_writing()

    def _pass_on(self) -> None:
        try:
            data = self._source.receive()
        except BlockingIOError:
            return
        except Exception as error:
            self._end(self._source, error)
            return
        if not data:
            self._end(self._source, None)
            return
        self._heard(len(data))
        self._unsent = data
        self._send_on()

    def _send_on(self) -> None:
        try:
            sent = self._sink.send(self._unsent)
        except Exception as error:
            self.stop()
            self._refused(error)
            return
        if sent < len(self._unsent) or self._sink.holds_back:
            self._unsent = memoryview(self._unsent)[sent:]
            self._source.readable.stop()
            self._sink.writable.start(self._send_on)
            self._is_blocked = True
            self._blocked()
        else:
            if self._is_blocked:
                self._is_blocked = False
                self._heard(0)
            self._unsent = b""
            self._sink.stop_writing()
            self._source.readable.start(self._pass_on)
