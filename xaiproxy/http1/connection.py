"""A connected socket that a greenlet can wait on and a callback in gevent's hub can use as well.

gevent's own sockets try before they wait, and make a new waiter and timeout each time. This class
waits before it reads, because usually nothing has arrived, and reuses one watcher.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Any

import gevent
from gevent import monkey

from xaiproxy import kernel
from xaiproxy.http1 import message_head
from xaiproxy.http1.message_head import Malformed

RECORD = 16384  # bytes of content that a TLS record holds at most
# Bytes of one read: large, but above 128 KiB malloc would map and unmap memory each time.
READ = 7 * RECORD
BURST = 8  # full reads in a row, then other greenlets run
FLUSH_POLL_INTERVAL = 0.02  # seconds: no event signals that bytes were acknowledged
RESET = struct.pack("ii", 1, 0)  # SO_LINGER that turns close into a reset
# Errors of a connection that TCP has abandoned: ETIMEDOUT, or the ICMP error that a router sent.
ABANDONED = frozenset((errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH))
_READABLE, _WRITABLE = 1, 2
_poll = monkey.get_original("select", "poll")
_socket = monkey.get_original("socket", "socket")

# The TCP connections of this process, for dead_paths.sweep.
OPEN: set[Connection] = set()


class DeadPath(ConnectionError):
    """The peer no longer acknowledges anything.

    Not a TimeoutError: those are for the proxy's limits.
    """


class Connection:
    """`unread`: bytes that arrived and were not used; `readable` and `writable`: gevent's watchers.

    It takes the file descriptor over from `sock`, which may be gevent's, whose wrapper would cost
    time at each read and write. One greenlet may read while another writes.

    `on_close`: called once it is closed, or None.

    `fault`: the error that ended the connection, once a read or a write has met it. The kernel
    reports it once, and reads then meet an EOF that looks like a clean one.
    """

    __slots__ = (
        "_eager",
        "_hub",
        "_limit",
        "_poll",
        "_timer",
        "_writable",
        "fault",
        "on_close",
        "readable",
        "socket",
        "unread",
    )

    # Whether `send` has taken bytes that the kernel has not.
    holds_back = False

    def __init__(self, sock: Any):
        self.socket = _socket(sock.family, sock.type, sock.proto, sock.detach())
        self.socket.setblocking(False)
        self.unread = b""
        self.fault: OSError | None = None
        self.on_close: Callable[[], object] | None = None
        self._hub = gevent.get_hub()
        self.readable = self._hub.loop.io(self.socket.fileno(), _READABLE)
        self._writable: Any = None
        # Reads that may be tried without waiting, because the last one was full.
        self._eager = 0
        self._poll: Any = None
        # The timer of reads, and its seconds.
        self._timer: Any = None
        self._limit: float | None = None
        if not self._is_unix:
            OPEN.add(self)

    @property
    def _is_unix(self) -> bool:
        return bool(self.socket.family == socket.AF_UNIX)

    @property
    def writable(self) -> Any:
        # Most connections never wait for it.
        if self._writable is None:
            self._writable = self._hub.loop.io(self.socket.fileno(), _WRITABLE)
        return self._writable

    # At once

    def receive(self) -> bytes:
        """The bytes that have arrived; b"" at the end.

        Raises BlockingIOError if nothing has arrived, DeadPath, OSError.
        """
        try:
            data: bytes = self.socket.recv(READ)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._fault_of(error) from None
        if not data and self.fault is not None:
            raise self.fault
        return data

    def send(self, data: Any) -> int:
        """Send what the kernel takes at once; return the number of bytes.

        Raises DeadPath, OSError.
        """
        try:
            sent: int = self.socket.send(data)
            return sent
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            # Without a fault the peer has closed, and what it sent before can still be read.
            if self.fault is None:
                raise
            raise self.fault from None
        except OSError as error:
            raise self._fault_of(error) from None

    def _fault_of(self, error: OSError) -> OSError:
        if self.fault is None:
            is_abandoned = error.errno in ABANDONED
            self.fault = DeadPath(f"TCP gave up: {error.strerror}") if is_abandoned else error
        return self.fault

    def abort(self, reason: str) -> None:
        """Shut down: readers and writers get DeadPath, after the bytes that have arrived."""
        OPEN.discard(self)
        self.fault = DeadPath(reason)
        # OSError: the kernel has abandoned it already. The shutdown starts the watchers' callbacks.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        # Unacknowledged bytes must not reach the peer later, when their request has failed.
        self.reset_at_close()

    def is_quiet(self) -> bool:
        """Whether there is nothing to read, neither bytes nor an EOF."""
        return not self._poll_at_once()

    def _poll_at_once(self) -> list[tuple[int, int]]:
        if self._poll is None:
            self._poll = _poll()
            self._poll.register(self.socket, select.POLLIN)
        events: list[tuple[int, int]] = self._poll.poll(0)
        return events

    def is_established(self) -> bool:
        if self._is_unix:
            return not self.is_closed()
        return kernel.is_established(self.socket)

    def is_closed(self) -> bool:
        if self._is_unix:
            return any(event & select.POLLHUP for _, event in self._poll_at_once())
        return kernel.is_closed(self.socket)

    def unacknowledged(self) -> int:
        # What a Unix socket has sent is with the peer.
        return 0 if self._is_unix else kernel.unacknowledged(self.socket)

    # In a greenlet

    def wait(self, watcher: Any, limit: float | None) -> None:
        """Let other greenlets run until `watcher` fires.

        `limit`: seconds. Raises TimeoutError, and what is thrown in.
        """
        greenlet = gevent.getcurrent()
        watcher.start(greenlet.switch)
        timer = None
        if limit is not None:
            if watcher is not self.readable:
                # Rare, and a reader may wait at the same time.
                timer = self._new_timer(limit)
            else:
                if limit != self._limit:
                    if self._timer is not None:
                        self._timer.close()
                    self._timer, self._limit = self._new_timer(limit), limit
                timer = self._timer
            # Not `start`, which would continue where `stop` left off. `update`, for 40 ns: without
            # it the limit counts from the beginning of this turn of the loop, and ends early if
            # the turn takes long.
            timer.again(greenlet.throw, TimeoutError, update=True)
        try:
            self._hub.switch()
        finally:
            watcher.stop()
            if timer is not None:
                timer.stop()
                if timer is not self._timer:
                    timer.close()

    def _new_timer(self, limit: float) -> Any:
        limit = max(limit, 0.001)
        # The lowest priority: after a long turn, bytes that came in time and the timeout are found
        # together, and the bytes count.
        return self._hub.loop.timer(limit, limit, priority=self._hub.loop.MINPRI)

    def recv(self, limit: float | None) -> bytes:
        """Return what is unread, or else what comes next; b"" at the end.

        Raises OSError, TimeoutError.
        """
        if self.unread:
            data, self.unread = self.unread, b""
            return data
        while True:
            late = None
            if not self._eager:
                try:
                    self.wait(self.readable, limit)
                except TimeoutError as error:
                    # Bytes that have arrived count all the same: the loop may have been late.
                    late = error
                self._eager = BURST
            try:
                data = self.receive()
            except BlockingIOError:
                self._eager = 0
                if late is not None:
                    raise late from None
                continue
            self._eager = self._eager - 1 if len(data) == READ else 0
            return data

    def wait_before_reading(self) -> None:
        """Make the next `recv` let other greenlets run before it reads, also in a burst."""
        self._eager = 0

    def recv_head(self, size_limit: int, limit: float) -> bytes:
        """Return a complete head; b"" if the connection ended before it began.

        `limit`: seconds for all of it. Raises message_head.Malformed and TooLong, EOFError if it
        ended in the middle, OSError, TimeoutError; what arrived is then `unread`.
        """
        start = time.monotonic()
        data = self.recv(limit)
        searched = end = 0
        try:
            while not (end := message_head.end(data, searched, size_limit)):
                searched = len(data)
                more = self.recv(limit - (time.monotonic() - start))
                if not more:
                    if data:
                        raise EOFError
                    return b""
                data += more
        finally:
            self.unread = data[end:]
        return data[:end]

    def send_all(self, data: Any, limit: float | None = None) -> None:
        """`limit`: seconds in which the peer takes no byte. Raises OSError, TimeoutError."""
        sent = self.send(data)
        while sent < len(data) or self.holds_back:
            if sent:
                data = memoryview(data)[sent:]
            else:
                self.wait(self.writable, limit)
            sent = self.send(data)

    def end(self) -> bool:
        """Send EOF after what `send` has taken; reading continues. Raises OSError.

        False if there is no room for it yet: call again once the socket is writable.
        """
        self.socket.shutdown(socket.SHUT_WR)
        return True

    def linger(self, idle: float, whole: float) -> None:
        """Send EOF and discard what still arrives, until the peer has closed too.

        `idle`: seconds without a byte; `whole`: seconds in all. To close while bytes are unread, or
        before some arrive, is a reset, and a reset can destroy what was sent before it.
        """
        with contextlib.suppress(OSError), gevent.Timeout(whole, False):
            self.end()
            while self.recv(idle):
                pass

    def flush(self, idle: float, whole: float) -> None:
        """Wait until the peer has acknowledged all that was sent, or for `idle` if that is unknown.

        `idle`: seconds without an acknowledgement; `whole`: seconds in all. Returns early if either
        side ends the connection.
        """
        left, deadline = self.unacknowledged(), time.monotonic() + idle
        end = time.monotonic() + whole
        known = kernel.HAS_TCP_INFO
        while (
            (left or not known) and time.monotonic() < min(deadline, end) and self.is_established()
        ):
            gevent.sleep(FLUSH_POLL_INTERVAL)
            now = self.unacknowledged()
            if now < left:
                left, deadline = now, time.monotonic() + idle

    def reset_at_close(self) -> None:
        """Let `close` send a reset, which the peer cannot mistake for a clean end."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def stop_writing(self) -> None:
        if self._writable is not None:
            self._writable.stop()

    def close(self) -> None:
        """May be called twice."""
        OPEN.discard(self)
        for watcher in (self.readable, self._writable, self._timer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self.socket.close()
        if self.on_close is not None:
            on_close, self.on_close = self.on_close, None
            on_close()


# What a peer, or the way to it, can do to a connection.
BROKEN = (OSError, EOFError, Malformed)


def reason(error: Exception) -> str:
    """One of BROKEN in words."""
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({(error.reason or 'closed').lower().replace('_', ' ')})"
    if isinstance(error, EOFError):
        return "it closed the connection"
    if isinstance(error, Malformed):
        return f"what it sent is not HTTP/1.1: it {error}"
    return getattr(error, "strerror", None) or str(error)
