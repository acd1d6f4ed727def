"""A server that sends scripted responses, byte by byte, and records the requests."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable
from typing import Any


def answer(
    status: int, body: Any = "", content_type: str = "application/json", **headers: str
) -> bytes:
    """Return an HTTP response. A dict or list becomes JSON; Retry_After=... is a header."""
    content = (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = [
        f"HTTP/1.1 {status} Whatever",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(content)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


class ScriptedServer:
    """Each connection gets the next one of `answers`; the last one is repeated.

    An answer is bytes, which are sent after a complete request, or a function of the socket, which
    is called at once. `tls`: an SSLContext, or None.
    """

    def __init__(
        self,
        *answers: bytes | Callable[[socket.socket], None],
        tls: Any = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self._tls = tls
        self._listener = socket.create_server((address, 0))
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{'localhost' if tls else address}:{self.port}"
        self._acceptor = threading.Thread(target=self._accept)

    def __enter__(self) -> ScriptedServer:
        self._acceptor.start()
        return self

    def __exit__(self, *_error: object) -> None:
        # This wakes accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for connection in self._connections:
            # This wakes the threads that are still reading or writing.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            script = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            self._threads.append(threading.Thread(target=self._serve, args=(connection, script)))
            self._threads[-1].start()

    def _serve(
        self, connection: socket.socket, script: bytes | Callable[[socket.socket], None]
    ) -> None:
        try:
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
                self._connections.append(connection)
            if callable(script):
                script(connection)
            else:
                self.requests.append(read_request(connection))
                connection.sendall(script)
        except OSError:
            # The client or the end of the test has closed it.
            pass
        connection.close()


def read_request(connection: socket.socket) -> bytes:
    """Read one complete request, whose body ends after its Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received and (more := connection.recv(65536)):
        received += more
    head, _, body = received.partition(b"\r\n\r\n")
    found = re.search(rb"(?im)^content-length: *([0-9]+)", head)
    length = int(found[1]) if found else 0
    while len(body) < length and (more := connection.recv(65536)):
        received += more
        body += more
    return received
