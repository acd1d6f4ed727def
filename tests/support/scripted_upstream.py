"""An upstream that a test scripts step by step, down to the byte.

It needs no thread: the kernel accepts connections and bytes by itself, and the proxy is another
process. A test is therefore a plain sequence of events.
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
    """A received request and its connection."""

    def __init__(self, message: Message, connection: Connection):
        super().__init__(message.head, message.body, message.chunks)
        self.connection = connection

    def answer(self, data: bytes = OK) -> Request:
        self.connection.send(data)
        return self


class Connection(RawConnection):
    # The number of requests on this connection.
    requests = 0


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
        """Close all connections, accepted or not, which empties the pool of the proxy."""
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
        """Return the next request on any connection.

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
        assert ready, "no request arrived"
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
        """Whether no new connection has arrived, and no byte on the existing ones."""
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
    """Whether a readable socket holds bytes, and not only EOF."""
    try:
        # TLS records count as bytes.
        return bool(socket.socket.recv(sock, 1, socket.MSG_PEEK))
    except ConnectionResetError:
        return False


def make_certificate(folder: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """Create a CA, and a server context with a certificate for `names` (or IP addresses)."""

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
