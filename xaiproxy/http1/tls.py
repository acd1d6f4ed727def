"""TLS on a connection."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

from xaiproxy.http1.connection import BURST, READ, RECORD, Connection


class TLSConnection(Connection):
    """TLS in another connection, by way of memory, where one system call gets or sends any number of records.

    OpenSSL on a socket would make two to read one record.
    """

    __slots__ = ("_inner", "_tls", "_in", "_out", "_unsent")

    def __init__(
        self,
        inner: Connection,
        context: ssl.SSLContext,
        host: str,
        session: ssl.SSLSession | None = None,
    ):
        self._inner = inner
        self.socket, self.readable, self._hub = inner.socket, inner.readable, inner._hub
        self.unread = b""
        self.fault = None
        self._writable = self._poll = self._timer = None
        self._eager = 0
        self._limit = None
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host, session=session)
        self._unsent = b""  # what the socket has not taken yet

    @property
    def holds_back(self) -> bool:  # type: ignore[override]
        return bool(self._unsent) or self._inner.holds_back

    @property
    def session_reused(self) -> bool:
        return bool(self._tls.session_reused)

    @property
    def session(self) -> ssl.SSLSession | None:
        """To resume on another connection. In TLS 1.3 it comes behind the handshake, with the first answer."""
        return self._tls.session

    def handshake(self, limit: float | None = None) -> None:
        """`limit`: seconds in which the peer sends no byte. Raises OSError, among them ssl.SSLError; and EOFError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._inner.send_all(self._out.read())
                data = self._inner.recv(limit)
                if not data:
                    raise EOFError from None
                self._in.write(data)
            else:
                self._inner.send_all(self._out.read())
                return

    def is_quiet(self) -> bool:
        """Session tickets and key updates are neither bytes nor an end; they are taken in."""
        for _ in range(BURST):
            if super().is_quiet():
                return True
            try:
                self.receive()
                return False
            except BlockingIOError:  # an end may follow
                continue
            except OSError:
                return False
        return False

    def close(self) -> None:
        super().close()
        self._inner.close()

    def receive(self) -> bytes:
        data = self._inner.receive()
        if data:
            self._in.write(data)
        elif self.fault is not None:
            raise self.fault
        else:
            self._in.write_eof()
        parts = []
        try:
            content = self._tls.read(RECORD)
            while (
                self._in.pending
            ):  # until all that came is read: no poll would report what is left in here
                parts.append(content)
                content = self._tls.read(RECORD)
                if not content:  # close_notify: OpenSSL leaves what follows it
                    break
        except ssl.SSLWantReadError:  # the rest of a record is still to come
            if not parts:
                raise BlockingIOError from None
            content = b""
        except ssl.SSLError as error:  # a record that is none: the content before it counts
            self.fault = error
            if not parts:
                raise
            self.socket.shutdown(
                socket.SHUT_RD
            )  # so that the next read comes at once, and meets the fault
            content = b""
        return b"".join([*parts, content]) if parts else content

    def send(self, data: Any) -> int:
        if self._unsent:
            self._unsent = self._unsent[self._inner.send(self._unsent) :]
        if self._unsent or not data:
            return 0
        taken = self._tls.write(data if len(data) <= READ else memoryview(data)[:READ])
        records = self._out.read()
        sent = self._inner.send(records)
        if sent < len(records):
            self._unsent = records[sent:]
        return taken

    def end(self) -> bool:
        with contextlib.suppress(ssl.SSLError):  # the peer's own close_notify is not waited for
            self._tls.unwrap()
        self._unsent += self._out.read()
        self.send(b"")
        return not self.holds_back and self._inner.end()
