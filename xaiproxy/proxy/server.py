"""Process 1: the WSGI server, its limits, its signals and its drain."""

import contextlib
import errno
import logging
import socket
import time
from typing import Any

import gevent
import gevent.event
import gevent.monkey
import gevent.pool
from gevent import pywsgi

from xaiproxy import config
from xaiproxy.http1.handler import Cut, Handler

logger = logging.getLogger(__name__)

_select = gevent.monkey.get_original(
    "select", "select"
)  # the patched one lets others run, also with a time-out of 0
BACKLOG = 1024  # connections that wait in the kernel until they are accepted
TURN = 0.001  # seconds in which the event loop polls all sockets
PATIENCE = (
    1.0  # seconds for a request to come, where there are too many connections or the end is near
)
KEEPALIVE_MARGIN = (
    5  # seconds by which a client is told less than KEEPALIVE_TIMEOUT, so that it closes first
)
WARNING_INTERVAL = (
    60.0  # seconds between two lines about one shortage: at a limit connections come and go
)


class NoDescriptor(OSError):
    """A connection could not be accepted; gevent tries again after 10 ms, doubling to 1 s."""


class Server(pywsgi.WSGIServer):
    """Accepts `connections` and a reserve on top, in which a request gets no answer but a health check's or a 503.

    `busy` counts the requests that are being answered; a request beyond `connections` of them is one in the reserve.
    Every other connection can be closed for a new one.
    """

    handler_class = Handler

    def __init__(
        self,
        listener: socket.socket,
        application: Any,
        proxy: Any,
        settings: config.Config,
        connections: int,
    ):
        # A pool, since without one WSGIServer.stop would cut every stream at once; full, it stops accepting.
        super().__init__(
            listener,
            application,
            spawn=gevent.pool.Pool(connections + config.RESERVE),
            log=None,
            error_log=logger,
            environ={"SERVER_NAME": "xaiproxy"},
        )  # else pywsgi asks the DNS for its name
        self.connections = connections
        self.busy = 0
        self.settings = settings
        self.proxy = proxy
        self.keep_alive = keep_alive_lines(settings.keepalive_timeout)
        self.draining = False
        # Sockets that may be closed for others, longest first:
        self.idle: dict[Any, None] = {}  # between two requests
        self.waiting: dict[
            Any, float
        ] = {}  # that owe us a whole head, the idle ones among them: since when
        self.answered: dict[
            Any, None
        ] = {}  # whose client has yet to read an answer, or to close after its last one
        self._crowded = False
        self._short = False
        self._next_warning = {
            "descriptors": 0.0,
            "connections": 0.0,
        }  # no line about them before this time

    def do_read(self) -> Any:
        try:
            accepted = super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if not self._has_queue():  # the kernel asks for a descriptor first
                return None
            any(_end_if_quiet(sock) for sock in self.idle)
            if self._is_warning_due("descriptors"):
                self._short = True
                logger.error(
                    "%s, with %d connections: new ones wait until others end; raise the limit with ulimit -n, "
                    "or lower XAI_PROXY_MAX_CONNECTIONS",
                    error.strerror,
                    len(self.pool),
                )
            raise NoDescriptor(*error.args) from error  # gevent looks at them
        if self._short and accepted:
            self._short = False
            logger.info("connections are accepted again")
        return accepted

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
        super().do_handle(*accepted)
        if len(self.pool) > self.connections:
            self._make_room()
            if not self._crowded:
                self._crowded = True
                gevent.spawn(self._watch_crowd)

    def _make_room(self) -> None:
        """End the connection that has waited longest; one whose first request is due, only when the reserve is full."""
        full = self.full()
        for sock in self.waiting:
            if not full and sock not in self.idle:
                return
            if _end_if_quiet(sock):
                return
        if full and self.answered:
            _end(next(iter(self.answered)), socket.SHUT_RDWR)  # even if it has unread bytes

    def _watch_crowd(self) -> None:
        """While there are more than `connections`, end those whose head has not come within PATIENCE."""
        while len(self.pool) > self.connections:
            gevent.sleep(PATIENCE / 10)
            self._end_waiting(PATIENCE)
            if self.full() and self._has_queue():
                self._make_room()
        self._crowded = False

    def is_reserve_in_use(self) -> bool:
        """Whether the next request is one in the reserve; logged."""
        if self.busy < self.connections:
            return False
        if self._is_warning_due("connections"):
            logger.warning(
                "all %d connections have a request: further ones get 503; raise XAI_PROXY_MAX_CONNECTIONS",
                self.connections,
            )
        return True

    def _end_waiting(self, patience: float) -> None:
        """End connections whose head has not come for so long; idle ones owe none yet."""
        due = time.monotonic() - patience
        for sock, since in self.waiting.items():
            if since > due:
                break
            if sock not in self.idle:
                _end_if_quiet(sock)

    def _end_answered(self) -> None:
        """Wait no longer for clients that have their last answer to close."""
        for sock in self.answered:
            _end(sock, socket.SHUT_RD)

    def drain(self, cut: gevent.event.Event) -> None:
        """Stop accepting, close idle connections, wait for open answers, then cut what is left.

        What reached the kernel before is answered. `cut`: set to end the wait early.
        """
        self.draining = True
        for _ in range(BACKLOG):  # closing would reset the connections that wait in the kernel
            if not self._has_queue():
                break
            gevent.sleep(TURN)
        self.close()
        for sock in self.idle:
            _end_if_quiet(sock)
        gevent.spawn_later(PATIENCE, self._end_waiting, 0)  # new ones' requests may be on their way
        gevent.spawn_later(PATIENCE, self._end_answered)
        if len(self.pool):
            logger.info(
                "stopping; %d open answers get %g s to finish",
                len(self.pool),
                self.settings.drain_timeout,
            )
        finished = gevent.spawn(self.pool.join)
        gevent.wait([finished, cut], timeout=self.settings.drain_timeout, count=1)
        if len(self.pool):
            logger.warning("cutting %d open answers", len(self.pool))
            self.pool.kill(Cut, timeout=5)


def _end_if_quiet(sock: socket.socket) -> bool:
    """Let its handler read an end, unless it has unread bytes; return whether it was ended."""
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
    """The header lines, each after its CRLF, of an answer whose connection stays open for `timeout` seconds."""
    announced = max(1, int(timeout) - KEEPALIVE_MARGIN)
    return "\r\nConnection: keep-alive" + (
        f"\r\nKeep-Alive: timeout={announced}" if announced + 1 <= timeout else ""
    )
