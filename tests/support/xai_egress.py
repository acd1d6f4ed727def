"""An HTTP proxy through which `https://api.x.ai` is another server on this machine."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from scripted_server import ScriptedServer, answer, read_request
from scripted_upstream import make_certificate

HOST = "api.x.ai"


class XaiEgress(ScriptedServer):
    """Decrypts each request to api.x.ai, and returns the response of `respond` to it.

    `environ`: variables with which a program sends its requests through this proxy and trusts its
    certificate. `seen`: the requests.
    """

    def __init__(self, folder: Path, respond: Callable[[bytes], bytes] | None = None) -> None:
        super().__init__(self._tunnel)
        authority, self._context = make_certificate(folder, HOST)
        self._respond = respond or (lambda _request: answer(200, {}))
        self.seen: list[bytes] = []
        self.environ = {"HTTPS_PROXY": self.url, "SSL_CERT_FILE": str(authority)}

    def _tunnel(self, connection: socket.socket) -> None:
        assert read_request(connection).startswith(f"CONNECT {HOST}:443 ".encode())
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        with self._context.wrap_socket(connection, server_side=True) as tls:
            try:
                while request := read_request(tls):
                    self.seen.append(request)
                    tls.sendall(self._respond(request))
            except ssl.SSLEOFError:
                # The client has closed the connection without a close_notify.
                pass
