"""Finds out that a client has closed its connection while its request is being served."""

from __future__ import annotations

import socket
from typing import Any

import gevent

from xaiproxy.errors import ClientGone
from xaiproxy.http1.connection import Connection

POLL_INTERVAL = 0.5  # seconds between two checks of a connection with unread bytes


class ClientWatch:
    """Throws ClientGone into the greenlet that made it when the client closes.

    It must stop at the first unread byte (a body that is not read yet, a pipelined request): the
    socket then stays readable, and the callback would run for ever without ever seeing the close
    that follows. From there on, the watch asks the kernel at intervals whether the connection is
    still established.
    """

    __slots__ = ("_connection", "_greenlet", "_timer", "_watcher")

    def __init__(self, connection: Connection):
        self._connection = connection
        self._greenlet: Any = gevent.getcurrent()
        self._watcher: Any = gevent.get_hub().loop.io(connection.socket.fileno(), 1)
        self._timer: Any = None

    def start(self) -> None:
        """Start, or start again after unread bytes were read."""
        self._stop_timer()
        if not self._watcher.active:
            self._watcher.start(self._on_readable)

    def stop(self) -> None:
        self._watcher.stop()
        self._stop_timer()

    def close(self) -> None:
        self.stop()
        self._watcher.close()

    def _on_readable(self) -> None:
        try:
            data = self._connection.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._watcher.stop()
        if data:
            self._timer = gevent.get_hub().loop.timer(POLL_INTERVAL, POLL_INTERVAL)
            self._timer.start(self._check_established)
        else:
            self._greenlet.throw(ClientGone)

    def _check_established(self) -> None:
        if not self._connection.is_established():
            self._stop_timer()
            self._greenlet.throw(ClientGone)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
