"""The proxy's listening sockets, and whether it may serve there."""

import errno
import functools
import logging
import socket
import time
import urllib.parse
from collections.abc import Callable

import gevent.event

from xaiproxy import addresses, client_keys, config, errors
from xaiproxy.addresses import UnixSocket
from xaiproxy.http1.dialler import PORTS, SOCKET_OPTIONS
from xaiproxy.proxy import socket_file
from xaiproxy.proxy.server import BACKLOG

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds of retries while an address is in use, or does not exist yet
INTERVAL = 0.2  # seconds between two of them
# EAGAIN: another proxy is starting in the folder of a Unix socket.
TEMPORARY = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EAGAIN)
FOLDER_ADVICE = (
    "the folder of the socket must exist, and this user must be able to write to it; or set "
    "XAI_PROXY_BIND"
)


def listen(
    settings: config.Config, stop: gevent.event.Event, timeout: float = TIMEOUT
) -> socket.socket | None:
    """The socket that serves the API, listening, or None once `stop` is set.

    Raises ConfigurationError if the address is not available within `timeout` seconds.
    """
    bind = settings.bind
    if isinstance(bind, UnixSocket):
        return _retry(
            functools.partial(socket_file.listen, bind, BACKLOG),
            str(bind),
            "XAI_PROXY_BIND (--bind)",
            FOLDER_ADVICE,
            stop,
            timeout,
        )
    return _retry(
        functools.partial(_listener, bind, settings.port),
        f"{bind} port {settings.port}",
        "XAI_PROXY_PORT (--port)",
        "set XAI_PROXY_BIND and XAI_PROXY_PORT to what this machine allows",
        stop,
        timeout,
    )


def listen_for_admin(
    address: tuple[str, int], stop: gevent.event.Event, timeout: float = TIMEOUT
) -> socket.socket | None:
    """The socket of the admin listener; as `listen`."""
    bind, port = address
    return _retry(
        functools.partial(_listener, bind, port),
        f"{bind} port {port}",
        "XAI_PROXY_ADMIN_BIND",
        "set XAI_PROXY_ADMIN_BIND to what this machine allows",
        stop,
        timeout,
    )


def _retry(
    listener: Callable[[], socket.socket],
    place: str,
    setting: str,
    advice: str,
    stop: gevent.event.Event,
    timeout: float,
) -> socket.socket | None:
    """`setting`: gives another place. `advice`: unless a program listens at `place`."""
    deadline = time.monotonic() + timeout
    retrying = False
    while not stop.is_set():
        try:
            return listener()
        except OSError as error:
            if error.errno not in TEMPORARY or time.monotonic() > deadline:
                if error.errno == errno.EADDRINUSE:
                    advice = f"stop the program that listens there, or set {setting}"
                raise errors.ConfigurationError(
                    f"cannot listen on {place}: {error.strerror}; {advice}"
                ) from error
            if not retrying:
                retrying = True
                logger.warning(
                    "cannot listen on %s yet: %s; retrying for %g s",
                    place,
                    error.strerror,
                    timeout,
                )
        stop.wait(INTERVAL)
    return None


def _listener(bind: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bind, port))
        set_options(listener)
    except OSError:
        listener.close()
        raise
    return listener


def check_distinct(settings: config.Config, inherited: socket.socket | None = None) -> None:
    """Raise ConfigurationError if both listeners are to have the same address.

    `inherited`: the listening socket that the process was started with, or None.
    """
    admin = settings.admin_bind
    main = inherited.getsockname() if inherited is not None else (settings.bind, settings.port)
    # The name of a Unix socket is a string.
    if admin is None or isinstance(main, str) or isinstance(main[0], UnixSocket):
        return
    same_address = admin[0] == main[0] or {admin[0], main[0]} & {"0.0.0.0", "::"}
    if same_address and admin[1] == main[1] != 0:
        raise errors.ConfigurationError(
            f"XAI_PROXY_ADMIN_BIND names port {admin[1]}, on which the proxy itself listens "
            "(XAI_PROXY_PORT, or ListenStream= of its socket unit); set one of them to another port"
        )


def set_options(listener: socket.socket) -> None:
    """Set the options and the backlog of a listening socket, also of one that was inherited."""
    if listener.family != socket.AF_UNIX:
        # Accepted sockets inherit them on Linux.
        for option in SOCKET_OPTIONS:
            listener.setsockopt(*option)
    listener.listen(BACKLOG)


def check_exposure(
    listener: socket.socket, settings: config.Config, keys: client_keys.ClientKeys
) -> None:
    """Raise ConfigurationError if other machines could use the login without a key by mistake."""
    if listener.family == socket.AF_UNIX:
        return
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
    if listener.family == socket.AF_UNIX:
        return
    url = urllib.parse.urlsplit(settings.upstream)
    port = listener.getsockname()[1]
    if addresses.is_loopback(url.hostname) and (url.port or PORTS[url.scheme]) == port:
        raise errors.ConfigurationError(
            f"XAI_PROXY_UPSTREAM is {settings.upstream!r}, but the proxy itself listens on port "
            f"{port}; set XAI_PROXY_UPSTREAM to the API, or XAI_PROXY_PORT to another port"
        )
