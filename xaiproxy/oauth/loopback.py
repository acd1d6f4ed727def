"""The loopback redirect of RFC 8252 section 7.3: a listener for one answer that takes all else in its stride.

The consent page does not redirect here; its script fetches, from another origin. So a browser first sends a
preflight (CORS, and Private Network Access for a page from the internet), and others may connect too: a
browser's idle spare connection, its request for a favicon, a port scanner. One thread serves them all, and
the terminal at which the answer may be pasted instead; each connection gets one answer, within bounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import os
import re
import selectors
import socket
import termios
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from xaiproxy import addresses, errors
from xaiproxy.oauth import authorization_code

PATH = "/callback"
XAI_ORIGINS = frozenset(("https://accounts.x.ai", "https://auth.x.ai"))
HEAD_LIMIT = (
    65536  # bytes of a request; browsers send the cookies of all other programs on 127.0.0.1 along
)
READ_SIZE = 16384  # bytes
CONNECTION_LIMIT = 64  # at once; the oldest is closed for a new one
PATIENCE = 10.0  # seconds that a connection has for its request
REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
}
PASTE_MARK = re.compile(
    "\x1b\\[20[01]~"
)  # bracketed paste: some terminals put these around what is pasted
REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r?\n((?:.*\n)*?)\r?\n")
ORIGIN = re.compile(rb"^origin:[ \t]*(\S+)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


class Listener:
    """Listens on 127.0.0.1:port, or on any free port when that one is taken."""

    def __init__(self, port: int, issuer: str, patience: float = PATIENCE):
        try:
            self._socket = socket.create_server(("127.0.0.1", port))
        except OSError:
            self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.redirect_uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}{PATH}"
        parts = urllib.parse.urlsplit(issuer)
        own = (
            {f"{parts.scheme}://{parts.netloc.lower()}"}
            if addresses.is_loopback(parts.hostname)
            else set()
        )
        self._origins = XAI_ORIGINS | own
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._connections: dict[socket.socket, _Connection] = {}  # oldest first
        self._patience = patience
        self._typed = b""
        self._incomplete = ""  # the beginning of a pasted URL
        self._paste_from: int | None = None

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._paste_from is not None:  # the rest of a paste is not for the shell
            with contextlib.suppress(OSError, termios.error):
                if (
                    os.tcgetpgrp(self._paste_from) == os.getpgrp()
                ):  # or SIGTTOU would stop this process
                    termios.tcflush(self._paste_from, termios.TCIFLUSH)
        for connection in list(self._connections):
            self._drop(connection)
        self._selector.close()
        self._socket.close()

    def wait(
        self,
        state: str,
        *,
        seconds: float,
        paste_from: int | None = None,
        say: Callable[[str], Any] = lambda text: None,
    ) -> str:
        """The code, from the page or from a line on the file descriptor `paste_from`.

        Raises AccessDenied or another OAuthError when that is the answer, ExpiredToken after `seconds`. `say`
        gets a sentence about everything that looked like the answer and was not. May be called again.
        """
        end = time.monotonic() + seconds
        if paste_from is not None and self._paste_from is None:
            self._selector.register(paste_from, selectors.EVENT_READ)
            self._paste_from = paste_from
        while (now := time.monotonic()) < end:
            for key, _ in self._selector.select(min(end, self._close_overdue(now)) - now):
                code = None
                if key.fileobj is self._socket:
                    self._accept()
                elif key.fileobj == paste_from:
                    code = self._pasted(paste_from, state, say)
                elif key.fileobj in self._connections:  # it may just have made room for another
                    code = self._serve(key.fileobj, state, say)
                if code:
                    return code
        raise errors.ExpiredToken(
            "expired_token", "", "nobody approved the login in time; start again"
        )

    def _close_overdue(self, now: float) -> float:
        """Returns when the next connection is due, on the monotonic clock."""
        for connection in list(self._connections.values()):
            if connection.end > now:
                return connection.end
            self._drop(connection.socket)
        return math.inf

    def _pasted(self, paste_from: int, state: str, say: Callable[[str], Any]) -> str | None:
        try:
            received = os.read(paste_from, 4096)
        except OSError:  # EIO: the terminal is gone
            received = b""
        if not received:  # Ctrl-D: nothing more will come
            self._selector.unregister(paste_from)
        *lines, self._typed = (self._typed + received).split(b"\n")
        for line in lines:
            if code := self._code_in_line(
                PASTE_MARK.sub("", line.decode("utf-8", "replace")).strip(), state, say
            ):
                return code
        return None

    def _code_in_line(self, line: str, state: str, say: Callable[[str], Any]) -> str | None:
        """The code, if it is in this line or in a URL that begins on former lines and ends here."""
        begun = self._incomplete if line and "://" not in line else ""
        self._incomplete = ""
        try:
            return authorization_code.code_from_paste(begun + line, state)
        except authorization_code.Incomplete as error:
            self._incomplete = begun + line
            say(
                f"That is not the whole address: {error}. Paste the rest of it; an empty line begins again."
            )
        except authorization_code.NotTheAnswer as error:
            say(
                f"That does not help: {error}. Paste the whole address, or the code that the page shows."
            )
        return None

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone again, or no file descriptor left
            connection, _ = self._socket.accept()
            connection.setblocking(False)
            if len(self._connections) >= CONNECTION_LIMIT:
                self._drop(next(iter(self._connections)))
            self._connections[connection] = _Connection(
                connection, time.monotonic() + self._patience
            )
            self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._connections[connection]
        connection.close()

    def _serve(
        self, connection: socket.socket, state: str, say: Callable[[str], Any]
    ) -> str | None:
        """Read on, and answer a request that is whole. Returns the code if that was in it."""
        about = self._connections[connection]
        try:
            received = connection.recv(READ_SIZE)
        except OSError:
            received = b""
        if not received:
            self._drop(connection)
        elif (
            about.refused
        ):  # to be read, or closing the connection would reset it before the answer is read
            pass
        elif about.add(received):
            try:
                if request := REQUEST.match(about.head):
                    return self._answer(connection, request, state, say)
            finally:
                self._drop(connection)
        elif len(about.head) >= HEAD_LIMIT:
            about.refused = True
            _send(
                connection,
                431,
                f"The request has more than {HEAD_LIMIT} bytes, most probably cookies. Copy this page's "
                "address and paste it into the terminal.",
            )
            say(
                f"{self.redirect_uri} was called with more than {HEAD_LIMIT} bytes, most probably cookies, which were not "
                "read. Paste the address of the page that your browser shows now, or the code on it."
            )
        return None

    def _answer(
        self,
        connection: socket.socket,
        request: re.Match[bytes],
        state: str,
        say: Callable[[str], Any],
    ) -> str | None:
        method, target, fields = request.groups()
        path, _, query = target.decode("latin-1").partition("?")
        origin = next((found[1].decode("latin-1") for found in ORIGIN.finditer(fields)), None)
        origin = origin if origin in self._origins else None
        if path != PATH:
            _send(connection, 404, "Nothing is here.")
        elif method == b"OPTIONS":
            _send(connection, 204 if origin else 403, "This origin may not call here.", origin)
        elif method != b"GET":
            _send(connection, 405, "Only GET is answered here.", origin)
        else:
            try:
                code = authorization_code.code_from_query(query, state)
            except authorization_code.NotTheAnswer as error:
                _send(connection, 400, f"This does not help to sign in: {error}.", origin)
                say(
                    f"{self.redirect_uri} was called, but that does not help: {error}. Still waiting."
                )
            except errors.OAuthError:
                _send(connection, 200, "The login was denied. You can close this window.", origin)
                raise
            else:
                _send(
                    connection,
                    200,
                    "The approval has arrived. You can close this window and go back to "
                    "the terminal.",
                    origin,
                )
                return code
        return None


@dataclasses.dataclass
class _Connection:
    socket: socket.socket
    end: float
    head: bytearray = dataclasses.field(default_factory=bytearray)
    refused: bool = False

    def add(self, received: bytes) -> bool:
        """Returns whether the head is whole."""
        begin = max(0, len(self.head) - 2)
        self.head += received
        return self.head.find(b"\n\r\n", begin) >= 0 or self.head.find(b"\n\n", begin) >= 0


def _send(connection: socket.socket, status: int, text: str, origin: str | None = None) -> None:
    body = (
        ""
        if status == 204
        else (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>xaiproxy</title>'
            '<body style="font-family: sans-serif; margin: 4em"><h1>xaiproxy</h1>'
            f"<p>{html.escape(text)}</p></body></html>\n"
        )
    )
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        "Connection: close",
        "Cache-Control: no-store",
        "Vary: Origin",
        "Referrer-Policy: no-referrer",
    ]
    if body:
        lines += ["Content-Type: text/html; charset=utf-8", f"Content-Length: {len(body.encode())}"]
    if origin:
        lines += [
            f"Access-Control-Allow-Origin: {origin}",
            "Access-Control-Allow-Methods: GET, OPTIONS",
            "Access-Control-Allow-Headers: Content-Type",
            "Access-Control-Allow-Private-Network: true",
        ]
    with contextlib.suppress(OSError):  # whoever asked has gone; what was asked counts all the same
        connection.send("\r\n".join([*lines, "", body]).encode())  # fits any socket's buffer
        connection.shutdown(socket.SHUT_WR)
