"""pywsgi, made to behave like the servers in front of xAI and to show what it was really sent.

Stock pywsgi unquotes the path, folds the headers into a mapping and holds an answer's head back until the
first byte of its body; this handler keeps the request's head as it came and sends the answer's at once.
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
FIELD_LINE = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n"
)  # RFC 9112 5, without obs-fold


class ClientGone(Exception):
    """The client closed its connection, or its half of it, before the answer was complete."""


class Cut(Exception):
    """The sandbox was told to end this connection: "close" or "reset"."""


class _Elapsed(Exception):
    """Nothing could be read from the client for as long as we looked."""


class Handler(pywsgi.WSGIHandler):
    raw_head = b""  # the header section as it came
    _numbers = itertools.count(1)
    close_delimited = (
        False  # set by the application: no framing, the end of the connection ends the body
    )
    talk: Callable[[], None] | None = (
        None  # set by it with a 101: what the connection is for from then on
    )

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connection = next(self._numbers)

    def read_requestline(self) -> str:
        with gevent.Timeout(self.server.application.knobs.idle_timeout, False):
            return super().read_requestline()
        return ""  # as if the client had closed

    def read_request(self, raw_requestline: str) -> bool:
        if not REQUEST_LINE.fullmatch(raw_requestline):
            raise ValueError("not a request line")
        return super().read_request(raw_requestline)

    def MessageClass(self, rfile: io.BufferedReader, *rest: Any) -> Any:
        lines = []
        while (line := rfile.readline(65537)) != b"\r\n":
            if not FIELD_LINE.fullmatch(line):
                raise ValueError("not a field line")
            lines.append(line)
        self.raw_head = b"".join(lines)
        lengths, codings = self.values("content-length"), self.values("transfer-encoding")
        if (lengths, codings) not in (([], []), ([], ["chunked"])):
            if codings or len(lengths) > 1 or not lengths[0].isdigit():
                raise ValueError("two servers could see the end of this body in two places")
        return super().MessageClass(io.BytesIO(self.raw_head + b"\r\n"), *rest)

    def header_list(self) -> list[list[str]]:
        """Names and values as they came, in order."""
        lines = self.raw_head.decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines if line)
        return [[name, value.strip(" \t")] for name, _colon, value in fields]

    def values(self, wanted: str) -> list[str]:
        """The values of every header of this name, given in lower case."""
        return [value for name, value in self.header_list() if name.lower() == wanted]

    def get_environ(self) -> dict[str, Any]:
        self.close_delimited, self.talk = False, None
        environ = {**super().get_environ(), "sandbox.handler": self}
        environ.pop(
            "HTTP_UPGRADE", None
        )  # with it Werkzeug would look among other routes, that know no plain GET
        return environ

    def process_result(self) -> None:
        self.write(b"")
        super().process_result()
        if self.talk and self.connection_upgraded:
            self.close_connection = True
            self.talk()

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if self.close_delimited and self.response_use_chunked:
            self.response_use_chunked = False
            self.response_headers.remove((b"Transfer-Encoding", b"chunked"))
            self.response_headers.append((b"Connection", b"close"))
            self.close_connection = True

    def handle_error(self, kind: type, error: BaseException, traceback: Any) -> None:
        if not issubclass(kind, (ClientGone, Cut)):
            return super().handle_error(kind, error, traceback)
        self.close_connection = True
        if error.args == ("reset",):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _handle_client_error(self, error: Exception) -> tuple[str, bytes]:
        if not isinstance(error, (ValueError, http.client.HTTPException)):
            return super()._handle_client_error(error)
        self.server.application.witness.count("malformed")
        return "400", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def cut(self, how: str) -> NoReturn:
        """End the connection amid the answer, or in its stead: "close" or "reset"."""
        self.wsgi_input = pywsgi.Input(
            self.rfile, 0
        )  # or the rest of the request would be awaited first
        raise Cut(how)

    def pause(self, seconds: float) -> None:
        """Wait, watching the client; raise ClientGone as soon as it is gone."""
        if seconds <= 0:  # nothing to wait for: the next send notices
            return gevent.sleep(0)
        end = time.monotonic() + seconds
        try:
            gevent_socket.wait_read(self.socket.fileno(), seconds, _Elapsed)
            if not self.socket.recv(1, socket.MSG_PEEK):
                raise ClientGone
        except _Elapsed:
            return None
        except ConnectionError as error:
            raise ClientGone from error
        # Bytes of a next request: they would be readable for ever, so this wait watches no longer.
        gevent.sleep(max(0, end - time.monotonic()))


def listen(address: str, port: int) -> socket.socket:
    """A listening socket whose connections inherit TCP_NODELAY; raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = gevent_socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener
