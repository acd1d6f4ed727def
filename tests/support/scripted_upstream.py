"""An upstream that a test scripts step by step, down to the byte.

It needs no thread: the kernel takes connections and bytes by itself, and the proxy is another
process. A test therefore reads as a sequence of events, in which nothing happens in between.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import time
from pathlib import Path

from raw_connection import TIMEOUT, Message, RawConnection, readable

PATTERN = bytes(range(256)) * 256
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Request(Message):
    """What came, and the connection it came on."""

    def __init__(self, message: Message, connection: Connection):
        super().__init__(message.head, message.body, message.chunks)
        self.connection = connection

    def answer(self, data: bytes = OK) -> Request:
        self.connection.send(data)
        return self


class Connection(RawConnection):
    requests = 0  # that came on it


class ScriptedUpstream:
    def __init__(
        self, context: ssl.SSLContext | None = None, address: str = "127.0.0.1", port: int = 0
    ):
        self._context = context
        self.listener = socket.create_server((address, port), backlog=2048)
        self.listener.settimeout(TIMEOUT)
        self.port: int = self.listener.getsockname()[1]
        self.authority = f"{address}:{self.port}"
        self.origin = f"{'https' if context else 'http'}://{self.authority}"
        self.connections: list[Connection] = []

    def __enter__(self) -> ScriptedUpstream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice."""
        if self.listener.fileno() >= 0:
            self.hang_up()
            self.listener.close()

    def hang_up(self) -> None:
        """Close all connections, accepted or not, so that the pool of the proxy is empty."""
        while readable([self.listener]):
            self.listener.accept()[0].close()
        while self.connections:
            self.connections.pop().close()

    def accept(self) -> Connection:
        sock, _ = self.listener.accept()
        if self._context is not None:
            sock.settimeout(TIMEOUT)
            sock = self._context.wrap_socket(sock, server_side=True)
        connection = Connection(sock)
        self.connections.append(connection)
        return connection

    def receive(self, *, body: bool = True, seconds: float = TIMEOUT) -> Request:
        """Return the next request, on whatever connection.

        `body`: whether its body is read as well, or left to the test.
        """
        deadline = time.monotonic() + seconds
        while True:
            connection = self._next(deadline)
            if connection is not None:
                connection.requests += 1
                return Request(connection.message() if body else connection.head(), connection)

    def _next(self, deadline: float) -> Connection | None:
        for connection in self.connections:
            if connection.buffer:
                return connection
        ready = self._readable(max(0, deadline - time.monotonic()))
        assert ready, "no request came"
        if self.listener in ready:
            return self.accept()
        connection = next(one for one in self.connections if one.sock is ready[0])
        if _has_bytes(connection.sock):
            return connection
        self.connections.remove(connection)
        connection.close()
        return None

    def _readable(self, seconds: float) -> list[socket.socket]:
        self.connections = [
            connection for connection in self.connections if connection.sock.fileno() >= 0
        ]
        return readable(
            [self.listener, *(connection.sock for connection in self.connections)], seconds
        )

    def quiet(self) -> bool:
        """Whether no further connection has come, and no byte on those that there are."""
        return not any(sock is self.listener or _has_bytes(sock) for sock in self._readable(0))


def pour(raw: RawConnection, at: int, size: int, timeout: float = 0.3) -> int:
    """Send PATTERN over and over, from byte `at` to `size`. Return the position it reached.

    It stops early when the peer has taken nothing for `timeout` seconds.
    """
    raw.sock.settimeout(timeout)
    with contextlib.suppress(TimeoutError):
        while at < size:
            # After a timeout, TLS requires the same bytes again.
            at += raw.sock.send(PATTERN[at % len(PATTERN) :][: size - at])
    raw.sock.settimeout(TIMEOUT)
    return at


def _has_bytes(sock: socket.socket) -> bool:
    """Whether a readable socket holds bytes and not just its end."""
    try:
        return bool(socket.socket.recv(sock, 1, socket.MSG_PEEK))  # TLS records are bytes enough
    except ConnectionResetError:
        return False


def make_certificate(folder: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """Make a CA, and a server's context with its certificate for `names` or IP addresses."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *key,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-days",
        "2",
        "-subj",
        "/CN=test CA",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
        "-addext",
        "keyUsage=critical,keyCertSign",
    )
    alternatives = ",".join(("IP:" if name[0].isdigit() else "DNS:") + name for name in names)
    (folder / "extensions").write_text(
        f"subjectAltName={alternatives}\nauthorityKeyIdentifier=keyid\n"
    )
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=upstream")
    openssl(
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-out",
        "server.pem",
        "-days",
        "2",
        "-extfile",
        "extensions",
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return folder / "ca.pem", context
