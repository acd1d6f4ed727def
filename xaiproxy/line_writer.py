"""Log lines to a descriptor whose reader may be slow, stopped or gone: no write ever waits for it.

What does not fit waits, up to WAIT_LIMIT bytes. Lines beyond that are dropped and counted, and a line says how many as
soon as there is room for it. The rules that a change must keep:

1. A write is shorter than PIPE_BUF, so that a pipe takes it whole or not at all (pipe(7)), and follows a poll of its
   own, with time-out zero, that reports room: the write before it may have filled the pipe.
2. A descriptor that was handed in never becomes O_NONBLOCK: that is a mode of the open file, which the shell shares.
3. A write that fails (EPIPE, EIO) ends nothing: what waits is dropped, and the next line tries again.
"""

import contextlib
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

LINE_LIMIT = select.PIPE_BUF - 1
WAIT_LIMIT = 256 * 1024  # bytes
ROOM = WAIT_LIMIT - LINE_LIMIT  # the rest is for a notice
CLOSE_TIME = 1.0  # seconds that a reader gets at the end to take what waits


class LineWriter:
    def __init__(
        self, fd: int, notice: Callable[[int], bytes], poll: Callable[[], Any] = select.poll
    ):
        """`notice`: the line that tells of so many dropped lines. `poll`: select.poll, unpatched by gevent."""
        self.dropped = 0  # lines that no notice has told of yet
        self._given = fd
        self._notice = notice
        self._make_poll = poll
        # Each with the number of lines that are lost with it: a notice stands for all that it tells of.
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._size = 0  # bytes in them
        self._open()

    def _open(self) -> None:
        self.fd = self._given
        if os.isatty(self.fd):
            # A terminal stopped with Ctrl-S may have room for half a line, for which only O_NONBLOCK helps.
            with contextlib.suppress(OSError):
                self.fd = os.open(
                    os.ttyname(self.fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                )
        self._poll = self._make_poll()
        self._poll.register(self.fd, select.POLLOUT)

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def write(self, lines: Iterable[bytes]) -> None:
        """Write what waits and then `lines`, as far as it fits. Each has its line end, within LINE_LIMIT bytes."""
        for line in lines:
            size = len(line)
            if self._size + size > ROOM:
                self._drain()
                if self._size + size > ROOM:
                    self.dropped += 1
                    continue
            if self.dropped:
                self._append_notice()
            self._waiting.append((line, 1))
            self._size += size
        self._drain()

    def close(self) -> None:
        """Give the reader CLOSE_TIME for what waits. A line that is written later opens a terminal anew."""
        end = time.monotonic() + CLOSE_TIME
        self._drain()
        while self._waiting and (left := end - time.monotonic()) > 0:
            self._poll.poll(left * 1000)
            self._drain()
        if self.fd not in (-1, self._given):
            os.close(self.fd)
            self.fd = -1

    def _append_notice(self) -> None:
        dropped, self.dropped = self.dropped, 0
        line = self._notice(dropped)
        self._waiting.append((line, dropped))
        self._size += len(line)

    def _drain(self) -> None:
        if self.fd < 0:
            self._open()
        while (self._waiting or self.dropped) and self._poll.poll(0):
            if not self._waiting:
                self._append_notice()
            data, count = self._take()
            try:
                written = os.write(self.fd, data)
            except (
                BlockingIOError
            ):  # somebody else made it O_NONBLOCK, and has filled it since the poll
                written = 0
            except OSError:
                self.dropped += count + sum(count for _, count in self._waiting)
                self._waiting.clear()
                self._size = 0
                return
            if written < len(data):
                self._waiting.appendleft((data[written:], count))
                self._size += len(data) - written
                return
        if self.dropped and not self._waiting:  # no room for the notice: it waits, too
            self._append_notice()

    def _take(self) -> tuple[bytes, int]:
        """The next lines, as many as one write may have, and their number."""
        waiting = self._waiting
        line, count = waiting.popleft()
        lines, size = [line], len(line)
        while waiting and size + len(waiting[0][0]) <= LINE_LIMIT:
            line, more = waiting.popleft()
            lines.append(line)
            size += len(line)
            count += more
        self._size -= size
        return b"".join(lines), count
