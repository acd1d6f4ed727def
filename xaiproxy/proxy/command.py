"""xai-proxy, process 1: its command line, its checks, its listener and its signals."""

import contextlib
import dataclasses
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import gevent
import gevent.event

from xaiproxy import (
    client_keys,
    command,
    config,
    errors,
    inherited_socket,
    judgement,
    log,
    run_folder,
    service_manager,
)
from xaiproxy.http1 import dead_paths
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
from xaiproxy.proxy.listener import (
    check_distinct,
    check_exposure,
    check_upstream,
    listen,
    listen_for_admin,
    set_options,
)
from xaiproxy.proxy.loop_lag import LoopLag
from xaiproxy.proxy.numbers import OwnNumbers
from xaiproxy.proxy.recorder import Recorder
from xaiproxy.proxy.server import AdminServer, Server
from xaiproxy.proxy.socket_file import SocketFile
from xaiproxy.proxy.status import Status
from xaiproxy.proxy.trouble import Trouble
from xaiproxy.token_store import TokenStore

logger = logging.getLogger(__name__)

EXAMPLES = """\
  xai-proxy                serve http://127.0.0.1:9090/v1
  xai-proxy --port 8080    the same on another port
"""
NOTES = """\
It serves with the login that xai-login made, and does not refresh it: that is
what xai-refresher does. xai-serve runs both.

Exit status: 0 after SIGTERM or Ctrl-C; 64 wrong usage; 78 wrong settings, or
an address that is in use.
"""


def parser() -> command.ArgumentParser:
    options = command.ArgumentParser(
        EXAMPLES,
        prog="xai-proxy",
        description="Serve an OpenAI-compatible endpoint.",
        epilog=NOTES,
    )
    command.add_serving_options(options)
    worker = options.add_argument_group("one of several workers (xai-serve --workers)")
    worker.add_argument(
        "--slot",
        type=command.whole(0, command.MOST_WORKERS - 1),
        metavar="I",
        help="serve as number I, from 0; standard input is the listening socket",
    )
    worker.add_argument(
        "--workers",
        type=command.whole(1, command.MOST_WORKERS),
        default=1,
        metavar="N",
        help="the number of workers, which share XAI_PROXY_MAX_CONNECTIONS and "
        "XAI_PROXY_REPLAY_MEMORY",
    )
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser()
    arguments = options.parse_args(argv)
    if (arguments.slot or 0) >= arguments.workers:
        options.error("--slot must be less than --workers")
    settings = command.serving_settings(arguments)
    return command.run("xai-proxy", lambda: serve(settings, arguments.slot, arguments.workers))


def serve(
    options: Mapping[str, str | None],
    slot: int | None = None,
    workers: int = 1,
    sweep: Callable[[], None] = dead_paths.sweep,
) -> int:
    """`options`: settings of the command line. `slot`: number of this worker, or None."""
    settings = config.from_environ(os.environ, options)
    settings = dataclasses.replace(
        settings,
        max_connections=max(1, settings.max_connections // workers),
        replay_memory=settings.replay_memory // workers,
    )
    event_loop.set_up_log(settings, slot)
    for warning in settings.warnings:
        logger.warning("%s", warning)
    keys = client_keys.ClientKeys(settings.client_keys_file, required=_names_a_key_file(settings))
    signals = handle_signals(lambda: set_log_level(options))
    stop = signals.stop
    inherited, admin = inherited_socket.take(os.environ, is_worker=slot is not None)
    with contextlib.ExitStack() as opened:
        for sock in filter(None, (inherited, admin)):
            opened.enter_context(sock)
        check_distinct(settings, inherited)
        if admin is None and settings.admin_bind is not None:
            if slot is not None:
                raise errors.ConfigurationError(
                    "XAI_PROXY_ADMIN_BIND was not set when xai-serve was started, and a worker "
                    "cannot open the socket for all; stop xai-serve, and start it again"
                )
            admin = listen_for_admin(settings.admin_bind, stop)
            if admin is not None:
                opened.enter_context(admin)
        listener = inherited or listen(settings, stop)
        if listener is not None:
            opened.enter_context(listener)
            set_options(listener)
            check_exposure(listener, settings, keys)
            check_upstream(listener, settings)
            run(listener, admin, settings, keys, sweep, signals, slot, workers)
    logger.info("stopped")
    return 0


def _names_a_key_file(settings: config.Config) -> bool:
    # If the settings name a key file and it is missing, that mistake must not admit everyone.
    return settings.client_keys_file != settings.token_path.parent / "client-keys"


class Signals:
    """The events that signals set.

    `stop`: by any signal. `drain`: by REPLACE, by SIGINT, since no load balancer sends requests to
    a proxy that runs on a terminal, and by a second signal. `abort`: by a second signal.

    `is_replaced`: whether the first signal was REPLACE.
    """

    def __init__(self) -> None:
        self.stop, self.drain, self.abort = (gevent.event.Event() for _ in range(3))
        self.is_replaced = False

    def is_stopping(self) -> bool:
        """Whether clients should go elsewhere."""
        return bool(self.stop.is_set()) and not self.is_replaced

    def on_signal(self, number: int) -> None:
        is_second = self.stop.is_set()
        self.is_replaced |= not is_second and number == run_folder.REPLACE
        self.stop.set()
        if is_second or number != signal.SIGTERM:
            self.drain.set()
        if is_second:
            self.abort.set()


def handle_signals(reload: Callable[[], None]) -> Signals:
    """SIGHUP sets `stop` if it means that the terminal was closed, and else calls `reload`."""
    hangup = command.hangup()
    signals = Signals()
    for number in (signal.SIGTERM, signal.SIGINT, run_folder.REPLACE):
        gevent.signal_handler(number, signals.on_signal, number)
    # Not on_signal: systemd closes the terminal of a session right after its SIGTERM.
    gevent.signal_handler(signal.SIGHUP, signals.stop.set if hangup == signal.SIGTERM else reload)
    return signals


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
    admin_listener: socket.socket | None,
    settings: config.Config,
    keys: client_keys.ClientKeys,
    sweep: Callable[[], None],
    signals: Signals,
    slot: int | None,
    workers: int,
) -> None:
    """Serve until `signals.stop` is set, then drain until `signals.abort` is set."""
    # It imports prometheus_client, which takes as long as the rest of --help.
    from xaiproxy.proxy.metrics import Metrics
    from xaiproxy.proxy.shared_numbers import SharedNumbers

    pool = Pool(settings)
    store, gate = TokenStore(settings), access.Access(settings, keys)
    spans = traces.start(settings)
    proxy = forward.Proxy(settings, store, gate, pool, spans)
    recorder, lag = Recorder(None if spans is None else spans.end), LoopLag()
    trouble = Trouble(recorder.upstream, is_token_pending=proxy.is_token_pending)
    own = OwnNumbers(recorder, pool, lag, trouble)
    shared = None
    if slot is not None and workers > 1:
        shared = SharedNumbers(own, settings, listener.getsockname(), slot, workers)
    metrics, status = Metrics(shared or own, store), Status(store, shared or own)

    def on_end(record: RequestRecord) -> None:
        if not request_log.is_late(record):
            request_log.write(record)
        recorder.add(record)

    def status_now() -> dict[str, Any]:
        return status.members(time.time())

    server = Server(
        listener,
        app.create_app(
            proxy, store, gate, metrics.page, status_now, trouble.sentence, signals.is_stopping
        ),
        proxy,
        settings,
        connection_limit(settings.max_connections),
        on_end,
        shared=workers > 1,
    )
    own.server = trouble.server = server
    admin = None
    if admin_listener is not None:
        application = app.create_app(
            None,
            store,
            gate,
            metrics.page,
            trouble=trouble.sentence,
            is_stopping=signals.is_stopping,
        )
        admin = AdminServer(
            admin_listener, application, settings, on_end, server, shared=workers > 1
        )
        admin.start()
        logger.info("health checks and metrics on %s", origin(admin_listener))
    server.start()
    if shared is not None:
        gevent.spawn(shared.run)
    logger.info(
        "listening on %s%s",
        place(listener),
        "" if keys.required else "; no client key required",
    )
    verdict = judgement.of(store, time.time())
    logger.info("%s", first_request.advice(listener.getsockname(), keys, verdict))
    service_manager.announce_ready()
    # One worker logs for all.
    watchers = [] if slot else [gevent.spawn(refresher_watch.watch, TokenStore(settings))]
    sweeper = gevent.spawn(sweep)
    key_uses = key_recorder.Recorder(keys)
    recording = gevent.spawn(key_uses.run)
    signals.stop.wait()
    server.stopping = True
    if settings.drain_delay and not signals.drain.is_set():
        logger.info("stopping in %g s; until then new connections are served", settings.drain_delay)
        signals.drain.wait(settings.drain_delay)
    if admin is not None and workers > 1:
        # A drain may be long, and from here on the siblings answer all health checks.
        admin.end()
    gevent.killall(watchers)
    if isinstance(listener, SocketFile):
        # From here on no connection is lost: those that wait in the kernel are served.
        listener.remove()
    server.drain(signals.abort)
    if admin is not None:
        admin.end()
    sweeper.kill()
    recording.kill()
    key_uses.save_last()
    pool.close()
    # It writes log lines and ends spans of the last requests.
    recorder.fold()
    if shared is not None:
        shared.close()
    if spans is not None:
        spans.close()


def place(listener: socket.socket) -> str:
    """Where clients find the API."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    return f"{origin(listener)}/v1"


def origin(listener: socket.socket) -> str:
    """The origin of an HTTP URL for the address on which it listens."""
    address, port = listener.getsockname()[:2]
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


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
