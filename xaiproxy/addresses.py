"""Hosts: the addresses of a name, and a connection to the first one that answers (RFC 8305).

Also the address of a Unix socket. Plain Python, for both processes. Under gevent, the sockets and
select.poll are its own.
"""

import errno
import ipaddress
import itertools
import math
import os
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ATTEMPT_DELAY = 0.25  # seconds from one attempt to the next, as RFC 8305 section 8 recommends

Address = tuple[int, int, int, str, Any]  # as getaddrinfo returns it


class UnixSocket(NamedTuple):
    """`group`: the name of the group that may connect too, or None."""

    path: Path
    group: str | None = None

    def __str__(self) -> str:
        return f"unix:{self.path}"


def look_up(
    host: str, port: int, getaddrinfo: Callable[..., Any] = socket.getaddrinfo
) -> list[Address]:
    """Return the addresses in getaddrinfo's order, with families alternating (RFC 8305 section 4).

    Raises socket.gaierror.
    """
    families: dict[int, list[Address]] = {}
    # Bytes, because text is encoded by IDNA, which raises errors of its own.
    for address in dict.fromkeys(getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)):
        families.setdefault(address[0], []).append(address)
    turns = itertools.zip_longest(*families.values())
    return [address for turn in turns for address in turn if address]


def connect(
    addresses: Iterable[Address],
    timeout: float | None = None,
    options: Iterable[tuple[int, int, int]] = (),
    failed: Callable[[Address], object] = lambda address: None,
) -> tuple[socket.socket, Address]:
    """Connect to the first address that answers (RFC 8305 section 5); return the socket and it.

    An attempt starts ATTEMPT_DELAY after the one before it, or as soon as that one has failed.
    Raises the last attempt's OSError, or TimeoutError.

    `timeout`: seconds for all attempts together, and the timeout of the socket
    `options`: arguments of setsockopt
    `failed`: called with each address whose attempt failed or timed out
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    waiting = deque(addresses)
    attempts: dict[int, tuple[socket.socket, Address]] = {}
    poll = select.poll()
    due = 0.0
    last = OSError("its name has no address")
    try:
        while waiting or attempts:
            now = time.monotonic()
            if now >= deadline:
                for _, address in attempts.values():
                    failed(address)
                raise TimeoutError("timed out")
            if waiting and (now >= due or not attempts):
                address = waiting.popleft()
                # A single attempt needs no poll, which costs far more under gevent.
                wait = 0 if attempts else min(ATTEMPT_DELAY, deadline - now)
                try:
                    sock, connected = _attempt(address, options, wait)
                except OSError as error:
                    last = error
                    failed(address)
                    continue
                if connected:
                    sock.settimeout(timeout)
                    return sock, address
                attempts[sock.fileno()] = sock, address
                poll.register(sock, select.POLLOUT)
                due = now + ATTEMPT_DELAY
                continue
            until = min(due, deadline) if waiting else deadline
            milliseconds = None if until == math.inf else math.ceil((until - now) * 1000)
            for number, _ in poll.poll(milliseconds):
                poll.unregister(number)
                sock, address = attempts.pop(number)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    sock.settimeout(timeout)
                    return sock, address
                sock.close()
                failed(address)
                last = OSError(code, os.strerror(code))
                due = now
        raise last
    finally:
        for sock, _ in attempts.values():
            sock.close()


def _attempt(
    address: Address, options: Iterable[tuple[int, int, int]], wait: float
) -> tuple[socket.socket, bool]:
    """A socket, and whether it has connected within `wait` seconds; if not, it still connects.

    Raises OSError.
    """
    family, kind, protocol, _, target = address
    sock = socket.socket(family, kind, protocol)
    try:
        for option in options:
            sock.setsockopt(*option)
        sock.settimeout(wait)
        code = sock.connect_ex(target)
        # EAGAIN: `wait` is over.
        if code not in (0, errno.EINPROGRESS, errno.EAGAIN):
            raise OSError(code, os.strerror(code))
        sock.setblocking(False)
        return sock, code == 0
    except BaseException:
        sock.close()
        raise


def is_loopback(host: str | None) -> bool:
    """Whether `host` (a name or an IP literal without brackets) can only be this machine."""
    if host is None:
        return False
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_authority(netloc: str) -> bool:
    """Whether it is a host and at most a port, which every URL parser reads alike."""
    return re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", netloc) is not None
