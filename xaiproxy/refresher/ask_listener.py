"""XAI_PROXY_ASK_BIND: the refresher's listener for proxies on other machines, and for probes.

It runs in a thread, because a refresh may take 30 s, and serves one connection at a time, each with
one request and a deadline. Nothing here can hold up a refresh. pages.py has the responses.
"""

import contextlib
import errno
import logging
import queue
import re
import socket
import threading
import time

from xaiproxy import config, errors
from xaiproxy.refresher.pages import Pages

logger = logging.getLogger(__name__)

DEADLINE = 2.0  # seconds for one connection
# Connections that wait in the kernel: many proxies report the same refusal at once.
BACKLOG = 1024
SIZE_LIMIT = 8192  # bytes of a request
POLL_INTERVAL = 0.5  # seconds, after which the thread notices that it is to end
RETRY_INTERVAL = 1.0  # seconds between two attempts to listen, and after an error of accept(2)
TEMPORARY = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
REQUEST = re.compile(rb"([A-Z]+) (/\S*) HTTP/1\.[01]\r\n((?:.*\r\n)*?)\r\n")
LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,9})[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
ACCEPT = re.compile(rb"^accept:(.*)\r$", re.IGNORECASE | re.MULTILINE)


class AskListener:
    """Raises ConfigurationError if the address can never be used.

    One that is in use is retried until it is free: the login is renewed all the same.
    """

    def __init__(self, settings: config.Config, address: tuple[str, int]):
        self._address = address
        self._messages: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._pages = Pages(settings, self._log)
        self._ending = threading.Event()
        self._socket: socket.socket | None = None
        try:
            self._socket = _listening(address)
        except OSError as error:
            place = f"{address[0]} port {address[1]}"
            if error.errno not in TEMPORARY:
                raise errors.ConfigurationError(
                    f"cannot listen on {place}: {error.strerror}; set XAI_PROXY_ASK_BIND to what "
                    "this machine allows"
                ) from error
            self._log(
                logging.WARNING,
                f"cannot listen on {place} (XAI_PROXY_ASK_BIND) yet: {error.strerror}; retrying",
            )
        self._thread = threading.Thread(target=self._run, name="ask listener", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Log what the thread reports: only the refresher's loop writes log lines."""
        while not self._messages.empty():
            logger.log(*self._messages.get())

    def close(self) -> None:
        self._ending.set()
        # On Linux this ends the wait for a connection at once.
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.poll()

    def _log(self, level: int, message: str) -> None:
        self._messages.put((level, message))

    # In the thread

    def _run(self) -> None:
        while self._socket is None and not self._ending.wait(RETRY_INTERVAL):
            with contextlib.suppress(OSError):
                self._socket = _listening(self._address)
        if self._socket is not None:
            with self._socket as listener:
                self._log(logging.INFO, f"proxies can ask at {_origin(listener)}")
                self._serve(listener)

    def _serve(self, listener: socket.socket) -> None:
        while not self._ending.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                # No free descriptor, or a connection that was reset before it was accepted.
                self._ending.wait(RETRY_INTERVAL)
                continue
            # The client may be gone, or too slow.
            with connection, contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        end = time.monotonic() + DEADLINE
        try:
            method, path, accept, body = _request(connection, end)
            status, fields, content = self._pages.answer(method, path, accept, body)
        except errors.ErrorResponse as refusal:
            status, fields, content = refusal.rendered()
        head = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields)]
        if not any(name == "Content-Length" for name, _ in fields):
            head.append(f"Content-Length: {len(content)}")
        head.append("Connection: close")
        connection.settimeout(_left(end))
        connection.sendall("\r\n".join([*head, "", ""]).encode() + content)


def _listening(address: tuple[str, int]) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):
            # The kernel keeps a connection until its request arrives: idle ones delay nothing.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(DEADLINE))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.settimeout(POLL_INTERVAL)
    return listener


def _origin(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _request(connection: socket.socket, end: float) -> tuple[str, str, str, bytes]:
    """Return method, path, Accept header and body. Raises BadRequest, OSError."""
    data = b""
    while b"\r\n\r\n" not in data and len(data) < SIZE_LIMIT:
        data += _received(connection, end)
    request = REQUEST.match(data)
    if request is None:
        raise errors.BadRequest("the request is malformed, or its head is too long")
    method, target, fields = request.groups()
    length = LENGTH.search(fields)
    size = int(length[1]) if length else 0
    if size > SIZE_LIMIT:
        raise errors.BadRequest("the request body is too long")
    data = data[request.end() :]
    while len(data) < size:
        data += _received(connection, end)
    accept = ACCEPT.search(fields)
    path = target.partition(b"?")[0].decode("ascii", "replace")
    return method.decode(), path, accept[1].decode("latin-1").strip() if accept else "", data[:size]


def _received(connection: socket.socket, end: float) -> bytes:
    """Return what arrives next. Raises OSError, also at the end of the connection."""
    connection.settimeout(_left(end))
    if not (data := connection.recv(SIZE_LIMIT)):
        raise ConnectionResetError
    return data


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
