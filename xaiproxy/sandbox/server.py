"""pywsgi, changed to behave like the servers in front of xAI and to record requests exactly.

Stock pywsgi unquotes the path, folds the headers into a mapping, and sends the head of a response
only with the first byte of its body. This handler keeps the request's head unchanged and sends the
head of a response at once.
"""

from __future__ import annotations

import http.client
import io
import itertools
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, NoReturn

import gevent
from gevent import pywsgi
from gevent import socket as gevent_socket

REQUEST_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [^ \t\r\n]+ HTTP/1\.[01]\r\n")
# RFC 9112 5, without obs-fold.
FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n")


class ClientGone(Exception):
    """The client closed its connection, or its half of it, before the response was complete."""


class Cut(Exception):
    """A knob ends this connection: "close" or "reset"."""


class _Elapsed(Exception):
    """The client sent nothing before the end of a pause."""


class Handler(pywsgi.WSGIHandler):  # type: ignore[misc]  # gevent has no types
    raw_head = b""  # the header section, unchanged
    _numbers = itertools.count(1)
    response_use_chunked: bool
    # The application sets it for a body without framing, which the end of the connection ends.
    close_delimited = False
    # The application sets it with a 101: called with the connection from then on.
    run_upgraded: Callable[[], None] | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connection = next(self._numbers)

    def read_requestline(self) -> str:
        with gevent.Timeout(self.server.application.knobs.idle_timeout, False):
            line: str = super().read_requestline()
            return line
        # As if the client had closed.
        return ""

    def read_request(self, raw_requestline: str) -> bool:
        if not REQUEST_LINE.fullmatch(raw_requestline):
            raise ValueError("not a request line")
        return bool(super().read_request(raw_requestline))

    def MessageClass(self, rfile: io.BufferedReader, *rest: Any) -> Any:
        lines = []
        while (line := rfile.readline(65537)) != b"\r\n":
            if not FIELD_LINE.fullmatch(line):
                raise ValueError("not a field line")
            lines.append(line)
        self.raw_head = b"".join(lines)
        lengths, codings = self.values("content-length"), self.values("transfer-encoding")
        unframed_or_chunked = (lengths, codings) in (([], []), ([], ["chunked"]))
        has_length = not codings and len(lengths) == 1 and lengths[0].isdigit()
        if not (unframed_or_chunked or has_length):
            raise ValueError("two servers could disagree about the end of this body")
        return super().MessageClass(io.BytesIO(self.raw_head + b"\r\n"), *rest)

    def header_list(self) -> list[list[str]]:
        """Names and values unchanged, in order."""
        lines = self.raw_head.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines if line)
        return [[name, value.strip(" \t")] for name, _colon, value in fields]

    def values(self, wanted: str) -> list[str]:
        """The values of all headers of this name. `wanted`: name in lower case."""
        return [value for name, value in self.header_list() if name.lower() == wanted]

    def get_environ(self) -> dict[str, Any]:
        self.close_delimited, self.run_upgraded = False, None
        environ = {**super().get_environ(), "sandbox.handler": self}
        # With it Werkzeug would match only its WebSocket routes.
        environ.pop("HTTP_UPGRADE", None)
        return environ

    def process_result(self) -> None:
        self.write(b"")
        super().process_result()
        if self.run_upgraded and self.connection_upgraded:
            self.close_connection = True
            self.run_upgraded()

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if self.close_delimited and self.response_use_chunked:
            self.response_use_chunked = False
            self.response_headers.remove((b"Transfer-Encoding", b"chunked"))
            self.response_headers.append((b"Connection", b"close"))
            self.close_connection = True

    def handle_error(self, kind: type, error: BaseException, traceback: Any) -> None:
        if not issubclass(kind, (ClientGone, Cut)):
            super().handle_error(kind, error, traceback)
            return
        self.close_connection = True
        if error.args == ("reset",):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _handle_client_error(self, error: Exception) -> tuple[str, bytes]:
        if not isinstance(error, (ValueError, http.client.HTTPException)):
            status, body = super()._handle_client_error(error)
            return status, body
        self.server.application.witness.count("malformed")
        return "400", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def cut(self, how: str) -> NoReturn:
        """End the connection within the response or before it. `how`: "close" or "reset"."""
        # Otherwise pywsgi would wait for the rest of the request first.
        self.wsgi_input = pywsgi.Input(self.rfile, 0)
        raise Cut(how)

    def pause(self, seconds: float) -> None:
        """Wait; raise ClientGone as soon as the client is gone."""
        # Without a pause the next send raises.
        if seconds <= 0:
            gevent.sleep(0)
            return
        end = time.monotonic() + seconds
        try:
            gevent_socket.wait_read(self.socket.fileno(), seconds, _Elapsed)
            if not self.socket.recv(1, socket.MSG_PEEK):
                raise ClientGone
        except _Elapsed:
            return
        except ConnectionError as error:
            raise ClientGone from error
        # The client has sent its next request. Its bytes stay readable, so sleep without watching.
        gevent.sleep(max(0, end - time.monotonic()))


def listen(address: str, port: int) -> socket.socket:
    """A listening socket whose connections inherit TCP_NODELAY; raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener: socket.socket = gevent_socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener
