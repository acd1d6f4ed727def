"""The server's side of a WebSocket (RFC 6455): wsproto knows the frames, this the connection under them.

A message passes in parts, as large as they come, and nothing is read while something waits to be sent: so what is
echoed needs little memory, however large it is, and a client that does not read is not read from.
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

SECRET = "xai-client-secret."  # begins the subprotocol in which a web page, which can set no header, sends a secret
LARGEST = 16 << 20  # bytes or characters of a message that is looked at whole
CLOSING = 5  # s that the client gets to answer a close


class Closed(Exception):
    """The closing handshake is done, or has waited long enough."""


def offered_subprotocols() -> list[str]:
    return [offer.strip() for offer in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]


def offered_secret() -> str | None:
    return next(
        (offer[len(SECRET) :] for offer in offered_subprotocols() if offer.startswith(SECRET)), None
    )


def upgrade(grants: Grants, talk: Callable[[WebSocket], None]) -> Answer:
    """The 101 that the request in hand gets, after which its connection is talk's; else what it lacks."""
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
        refusal = problem.event_hint
        return reply(
            str(problem),
            refusal.status_code,
            {name.decode(): value.decode() for name, value in refusal.headers},
        )
    chosen = next(
        (
            offer
            for offer in offered_subprotocols()
            if offer == "realtime" or offer.startswith(SECRET)
        ),
        None,
    )
    accepted = opening.send(
        AcceptConnection(subprotocol=chosen, extensions=[PerMessageDeflate()])
    ).decode()
    handler.talk = functools.partial(
        _run, grants, talk, WebSocket(handler, opening.connection, grants)
    )
    return Answer(
        status=101, headers=[line.split(": ", 1) for line in accepted.split("\r\n")[1:-2]]
    )


def _run(grants: Grants, talk: Callable[[WebSocket], None], websocket: WebSocket) -> None:
    with grants.witness.open("websockets"):
        with contextlib.suppress(Closed):
            talk(websocket)


class WebSocket:
    """What is received or sent raises Closed once the client has closed, and ClientGone when it left without."""

    def __init__(self, handler: Handler, connection: Connection, grants: Grants) -> None:
        self._handler, self._connection, self._knobs = handler, connection, grants.knobs
        self._received: collections.deque[Message] = collections.deque()

    # In

    def parts(self) -> Iterator[Message]:
        """Parts of messages, as they come; more is read only when the former ones are taken."""
        while True:
            while self._received:
                yield self._received.popleft()
            self._receive()

    def messages(self, binary: bool = False) -> Iterator[Any]:
        """Whole messages: JSON objects, and if `binary` bytes too. Closes at what is neither, or too large."""
        parts, size = [], 0
        for part in self.parts():
            parts.append(part.data)
            size += len(part.data)
            if size > LARGEST:
                self.close(1009, f"a message of more than {LARGEST} bytes")
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
            elif isinstance(
                event, CloseConnection
            ):  # the client's, or wsproto's own at what is no frame
                if self._connection.state in (ConnectionState.REMOTE_CLOSING, ConnectionState.OPEN):
                    self.send(event.response())
                raise Closed

    # Out

    def send(self, event: Event) -> None:
        self._write(self._connection.send(event))

    def tell(self, *events: dict[str, Any]) -> None:
        """Send these as JSON, at once."""
        for event in events:
            self._write(self._frame(event))

    def stream(self, events: Iterable[dict[str, Any]]) -> None:
        """Send these as JSON, as slow, silent or cut as the knobs have it."""
        for frame in paced(map(self._frame, events), self._knobs, self):
            self._write(frame)

    def close(self, code: int, reason: str = "") -> NoReturn:
        self.send(CloseConnection(code, reason))
        with gevent.Timeout(CLOSING, False):
            while True:
                self._received.clear()
                self._receive()
        raise Closed

    def cut(self, how: str) -> NoReturn:
        """End the connection as if something had broken: "close" or "reset"; 1006 at the client."""
        self._handler.cut(how)

    def pause(self, seconds: float) -> None:
        """Wait, answering pings; what else comes is kept, and ends the watch for the client's leaving."""
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
