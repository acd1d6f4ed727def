"""The listening sockets that the process was started with, instead of those that it opens itself.

The proxy's is the first descriptor after standard error if LISTEN_PID names this process (systemd's
socket activation, sd_listen_fds(3)), and otherwise, in a worker, its standard input, as FastCGI has
it. A worker's admin listener is the first descriptor after standard error.
"""

import os
import socket
from collections.abc import MutableMapping

from xaiproxy import errors

FIRST = 3  # SD_LISTEN_FDS_START
FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
# The descriptors that xai-serve has opened for its workers: the proxy's, and perhaps the admin
# listener's. The workers get them from supervision.py.
handed_down: list[int] = []


def close_handed_down() -> None:
    """May be called twice."""
    while handed_down:
        os.close(handed_down.pop())


def take(
    environ: MutableMapping[str, str], *, is_worker: bool
) -> tuple[socket.socket | None, socket.socket | None]:
    """Return the proxy's socket and the admin listener's, each None if there is none.

    A worker has the first one. Raises ConfigurationError.
    """
    pid, number = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid == str(os.getpid()) and number:
        if number != "1":
            raise errors.ConfigurationError(
                f"the service manager passes {number} sockets, and xai-proxy takes one; "
                "leave one ListenStream= in its socket unit"
            )
        os.set_inheritable(FIRST, False)
        return _listening(FIRST, "the socket that the service manager passes"), None
    if not is_worker:
        return None, None
    sock = _listening(os.dup(0), "the standard input of a worker (--slot)")
    replace_stdin()
    if not is_listening(FIRST):
        return sock, None
    os.set_inheritable(FIRST, False)
    return sock, socket.socket(fileno=FIRST)


def replace_stdin() -> None:
    """Close standard input; its number must not go to a file that is opened later."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _listening(fd: int, name: str) -> socket.socket:
    if not is_listening(fd):
        raise errors.ConfigurationError(
            f"{name} is not a listening stream socket; start workers with "
            f"{errors.typed('xai-serve --workers N')}"
        )
    return socket.socket(fileno=fd)


def is_listening(fd: int) -> bool:
    """Whether the descriptor is a listening stream socket of one of FAMILIES."""
    try:
        sock = socket.socket(fileno=os.dup(fd))
    except OSError:
        return False
    with sock:
        return bool(
            sock.family in FAMILIES
            and sock.type == socket.SOCK_STREAM
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )
