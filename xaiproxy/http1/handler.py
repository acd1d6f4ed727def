"""One client connection: requests are read and answered, one after the other, until it ends.

gevent's WSGIServer makes a Handler for each connection. pywsgi's own handler waits for the first
part of a body with the head, hides the raw request, and costs several times as much. What the
server's proxy serves goes to it without a WSGI environ; all other requests go to the WSGI
application, whose environ has one more member:

    xaiproxy.request  the client_request.ClientRequest, with the raw target and fields
"""

from __future__ import annotations

import contextlib
import logging
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import gevent

from xaiproxy import errors
from xaiproxy.http1 import message_head, request_head
from xaiproxy.http1.client_request import ClientRequest
from xaiproxy.http1.client_response import ClientResponse, Cut
from xaiproxy.http1.client_watch import ClientWatch
from xaiproxy.http1.connection import Connection
from xaiproxy.http1.request_body import RequestBody

logger = logging.getLogger(__name__)

# How long a client's connection is read on after our end, so that a response is not destroyed by a
# reset: for these seconds without a byte, and in all. Many clients read no response before they
# have sent their whole body.
LINGER_IDLE, LINGER_WHOLE = 5.0, 30.0
DRAIN_LINGER = 1.0  # seconds for the same in a drain
EMPTY_LINE = b"\r\n"
NO_VALUE = ("",)
REQUEST_ID_LIMIT = 200  # characters of a client's X-Request-Id; a longer one is not used


class Handler:
    """What WSGIServer asks for: made with a connection, and `handle` called once."""

    response_class = ClientResponse

    def __init__(self, sock: Any, address: Any, server: Any):
        self._server = server
        self._connection = Connection(sock)
        self._watch = ClientWatch(self._connection)
        # A client of a Unix socket has no address.
        self._client = str(address[0]) if isinstance(address, tuple) else "unix"
        self._answered_before = False
        self._send_limit: float = server.settings.client_timeout

    def handle(self) -> None:
        """Answer requests until the connection ends."""
        try:
            # Cut: while it reads a head, or lingers.
            with contextlib.suppress(Cut):
                while self._handle_one():
                    pass
        finally:
            self._watch.close()
            self._connection.close()

    def _handle_one(self) -> bool:
        """Read and answer one request; whether another may follow."""
        data = b""
        try:
            data = self._wait_for_head()
            if not data:
                return False
            began_at = time.monotonic()
            head = request_head.parse(data)
        except errors.ErrorResponse as refusal:
            self._refuse_head(refusal, data or self._connection.unread)
            return False
        except (OSError, EOFError):
            return False
        self._answered_before = True
        server = self._server
        all_in_use = server.connections if server.is_reserve_in_use() else 0
        body = RequestBody(head, self._connection, server.settings.client_timeout)
        response = self.response_class(
            self._connection,
            server,
            body,
            self._request_id(head),
            head.method,
            head.version,
            close=bool(all_in_use) or not head.keep_alive,
        )
        request = ClientRequest(head, body, self._watch, response.send_interim, all_in_use)
        server.busy += 1
        try:
            self._respond(request, response)
        finally:
            server.busy -= 1
            body.close()
            user_agent = head.by_name.get("user-agent", NO_VALUE)[0]
            server.on_end(response.record(request, self._client, user_agent, began_at))
        self._send_limit = response.send_limit
        response.close |= not body.ended
        if response.close:
            self._linger(response)
        return not response.close

    def _request_id(self, head: request_head.Head) -> str:
        """The client's X-Request-Id, or one of our own."""
        values = head.by_name.get("x-request-id", NO_VALUE)
        if values[0] and len(values) == 1 and len(values[0]) <= REQUEST_ID_LIMIT:
            return values[0]
        own: str = next(self._server.request_ids)
        return own

    # The head

    def _wait_for_head(self) -> bytes:
        """The head of the next request; b"" if none came in time, or at the end."""
        server, connection = self._server, self._connection
        if connection.unread:
            # A pipelined request. Waiting gives other connections their turn before it, and a
            # client that does not read its responses gets no more of them. With gevent.sleep(0) the
            # loop would poll only every fiftieth time.
            with self._waiting_for_client():
                connection.wait(connection.writable, self._send_limit)
        server.waiting[connection.socket] = time.monotonic()
        # In a drain the rest of a request that has begun is on its way, or does not come.
        in_drain = server.draining and self._answered_before
        try:
            if not self._begins():
                return b""
            limit = DRAIN_LINGER if in_drain else server.settings.client_timeout
            return connection.recv_head(request_head.SIZE_LIMIT, limit)
        except message_head.Malformed as error:
            raise request_head.refusal(error) from None
        except TimeoutError:
            if in_drain:
                return b""
            raise errors.ClientTimeout(
                f"the request head was not complete within {server.settings.client_timeout:g} s"
            ) from None
        finally:
            del server.waiting[connection.socket]

    def _begins(self) -> bool:
        """Whether a request line begins in time; RFC 9112 section 2.2 ignores an empty line."""
        server, connection = self._server, self._connection
        limit = server.settings.client_timeout
        if self._answered_before:
            limit = server.settings.keepalive_timeout
            server.idle[connection.socket] = None
        try:
            while EMPTY_LINE.startswith(connection.unread):
                came, connection.unread = connection.unread, b""
                # In a drain a connection that had a response has its last request there already, or
                # none.
                at_once = server.draining and self._answered_before
                more = connection.receive() if at_once else connection.recv(limit)
                if not more:
                    return False
                connection.unread = came + more
        except (TimeoutError, BlockingIOError):
            return False
        finally:
            server.idle.pop(connection.socket, None)
            # From now on the client owes the rest.
            del server.waiting[connection.socket]
            server.waiting[connection.socket] = time.monotonic()
        return True

    def _refuse_head(self, refusal: errors.ErrorResponse, came: bytes) -> None:
        """`came`: as much of the head as has come."""
        is_head = came.removeprefix(EMPTY_LINE).startswith(b"HEAD ")
        response = self.response_class(
            self._connection,
            self._server,
            None,
            next(self._server.request_ids),
            "HEAD" if is_head else "",
            close=True,
        )
        response.send_limit = LINGER_IDLE
        began_at = time.monotonic()
        try:
            response.refuse(refusal)
        except errors.ClientGone as error:
            response.abort(error)
        finally:
            self._server.on_end(response.record(None, self._client, "", began_at, refusal))
        self._linger(response)

    # The response

    def _respond(self, request: ClientRequest, response: ClientResponse) -> None:
        proxy = self._server.proxy
        try:
            try:
                if proxy is not None and proxy.serves(request.head):
                    self._forward(proxy, request, response)
                else:
                    self._run_application(request, response)
            except errors.ErrorResponse as refusal:
                request.refusal = refusal
                request.body.close()
                response.refuse(refusal)
        except (errors.ClientGone, errors.UpstreamBroken, Cut, gevent.GreenletExit) as error:
            response.abort(error)
        except BaseException as error:
            logger.error("an unexpected error; please report it", exc_info=True)
            response.close = True
            if not response.headers_sent:
                request.refusal = errors.ErrorResponse("the proxy failed; its log has the details")
                with contextlib.suppress(errors.ClientGone):
                    response.refuse(request.refusal)
            response.abort(error)

    def _forward(self, proxy: Any, request: ClientRequest, response: ClientResponse) -> None:
        # While the proxy waits for a token, and for upstream; it stops at the first byte of a body.
        self._watch.start()
        answer = None
        try:
            answer = proxy.forward(request)
            if answer.exchange.head.status == 101:
                # The tunnel reads on that socket.
                self._watch.stop()
            response.pass_on(answer)
        finally:
            # First: it could throw into what follows.
            self._watch.stop()
            if answer is not None:
                answer.exchange.close()

    def _run_application(self, request: ClientRequest, response: ClientResponse) -> None:
        self._server.pages += 1
        try:
            result = self._server.application(self._environ(request), response.start_response)
            try:
                response.send(result)
            finally:
                close = getattr(result, "close", None)
                if close is not None:
                    close()
        finally:
            self._server.pages -= 1

    def _environ(self, request: ClientRequest) -> dict[str, Any]:
        """PEP 3333's. Header names with an underscore are left out: they would read as others."""
        head = request.head
        environ: dict[str, Any] = {
            **self._server.get_environ(),
            "REQUEST_METHOD": head.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": urllib.parse.unquote_to_bytes(head.path).decode("latin-1"),
            "QUERY_STRING": head.target[len(head.path) + 1 :],
            "SERVER_PROTOCOL": head.version,
            "REMOTE_ADDR": self._client,
            "wsgi.input": request.body,
            "wsgi.input_terminated": True,
            "xaiproxy.request": request,
        }
        for name, values in head.by_name.items():
            if "_" not in name:
                key = name.upper().replace("-", "_")
                is_plain = key in ("CONTENT_TYPE", "CONTENT_LENGTH")
                environ[key if is_plain else f"HTTP_{key}"] = ",".join(values)
        return environ

    # The end

    def _linger(self, response: ClientResponse) -> None:
        """End the connection so that all that was sent arrives before the end."""
        idle, whole = LINGER_IDLE, LINGER_WHOLE
        if self._server.draining:
            idle = whole = DRAIN_LINGER
        is_reset = response.is_end_ambiguous
        if not response.client_gone:
            with self._waiting_for_client():
                (self._connection.flush if is_reset else self._connection.linger)(idle, whole)
        if is_reset:
            # Nothing else shows this client that the content is cut.
            self._connection.reset_at_close()

    @contextlib.contextmanager
    def _waiting_for_client(self) -> Iterator[None]:
        """Meanwhile the server may close the connection for another one."""
        sock = self._connection.socket
        self._server.answered[sock] = None
        try:
            yield
        finally:
            del self._server.answered[sock]
