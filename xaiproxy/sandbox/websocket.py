"""The server's side of a WebSocket (RFC 6455): the connection; wsproto handles the frames.

Messages pass in parts of any size, and nothing is read while a send blocks. So an echo of any size
takes little memory, and a client that does not read gets back-pressure.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import gevent
from flask import request
from gevent import socket as gevent_socket
from wsproto import handshake
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import AcceptConnection, CloseConnection, Event, Message, Ping, TextMessage
from wsproto.extensions import PerMessageDeflate
from wsproto.utilities import RemoteProtocolError

from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.replies import Answer, compact, reply
from xaiproxy.sandbox.server import ClientGone, Handler
from xaiproxy.sandbox.stream import paced

# Prefix of the subprotocol with which a web page, which cannot set headers, sends a client secret.
SECRET = "xai-client-secret."
MESSAGE_LIMIT = 16 << 20  # bytes or characters
CLOSE_TIMEOUT = 5  # seconds for the client's Close frame


class Closed(Exception):
    """The closing handshake is done, or has timed out."""


def offered_subprotocols() -> list[str]:
    return [offer.strip() for offer in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]


def offered_secret() -> str | None:
    return next(
        (offer[len(SECRET) :] for offer in offered_subprotocols() if offer.startswith(SECRET)), None
    )


def upgrade(grants: Grants, run: Callable[[WebSocket], None]) -> Answer:
    """The response to the current request: 101, or an error for an invalid handshake.

    `run`: called with the WebSocket after the 101.
    """
    handler = request.environ["sandbox.handler"]
    opening = handshake.H11Handshake(ConnectionType.SERVER)
    fields = [
        (name.encode(), value.encode("latin-1"))
        for name, value in handler.header_list()
        if name.lower().startswith(("host", "connection", "upgrade", "sec-websocket-"))
    ]
    try:
        opening.initiate_upgrade_connection(fields, handler.path)
    except RemoteProtocolError as problem:
        refusal: Any = problem.event_hint
        headers = {name.decode(): value.decode() for name, value in refusal.headers}
        return reply(str(problem), refusal.status_code, headers)
    offers = offered_subprotocols()
    chosen = next((it for it in offers if it == "realtime" or it.startswith(SECRET)), None)
    accepted = opening.send(
        AcceptConnection(subprotocol=chosen, extensions=[PerMessageDeflate()])
    ).decode()
    websocket = WebSocket(handler, opening.connection, grants)
    handler.run_upgraded = functools.partial(_run, grants, run, websocket)
    response = Answer(status=101)
    for line in accepted.split("\r\n")[1:-2]:
        response.headers.add(*line.split(": ", 1))
    return response


def _run(grants: Grants, run: Callable[[WebSocket], None], websocket: WebSocket) -> None:
    with grants.witness.open("websockets"), contextlib.suppress(Closed):
        run(websocket)


class WebSocket:
    """Raises Closed once the client has closed it, ClientGone if the connection ended without."""

    def __init__(self, handler: Handler, connection: Connection | None, grants: Grants) -> None:
        assert connection is not None
        self._handler, self._connection, self._knobs = handler, connection, grants.knobs
        self._received: collections.deque[Message[Any]] = collections.deque()

    # Receiving

    def parts(self) -> Iterator[Message[Any]]:
        """Parts of messages as they arrive; reads on only after all of these are consumed."""
        while True:
            while self._received:
                yield self._received.popleft()
            self._receive()

    def messages(self, binary: bool = False) -> Iterator[Any]:
        """Complete messages: JSON objects, and bytes if `binary`; others close the WebSocket."""
        parts, size = [], 0
        for part in self.parts():
            parts.append(part.data)
            size += len(part.data)
            if size > MESSAGE_LIMIT:
                self.close(1009, f"a message of more than {MESSAGE_LIMIT} bytes")
            if part.message_finished:
                yield self._parsed(type(part.data)().join(parts), binary)
                parts, size = [], 0

    def _parsed(self, message: str | bytes, binary: bool) -> Any:
        if isinstance(message, bytes):
            return message if binary else self.close(1003, "not text")
        try:
            parsed = json.loads(message)
        except ValueError:
            parsed = None
        return parsed if isinstance(parsed, dict) else self.close(1007, "not a JSON object")

    def _receive(self) -> None:
        try:
            data = self._handler.rfile.read1(65536)
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ClientGone
        self._connection.receive_data(data)
        for event in self._connection.events():
            if isinstance(event, Message):
                self._received.append(event)
            elif isinstance(event, Ping) and self._connection.state is ConnectionState.OPEN:
                self.send(event.response())
            # The client's Close, or wsproto's own after an invalid frame.
            elif isinstance(event, CloseConnection):
                if self._connection.state in (ConnectionState.REMOTE_CLOSING, ConnectionState.OPEN):
                    self.send(event.response())
                raise Closed

    # Sending

    def send(self, event: Event) -> None:
        self._write(self._connection.send(event))

    def send_json(self, *events: dict[str, Any]) -> None:
        """Send the events as JSON at once."""
        for event in events:
            self._write(self._frame(event))

    def stream(self, events: Iterable[dict[str, Any]]) -> None:
        """Send the events as JSON; the knobs may make it slow, silent or cut."""
        for frame in paced(map(self._frame, events), self._knobs, self):
            self._write(frame)

    def close(self, code: int, reason: str = "") -> NoReturn:
        self.send(CloseConnection(code, reason))
        with gevent.Timeout(CLOSE_TIMEOUT, False):
            while True:
                self._received.clear()
                self._receive()
        raise Closed

    def cut(self, how: str) -> NoReturn:
        """End the connection without a Close (1006 at the client). `how`: "close" or "reset"."""
        self._handler.cut(how)

    def pause(self, seconds: float) -> None:
        """Wait, answering pings; raise as soon as the client is gone.

        Once a message arrives, which is kept, it only sleeps.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._received:
            try:
                gevent_socket.wait_read(self._handler.socket.fileno(), left, TimeoutError())
            except TimeoutError:
                return
            self._receive()
        gevent.sleep(max(0, left))

    def _frame(self, event: dict[str, Any]) -> bytes:
        return self._connection.send(TextMessage(compact(event)))

    def _write(self, data: bytes) -> None:
        try:
            self._handler.socket.sendall(data)
        except OSError as error:
            raise ClientGone from error
