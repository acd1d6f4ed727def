"""The HTTP server of process 1: its limits and its shutdown."""

import contextlib
import errno
import itertools
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import gevent.monkey
import gevent.pool
from gevent import pywsgi

from xaiproxy import config
from xaiproxy.http1.client_response import Cut
from xaiproxy.http1.handler import Handler
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy.forward import Proxy

logger = logging.getLogger(__name__)

# The patched select lets other greenlets run, even with timeout 0.
_select = gevent.monkey.get_original("select", "select")

BACKLOG = 1024  # connections that wait in the kernel until they are accepted
TURN = 0.001  # seconds, in which the event loop polls all sockets
# Seconds for a request head to arrive once there are too many connections, or during shutdown.
HEAD_TIMEOUT = 1.0
# Seconds by which responses announce less than KEEPALIVE_TIMEOUT, so that the client closes first.
KEEPALIVE_MARGIN = 5
# With the reserve, their file descriptors are among config.SPARE_DESCRIPTORS.
ADMIN_CONNECTIONS = 8
# Seconds for which a full worker leaves a new connection to those that have room.
HEAD_START = 0.05
# Seconds between two log lines about one shortage, which may come and go many times a second.
WARNING_INTERVAL = 60.0


class LeftToSiblings(Exception):
    """A connection was not accepted, because another worker may have room for it.

    gevent tries again after HEAD_START.
    """


class NoDescriptor(OSError):
    """A connection could not be accepted; gevent tries again after 10 ms, doubling to 1 s."""


class Server(pywsgi.WSGIServer):  # type: ignore[misc]  # gevent is untyped
    """Accepts `connections` and a reserve, in which only health checks are answered without a 503.

    `busy` counts the requests that are being answered; one more than `connections` is in the
    reserve. Every connection without a request can be closed for a new one.
    """

    handler_class = Handler

    def __init__(
        self,
        listener: socket.socket,
        application: Callable[..., Any],
        proxy: Proxy | None,
        settings: config.Config,
        connections: int,
        on_end: Callable[[RequestRecord], object],
        *,
        shared: bool = False,
    ):
        """`proxy`: serves the API; None: the application serves everything.

        `on_end`: called with the record of each request that has ended.

        `shared`: whether other processes accept connections of the same listener.
        """
        super().__init__(
            listener,
            application,
            # Without a pool, WSGIServer.stop would cut every stream at once. A full one stops
            # accepting.
            spawn=gevent.pool.Pool(connections + config.RESERVE),
            log=None,
            error_log=logger,
            environ={
                # Without it, pywsgi asks the DNS for the name.
                "SERVER_NAME": "xaiproxy",
                # With it, gevent accepts one connection at a time, not up to 100, so that
                # connections spread evenly.
                "wsgi.multiprocess": shared,
            },
        )
        # do_read logs the first one.
        gevent.get_hub().NOT_ERROR += (NoDescriptor, LeftToSiblings)
        self._shared = shared
        # Whether connections wait that were left to the siblings.
        self._siblings_are_full = False
        self.connections = connections
        self.busy = 0
        # Those of `busy` that the application answers, such as one for `busy` itself.
        self.pages = 0
        # Connections so far.
        self.accepted = 0
        self.on_end = on_end
        # Of requests without one.
        self.request_ids = map(f"{secrets.token_hex(4)}-{{:x}}".format, itertools.count(1))
        # Responses that are being forwarded.
        self.open = {"streams": 0, "websockets": 0}
        self.settings = settings
        self.proxy = proxy
        self.keep_alive = keep_alive_lines(settings.keepalive_timeout)
        # Every response ends its connection.
        self.stopping = False
        # No further connection is accepted.
        self.draining = False
        # Sockets that may be closed for others, the longest waiting first:
        # between two requests,
        self.idle: dict[Any, None] = {}
        # without a complete request head, those between two requests among them, and since when,
        self.waiting: dict[Any, float] = {}
        # and whose client has yet to read a response, or to close after its last one.
        self.answered: dict[Any, None] = {}
        self._enforcing_limit = False
        self._is_short_of_descriptors = False
        # No log line about a shortage before this time.
        self._next_warning = {"descriptors": 0.0, "connections": 0.0}

    @contextlib.contextmanager
    def count_open(self, kind: str) -> Iterator[None]:
        """Count a response in `open` meanwhile. `kind`: streams or websockets."""
        self.open[kind] += 1
        try:
            yield
        finally:
            self.open[kind] -= 1

    def do_read(self) -> Any:
        if self._shared and len(self.pool) >= self.connections and not self._siblings_are_full:
            # gevent doubles it each time.
            self.delay = HEAD_START
            raise LeftToSiblings
        try:
            accepted = super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            # The kernel takes a descriptor before it checks for a connection.
            if not self._has_queue():
                return None
            self.end_one_idle()
            if self._is_warning_due("descriptors"):
                self._is_short_of_descriptors = True
                logger.error(
                    "%s, with %d connections: new ones wait until others end; "
                    "raise the limit with ulimit -n, or lower XAI_PROXY_MAX_CONNECTIONS",
                    error.strerror,
                    len(self.pool),
                )
            # gevent reads the error number from the arguments.
            raise NoDescriptor(*error.args) from error
        if self._is_short_of_descriptors and accepted:
            self._is_short_of_descriptors = False
            logger.info("connections are accepted again")
        if self._siblings_are_full:
            self._siblings_are_full = self._has_queue()
        return accepted

    def _start_accepting_if_started(self, _event: object = None) -> None:
        # gevent calls it after each pause.
        if self.started:
            self._siblings_are_full = self._shared and self._has_queue()
        super()._start_accepting_if_started(_event)

    def end_one_idle(self) -> None:
        """End the connection that has been idle longest, for its file descriptor."""
        any(_end_unless_readable(sock) for sock in self.idle)

    def _has_queue(self) -> bool:
        """Whether a connection waits in the kernel."""
        return bool(_select([self.socket], [], [], 0)[0])

    def _is_warning_due(self, shortage: str) -> bool:
        now = time.monotonic()
        if now < self._next_warning[shortage]:
            return False
        self._next_warning[shortage] = now + WARNING_INTERVAL
        return True

    def do_handle(self, *accepted: Any) -> None:
        self.accepted += 1
        super().do_handle(*accepted)
        if len(self.pool) > self.connections:
            self._make_room()
            if not self._enforcing_limit:
                self._enforcing_limit = True
                gevent.spawn(self._enforce_limit)

    def _make_room(self) -> None:
        """End the connection that has been idle longest.

        One that owes its first request is ended only when the reserve is full.
        """
        full = self.full()
        for sock in self.waiting:
            if not full and sock not in self.idle:
                return
            if _end_unless_readable(sock):
                return
        if full and self.answered:
            # Even with unread bytes.
            _end(next(iter(self.answered)), socket.SHUT_RDWR)

    def _enforce_limit(self) -> None:
        """While there are too many connections, end those without a head after HEAD_TIMEOUT."""
        while len(self.pool) > self.connections:
            gevent.sleep(HEAD_TIMEOUT / 10)
            self._end_waiting(HEAD_TIMEOUT)
            if self.full() and self._has_queue():
                self._make_room()
        self._enforcing_limit = False

    def in_flight(self) -> int:
        """The requests to the API that are being answered."""
        return self.busy - self.pages

    def is_reserve_in_use(self) -> bool:
        """Whether the next request is in the reserve, which is logged."""
        if self.busy < self.connections:
            return False
        if self._is_warning_due("connections"):
            logger.warning(
                "all %d connections have a request: further requests get 503; "
                "raise XAI_PROXY_MAX_CONNECTIONS",
                self.connections,
            )
        return True

    def _end_waiting(self, timeout: float) -> None:
        """End connections without a complete head after `timeout`; idle ones owe none yet."""
        due = time.monotonic() - timeout
        for sock, since in self.waiting.items():
            if since > due:
                break
            if sock not in self.idle:
                _end_unless_readable(sock)

    def _end_answered(self) -> None:
        """End connections whose client has its last response and does not close."""
        for sock in self.answered:
            _end(sock, socket.SHUT_RD)

    def drain(self, abort: gevent.event.Event) -> None:
        """Stop accepting, close idle connections, wait for open responses, then abort the rest.

        Requests that have reached the kernel are answered. `abort`: set to end the wait early.
        """
        self.stopping = self.draining = True
        # Closing the listener would reset the connections that wait in the kernel.
        for _ in range(BACKLOG):
            if not self._has_queue():
                break
            gevent.sleep(TURN)
        self.close()
        for sock in self.idle:
            _end_unless_readable(sock)
        # The requests of new connections may be on their way.
        gevent.spawn_later(HEAD_TIMEOUT, self._end_waiting, 0)
        gevent.spawn_later(HEAD_TIMEOUT, self._end_answered)
        if len(self.pool):
            logger.info(
                "stopping; %d open responses have %g s to finish",
                len(self.pool),
                self.settings.drain_timeout,
            )
        finished = gevent.spawn(self.pool.join)
        gevent.wait([finished, abort], timeout=self.settings.drain_timeout, count=1)
        if len(self.pool):
            logger.warning("aborting %d open responses", len(self.pool))
            self.pool.kill(Cut, timeout=5)


class AdminServer(Server):
    """Serves health checks and metrics, also while every connection of `main` has a request."""

    def __init__(
        self,
        listener: socket.socket,
        application: Callable[..., Any],
        settings: config.Config,
        on_end: Callable[[RequestRecord], object],
        main: Server,
        *,
        shared: bool = False,
    ):
        super().__init__(
            listener, application, None, settings, ADMIN_CONNECTIONS, on_end, shared=shared
        )
        self.main = main

    def end(self) -> None:
        """Stop accepting, and answer the requests of open connections. May be called twice."""
        self.stopping = True
        self.close()
        for sock in self.idle:
            _end_unless_readable(sock)
        self.stop(HEAD_TIMEOUT)

    def end_one_idle(self) -> None:
        super().end_one_idle()
        self.main.end_one_idle()

    def is_reserve_in_use(self) -> bool:
        # Nothing here gets a 503: each request is short.
        return False


def _end_unless_readable(sock: socket.socket) -> bool:
    """Have its handler read an end, unless it has unread bytes; return whether it was ended."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        _end(sock, socket.SHUT_RD)
        return True
    except OSError:
        pass
    return False


def _end(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)


def keep_alive_lines(timeout: float) -> str:
    """The header lines, each after a CRLF, of a response whose connection stays open."""
    announced = max(1, int(timeout) - KEEPALIVE_MARGIN)
    return "\r\nConnection: keep-alive" + (
        f"\r\nKeep-Alive: timeout={announced}" if announced + 1 <= timeout else ""
    )
