"""The body of a client's request: read as it arrives, and kept within limits to be sent again.

A body is sent upstream in passes: `rewind` begins one, `read1` returns its next part, and `at_end`
is true after the last. A new pass may begin before the former has ended: it repeats what was read
before, then goes on reading.
"""

from __future__ import annotations

import time

from xaiproxy import errors
from xaiproxy.http1 import framing
from xaiproxy.http1.connection import READ, Connection
from xaiproxy.http1.memory_budget import MemoryBudget
from xaiproxy.http1.message_head import Malformed
from xaiproxy.http1.request_head import Head


class RequestBody:
    """A body that may still be arriving, or came whole with its head.

    `chunked`, `content_length`: its framing. `replayable`: whether there can be another pass; False
    until `keep`. `received`: bytes of content that the client has sent so far.
    """

    __slots__ = (
        "_at",
        "_connection",
        "_continue_due",
        "_framing",
        "_kept",
        "_limit",
        "_memory",
        "_memory_used",
        "_timeout",
        "_unread",
        "chunked",
        "content_length",
        "received",
        "replayable",
    )

    def __init__(self, head: Head, connection: Connection, timeout: float):
        """`timeout`: seconds in which the client must send a byte of it."""
        self.chunked = head.chunked
        self.content_length = head.content_length
        self.replayable = False
        self._connection = connection
        self._timeout = timeout
        self._limit = 0
        self._memory: MemoryBudget | None = None
        self._memory_used = 0
        # Content that earlier parts or passes have read. One buffer, since a list of short chunks
        # would take thirty times the memory.
        self._kept: bytes | bytearray = b""
        # How much of it this pass has returned.
        self._at = 0
        # Content that came together with other bytes, and that no pass has returned.
        self._unread = b""
        self._continue_due = False
        self.received = 0
        size = head.content_length or 0
        came = connection.unread
        if not head.chunked and len(came) >= size:
            self._framing: framing.Sized | framing.Chunked = framing.Sized(0)
            self._kept, connection.unread = came[:size], came[size:]
            self.received = size
        else:
            self._framing = framing.Chunked() if head.chunked else framing.Sized(size)
            self._continue_due = head.version == "HTTP/1.1" and [
                value.lower() for value in head.values("expect")
            ] == ["100-continue"]

    @property
    def ended(self) -> bool:
        """Whether all of it was read from the connection, so that another request can follow."""
        return self._framing.ended and not self._unread

    @property
    def has_come(self) -> bool:
        """Whether read1 need not wait. Raises BadRequest."""
        if self._at < len(self._kept):
            return True
        if not self._unread and self._connection.unread and not self._framing.ended:
            self._unread = self._content(self._connection.recv(None))
        return bool(self._unread)

    @property
    def at_end(self) -> bool:
        return self._at == len(self._kept) and self.ended

    def rewind(self) -> None:
        self._at = 0

    def read1(self) -> bytes:
        """The next part of this pass; b"" at its end.

        Raises BadRequest, ClientTimeout, ClientGone.
        """
        if self._at < len(self._kept):
            data = bytes(self._kept[self._at : self._at + READ])
            self._at += len(data)
            if not self.replayable:
                self.forget()
            return data
        data, self._unread = self._unread or self._next(), b""
        if self.replayable:
            self._keep(data)
        return data

    def read(self, size: int = -1) -> bytes:
        """As a WSGI input has it (PEP 3333)."""
        data = b""
        while (size < 0 or len(data) < size) and (more := self.read1()):
            data += more
        if 0 <= size < len(data):
            data, self._unread = data[:size], data[size:] + self._unread
        return data

    def invite(self) -> None:
        """Send a 100 (Continue) if the client waits for one (RFC 9110 section 10.1.1).

        Raises ClientGone.
        """
        if self._continue_due:
            self._continue_due = False
            try:
                self._connection.send_all(b"HTTP/1.1 100 Continue\r\n\r\n", self._timeout)
            except OSError:
                raise errors.ClientGone from None

    def _next(self) -> bytes:
        """The content of what arrives next, of all chunks in it."""
        # Bytes that are no content do not extend it.
        deadline = time.monotonic() + self._timeout
        content = b""
        self.invite()
        try:
            while not content and not self._framing.ended:
                data = self._connection.recv(deadline - time.monotonic())
                if not data:
                    raise errors.ClientGone
                content = self._content(data)
        except TimeoutError:
            raise errors.ClientTimeout(
                f"no byte of the request body came for {self._timeout:g} s"
            ) from None
        except OSError:
            raise errors.ClientGone from None
        return content

    def _content(self, data: bytes) -> bytes:
        try:
            spans = self._framing.feed(data)
        except Malformed as error:
            raise errors.BadRequest(f"the request body {error}") from None
        self._connection.unread = data[self._framing.used :]
        if self.chunked:
            # Chunks of a byte each take long: other greenlets run between two reads.
            self._connection.wait_before_reading()
        content = b"".join([data[start:end] for start, end in spans])
        self.received += len(content)
        return content

    # The copy

    def keep(self, limit: int, memory: MemoryBudget) -> None:
        """Keep what is read for another pass, up to `limit` bytes and as `memory` has room."""
        self._limit, self._memory = limit, memory
        self.replayable = (self.content_length or 0) <= limit and self._take(len(self._kept))

    def _take(self, size: int) -> bool:
        if self._memory is None or not self._memory.take(size):
            return False
        self._memory_used += size
        return True

    def _keep(self, data: bytes) -> None:
        if len(self._kept) + len(data) > self._limit or not self._take(len(data)):
            self.forget()
            return
        if not self._kept:
            self._kept = bytearray()
        self._kept += data
        self._at += len(data)

    def forget(self) -> None:
        """Begin no other pass: free the copy, or free it once this pass has returned all of it."""
        self.replayable = False
        if self._at == len(self._kept):
            self.close()

    def close(self) -> None:
        """Free the copy. May be called twice."""
        self.replayable = False
        if self._memory is not None:
            self._memory.give_back(self._memory_used)
        self._memory_used = 0
        self._kept, self._at = b"", 0
