"""The body of a client's request, handed on as it arrives, and the copy kept so that it can be sent again."""

import time
from collections.abc import Iterator

from xaiproxy import errors, framing
from xaiproxy.connection import READ, Connection
from xaiproxy.request_head import Head


class RequestBody:
    """A WSGI input whose `read1` gives what is there instead of waiting for more.

    `ended` says whether the whole body was read, so that another request can follow on the connection.
    """

    def __init__(self, head: Head, connection: Connection, timeout: float):
        self.chunked = head.chunked
        self.content_length = head.content_length
        self._framing = framing.Chunked() if head.chunked else framing.Sized(head.content_length or 0)
        self._connection = connection
        self._timeout = timeout
        self._unread = b""  # content that came with what was asked for
        self._continue_due = not self.ended and head.version == "HTTP/1.1" and \
            [value.lower() for value in head.values("expect")] == ["100-continue"]

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
            if self._continue_due:
                self._continue_due = False
                self._connection.send_all(b"HTTP/1.1 100 Continue\r\n\r\n", self._timeout)
            while not content and not self._framing.ended:
                data = self._connection.recv(deadline - time.monotonic())
                if not data:
                    raise errors.ClientGone
                content = self._content(data)
        except TimeoutError:
            raise errors.ClientTimeout(f"no byte of the request body came for {self._timeout:g} s", close=True) from None
        except OSError:
            raise errors.ClientGone from None
        return content

    def _content(self, data: bytes) -> bytes:
        try:
            spans = self._framing.feed(data)
        except framing.Malformed as error:
            raise errors.BadRequest(f"the request body {error}", close=True) from None
        self._connection.unread = data[self._framing.used:]
        return b"".join([data[start:end] for start, end in spans]) if spans != [(0, len(data))] else data


class NoBody:
    """What a request without a body has in place of both, a RequestBody and a ReplayableBody; one for all."""

    chunked = has_come = False
    ended = replayable = True
    content_length = None

    def read1(self, size: int = -1) -> bytes:
        return b""

    read = read1

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def forget(self) -> None:
        pass


NO_BODY = NoBody()


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


class ReplayableBody:
    """Iterate it to send the body; again, from the start, as long as `replayable`.

    It may be iterated a second time before the first went through: what was read is repeated, then comes the rest.
    """

    def __init__(self, body: RequestBody, limit: int, memory: ReplayMemory):
        self.chunked = body.chunked
        self.content_length = body.content_length
        self._body = body
        self._limit = limit
        self._memory = memory
        self._kept = bytearray()  # a list of chunks of a byte or two each would take thirty times the memory
        self.replayable = (body.content_length or 0) <= limit

    @property
    def ended(self) -> bool:
        return self._body.ended

    @property
    def has_come(self) -> bool:
        """Whether the first part need not be waited for."""
        return bool(self._kept) or self._body.has_come

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._kept), READ):
            yield bytes(self._kept[start:start + READ])
        while data := self._body.read1():
            self._keep(data)
            yield data

    def _keep(self, data: bytes) -> None:
        if not self.replayable:
            return
        if len(self._kept) + len(data) > self._limit or not self._memory.take(len(data)):
            self.forget()
            return
        self._kept += data

    def forget(self) -> None:
        """Free the copy: there will be no replay. May be called twice."""
        self.replayable = False
        self._memory.give_back(len(self._kept))
        self._kept = bytearray()
