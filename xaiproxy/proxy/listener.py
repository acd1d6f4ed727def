"""The proxy's listening socket, and whether it may serve there."""

import errno
import logging
import socket
import time
import urllib.parse

import gevent.event

from xaiproxy import addresses, client_keys, config, errors
from xaiproxy.http1.dialler import PORTS, SOCKET_OPTIONS
from xaiproxy.proxy.server import BACKLOG

logger = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds of retries while an address is in use, or does not exist yet
INTERVAL = 0.2  # seconds between two of them


def listen(
    settings: config.Config, stop: gevent.event.Event, timeout: float = TIMEOUT
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
        stop.wait(INTERVAL)
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
