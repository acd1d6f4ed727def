"""Log lines to a descriptor whose reader may be slow, stopped or gone: no write waits for it.

Lines that do not fit wait, up to WAIT_LIMIT bytes. Lines beyond that are dropped and counted, and
a notice gives their number as soon as there is room. Rules that a change must keep:

1. A write is shorter than PIPE_BUF, so that a pipe takes all of it or nothing (pipe(7)). It follows
   a poll of its own, with timeout 0, that reports room: the write before may have filled the pipe.
2. A descriptor that was passed in never becomes O_NONBLOCK, which is a mode of the open file and so
   of the shell's, too.
3. A failed write (EPIPE, EIO) ends nothing: the waiting lines are dropped, and the next line tries
   again.
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
DROPPED = "%d log lines were dropped: the log was not read in time"
CLOSE_TIMEOUT = 1.0  # seconds for the reader to take the waiting lines at the end


class LineWriter:
    def __init__(
        self, fd: int, notice: Callable[[int], bytes], poll: Callable[[], Any] = select.poll
    ):
        """`notice`: returns the line about so many dropped lines; `poll`: unpatched by gevent."""
        self.dropped = 0  # lines that are in no notice yet
        self.dropped_in_all = 0
        self._given = fd
        self._notice = notice
        self._make_poll = poll
        # Each with the number of lines that would be lost with it, for which a notice stands too,
        # and of those that would be lost now.
        self._waiting: deque[tuple[bytes, int, int]] = deque()
        self._size = 0  # bytes in them
        self._open()

    def _open(self) -> None:
        self.fd = self._given
        if os.isatty(self.fd):
            # A terminal stopped with Ctrl-S may take half a line, which only O_NONBLOCK handles.
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
        """Write the waiting lines and then `lines`, as far as they fit.

        `lines`: each with its line end, and of at most LINE_LIMIT bytes.
        """
        for line in lines:
            size = len(line)
            if self._size + size > ROOM:
                self._drain()
                if self._size + size > ROOM:
                    self.dropped += 1
                    self.dropped_in_all += 1
                    continue
            if self.dropped:
                self._append_notice()
            self._waiting.append((line, 1, 1))
            self._size += size
        self._drain()

    def close(self) -> None:
        """Write the waiting lines within CLOSE_TIMEOUT. A later write opens a terminal again."""
        end = time.monotonic() + CLOSE_TIMEOUT
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
        self._waiting.append((line, dropped, 0))
        self._size += len(line)

    def _drain(self) -> None:
        if self.fd < 0:
            self._open()
        while (self._waiting or self.dropped) and self._poll.poll(0):
            if not self._waiting:
                self._append_notice()
            data, count, new = self._take()
            try:
                written = os.write(self.fd, data)
            except BlockingIOError:
                # Another process made it O_NONBLOCK, and the pipe was filled after the poll.
                written = 0
            except OSError:
                self.dropped += count + sum(count for _, count, _ in self._waiting)
                self.dropped_in_all += new + sum(new for _, _, new in self._waiting)
                self._waiting.clear()
                self._size = 0
                return
            if written < len(data):
                self._waiting.appendleft((data[written:], count, new))
                self._size += len(data) - written
                return
        # Without room, the notice waits, too.
        if self.dropped and not self._waiting:
            self._append_notice()

    def _take(self) -> tuple[bytes, int, int]:
        """The next lines, as many as fit in one write, and their numbers."""
        waiting = self._waiting
        line, count, new = waiting.popleft()
        lines, size = [line], len(line)
        while waiting and size + len(waiting[0][0]) <= LINE_LIMIT:
            line, more, more_new = waiting.popleft()
            lines.append(line)
            size += len(line)
            count += more
            new += more_new
        self._size -= size
        return b"".join(lines), count, new
