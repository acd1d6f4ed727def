"""A Service of a cluster: an address that stays, and forwards each connection to a refresher."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class Service:
    """`listener`: it may be in another network namespace. `port`: returns the refresher's."""

    def __init__(self, listener: socket.socket, port: Callable[[], int]):
        address, number = listener.getsockname()
        self.url = f"http://{address}:{number}"
        self._listener, self._port = listener, port
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        # It ends the wait for a connection.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # If the refresher is gone, the proxy sees its connection end.
            with (
                connection,
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._port()), 5) as refresher,
            ):
                # A request fits in one segment.
                refresher.sendall(connection.recv(65536))
                connection.sendall(b"".join(iter(lambda: refresher.recv(65536), b"")))
