"""The body of a client's request, handed on as it arrives, and the copy kept so that it can be sent again."""

import re
from collections.abc import Iterator

import gevent

from xaiproxy import errors
from xaiproxy.request_head import FIELD_LINE, Head

CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")  # RFC 9112 section 7.1
LINE_LIMIT = 4096  # bytes of one chunk-size or trailer line
TRAILER_LIMIT = 100
READ = 65536


class RequestBody:
    """A WSGI input whose `read1` gives what is there instead of waiting for more.

    `ended` says whether the whole body was read, so that another request can follow on the connection.
    """

    def __init__(self, head: Head, stream, sock, timeout: float):
        self.chunked = head.chunked
        self.content_length = head.content_length
        self.ended = not head.chunked and not head.content_length
        self._left = 0 if head.chunked else head.content_length or 0  # bytes of the body, or of this chunk
        self._first_chunk = True
        self._stream = stream
        self._socket = sock
        self._timeout = timeout
        self._continue_due = not self.ended and head.version == "HTTP/1.1" and \
            [value.lower() for value in head.values("expect")] == ["100-continue"]

    def read1(self, size: int = READ) -> bytes:
        """Return some bytes, at most `size` if that is positive; b"" at the end.

        Raises BadRequest, ClientTimeout, ClientGone.
        """
        if self.ended or size == 0:
            return b""
        try:
            with gevent.Timeout(self._timeout, errors.ClientTimeout(
                    f"no byte of the request body came for {self._timeout:g} s", close=True)):
                if self._continue_due:
                    self._continue_due = False
                    self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                if self.chunked and self._left == 0 and not self._next_chunk():
                    return b""
                data = self._stream.read1(min(size if size > 0 else READ, self._left))
        except OSError:
            raise errors.ClientGone from None
        if not data:
            raise errors.ClientGone
        self._left -= len(data)
        if self._left == 0 and not self.chunked:
            self.ended = True
        return data

    def read(self, size: int = -1) -> bytes:
        parts = []
        while data := self.read1(size):
            parts.append(data)
            size -= len(data) if size > 0 else 0
        return b"".join(parts)

    def _discard(self) -> None:
        """pywsgi's hook after an answer; what is unread makes our handler close the connection instead."""

    def _next_chunk(self) -> bool:
        if not self._first_chunk and self._line(2) != b"\r\n":
            raise errors.BadRequest("a chunk of the request body is longer than it says", close=True)
        self._first_chunk = False
        match = CHUNK_LINE.fullmatch(self._line())
        if match is None:
            raise errors.BadRequest("a chunk size in the request body is malformed", close=True)
        self._left = int(match[1], 16)
        if self._left:
            return True
        for _ in range(TRAILER_LIMIT + 1):
            line = self._line()
            if line == b"\r\n":
                self.ended = True
                return False
            if FIELD_LINE.fullmatch(line) is None:
                break
        raise errors.BadRequest("the trailers of the request body are malformed", close=True)

    def _line(self, limit: int = LINE_LIMIT) -> bytes:
        line = self._stream.readline(limit)
        if len(line) < limit and not line.endswith(b"\n"):
            raise errors.ClientGone
        return line


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
        self._body = body
        self._limit = limit
        self._memory = memory
        self._kept = bytearray()  # a list of chunks of a byte or two each would take thirty times the memory
        self.replayable = (body.content_length or 0) <= limit

    @property
    def ended(self) -> bool:
        return self._body.ended

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
