"""Where the body of a message ends (RFC 9112 sections 6 and 7), found while its bytes pass through.

The three kinds have one interface. `feed` takes the bytes that arrived and returns which of them
are content; it keeps no content. Then `ended` is true if the body is complete, and `used` is the
number of these bytes that belong to the body, framing included. If content precedes something
malformed, `feed` stops between them, with `used` short of the end; fed with the rest, it raises. To
forward a body in its own framing, send the first `passes` of these bytes and then `trailers`.
Trailer fields that are not forwarded are left out, so a trailer section is held back until it is
complete. `seems_ended`: a lenient client (http.client) would take a body that stops here for a
complete one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from xaiproxy.http1 import headers
from xaiproxy.http1.message_head import ALLOWED, NAME, Malformed

CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")  # section 7.1
LAST = b"0\r\n\r\n"  # the end without trailers
LINE_LIMIT = 4096  # bytes of a chunk-size or trailer line
TRAILER_LIMIT = 100
NOT_IN_TRAILERS = ("", "content-length", "transfer-encoding")  # RFC 9110 section 6.5.1; "": no name

Spans = list[tuple[int, int]]


class Sized:
    """As many bytes as Content-Length announces."""

    __slots__ = ("_left", "ended", "passes", "used")

    seems_ended = False
    trailers = b""

    def __init__(self, length: int):
        self._left = length
        self.used = self.passes = 0
        self.ended = length == 0

    def feed(self, data: bytes) -> Spans:
        """Return where in `data` content starts and ends."""
        self.used = self.passes = min(len(data), self._left)
        self._left -= self.used
        self.ended = self._left == 0
        return [(0, self.used)]

    def end_of_connection(self) -> None:
        """Raises EOFError unless the body may end with the connection."""
        raise EOFError


class UntilClose:
    """A response that only the end of its connection ends."""

    __slots__ = ("ended", "passes", "used")

    # The relay does not carry such a body: see client_response.
    seems_ended = False
    trailers = b""

    def __init__(self) -> None:
        self.used = self.passes = 0
        self.ended = False

    def feed(self, data: bytes) -> Spans:
        self.used = self.passes = len(data)
        return [(0, self.used)]

    def end_of_connection(self) -> None:
        self.ended = True


class Chunked:
    """The chunked transfer coding (RFC 9112 section 7.1).

    What follows it on the connection is read as another message, so it is Malformed when in doubt.
    """

    __slots__ = (
        "_expect",
        "_kept",
        "_left",
        "_line",
        "_trailers",
        "ended",
        "passes",
        "trailers",
        "used",
    )

    def __init__(self) -> None:
        self.used = self.passes = 0
        self.trailers = b""
        self.ended = False
        # Bytes of this chunk's content that are to come.
        self._left = 0
        # The beginning of a line.
        self._line = b""
        # How to take the next line; unbound, so that a copy has its own.
        self._expect: Callable[[Chunked, bytes], None] = Chunked._size
        self._trailers = 0
        # Trailer lines that are forwarded.
        self._kept = b""

    def feed(self, data: bytes) -> Spans:
        """As Sized.feed; raises Malformed."""
        size = len(data)
        if self._expect is Chunked._size and not self._left and not self._line:
            # An event mostly arrives as one chunk, alone.
            whole = CHUNK_LINE.match(data)
            if (
                whole
                and size == whole.end() + int(whole[1], 16) + 2 > whole.end() + 2
                and data.endswith(b"\r\n")
            ):
                self.used = self.passes = size
                return [(whole.end(), size - 2)]
        spans = []
        at = 0
        passes = -1
        while at < size and not self.ended:
            if self._left:
                end = min(size, at + self._left)
                spans.append((at, end))
                self._left -= end - at
                at = end
                if data.startswith(b"\r\n", at) and not self._left:
                    self._expect = Chunked._size
                    at += 2
                continue
            if self._expect is Chunked._size and not self._line:
                # Most often what follows has arrived already.
                if data.startswith(LAST, at):
                    self.ended, at = True, at + len(LAST)
                    break
                line = CHUNK_LINE.match(data, at, at + LINE_LIMIT)
                if line:
                    self._begin_chunk(line)
                    at = line.end()
                    continue
            if self._expect is Chunked._trailer and passes < 0:
                passes = at
            end = data.find(b"\n", at, at + LINE_LIMIT) + 1 or size
            try:
                self._take(self._line + data[at:end])
            except Malformed:
                if not spans:
                    raise
                # Stop before the malformed line.
                break
            at = end
        self.used = at
        self.passes = at if passes < 0 else passes
        return spans

    def _take(self, line: bytes) -> None:
        """`line`: whole, or its beginning."""
        if len(line) > LINE_LIMIT:
            raise Malformed("has a line that is too long")
        if line.endswith(b"\n"):
            self._expect(self, line)
            # Not earlier: the beginning of a malformed line was forwarded too.
            self._line = b""
        else:
            self._line = line

    def end_of_connection(self) -> None:
        raise EOFError

    @property
    def seems_ended(self) -> bool:
        """In the middle of a chunk size that begins with 0: http.client needs no line end."""
        return self._expect is Chunked._size and self._line.startswith(b"0")

    def _size(self, line: bytes) -> None:
        match = CHUNK_LINE.fullmatch(line)
        if match is None:
            raise Malformed("has a chunk size that is malformed")
        self._begin_chunk(match)

    def _begin_chunk(self, line: re.Match[bytes]) -> None:
        self._left = int(line[1], 16)
        self._expect = Chunked._end_of_chunk if self._left else Chunked._trailer

    def _end_of_chunk(self, line: bytes) -> None:
        if line != b"\r\n":
            raise Malformed("has a chunk that is longer than announced")
        self._expect = Chunked._size

    def _trailer(self, line: bytes) -> None:
        if line == b"\r\n":
            self.ended = True
            self.trailers = self._kept + line
            return
        self._trailers += 1
        name, colon, _ = line.decode("latin-1").partition(":")
        lower = name.lower() if NAME.fullmatch(name) else ""
        if (
            self._trailers > TRAILER_LIMIT
            or not colon
            or lower in NOT_IN_TRAILERS
            or not line.endswith(b"\r\n")
            or line.translate(None, ALLOWED) != b"\r\n"
        ):
            raise Malformed("has trailers that are malformed")
        if lower not in headers.NOT_PASSED:
            self._kept += line


def content_of(body: Sized | UntilClose | Chunked, data: bytes) -> Iterator[bytes]:
    """Feed `data` to `body` and yield its content.

    Raises Malformed, after the content that precedes it.
    """
    for start, end in body.feed(data):
        yield data[start:end]
    if body.used < len(data) and not body.ended:
        body.feed(data[body.used :])
