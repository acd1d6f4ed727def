"""A WebSocket connection after its handshake: bytes both ways (RFC 6455).

Frames are not read: if one side closes in the middle of a frame, so does the other's connection.
The EOF of a side follows its last bytes. From the first EOF on there is no limit as long as bytes
move; without progress for CLIENT_TIMEOUT both connections are reset. A side that resets its
connection ends the tunnel at once.
"""

from __future__ import annotations

from typing import Any

import gevent

from xaiproxy.errors import ClientGone
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.exchange import Exchange

# Seconds between two checks for what no event signals: a reset hidden by unread bytes, acknowledged
# bytes.
POLL_INTERVAL = 0.5


class Tunnel:
    """Run as a relay.Relay is."""

    def __init__(self, exchange: Exchange, client: Connection):
        # Bytes that came from upstream, and from the client.
        self.content = self.received = 0
        self._exchange = exchange
        self._client = client
        # Whether one side has closed, or no longer reads.
        self._closing = False
        # The bytes of both connections.
        self._unacknowledged = (0, 0)

    def run(self, head: bytes) -> None:
        """Send `head` and forward bytes.

        Raises ClientGone, UpstreamBroken, and what is thrown in.
        """
        client, upstream = self._client, self._exchange.connection
        try:
            client.send_all(head, self._exchange.idle_timeout)
        except OSError:
            raise ClientGone from None
        hub = gevent.get_hub()
        self._greenlet = gevent.getcurrent()
        self._down, self._up = _Pipe(self, upstream, client), _Pipe(self, client, upstream)
        self._start_timeout(self._exchange.idle_timeout)
        self._poll = hub.loop.timer(POLL_INTERVAL, POLL_INTERVAL)
        try:
            for pipe in (self._down, self._up):
                hub.loop.run_callback(pipe.start)
            hub.switch()
        finally:
            for timer in (self._timer, self._poll):
                timer.stop()
                timer.close()
            for pipe in (self._down, self._up):
                pipe.stop()

    # In the hub, whose callbacks must not raise

    def _start_timeout(self, limit: float) -> None:
        loop = gevent.get_hub().loop
        # The priority, and `update` below: see Connection.wait.
        self._timer = loop.timer(limit, limit, priority=loop.MINPRI)
        self.progress()

    def progress(self) -> None:
        self._timer.again(self._on_timeout, update=True)

    def blocked(self) -> None:
        """A side does not read what the other sends, whose reset is then hidden by unread bytes."""
        if not self._poll.active:
            self._poll.again(self._check)

    def refused(self, pipe: _Pipe, error: Exception) -> None:
        """The sink of `pipe` takes no more bytes; a closed client may have sent some more."""
        if pipe is self._down and not isinstance(error, BrokenPipeError):
            self.failed(self._client, error)
        else:
            self.close()

    def failed(self, side: Connection, error: Exception) -> None:
        self._greenlet.throw(ClientGone() if side is self._client else self._exchange.broken(error))

    def close(self) -> None:
        """To be called at each end of a direction."""
        if not self._closing:
            self._closing = True
            self._timer.stop()
            self._timer.close()
            self._start_timeout(self._exchange.client_timeout)
            self.blocked()
        down, up = self._down, self._up
        if (
            down.over
            and up.over
            and not (
                (down.refused and up.sink.unacknowledged())
                or (up.refused and down.sink.unacknowledged())
            )
        ):
            self._greenlet.switch()

    def _check(self) -> None:
        if self._up.blocked and not self._down.refused and self._client.is_closed():
            self.failed(self._client, ConnectionResetError())
        elif self._closing or self._up.hides_end or self._down.hides_end:
            unacknowledged = (
                self._client.unacknowledged(),
                self._exchange.connection.unacknowledged(),
            )
            if unacknowledged != self._unacknowledged:
                self._unacknowledged = unacknowledged
                self.progress()
            self.close()
        elif not (self._up.blocked or self._down.blocked):
            self._poll.stop()

    def _on_timeout(self) -> None:
        if self._closing:
            self._client.reset_at_close()
            self._exchange.connection.reset_at_close()
        is_client = self._down.blocked or self._up.ended
        self.failed(self._client if is_client else self._exchange.connection, TimeoutError())


class _Pipe:
    """One direction, in the hub; while the sink takes nothing, nothing is read.

    `ended`: the source's EOF has been forwarded. `refused`: the sink takes no more bytes, and what
    arrives is discarded, because unread bytes would turn the close of the source into a reset.
    """

    __slots__ = (
        "_at_end",
        "_source",
        "_stopped",
        "_tunnel",
        "_unsent",
        "blocked",
        "ended",
        "refused",
        "sink",
    )

    def __init__(self, tunnel: Tunnel, source: Connection, sink: Connection):
        self.sink = sink
        self.ended = self.refused = self.blocked = False
        self._tunnel = tunnel
        self._source = source
        self._at_end = False
        self._unsent: Any = b""
        self._stopped = False

    @property
    def over(self) -> bool:
        return self.ended or self.refused

    @property
    def hides_end(self) -> bool:
        """Whether the source has closed, but its last bytes wait for the sink."""
        return self.blocked and not self._source.is_established()

    def start(self) -> None:
        if not self._stopped:
            # What came with the handshake.
            data, self._source.unread = self._source.unread, b""
            self._take(data)

    def stop(self) -> None:
        self._stopped = True
        self._source.readable.stop()
        self.sink.stop_writing()

    def _on_readable(self) -> None:
        try:
            data = self._source.receive()
        except BlockingIOError:
            return
        except Exception as error:
            self._tunnel.failed(self._source, error)
            return
        self._at_end = not data
        self._take(data)

    def _take(self, data: bytes) -> None:
        self._tunnel.progress()
        if self is self._tunnel._down:
            self._tunnel.content += len(data)
        else:
            self._tunnel.received += len(data)
        if not self.refused:
            self._unsent = data
            self._on_writable()
        elif self._at_end:
            self._source.readable.stop()
            self.ended = True
            self._tunnel.close()

    def _on_writable(self) -> None:
        try:
            sent = self.sink.send(self._unsent)
            waits = (
                sent < len(self._unsent)
                or self.sink.holds_back
                or (self._at_end and not self.sink.end())
            )
        except Exception as error:
            self._unsent = b""
            self.refused, self.blocked = True, False
            self.sink.stop_writing()
            if not self._at_end:
                self._source.readable.start(self._on_readable)
            self._tunnel.refused(self, error)
            return
        if sent and self.blocked:
            self._tunnel.progress()
        self._unsent = memoryview(self._unsent)[sent:] if waits else b""
        self.blocked = waits
        if waits:
            self._source.readable.stop()
            self.sink.writable.start(self._on_writable)
            self._tunnel.blocked()
            return
        self.sink.stop_writing()
        if self._at_end:
            self._source.readable.stop()
            self.ended = True
            self._tunnel.close()
        else:
            self._source.readable.start(self._on_readable)
