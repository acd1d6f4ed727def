"""One client connection: a strict head, a body that streams, and a head of the answer that does not wait.

gevent's WSGIServer makes a Handler for each connection. pywsgi's own handler waits for the first part of a body with
the head, hides the raw request, and costs several times as much. This one puts into the WSGI environ, beside what
PEP 3333 asks for:

    xaiproxy.head     the request_head.Head: the raw target and fields, which PATH_INFO and HTTP_* have lost
    xaiproxy.handler  this object, for what WSGI has no words for: the client's socket, and who ended the request
"""

import contextlib
import functools
import logging
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent
from gevent import pywsgi

from xaiproxy import errors, log
from xaiproxy.http1 import framing, message_head, request_head
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.request_body import body_of

logger = logging.getLogger("xaiproxy.request")

# How long a client's connection is read on after our end, so that an answer is not destroyed by a reset: for these
# seconds without a byte, and in all. Many clients read no answer before they have sent their whole body.
LINGER_IDLE, LINGER_WHOLE = 5.0, 30.0
DRAIN_LINGER = 1.0  # seconds for the same in a drain
LOOK = 0.5  # seconds between two polls of a connection with unread bytes
EMPTY_LINE = b"\r\n"


class Cut(Exception):
    """Thrown into a request that has outlived the drain."""


class ClientWatch:
    """Throws ClientGone into the greenlet that made it when the client closes its side, also in silence.

    It must stop at the first unread byte (a body whose turn has not come, a pipelined request): the socket then
    stays readable, and the callback would run for ever without ever seeing the close behind it. From there on the
    kernel is asked now and then whether the connection is still established.
    """

    __slots__ = ("_connection", "_greenlet", "_watcher", "_timer")

    def __init__(self, connection: Connection):
        self._connection = connection
        self._greenlet: Any = gevent.getcurrent()
        self._watcher = gevent.get_hub().loop.io(connection.socket.fileno(), 1)
        self._timer: Any = None

    def start(self) -> None:
        """May be called again, to look anew after unread bytes were read."""
        self._stop_timer()
        if not self._watcher.active:
            self._watcher.start(self._look)

    def stop(self) -> None:
        self._watcher.stop()
        self._stop_timer()

    def close(self) -> None:
        self.stop()
        self._watcher.close()

    def _look(self) -> None:
        try:
            data = self._connection.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._watcher.stop()
        if data:
            self._timer = gevent.get_hub().loop.timer(LOOK, LOOK)
            self._timer.start(self._look_behind)
        else:
            self._greenlet.throw(errors.ClientGone)

    def _look_behind(self) -> None:
        if not self._connection.is_established():
            self._stop_timer()
            self._greenlet.throw(errors.ClientGone)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None


class Handler:
    """What WSGIServer asks for: made with a connection, and `handle` called once."""

    def __init__(self, sock: Any, address: Any, server: Any):
        self.server = server
        self.connection = Connection(sock)
        self.watch = ClientWatch(self.connection)
        self.key_name: str | None = None
        self.ended_by = ""  # client, upstream, proxy; empty: nobody cut it short
        self._address = address
        self._head: request_head.Head | None = None
        self._body: Any = None
        self._answered_before = False

    def handle(self) -> None:
        """Answer requests until the connection ends."""
        try:
            with contextlib.suppress(Cut):  # while it reads a head, or lingers
                while self._handle_one():
                    pass
        finally:
            self.watch.close()
            self.connection.close()

    def _handle_one(self) -> bool:
        """Read and answer one request; whether another may follow."""
        self._head = self._body = self.key_name = (
            None  # nothing of a request stays while the connection is idle
        )
        self.ended_by = ""
        self._code, self._content_bytes, self._time_head = 0, 0, 0.0
        self._ends_with_connection = False
        self._headers_sent = self._cut_short = self._client_gone = self._chunks = False
        data = b""
        try:
            data = self._wait_for_head()
            if not data:
                return False
            self._time_start = time.time()
            self._head = head = request_head.parse(data)
        except errors.Refusal as refusal:
            self._refuse_head(refusal, data or self.connection.unread)
            return False
        except (OSError, EOFError):
            return False
        self._answered_before = True
        server = self.server
        self._in_reserve = server.is_reserve_in_use()
        self._close = self._in_reserve or not head.keep_alive
        self._send_limit = server.settings.client_timeout
        self._body = body_of(head, self.connection, server.settings.client_timeout)
        server.busy += 1
        try:
            self._respond()
        finally:
            server.busy -= 1
        self._close |= not self._body.ended
        if self._close:
            self._linger()
        return not self._close

    def _linger(self) -> None:
        """End the connection so that all that was sent arrives before the end."""
        idle, whole = (
            (DRAIN_LINGER, DRAIN_LINGER) if self.server.draining else (LINGER_IDLE, LINGER_WHOLE)
        )
        is_reset = self._cut_short and self._headers_sent and self._ends_with_connection
        if not self._client_gone:
            with self._waiting_for_client():
                (self.connection.flush if is_reset else self.connection.linger)(idle, whole)
        if is_reset:  # nothing else tells this client that the answer is cut
            self.connection.reset_at_close()

    @contextlib.contextmanager
    def _waiting_for_client(self) -> Iterator[None]:
        """Meanwhile the server may close the connection for another one."""
        sock = self.connection.socket
        self.server.answered[sock] = None
        try:
            yield
        finally:
            del self.server.answered[sock]

    def _wait_for_head(self) -> bytes:
        """The head of the next request; b"" when none came in time, or at its end."""
        server, connection = self.server, self.connection
        if connection.unread:
            # A pipelined request. Waiting gives other connections their turn before it, and a client that does not read
            # its answers gets no more of them. gevent.sleep(0) would let the loop poll only every fiftieth time.
            with self._waiting_for_client():
                connection.wait(connection.writable, self._send_limit)
        server.waiting[connection.socket] = time.monotonic()
        # In a drain the rest of a request that has begun is on its way, or does not come.
        in_drain = server.draining and self._answered_before
        try:
            if not self._begins():
                return b""
            return connection.recv_head(
                request_head.SIZE_LIMIT,
                DRAIN_LINGER if in_drain else server.settings.client_timeout,
            )
        except message_head.Malformed as error:
            raise request_head.refusal(error) from None
        except TimeoutError:
            if in_drain:
                return b""
            raise errors.ClientTimeout(
                f"the request head was not complete within {server.settings.client_timeout:g} s",
                close=True,
            ) from None
        finally:
            del server.waiting[connection.socket]

    def _begins(self) -> bool:
        """Whether a request line begins in time; an empty line before it is ignored (RFC 9112 section 2.2)."""
        server, connection = self.server, self.connection
        limit = (
            server.settings.keepalive_timeout
            if self._answered_before
            else server.settings.client_timeout
        )
        if self._answered_before:
            server.idle[connection.socket] = None
        try:
            while EMPTY_LINE.startswith(connection.unread):
                came, connection.unread = connection.unread, b""
                # What has been answered and goes on in a drain has its last request there already, or none.
                at_once = server.draining and self._answered_before
                more = connection.receive() if at_once else connection.recv(limit)
                if not more:
                    return False
                connection.unread = came + more
        except (TimeoutError, BlockingIOError):
            return False
        finally:
            server.idle.pop(connection.socket, None)
            del server.waiting[connection.socket]  # from now on it owes us the rest
            server.waiting[connection.socket] = time.monotonic()
        return True

    def _refuse_head(self, refusal: errors.Refusal, came: bytes) -> None:
        """`came`: as much of the head as has come."""
        status, fields, body = refusal.rendered()
        lines = [
            f"HTTP/1.1 {status}",
            *(f"{name}: {value}" for name, value in fields),
            f"Date: {_date()}",
            "Connection: close",
            "",
            "",
        ]
        if came.removeprefix(EMPTY_LINE).startswith(b"HEAD "):
            body = b""
        self._time_start = self._time_head = time.time()
        self._code, self._content_bytes, self.ended_by = refusal.status, len(body), "proxy"
        self._log()
        with contextlib.suppress(OSError):
            self.connection.send_all("\r\n".join(lines).encode("latin-1") + body, LINGER_IDLE)
            self._linger()

    # The answer

    def check_room(self) -> None:
        """Raises TooManyConnections for a request in the reserve."""
        if self._in_reserve:
            raise errors.TooManyConnections(
                f"all {self.server.connections} connections are in use "
                "(XAI_PROXY_MAX_CONNECTIONS); try again"
            )

    def _respond(self) -> None:
        result: Any = None
        try:
            result = self.server.application(self._environ(), self.start_response)
            self._send(result)
        except (errors.ClientGone, errors.UpstreamBroken, Cut, gevent.GreenletExit) as error:
            self.ended_by = {errors.ClientGone: "client", errors.UpstreamBroken: "upstream"}.get(
                type(error), "proxy"
            )
            self._client_gone = isinstance(error, errors.ClientGone)
            self._cut_short = self._close = True
        except BaseException:
            logger.error("an unexpected error; please report it", exc_info=True)
            self.ended_by = "proxy"
            if not self._headers_sent:
                status, fields, body = errors.Refusal(
                    "the proxy failed; its log has the details"
                ).rendered()
                self._close = True
                with contextlib.suppress(errors.ClientGone):
                    self.start_response(status, fields)(body)
            self._cut_short = self._close = True
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()
            self._log()

    def _environ(self) -> dict[str, Any]:
        head = self._head
        known = head.derived.get("environ")
        if known is None:
            known = head.derived["environ"] = self._environ_of(head)
        environ = known.copy()
        environ["REMOTE_ADDR"] = str(self._address[0])
        environ["wsgi.input"] = self._body
        environ["xaiproxy.head"] = head
        environ["xaiproxy.handler"] = self
        if head.content_length is not None:
            environ["CONTENT_LENGTH"] = str(head.content_length)
        return environ

    def _environ_of(self, head: request_head.Head) -> dict[str, Any]:
        environ = self.server.get_environ()
        environ["REQUEST_METHOD"] = head.method
        environ["SCRIPT_NAME"] = ""
        environ["PATH_INFO"] = (
            urllib.parse.unquote_to_bytes(head.path).decode("latin-1")
            if "%" in head.path
            else head.path
        )
        environ["QUERY_STRING"] = head.target[len(head.path) + 1 :]
        environ["SERVER_PROTOCOL"] = head.version
        environ["wsgi.input_terminated"] = True
        for name, values in head.by_name.items():
            key = _environ_key(name)
            if key:
                environ[key] = ",".join(values)
        return environ

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], None]:
        """PEP 3333's. Raises ValueError at a line end in what would become a header line."""
        if exc_info and self._headers_sent:
            raise exc_info[1]
        text = f"HTTP/1.1 {status}" + "".join([f"\r\n{name}: {value}" for name, value in headers])
        if not text.count("\r\n") == text.count("\r") == text.count("\n") == len(headers):
            raise ValueError("a line end in a header field")
        names = {name.lower() for name, _ in headers}
        self.start(int(status[:3]), text, "content-length" in names, "date" in names)
        return self.write

    def start(
        self, code: int, text: str, has_length: bool, has_date: bool, uploads: bool = False
    ) -> None:
        """Take the answer's head, to go out with the first bytes of its body.

        `text`: its lines, each but the first preceded by a CRLF, without those that are up to this connection.
        `uploads`: the request's body is being read to its end meanwhile.
        """
        is_1_0 = self._head.version == "HTTP/1.0"
        no_body = self._head.method == "HEAD" or code in (101, 204, 304)
        self._code = code
        self._chunks = not (has_length or no_body or is_1_0)
        self._ends_with_connection = not (has_length or self._chunks or no_body)
        # What is unread of the body would be taken for the next request; and the end of the connection is the only
        # end of the body that HTTP/1.0 knows.
        if self.server.draining or self._ends_with_connection or not (self._body.ended or uploads):
            self._close = True
        if not has_date:
            text += f"\r\nDate: {_date()}"
        if self._chunks:
            text += "\r\nTransfer-Encoding: chunked"
        if code == 101:  # what follows on this connection is no HTTP
            text += "\r\nConnection: Upgrade\r\nUpgrade: websocket"
            self._close = True
        elif self._close:
            text += "\r\nConnection: close"
        else:
            text += self.server.keep_alive
        self._head_bytes = f"{text}\r\n\r\n".encode("latin-1")

    def send_interim(self, code: int, text: str) -> None:
        """A head before the final one (RFC 9110 section 15.2); `text` as for `start`. Raises ClientGone."""
        if code != 100 and self._head.version != "HTTP/1.0":  # to go on is what we say ourselves
            self._send_all(f"{text}\r\n\r\n".encode("latin-1"))

    def _take_head(self) -> bytes:
        self._headers_sent = True
        self._time_head = time.time()
        return self._head_bytes

    def _send(self, result: Iterable[bytes]) -> None:
        is_stream = hasattr(result, "relay")
        if is_stream:
            self._send_limit = self.server.settings.idle_timeout
        if is_stream and (self._code == 101 or self._can_relay(result)):
            relay = result.relay(self.connection)
            try:
                relay.run(self._take_head())
            finally:
                self._content_bytes = relay.content
                self._ends_with_connection |= result.seems_ended
            return
        if is_stream:
            self.write(b"")  # the head leaves now, even if no byte of the body follows for an hour
        for data in result:
            if data:
                self.write(data)
        if not self._headers_sent:
            self.write(b"")
        if self._chunks:
            self._send_all(b"0\r\n\r\n")
        if is_stream:
            result.finish()

    def _can_relay(self, result: Any) -> bool:
        """Whether the client is to have the body in the framing that upstream has put it in."""
        return (
            result.framing not in (None, framing.UntilClose)
            and (result.framing is framing.Chunked) == self._chunks
        )

    def write(self, data: bytes) -> None:
        """PEP 3333's."""
        if self._head.method == "HEAD":
            data = b""
        self._content_bytes += len(data)
        if self._chunks and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._send_all(data if self._headers_sent else self._take_head() + data)

    def _send_all(self, data: bytes) -> None:
        try:
            self.connection.send_all(data, self._send_limit)
        except OSError:
            raise errors.ClientGone from None

    def _log(self) -> None:
        head = self._head
        now = time.time()
        fields: dict[str, Any] = {
            "method": head.method if head else "-",
            "path": head.path if head else "-",
            "status": abs(self._code or 0),
            "bytes": self._content_bytes,
            "first_byte_ms": int((self._time_head - self._time_start) * 10000) / 10
            if self._time_head
            else None,
            "duration_ms": int((now - self._time_start) * 10000) / 10,
            "ended_by": self.ended_by or "done",
            "key": self.key_name,
        }
        quiet = fields["path"] in ("/healthz", "/readyz") and fields["status"] == 200
        log.event(logger, logging.DEBUG if quiet else logging.INFO, "request", fields)


def _date() -> str:
    return pywsgi.format_date_time(time.time()).decode()


@functools.lru_cache(maxsize=1024)
def _environ_key(name: str) -> str:
    """CGI's name of a header field; "" for one that it would make look like another."""
    if "_" in name:
        return ""
    key = name.upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key
