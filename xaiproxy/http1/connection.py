"""A connected socket, plain or TLS, that a greenlet can wait on and a callback in gevent's hub can use as well.

gevent's own sockets try before they wait and make new waiters and time-outs each time; what is here waits first, since
mostly nothing is there yet, on one watcher that stays.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import struct
import time
from typing import Any

import gevent
from gevent import monkey

from xaiproxy.http1 import message_head
from xaiproxy.http1.message_head import Malformed

RECORD = 16384  # bytes of content that a TLS record holds at most
READ = (
    7 * RECORD
)  # bytes: a call of the kernel for many, but above 128 KiB malloc would map and unmap memory each time
BURST = 8  # full reads in a row, then others have their turn
FLUSH_POLL = 0.02  # seconds: no event tells that bytes were acknowledged
TCP_ESTABLISHED, TCP_CLOSE = 1, 7  # the first byte of Linux's struct tcp_info
UNACKNOWLEDGED = struct.Struct("=24xI116xI")  # of that, tcpi_unacked and tcpi_notsent_bytes
RESET = struct.pack("ii", 1, 0)  # SO_LINGER that turns close into a reset
# Errors of a connection that TCP has given up: ETIMEDOUT, or the ICMP error that a router sent meanwhile.
GIVEN_UP = frozenset((errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH))
_READABLE, _WRITABLE = 1, 2
_poll = monkey.get_original("select", "poll")
_socket = monkey.get_original("socket", "socket")


OPEN: set[Connection] = set()  # the TCP connections of this process, for dead_paths.sweep


class DeadPath(ConnectionError):
    """The peer no longer acknowledges anything. Not a TimeoutError: those are for limits of our own."""


class Connection:
    """`unread`: bytes that came and that nobody has taken; `readable` and `writable`: gevent's watchers.

    It takes the file descriptor over from `sock`, which may be gevent's: the wrapping that those do would cost at each
    read and write. One greenlet may read while another writes.

    `fault`: the error that ended the connection, once a read or a write has met it. The kernel reports it once, and
    reads then meet an end that looks like a clean one.
    """

    __slots__ = (
        "socket",
        "unread",
        "readable",
        "fault",
        "_writable",
        "_eager",
        "_timer",
        "_limit",
        "_poll",
        "_hub",
    )

    holds_back = False  # bytes that `send` has taken, but the kernel has not

    def __init__(self, sock: Any):
        self.socket = _socket(sock.family, sock.type, sock.proto, sock.detach())
        self.socket.setblocking(False)
        self.unread = b""
        self.fault: OSError | None = None
        self._hub = gevent.get_hub()
        self.readable = self._hub.loop.io(self.socket.fileno(), _READABLE)
        self._writable: Any = None
        self._eager = 0  # reads that may be tried without waiting, since the last one was full
        self._poll: Any = None
        self._timer: Any = None
        self._limit: float | None = None  # seconds of that timer
        if sock.family != socket.AF_UNIX:
            OPEN.add(self)

    @property
    def writable(self) -> Any:
        if self._writable is None:  # most never wait to be
            self._writable = self._hub.loop.io(self.socket.fileno(), _WRITABLE)
        return self._writable

    # At once

    def receive(self) -> bytes:
        """What is there; b"" at the end. Raises BlockingIOError when nothing is, DeadPath, OSError."""
        try:
            data = self.socket.recv(READ)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._fault_of(error)
        if not data and self.fault is not None:
            raise self.fault
        return data

    def send(self, data: Any) -> int:
        """Send what is taken at once; return how many bytes that was. Raises DeadPath, OSError."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            if (
                self.fault is None
            ):  # the peer has closed, and what it sent before is still to be read
                raise
            raise self.fault from None
        except OSError as error:
            raise self._fault_of(error)

    def _fault_of(self, error: OSError) -> OSError:
        if self.fault is None:
            self.fault = (
                DeadPath(f"TCP gave up: {error.strerror}") if error.errno in GIVEN_UP else error
            )
        return self.fault

    def abort(self, reason: str) -> None:
        """Shut the connection down: whatever uses it gets DeadPath, after the bytes that have already arrived."""
        OPEN.discard(self)
        self.fault = DeadPath(reason)
        with contextlib.suppress(OSError):  # the kernel has given it up already
            self.socket.shutdown(socket.SHUT_RDWR)  # starts the watchers' callbacks
        self.reset_at_close()  # unacknowledged bytes must not reach the peer later, when their request has failed

    def is_quiet(self) -> bool:
        """Whether there is nothing to be read, neither bytes nor an end."""
        if self._poll is None:
            self._poll = _poll()
            self._poll.register(self.socket, select.POLLIN)
        return not self._poll.poll(0)

    def is_established(self) -> bool:
        """Whether the peer has closed nothing, as far as the kernel knows, even while bytes are unread."""
        return self._state() == TCP_ESTABLISHED

    def is_reset(self) -> bool:
        """Whether the peer has reset the connection, even while bytes are unread."""
        return self._state() == TCP_CLOSE

    def _state(self) -> int:
        return self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]

    def unacknowledged(self) -> int:
        """0 once the peer's kernel has acknowledged all that ours has taken: unsent bytes and unacknowledged segments."""
        return sum(
            UNACKNOWLEDGED.unpack(
                self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, UNACKNOWLEDGED.size)
            )
        )

    # In a greenlet

    def wait(self, watcher: Any, limit: float | None) -> None:
        """Let others run until `watcher` fires. `limit`: seconds. Raises TimeoutError, and what is thrown in."""
        greenlet = gevent.getcurrent()
        watcher.start(greenlet.switch)
        timer = None
        if limit is not None:
            if watcher is not self.readable:  # rare, and a reader may wait at the same time
                timer = self._new_timer(limit)
            else:
                if limit != self._limit:
                    if self._timer is not None:
                        self._timer.close()
                    self._timer, self._limit = self._new_timer(limit), limit
                timer = self._timer
            # Not `start`, which would go on where `stop` has left it. `update`, for 40 ns: without it the limit counts
            # from the beginning of this turn of the loop, and ends early when the turn takes long.
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
        # The lowest priority: after a long turn, bytes that came in time and the end of the time are found together.
        return self._hub.loop.timer(limit, limit, priority=self._hub.loop.MINPRI)

    def recv(self, limit: float | None) -> bytes:
        """Return what is unread, or else what comes next; b"" at the end. Raises OSError, TimeoutError."""
        if self.unread:
            data, self.unread = self.unread, b""
            return data
        while True:
            late = None
            if not self._eager:
                try:
                    self.wait(self.readable, limit)
                except TimeoutError as error:
                    late = error  # what has come all the same counts: the loop may have been late
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
        """Have the next `recv` let others run before it reads, also in a burst."""
        self._eager = 0

    def recv_head(self, size_limit: int, limit: float) -> bytes:
        """Return a whole head, for which the peer has `limit` seconds; b"" when the connection ended before it began.

        Raises message_head.Malformed and TooLong, EOFError when it ended in the middle, OSError, TimeoutError; what came
        is then `unread`.
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
        """Send our end after what `send` has taken; reading goes on. Raises OSError.

        False when there is no room for it yet: call again once the socket is writable.
        """
        self.socket.shutdown(socket.SHUT_WR)
        return True

    def linger(self, idle: float, whole: float) -> None:
        """Send our end and discard what still comes: until the peer has closed too, or `idle` s without a byte.

        `whole`: seconds in all. To close while bytes are unread, or before some arrive, is a reset, and a reset can
        destroy what was sent before it.
        """
        with contextlib.suppress(OSError), gevent.Timeout(whole, False):
            self.end()
            while self.recv(idle):
                pass

    def flush(self, idle: float, whole: float) -> None:
        """Wait until the peer has acknowledged all that was sent, or for `idle` seconds no more of it.

        `whole`: seconds in all. Ends early when either side ends the connection.
        """
        left, deadline = self.unacknowledged(), time.monotonic() + idle
        end = time.monotonic() + whole
        while left and time.monotonic() < min(deadline, end) and self.is_established():
            gevent.sleep(FLUSH_POLL)
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
