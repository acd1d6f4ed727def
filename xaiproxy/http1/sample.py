"""Content of a response that is kept while it passes, to be read after its end."""

from __future__ import annotations

from xaiproxy.http1.memory_budget import MemoryBudget

# Bytes of a stream that are kept.
START, END = 4096, 16384
# Bytes above these that arrive before the oldest are dropped, so that not each event moves memory.
SLACK = 4096
LIMIT = START + END + SLACK
WHOLE_LIMIT = 1 << 20  # bytes of content that is kept whole


class Sample:
    """The start and the end of the content, or, with a `budget`, all of it up to WHOLE_LIMIT.

    `is_stream`: whether the content is an event stream.
    `too_long`: nothing is kept, because WHOLE_LIMIT or the budget is exceeded.
    """

    __slots__ = ("_budget", "_kept", "_start", "is_stream", "too_long")

    def __init__(self, budget: MemoryBudget | None = None, is_stream: bool = False):
        self.is_stream = is_stream
        self.too_long = False
        self._budget = budget
        self._start = b""
        # Most content arrives in one piece, which need not be copied.
        self._kept: bytes | bytearray = b""

    def add(self, data: bytes) -> None:
        """The next bytes of the content."""
        if self.too_long:
            return
        budget = self._budget
        if budget is not None and not budget.take(len(data)):
            self._drop()
            return
        if not self._kept:
            self._kept = data
        elif isinstance(self._kept, bytearray):
            self._kept += data
        else:
            self._kept = bytearray(self._kept + data)
        if budget is not None:
            if len(self._kept) > WHOLE_LIMIT:
                self._drop()
        elif len(self._start) + len(self._kept) > LIMIT:
            self._start = self._start or bytes(self._kept[:START])
            self._kept = self._kept[-END:]

    def _drop(self) -> None:
        self.too_long = True
        self.take()

    @property
    def keeps_all(self) -> bool:
        """Whether nothing between start and end may be dropped."""
        return self._budget is not None

    @property
    def is_whole(self) -> bool:
        """Whether nothing between start and end is missing."""
        return not self._start

    def end(self, size: int) -> bytes:
        """The last `size` bytes that are kept."""
        return bytes(self._kept[-size:])

    def take(self) -> bytes:
        """Return what is kept, once: it is freed. Of a long stream some bytes are missing."""
        data = self._start + b"\n\n" + bytes(self._kept) if self._start else bytes(self._kept)
        if self._budget is not None:
            self._budget.give_back(len(self._kept))
        self._start = self._kept = b""
        return data
