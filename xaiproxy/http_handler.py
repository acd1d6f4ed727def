"""One client connection: pywsgi's handler with a strict head, a body that streams, and a head that does not wait.

It puts into the WSGI environ, beside what PEP 3333 asks for:

    xaiproxy.head     the request_head.Head: the raw target and fields, which PATH_INFO and HTTP_* have lost
    xaiproxy.handler  this object, for what WSGI has no words for: the client's socket, and who ended the request
"""

import contextlib
import logging
import socket
import struct
import time
import urllib.parse
from typing import Any

import gevent
from gevent import pywsgi

from xaiproxy import errors, request_head
from xaiproxy.request_body import RequestBody

logger = logging.getLogger("xaiproxy.request")

LINGER_TIME = 5.0  # seconds that a client gets to stop sending a body that nobody reads
LOOK = 0.5  # seconds between two looks at a connection with unread bytes
TCP_ESTABLISHED = 1  # the first byte of Linux's struct tcp_info
RESET = struct.pack("ii", 1, 0)  # SO_LINGER that turns close into a reset


class Cut(Exception):
    """Thrown into a request that has outlived the drain."""


class ClientWatch:
    """Throws ClientGone into the greenlet that made it when the client closes its side, also in silence.

    It must stop at the first unread byte (a body whose turn has not come, a pipelined request): the socket then
    stays readable, and the callback would run for ever without ever seeing the close behind it. From there on the
    kernel is asked now and then whether the connection is still established.
    """

    def __init__(self, sock: Any):
        self._socket = sock._sock  # the plain one: the callbacks run in the hub, where nothing may wait
        self._greenlet = gevent.getcurrent()
        loop = gevent.get_hub().loop
        self._watcher = loop.io(sock.fileno(), 1)
        self._timer = loop.timer(LOOK, LOOK)

    def start(self) -> None:
        self._timer.stop()
        self._watcher.start(self._look)

    def _look(self) -> None:
        try:
            data = self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._watcher.stop()
        if data:
            self._timer.start(self._look_behind)
        else:
            self._greenlet.throw(errors.ClientGone)

    def _look_behind(self) -> None:
        if self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_ESTABLISHED:
            self._timer.stop()
            self._greenlet.throw(errors.ClientGone)

    def close(self) -> None:
        for watcher in (self._watcher, self._timer):
            watcher.stop()
            watcher.close()


class Handler(pywsgi.WSGIHandler):
    head: "request_head.Head | None" = None
    key_name: "str | None" = None
    ended_by = ""  # client, upstream, proxy; empty: nobody cut it short
    body_length = 0  # bytes of the answer's body
    time_head = 0.0  # when the answer's head left
    cut_short = False  # the answer, and with it the connection
    answered_before = False

    def handle(self):
        with contextlib.suppress(Cut):  # while it reads a head, or lingers
            super().handle()

    def handle_one_request(self):
        """Read and answer one request; None ends the connection (pywsgi's contract)."""
        self.head, self.key_name, self.ended_by, self.body_length, self.time_head = None, None, "", 0, 0.0
        self.code, self.cut_short = 0, False
        try:
            if not self._wait_for_request():
                return None
            settings = self.server.settings
            with gevent.Timeout(settings.client_timeout, errors.ClientTimeout(
                    f"the request head was not complete within {settings.client_timeout:g} s", close=True)):
                self.head = request_head.read(self.rfile)
        except errors.Refusal as refusal:
            self._refuse_head(refusal)
            return None
        except OSError:
            return None
        if self.head is None:
            return None
        self.answered_before = True
        self.command, self.path, self.request_version = self.head.method, self.head.target, self.head.version
        self.close_connection = not self.head.keep_alive
        self.environ = self.get_environ()
        self.application = self.server.application
        self.handle_one_response()
        if self.close_connection:
            if not self.wsgi_input.ended and not self.cut_short:
                self._linger()
            return None
        return True

    def _wait_for_request(self) -> bool:
        """Wait for the first byte; False when none came in time, or at its end."""
        settings = self.server.settings
        limit = settings.keepalive_timeout if self.answered_before else settings.client_timeout
        if self.server.draining:
            limit = 0  # only what is there already
        with self.server.idle(self.socket), gevent.Timeout(limit, False):
            return bool(self.rfile.peek(1))
        return False

    def _refuse_head(self, refusal: errors.Refusal) -> None:
        status, fields, body = refusal.rendered()
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields), "Connection: close", "", ""]
        self.time_start = self.time_head = time.time()
        self.code, self.body_length, self.ended_by = refusal.status, len(body), "proxy"
        self.log_request()
        with contextlib.suppress(OSError):
            self.socket.sendall("\r\n".join(lines).encode("latin-1") + body)
            self._linger()

    def get_environ(self) -> "dict[str, Any]":
        head, environ = self.head, self.server.get_environ()
        self.wsgi_input = RequestBody(head, self.rfile, self.socket, self.server.settings.client_timeout)
        path, _, query = head.target.partition("?")
        environ.update({
            "REQUEST_METHOD": head.method, "SCRIPT_NAME": "", "QUERY_STRING": query,
            "PATH_INFO": urllib.parse.unquote_to_bytes(path).decode("latin-1"),
            "SERVER_PROTOCOL": head.version, "REMOTE_ADDR": str(self.client_address[0]),
            "wsgi.input": self.wsgi_input, "wsgi.input_terminated": True,
            "xaiproxy.head": head, "xaiproxy.handler": self})
        if head.content_length is not None:
            environ["CONTENT_LENGTH"] = str(head.content_length)
        for name, value in head.fields:
            if "_" not in name:
                key = name.upper().replace("-", "_")
                key = key if key == "CONTENT_TYPE" else "HTTP_" + key
                environ[key] = f"{environ[key]},{value}" if key in environ else value
        environ.pop("HTTP_CONTENT_LENGTH", None)
        return environ

    def start_response(self, status, headers, exc_info=None):
        # What is unread of the body would be taken for the next request.
        if self.server.draining or not self.wsgi_input.ended:
            self.close_connection = True
        if self.request_version == "HTTP/1.0" and not any(name.lower() == "content-length" for name, _ in headers):
            self.close_connection = True  # its end is the only end of the body that HTTP/1.0 knows
        if self.close_connection and self.request_version == "HTTP/1.1":
            headers = [*headers, ("Connection", "close")]
        return super().start_response(status, headers, exc_info)

    def finalize_headers(self):
        if self.head is not None and (self.head.method == "HEAD" or self.code in (204, 304)):
            # pywsgi would announce chunks for them, and send a last one.
            if self.provided_date is None:
                self.response_headers.append((b"Date", pywsgi.format_date_time(time.time())))
            return
        super().finalize_headers()

    def process_result(self):
        if getattr(self.result, "head_first", False):
            self.write(b"")  # the head leaves now, even if no byte of the body follows for an hour
        super().process_result()

    def write(self, data):
        if self.head.method == "HEAD":
            data = b""
        if not self.headers_sent:
            self.time_head = time.time()
        self.body_length += len(data)
        return super().write(data)

    def _sendall(self, data):
        try:
            super()._sendall(data)
        except OSError:
            raise errors.ClientGone from None

    def handle_error(self, t, v, tb):
        if issubclass(t, (errors.ClientGone, errors.UpstreamBroken, Cut, gevent.GreenletExit)):
            self.ended_by = {errors.ClientGone: "client", errors.UpstreamBroken: "upstream"}.get(t, "proxy")
        else:
            logger.error("an unexpected error; please report it", exc_info=(t, v, tb))
            self.ended_by = "proxy"
            if not self.headers_sent:
                status, fields, body = errors.Refusal("the proxy failed; its log has the details").rendered()
                self.close_connection = True
                self.start_response(status, fields)
                self.write(body)
        self.close_connection = self.cut_short = True
        if self.headers_sent and not self.response_use_chunked and self.provided_content_length is None:
            with contextlib.suppress(OSError):  # nothing but a reset tells this client that the answer is cut short
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _linger(self) -> None:
        """Take in what the client still sends: to close on unread bytes is a reset, which can destroy our answer."""
        with contextlib.suppress(OSError), gevent.Timeout(LINGER_TIME, False):
            self.socket.shutdown(socket.SHUT_WR)
            while self.rfile.read1(65536):
                pass

    def log_request(self):
        head = self.head
        now = time.time()
        fields: "dict[str, Any]" = {
            "method": head.method if head else "-", "path": head.path if head else "-", "status": abs(self.code or 0),
            "bytes": self.body_length,
            "first_byte_ms": round((self.time_head - self.time_start) * 1000, 1) if self.time_head else None,
            "duration_ms": round((now - self.time_start) * 1000, 1),
            "ended_by": self.ended_by or "done", "key": self.key_name}
        quiet = fields["path"] in ("/healthz", "/readyz") and fields["status"] == 200
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})
