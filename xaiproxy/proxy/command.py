"""Process 1: its command line, listener, signals and checks before it serves."""

import errno
import logging
import os
import resource
import signal
import socket
import time
import urllib.parse
from collections.abc import Callable, Mapping

import gevent
import gevent.event
import gevent.monkey

from xaiproxy import addresses, client_keys, command, config, errors, log, token_store
from xaiproxy.http1 import dead_paths
from xaiproxy.http1.dialler import PORTS, SOCKET_OPTIONS
from xaiproxy.http1.pool import Pool
from xaiproxy.proxy import access, app, event_loop, forward, refresher_watch
from xaiproxy.proxy.server import BACKLOG, NoDescriptor, Server

logger = logging.getLogger(__name__)

LOG_DELAY = (
    0.005  # seconds that a log line waits at most, for others or until nothing else is to be done
)
LISTEN_TIME = 10.0  # seconds in which an address that is in use, or not there yet, is tried again
LISTEN_INTERVAL = 0.2  # seconds between two of these tries
EXAMPLES = """\
  xai-proxy                        serve http://127.0.0.1:9090/v1 with the login of xai-login
  xai-proxy --port 8080            on another port
"""


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


def serve(options: Mapping[str, str | None], sweep: Callable[[], None] = dead_paths.sweep) -> int:
    """`options`: settings of the command line."""
    settings = config.from_environ(os.environ, options)
    # The original poll: the patched one would switch greenlets in the middle of a log line.
    log.setup(
        "proxy",
        settings.log_level,
        settings.log_format,
        poll=gevent.monkey.get_original("select", "poll"),
        defer=event_loop.Leisure(LOG_DELAY),
        when_writable=event_loop.WhenWritable(),
    )
    hub = gevent.get_hub()
    hub.exception_stream = event_loop.LogStream()
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
    watcher = gevent.spawn(refresher_watch.watch_refresher, token_store.TokenStore(settings))
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
    if not (addresses.is_loopback(address) or keys.required or settings.allow_anonymous):
        raise errors.ConfigurationError(
            f"{address} can be reached from other machines, and there is no client key; make one with "
            f"{errors.typed('xai-client-key add NAME')} ({settings.client_keys_file}), or set XAI_PROXY_ALLOW_ANONYMOUS=1"
        )


def check_upstream(listener: socket.socket, settings: config.Config) -> None:
    """Refuse to be our own upstream: one request would take all connections. Raises ConfigurationError."""
    upstream = urllib.parse.urlsplit(settings.upstream)
    port = listener.getsockname()[1]
    if (
        addresses.is_loopback(upstream.hostname)
        and (upstream.port or PORTS[upstream.scheme]) == port
    ):
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
