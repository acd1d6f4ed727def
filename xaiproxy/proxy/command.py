"""xai-proxy, process 1: its command line, its checks, its listener and its signals."""

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

from xaiproxy import (
    addresses,
    client_keys,
    command,
    config,
    errors,
    judgement,
    log,
    token_store,
)
from xaiproxy.http1 import dead_paths
from xaiproxy.http1.dialler import PORTS, SOCKET_OPTIONS
from xaiproxy.http1.pool import Pool
from xaiproxy.http1.request_record import RequestRecord
from xaiproxy.proxy import (
    access,
    app,
    event_loop,
    first_request,
    forward,
    key_recorder,
    refresher_watch,
    request_log,
    traces,
)
from xaiproxy.proxy.loop_lag import LoopLag
from xaiproxy.proxy.recorder import Recorder
from xaiproxy.proxy.server import BACKLOG, Server

logger = logging.getLogger(__name__)

LISTEN_TIMEOUT = 10.0  # seconds of retries while an address is in use, or does not exist yet
LISTEN_INTERVAL = 0.2  # seconds between two of them
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
    event_loop.set_up_log(settings)
    for warning in settings.warnings:
        logger.warning("%s", warning)
    keys = client_keys.ClientKeys(settings.client_keys_file, required=_names_a_key_file(settings))
    stop, abort = handle_signals(lambda: set_log_level(options))
    listener = listen(settings, stop)
    if listener is not None:
        with listener:
            check_exposure(listener, settings, keys)
            check_upstream(listener, settings)
            run(listener, settings, keys, sweep, stop, abort)
    logger.info("stopped")
    return 0


def _names_a_key_file(settings: config.Config) -> bool:
    # If the settings name a key file and it is missing, that mistake must not admit everyone.
    return settings.client_keys_file != settings.token_path.parent / "client-keys"


def handle_signals(reload: Callable[[], None]) -> tuple[gevent.event.Event, gevent.event.Event]:
    """Return two events: the first SIGTERM or SIGINT sets the first, another one the second.

    SIGHUP sets the first event if it means that the terminal was closed, and else calls `reload`.
    """
    hangup = command.hangup()
    stop, abort = gevent.event.Event(), gevent.event.Event()

    def on_signal() -> None:
        (abort if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, on_signal)
    # Not on_signal: systemd closes the terminal of a session right after its SIGTERM.
    gevent.signal_handler(signal.SIGHUP, stop.set if hangup == signal.SIGTERM else reload)
    return stop, abort


def set_log_level(options: Mapping[str, str | None]) -> None:
    """Take XAI_PROXY_LOG_LEVEL from the settings as they are now."""
    try:
        level = config.from_environ(os.environ, options).log_level
    except errors.ConfigurationError as error:
        logger.error("SIGHUP: the log level stays as it is: %s", error)
        return
    log.set_level(level)
    logger.info("SIGHUP: the log level is %s", level)


def run(
    listener: socket.socket,
    settings: config.Config,
    keys: client_keys.ClientKeys,
    sweep: Callable[[], None],
    stop: gevent.event.Event,
    abort: gevent.event.Event,
) -> None:
    """Serve until `stop` is set, then drain until `abort` is set."""
    # It imports prometheus_client, which takes as long as the rest of --help.
    from xaiproxy.proxy.metrics import Metrics

    pool = Pool(settings)
    store, gate = token_store.TokenStore(settings), access.Access(settings, keys)
    spans = traces.start(settings)
    proxy = forward.Proxy(settings, store, gate, pool, spans)
    recorder, lag = Recorder(None if spans is None else spans.end), LoopLag()
    metrics = Metrics(recorder, store, pool, lag)

    def on_end(record: RequestRecord) -> None:
        request_log.write(record)
        recorder.add(record)

    server = Server(
        listener,
        app.create_app(proxy, store, gate, metrics=metrics.page),
        proxy,
        settings,
        connection_limit(settings.max_connections),
        on_end,
    )
    metrics.server = server
    server.start()
    address, port = listener.getsockname()[:2]
    logger.info(
        "listening on http://%s:%d/v1%s",
        f"[{settings.bind}]" if ":" in settings.bind else settings.bind,
        port,
        "" if keys.required else "; no client key required",
    )
    verdict = judgement.of(store, time.time())
    logger.info("%s", first_request.advice(address, port, keys, verdict))
    watcher = gevent.spawn(refresher_watch.watch, token_store.TokenStore(settings))
    sweeper = gevent.spawn(sweep)
    key_uses = key_recorder.Recorder(keys)
    recording = gevent.spawn(key_uses.run)
    stop.wait()
    watcher.kill()
    server.drain(abort)
    sweeper.kill()
    recording.kill()
    key_uses.save_last()
    pool.close()
    if spans is not None:
        recorder.fold()
        spans.close()


def listen(
    settings: config.Config, stop: gevent.event.Event, timeout: float = LISTEN_TIMEOUT
) -> socket.socket | None:
    """A listening socket, or None once `stop` is set.

    Raises ConfigurationError if the address is not available within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    retrying = False
    while not stop.is_set():
        try:
            return _listener(settings)
        except OSError as error:
            may_pass = error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
            if not may_pass or time.monotonic() > deadline:
                advice = (
                    "stop the program that listens there, or set XAI_PROXY_PORT"
                    if error.errno == errno.EADDRINUSE
                    else "set XAI_PROXY_BIND and XAI_PROXY_PORT to what this machine allows"
                )
                raise errors.ConfigurationError(
                    f"cannot listen on {settings.bind} port {settings.port}: {error.strerror}; "
                    f"{advice}"
                ) from error
            if not retrying:
                retrying = True
                logger.warning(
                    "cannot listen on %s port %d yet: %s; retrying for %g s",
                    settings.bind,
                    settings.port,
                    error.strerror,
                    timeout,
                )
        stop.wait(LISTEN_INTERVAL)
    return None


def _listener(settings: config.Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit them on Linux.
        for option in SOCKET_OPTIONS:
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
    """Raise ConfigurationError if other machines could use the login without a key by mistake."""
    # The socket's own address, which the settings need not name.
    address = listener.getsockname()[0]
    if not (addresses.is_loopback(address) or keys.required or settings.allow_anonymous):
        raise errors.ConfigurationError(
            f"{address} is reachable from other machines, and there is no client key; make one "
            f"with {errors.typed('xai-client-key add NAME')} ({settings.client_keys_file}), or set "
            "XAI_PROXY_ALLOW_ANONYMOUS=1"
        )


def check_upstream(listener: socket.socket, settings: config.Config) -> None:
    """Raise ConfigurationError if upstream is this proxy: one request would use all connections."""
    url = urllib.parse.urlsplit(settings.upstream)
    port = listener.getsockname()[1]
    if addresses.is_loopback(url.hostname) and (url.port or PORTS[url.scheme]) == port:
        raise errors.ConfigurationError(
            f"XAI_PROXY_UPSTREAM is {settings.upstream!r}, but the proxy itself listens on port "
            f"{port}; set XAI_PROXY_UPSTREAM to the API, or XAI_PROXY_PORT to another port"
        )


def connection_limit(wanted: int) -> int:
    """Raise this process's file descriptor limit for `wanted` client connections.

    Return how many of them fit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.descriptors_for(wanted)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    fitting = config.connections_within(soft)
    logger.warning(
        "the file descriptor limit of %d has room for %d client connections, not %d; "
        "raise it with ulimit -n",
        soft,
        fitting,
        wanted,
    )
    return fitting
