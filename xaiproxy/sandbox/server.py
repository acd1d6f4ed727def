"""pywsgi, made to behave like the servers in front of xAI and to show what it was really sent.

Stock pywsgi unquotes the path, folds the headers into a mapping and holds an answer's head back until the
first byte of its body; this handler keeps the request's head as it came and sends the answer's at once.
"""
from __future__ import annotations

import io
import itertools
import socket
import struct
import time
from typing import Any

import gevent
from gevent import pywsgi
from gevent import socket as gevent_socket


class ClientGone(Exception):
    """The client closed its connection, or its half of it, before the answer was complete."""


class Cut(Exception):
    """The sandbox was told to end this connection: "close" or "reset"."""


class _Elapsed(Exception):
    """Nothing could be read from the client for as long as we looked."""


class Handler(pywsgi.WSGIHandler):
    raw_head = b""  # the header section as it came, with its final empty line
    _numbers = itertools.count(1)
    close_delimited = False  # set by the application: no framing, the end of the connection ends the body

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connection = next(self._numbers)

    def MessageClass(self, rfile: io.BufferedReader, *rest: Any) -> Any:
        lines = []
        while not lines or lines[-1] not in (b"\r\n", b"\n", b""):
            lines.append(rfile.readline(65537))
        self.raw_head = b"".join(lines)
        return super().MessageClass(io.BytesIO(self.raw_head), *rest)

    def header_list(self) -> list[list[str]]:
        """Names and values as they came, in order."""
        lines = self.raw_head.decode("latin-1").split("\r\n")
        return [[name, value.strip(" \t")] for name, _, value in (line.partition(":") for line in lines if line)]

    def get_environ(self) -> dict[str, Any]:
        self.close_delimited = False
        return {**super().get_environ(), "sandbox.handler": self}

    def process_result(self) -> None:
        self.write(b"")
        super().process_result()

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

    def pause(self, seconds: float) -> None:
        """Wait, watching the client; raise ClientGone as soon as it is gone."""
        end = time.monotonic() + seconds
        try:
            gevent_socket.wait_read(self.socket.fileno(), seconds, _Elapsed)
            if not self.socket.recv(1, socket.MSG_PEEK):
                raise ClientGone
        except _Elapsed:
            return
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
