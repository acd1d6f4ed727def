"""The loopback redirect of RFC 8252 section 7.3: a listener for one authorization response.

The consent page does not redirect here: its script calls fetch() from another origin, so the
browser sends a preflight first (CORS, and Private Network Access for a page from the internet).
Other connections may arrive as well: a browser's idle spare connection, its request for a favicon,
a port scanner. One thread serves them all, and the terminal into which the user may paste the
response instead. Each connection gets one answer; number, size and time of connections are limited.
"""

from __future__ import annotations

import contextlib
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

from xaiproxy import config, errors
from xaiproxy.oauth import authorization_code
from xaiproxy.oauth.callback_request import HEAD_LIMIT, ORIGIN, REQUEST, CallbackRequest, respond

PATH = "/callback"
XAI_ORIGINS = frozenset(("https://accounts.x.ai", "https://auth.x.ai"))
READ_SIZE = 16384  # bytes
CONNECTION_LIMIT = 64  # at once; beyond it, a new connection closes the oldest
REQUEST_TIMEOUT = 10.0  # seconds for a connection to send its request
# Bracketed paste: some terminals put these around pasted text.
PASTE_MARK = re.compile("\x1b\\[20[01]~")


class Listener:
    """Listens on 127.0.0.1:port, or on any free port if that one is in use."""

    def __init__(self, port: int, issuer: str, request_timeout: float = REQUEST_TIMEOUT):
        try:
            self._socket = socket.create_server(("127.0.0.1", port))
        except OSError:
            self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.redirect_uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}{PATH}"
        parts = urllib.parse.urlsplit(issuer)
        self.origins = frozenset((f"{parts.scheme}://{parts.netloc.lower()}",))
        if issuer == config.DEFAULT_ISSUER:
            self.origins = XAI_ORIGINS
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._connections: dict[Any, CallbackRequest] = {}  # by socket, oldest first
        self._request_timeout = request_timeout
        self._typed = b""
        self._incomplete = ""  # the beginning of a pasted URL
        self._paste_from: int | None = None

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        # Discard the rest of a paste, or the shell would run it.
        if self._paste_from is not None:
            with contextlib.suppress(OSError, termios.error):
                # In the background, SIGTTOU would stop this process.
                if os.tcgetpgrp(self._paste_from) == os.getpgrp():
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
        report: Callable[[str], Any] = lambda text: None,
    ) -> str:
        """Return the code, from the page or from a line on the file descriptor `paste_from`.

        Raises AccessDenied or another OAuthError for an error response, ExpiredToken after
        `seconds`. `report` is called with a sentence about each invalid response. May be called
        again.
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
                    code = self._pasted(paste_from, state, report)
                # It may just have been closed for a new connection.
                elif key.fileobj in self._connections:
                    connection: Any = key.fileobj
                    code = self._serve(connection, state, report)
                if code:
                    return code
        raise errors.ExpiredToken(
            "expired_token", "", "the login was not approved in time; start again"
        )

    def _close_overdue(self, now: float) -> float:
        """Close them; return when the next connection is due, on the monotonic clock."""
        for connection in list(self._connections.values()):
            if connection.end > now:
                return connection.end
            self._drop(connection.socket)
        return math.inf

    def _pasted(self, paste_from: int, state: str, report: Callable[[str], Any]) -> str | None:
        try:
            received = os.read(paste_from, 4096)
        # EIO: the terminal is gone.
        except OSError:
            received = b""
        # End of input, such as Ctrl-D.
        if not received:
            self._selector.unregister(paste_from)
        *lines, self._typed = (self._typed + received).split(b"\n")
        for line in lines:
            text = PASTE_MARK.sub("", line.decode("utf-8", "replace")).strip()
            if code := self._code_in_line(text, state, report):
                return code
        return None

    def _code_in_line(self, line: str, state: str, report: Callable[[str], Any]) -> str | None:
        """The code, if it is in this line or in a URL that ends here and began in earlier lines."""
        begun = self._incomplete if line and "://" not in line else ""
        self._incomplete = ""
        try:
            return authorization_code.code_from_paste(begun + line, state)
        except authorization_code.Incomplete as error:
            self._incomplete = begun + line
            report(
                f"The address is incomplete: {error}. Paste the rest of it; "
                "an empty line discards it."
            )
        except authorization_code.InvalidResponse as error:
            report(
                f"That is not the response: {error}. Paste the whole address, or the code that "
                "the page shows."
            )
        return None

    def _accept(self) -> None:
        # The client may be gone again, or no file descriptor be left.
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            connection.setblocking(False)
            if len(self._connections) >= CONNECTION_LIMIT:
                self._drop(next(iter(self._connections)))
            end = time.monotonic() + self._request_timeout
            self._connections[connection] = CallbackRequest(connection, end)
            self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._connections[connection]
        connection.close()

    def _serve(
        self, connection: socket.socket, state: str, report: Callable[[str], Any]
    ) -> str | None:
        """Read more of the request, and answer it when complete. Returns the code, if it has it."""
        request = self._connections[connection]
        try:
            received = connection.recv(READ_SIZE)
        except OSError:
            received = b""
        if not received:
            self._drop(connection)
        elif request.refused:
            # Read on: closing the connection with unread bytes would reset it, and the browser
            # would lose the answer.
            pass
        elif request.add(received):
            try:
                if parsed := REQUEST.match(request.head):
                    return self._answer(connection, parsed, state, report)
            finally:
                self._drop(connection)
        elif len(request.head) >= HEAD_LIMIT:
            request.refused = True
            respond(
                connection,
                431,
                f"The request is longer than {HEAD_LIMIT} bytes, most probably because of "
                "cookies. Copy this page's address and paste it into the terminal.",
            )
            report(
                f"A request to {self.redirect_uri} was longer than {HEAD_LIMIT} bytes, most "
                "probably because of cookies, and was not read. Paste the address of the page "
                "that your browser shows now, or the code on it."
            )
        return None

    def _answer(
        self,
        connection: socket.socket,
        request: re.Match[bytes],
        state: str,
        report: Callable[[str], Any],
    ) -> str | None:
        method, target, fields = request.groups()
        path, _, query = target.decode("latin-1").partition("?")
        origin = next((found[1].decode("latin-1") for found in ORIGIN.finditer(fields)), None)
        origin = origin if origin in self.origins else None
        if path != PATH:
            respond(connection, 404, "Not found.")
        elif method == b"OPTIONS":
            respond(connection, 204 if origin else 403, "This origin is not allowed.", origin)
        elif method != b"GET":
            respond(connection, 405, "Only GET is allowed.", origin)
        else:
            try:
                code = authorization_code.code_from_query(query, state)
            except authorization_code.InvalidResponse as error:
                respond(connection, 400, f"This is not the response to sign in: {error}.", origin)
                report(
                    f"A request to {self.redirect_uri} was not the response: {error}. "
                    "Still waiting."
                )
            except errors.OAuthError:
                respond(connection, 200, "The login was denied. You can close this window.", origin)
                raise
            else:
                text = "Approved. You can close this window and go back to the terminal."
                respond(connection, 200, text, origin)
                return code
        return None
