"""The body of a client's request, handed on as it arrives, and the copy kept so that it can be sent again.

What is sent upstream is read in passes: `rewind` begins one, `read1` gives its next part, `at_end` says whether there
is none. A pass may begin before the one before it has ended: it repeats what was read, then the rest comes.
"""

import time

from xaiproxy import errors
from xaiproxy.http1 import framing
from xaiproxy.http1.connection import READ, Connection
from xaiproxy.http1.request_head import Head


class RequestBody:
    """A WSGI input whose `read1` gives what is there instead of waiting for more.

    `ended` says whether the whole body was read, so that another request can follow on the connection.
    """

    def __init__(self, head: Head, connection: Connection, timeout: float):
        self.chunked = head.chunked
        self.content_length = head.content_length
        self._framing = (
            framing.Chunked() if head.chunked else framing.Sized(head.content_length or 0)
        )
        self._connection = connection
        self._timeout = timeout
        self._unread = b""  # content that came with what was asked for
        self._continue_due = (
            not self.ended
            and head.version == "HTTP/1.1"
            and [value.lower() for value in head.values("expect")] == ["100-continue"]
        )

    @property
    def ended(self) -> bool:
        return self._framing.ended and not self._unread

    @property
    def has_come(self) -> bool:
        """Whether read1 need not wait. Raises BadRequest."""
        if not self._unread and self._connection.unread:
            self._unread = self._content(self._connection.recv(None))
        return bool(self._unread)

    def read1(self, size: int = -1) -> bytes:
        """Return some bytes, at most `size` if that is not negative; b"" at the end.

        Raises BadRequest, ClientTimeout, ClientGone.
        """
        if size == 0:
            return b""
        data = self._unread or self._next()
        if 0 < size < len(data):
            data, self._unread = data[:size], data[size:]
        else:
            self._unread = b""
        return data

    def read(self, size: int = -1) -> bytes:
        parts = []
        while data := self.read1(size):
            parts.append(data)
            size -= len(data) if size > 0 else 0
        return b"".join(parts)

    def _next(self) -> bytes:
        """The content of what comes next, of all chunks in it."""
        deadline = time.monotonic() + self._timeout  # bytes that are no content do not push it on
        content = b""
        try:
            self._go_on()
            while not content and not self._framing.ended:
                data = self._connection.recv(deadline - time.monotonic())
                if not data:
                    raise errors.ClientGone
                content = self._content(data)
        except TimeoutError:
            raise errors.ClientTimeout(
                f"no byte of the request body came for {self._timeout:g} s", close=True
            ) from None
        except OSError:
            raise errors.ClientGone from None
        return content

    def invite(self) -> None:
        """Send a 100 (Continue) if the client waits for one (RFC 9110 section 10.1.1). Raises ClientGone."""
        try:
            self._go_on()
        except OSError:
            raise errors.ClientGone from None

    def _go_on(self) -> None:
        if self._continue_due:
            self._continue_due = False
            self._connection.send_all(b"HTTP/1.1 100 Continue\r\n\r\n", self._timeout)

    def _content(self, data: bytes) -> bytes:
        try:
            spans = self._framing.feed(data)
        except framing.Malformed as error:
            raise errors.BadRequest(f"the request body {error}", close=True) from None
        self._connection.unread = data[self._framing.used :]
        if self.chunked:
            self._connection.wait_before_reading()  # chunks of a byte each take long: others have their turn
        return (
            b"".join([data[start:end] for start, end in spans])
            if spans != [(0, len(data))]
            else data
        )


class ReplayMemory:
    """How many bytes all requests together may keep for a replay."""

    def __init__(self, limit: int):
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        self.used -= size


class WholeBody:
    """A body that came with its head, or none at all: what RequestBody and ReplayableBody are in one."""

    chunked = False
    ended = True

    def __init__(self, content: bytes, content_length: int | None):
        self.content_length = content_length
        self.replayable = True
        self._content = content
        self._at = 0
        self._memory: ReplayMemory | None = None

    def rewind(self) -> None:
        self._at = 0

    @property
    def has_come(self) -> bool:
        return self._at < len(self._content)

    @property
    def at_end(self) -> bool:
        return self._at == len(self._content)

    def read1(self, size: int = -1) -> bytes:
        data = self._content[self._at :] if size < 0 else self._content[self._at : self._at + size]
        self._at += len(data)
        return data

    read = read1

    def invite(self) -> None:
        pass

    def keep(self, limit: int, memory: ReplayMemory) -> None:
        """Count what there is."""
        self.replayable = len(self._content) <= limit and memory.take(len(self._content))
        self._memory = memory if self.replayable else None

    def forget(self) -> None:
        if self._content:
            self.replayable = False
            if self._memory is not None:
                self._memory.give_back(len(self._content))
            self._content, self._at = b"", 0

    close = forget


NO_BODY = WholeBody(b"", None)


def body_of(head: Head, connection: Connection, timeout: float) -> RequestBody | WholeBody:
    """The body that follows this head on the connection."""
    if head.content_length is None:
        return RequestBody(head, connection, timeout) if head.chunked else NO_BODY
    unread = connection.unread
    if len(unread) < head.content_length:
        return RequestBody(head, connection, timeout)
    connection.unread = unread[head.content_length :]
    return WholeBody(unread[: head.content_length], head.content_length)


class ReplayableBody:
    """A body that may still be on its way; there can be another pass as long as it is `replayable`."""

    def __init__(self, body: RequestBody, limit: int, memory: ReplayMemory):
        self.chunked = body.chunked
        self.content_length = body.content_length
        self._body = body
        self._limit = limit
        self._memory = memory
        self._kept = (
            bytearray()
        )  # a list of chunks of a byte or two each would take thirty times the memory
        self._at = 0  # of those, how many this pass has given
        self.replayable = (body.content_length or 0) <= limit

    def rewind(self) -> None:
        self._at = 0

    @property
    def has_come(self) -> bool:
        """Whether read1 need not wait. Raises BadRequest."""
        return self._at < len(self._kept) or self._body.has_come

    @property
    def at_end(self) -> bool:
        return self._at == len(self._kept) and self._body.ended

    def invite(self) -> None:
        """Send a 100 (Continue) if the client waits for one. Raises ClientGone."""
        self._body.invite()

    def read1(self) -> bytes:
        """The next part of this pass; b"" at its end. Raises as RequestBody.read1."""
        if self._at == len(self._kept):
            data = self._body.read1()
            self._keep(data)
            return data
        data = bytes(memoryview(self._kept)[self._at : self._at + READ])
        self._at += len(data)
        if not self.replayable:
            self.forget()
        return data

    def _keep(self, data: bytes) -> None:
        if not self.replayable:
            return
        if len(self._kept) + len(data) > self._limit or not self._memory.take(len(data)):
            self.forget()
            return
        self._kept += data
        self._at += len(data)

    def forget(self) -> None:
        """There will be no other pass: free the copy, or as soon as this pass has given all of it."""
        self.replayable = False
        if self._at == len(self._kept):
            self.close()

    def close(self) -> None:
        """Free the copy. May be called twice."""
        self.replayable = False
        self._memory.give_back(len(self._kept))
        self._kept, self._at = bytearray(), 0
