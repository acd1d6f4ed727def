"""Process 1: the WSGI server, its limits, its signals and its drain."""

import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import gevent
import gevent.event
import gevent.monkey
import gevent.pool
from gevent import pywsgi

from xaiproxy import client_keys, command, config, errors, log, token_store
from xaiproxy.http1 import dead_paths
from xaiproxy.http1.dialler import PORTS, SOCKET_OPTIONS
from xaiproxy.http1.handler import Cut, Handler
from xaiproxy.http1.pool import Pool
from xaiproxy.proxy import access, app, forward

logger = logging.getLogger(__name__)

_select = gevent.monkey.get_original(
    "select", "select"
)  # the patched one lets others run, also with a time-out of 0
BACKLOG = 1024  # connections that wait in the kernel until they are accepted
TURN = 0.001  # seconds in which the event loop polls all sockets
RECHECK = 1.0  # seconds between two polls of a log that takes no line
LOG_DELAY = (
    0.005  # seconds that a log line waits at most, for others or until nothing else is to be done
)
PATIENCE = (
    1.0  # seconds for a request to come, where there are too many connections or the end is near
)
KEEPALIVE_MARGIN = (
    5  # seconds by which a client is told less than KEEPALIVE_TIMEOUT, so that it closes first
)
WARNING_INTERVAL = (
    60.0  # seconds between two lines about one shortage: at a limit connections come and go
)
LISTEN_TIME = 10.0  # seconds in which an address that is in use, or not there yet, is tried again
LISTEN_INTERVAL = 0.2  # seconds between two of these tries
REFRESHER_LOOK = 2.0  # seconds between two looks for a living refresher, of which the first leaves it time to start
EXAMPLES = """\
  xai-proxy                        serve http://127.0.0.1:9090/v1 with the login of xai-login
  xai-proxy --port 8080            on another port
"""


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


def main(argv: list[str] | None = None) -> int:
    parser = command.ArgumentParser(
        prog="xai-proxy", description="Serve an OpenAI-compatible endpoint.", epilog=EXAMPLES
    )
    parser.add_argument("--bind", metavar="ADDRESS", help="IP address to listen on")
    parser.add_argument("-p", "--port", help="TCP port to listen on")
    parser.add_argument("--token-path", metavar="FILE", help="the token file")
    arguments = parser.parse_args(argv)
    options = {
        "XAI_PROXY_BIND": arguments.bind,
        "XAI_PROXY_PORT": arguments.port,
        "XAI_PROXY_TOKEN_PATH": arguments.token_path,
    }
    return command.run(parser.prog, lambda: serve(options))


class Leisure:
    """Calls back when the event loop has nothing else to do, and after `limit` seconds at the latest."""

    def __init__(self, limit: float):
        loop = gevent.get_hub().loop
        self._idle, self._timer = loop.idle(), loop.timer(limit, limit)

    def __call__(self, callback: Callable[[], None]) -> None:
        self._idle.start(self._call, callback)
        if not self._timer.active:  # to start it anew each time would cost more than what is called
            self._timer.again(self._tick, callback)

    def _call(self, callback: Callable[[], None]) -> None:
        self._idle.stop()
        callback()

    def _tick(self, callback: Callable[[], None]) -> None:
        if self._idle.active:
            self._call(callback)
        else:
            self._timer.stop()


class WhenWritable:
    """Calls back once a descriptor is writable, or after RECHECK seconds; `fd` must be the same in every call.

    The recheck: epoll has been seen to miss that a pipe was emptied while the machine was busy.
    """

    def __init__(self) -> None:
        self._watcher: Any = None
        self._timer = gevent.get_hub().loop.timer(RECHECK)

    def __call__(self, fd: int, callback: Callable[[], None]) -> None:
        if self._watcher is None:
            self._watcher = gevent.get_hub().loop.io(fd, 2)
        self._watcher.start(self._call, callback)
        self._timer.stop()
        self._timer.start(self._call, callback, update=True)

    def _call(self, callback: Callable[[], None]) -> None:
        self._watcher.stop()
        self._timer.stop()
        callback()


def serve(options: Mapping[str, str | None], sweep: Callable[[], None] = dead_paths.sweep) -> int:
    """`options`: settings of the command line."""
    settings = config.from_environ(os.environ, options)
    # The original poll: the patched one would switch greenlets in the middle of a log line.
    log.setup(
        "proxy",
        settings.log_level,
        settings.log_format,
        poll=gevent.monkey.get_original("select", "poll"),
        defer=Leisure(LOG_DELAY),
        when_writable=WhenWritable(),
    )
    hub = gevent.get_hub()
    hub.exception_stream = _LogStream()
    hub.NOT_ERROR += (NoDescriptor,)  # the server has said it already
    for warning in settings.warnings:
        logger.warning("%s", warning)
    keys = client_keys.ClientKeys(settings.client_keys_file, required=_names_a_key_file(settings))
    stop, cut = handle_signals(lambda: set_log_level(options))
    listener = listen(settings, stop)
    if listener is not None:
        with listener:
            check_exposure(listener, settings, keys)
            check_upstream(listener, settings)
            run(listener, settings, keys, sweep, stop, cut)
    logger.info("stopped")
    return 0


def handle_signals(reload: Callable[[], None]) -> tuple[gevent.event.Event, gevent.event.Event]:
    """Two events: the first is set by SIGTERM or SIGINT, the second by another one of them after that.

    SIGHUP sets the first too if it means a closed terminal, and calls `reload` if not.
    """
    hangup = command.hangup()
    stop, cut = gevent.event.Event(), gevent.event.Event()

    def on_signal() -> None:
        (cut if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, on_signal)
    # Not on_signal: the terminal of a session that systemd ends is closed right after a SIGTERM.
    gevent.signal_handler(signal.SIGHUP, stop.set if hangup == signal.SIGTERM else reload)
    return stop, cut


def run(
    listener: socket.socket,
    settings: config.Config,
    keys: client_keys.ClientKeys,
    sweep: Callable[[], None],
    stop: gevent.event.Event,
    cut: gevent.event.Event,
) -> None:
    """Serve until `stop` is set, then drain until `cut` is."""
    pool = Pool(settings)
    store, gate = token_store.TokenStore(settings), access.Access(settings, keys)
    proxy = forward.Proxy(settings, store, gate, pool)
    server = Server(
        listener,
        app.create_app(proxy, store, gate),
        proxy,
        settings,
        connection_limit(settings.max_connections),
    )
    server.start()
    host = f"[{settings.bind}]" if ":" in settings.bind else settings.bind
    logger.info(
        "listening on http://%s:%d/v1%s",
        host,
        listener.getsockname()[1],
        "" if keys.required else "; no client key is asked for",
    )
    watcher = gevent.spawn(watch_refresher, token_store.TokenStore(settings))
    sweeper = gevent.spawn(sweep)
    stop.wait()
    watcher.kill()
    server.drain(cut)
    sweeper.kill()
    pool.close()


def set_log_level(options: Mapping[str, str | None]) -> None:
    """Take XAI_PROXY_LOG_LEVEL from the settings as they are now."""
    try:
        level = config.from_environ(os.environ, options).log_level
    except errors.ConfigurationError as error:
        logger.error("SIGHUP: the settings are not read anew: %s", error)
        return
    log.set_level(level)
    logger.info("SIGHUP: the log level is %s", level)


def watch_refresher(store: token_store.TokenStore) -> None:
    """Say once when the login has nobody to renew it, and once when it has again."""
    alive = True
    while True:
        gevent.sleep(REFRESHER_LOOK)
        try:
            renewable = store.current().refresh_token is not None
        except errors.LoginUnusable:
            continue
        if alive and not store.refresher_alive(time.time()):
            gevent.sleep(token_store.OVERDUE)
        if renewable and store.refresher_alive(time.time()) != alive:
            alive = not alive
            if alive:
                logger.info("the refresher is back")
            else:
                logger.warning(
                    "%s; look why xai-refresher does not run",
                    app.readiness_of(store, time.time())[1],
                )


def listen(
    settings: config.Config, stop: gevent.event.Event, patience: float = LISTEN_TIME
) -> socket.socket | None:
    """A listening socket, or None once `stop` is set.

    Raises ConfigurationError when the address cannot be had within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    waiting = False
    while not stop.is_set():
        try:
            return _listener(settings)
        except OSError as error:
            passing = error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
            if not passing or time.monotonic() > deadline:
                advice = (
                    "stop what listens there, or set XAI_PROXY_PORT"
                    if error.errno == errno.EADDRINUSE
                    else "set XAI_PROXY_BIND and XAI_PROXY_PORT to what this machine allows"
                )
                raise errors.ConfigurationError(
                    f"cannot listen on {settings.bind} port {settings.port}: {error.strerror}; {advice}"
                ) from error
            if not waiting:
                waiting = True
                logger.warning(
                    "cannot listen on %s port %d yet: %s; trying for %g s",
                    settings.bind,
                    settings.port,
                    error.strerror,
                    patience,
                )
        stop.wait(LISTEN_INTERVAL)
    return None


def _listener(settings: config.Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option in SOCKET_OPTIONS:  # accepted sockets inherit them on Linux
            listener.setsockopt(*option)
        listener.bind((settings.bind, settings.port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def check_exposure(
    listener: socket.socket, settings: config.Config, keys: client_keys.ClientKeys
) -> None:
    """Refuse to serve everybody by accident. Raises ConfigurationError."""
    address = listener.getsockname()[0]  # what the socket says, not what the settings say
    if not (config.is_loopback(address) or keys.required or settings.allow_anonymous):
        raise errors.ConfigurationError(
            f"{address} can be reached from other machines, and there is no client key; make one with "
            f"{errors.typed('xai-client-key add NAME')} ({settings.client_keys_file}), or set XAI_PROXY_ALLOW_ANONYMOUS=1"
        )


def check_upstream(listener: socket.socket, settings: config.Config) -> None:
    """Refuse to be our own upstream: one request would take all connections. Raises ConfigurationError."""
    upstream = urllib.parse.urlsplit(settings.upstream)
    port = listener.getsockname()[1]
    if config.is_loopback(upstream.hostname) and (upstream.port or PORTS[upstream.scheme]) == port:
        raise errors.ConfigurationError(
            f"XAI_PROXY_UPSTREAM is {settings.upstream!r}, but the proxy itself listens on port {port}; set "
            "XAI_PROXY_UPSTREAM to the API, or XAI_PROXY_PORT to another port"
        )


def _names_a_key_file(settings: config.Config) -> bool:
    # A file that the settings name and that is not there is a mistake, which must not leave the door open.
    return settings.client_keys_file != settings.token_path.parent / "client-keys"


def connection_limit(wanted: int) -> int:
    """Raise our own file descriptor limit as far as it goes; return how many client connections fit in it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.descriptors_for(wanted)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    fitting = config.connections_within(soft)
    logger.warning(
        "the file descriptor limit of %d has room for %d client connections, not %d; raise it with ulimit -n",
        soft,
        fitting,
        wanted,
    )
    return fitting


class _LogStream:
    """Where gevent prints what a greenlet died of: our log, since stderr may be read by nobody."""

    def write(self, text: str) -> None:
        if text.strip():
            logger.error("%s", text.rstrip())

    def flush(self) -> None:
        pass
