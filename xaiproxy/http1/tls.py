"""TLS on a connection, through memory buffers."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

from xaiproxy.http1.connection import BURST, READ, RECORD, Connection


class TLSConnection(Connection):
    """TLS in another connection. One system call reads or writes any number of records.

    OpenSSL on a socket would make two calls to read one record.
    """

    __slots__ = ("_in", "_inner", "_out", "_tls", "_unsent")

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
        self.fault = self.on_close = None
        self._writable = self._poll = self._timer = None
        self._eager = 0
        self._limit = None
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host, session=session)
        # Records that the socket has not taken yet.
        self._unsent = b""

    @property
    def holds_back(self) -> bool:  # type: ignore[override]
        return bool(self._unsent) or self._inner.holds_back

    @property
    def session_reused(self) -> bool:
        return bool(self._tls.session_reused)

    @property
    def session(self) -> ssl.SSLSession | None:
        """The session to resume; in TLS 1.3 it arrives with the first response."""
        return self._tls.session

    def handshake(self, limit: float | None = None) -> None:
        """`limit`: seconds in which the peer must send a byte.

        Raises OSError, also ssl.SSLError; EOFError.
        """
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
        """Session tickets and key updates are neither bytes nor an EOF; they are processed."""
        for _ in range(BURST):
            if super().is_quiet():
                return True
            try:
                self.receive()
                return False
            except BlockingIOError:
                # An EOF may follow.
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
            # Until everything is read: no poll would report what is left in this buffer.
            while self._in.pending:
                parts.append(content)
                content = self._tls.read(RECORD)
                # After close_notify OpenSSL ignores what follows.
                if not content:
                    break
        except ssl.SSLWantReadError:
            # The rest of a record is still to come.
            if not parts:
                raise BlockingIOError from None
            content = b""
        except ssl.SSLError as error:
            # An invalid record: the content before it counts.
            self.fault = error
            if not parts:
                raise
            # Makes the next read return at once, and meet the fault.
            self.socket.shutdown(socket.SHUT_RD)
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
        # SSLError: the peer's own close_notify has not arrived, and is not waited for.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self._unsent += self._out.read()
        self.send(b"")
        return not self.holds_back and self._inner.end()
