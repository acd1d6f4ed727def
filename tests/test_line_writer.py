"""Lines to readers that are slow, stopped, gone or back: no write blocks, and losses are counted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xaiproxy.line_writer import CLOSE_TIMEOUT, LINE_LIMIT, WAIT_LIMIT, LineWriter

PAGE = os.sysconf("SC_PAGE_SIZE")
# F_SETPIPE_SZ, which fcntl names from Python 3.10.1 on.
SET_PIPE_SIZE = 1031


def notice(dropped: int) -> bytes:
    return b"%d were dropped\n" % dropped


def line(number: int, size: int = 100) -> bytes:
    return b"line %d " % number + b"." * (size - len(b"line %d " % number) - 1) + b"\n"


def lines(start: int, end: int, size: int = 100) -> list[bytes]:
    return [line(number, size) for number in range(start, end)]


def numbers(data: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"line (\d+) \.*\n", data)]


def accounted(data: bytes) -> int:
    """The number of lines that arrived or were counted as dropped."""
    return len(numbers(data)) + sum(
        int(number) for number in re.findall(rb"(\d+) were dropped", data)
    )


class Pipe:
    """`flags`: O_DIRECT keeps each write apart."""

    def __init__(self, size: int = 65536, flags: int = 0):
        self.read_end, self.write_end = os.pipe2(flags)
        self.size = fcntl.fcntl(self.write_end, SET_PIPE_SIZE, size)
        os.set_blocking(self.read_end, False)
        self.writer = LineWriter(self.write_end, notice)

    def read(self, size: int = 1 << 20) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(self.read_end, size)
        return b""

    def rest(self) -> bytes:
        """All that still arrives."""
        parts = []
        while (part := self.read()) or self.writer.waiting:
            parts.append(part)
            self.writer.write(())
        return b"".join(parts)

    def close(self) -> None:
        for fd in (self.read_end, self.write_end):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_lines_that_fit_are_written_at_once(pipe: Pipe) -> None:
    pipe.writer.write(lines(0, 100))
    assert pipe.read() == b"".join(lines(0, 100)) and not pipe.writer.waiting


def test_lines_that_do_not_fit_wait_and_come_in_order(pipe: Pipe) -> None:
    for start in range(0, 3000, 30):
        pipe.writer.write(lines(start, start + 30))
    assert pipe.writer.waiting and pipe.writer.dropped == 0
    assert pipe.rest() == b"".join(lines(0, 3000))


def test_a_reader_of_small_pieces_gets_every_line(pipe: Pipe) -> None:
    pipe.writer.write(lines(0, 2000))
    seen = b""
    for number in range(2000, 3000):
        seen += pipe.read(137)
        pipe.writer.write([line(number)])
    assert seen + pipe.rest() == b"".join(lines(0, 3000))


@pytest.mark.parametrize("beyond", [0, 1])
def test_lines_wait_up_to_the_limit(beyond: int) -> None:
    """As many bytes as may wait, and one more."""
    pipe = Pipe()
    # Each line has a page of its own.
    pipe.writer.write(lines(0, 1000, 4000))
    arrived = numbers(pipe.read())
    room = WAIT_LIMIT - LINE_LIMIT
    pipe.rest()
    pipe.writer.dropped = 0
    # The pipe is full, and no line waits.
    pipe.writer.write(lines(0, pipe.size // PAGE, 4000))
    assert arrived == list(range(pipe.size // PAGE)) and not pipe.writer.waiting
    pipe.writer.write(
        [
            *lines(100, 100 + room // 1000 - 1, 1000),
            line(500, room - (room // 1000 - 1) * 1000 + beyond),
        ]
    )
    assert pipe.writer.dropped == beyond
    data = pipe.rest()
    assert numbers(data)[-1] == (100 + room // 1000 - 2 if beyond else 500)
    assert (b"1 were dropped" in data) is bool(beyond)
    pipe.close()


def test_dropped_lines_are_counted_in_their_place(pipe: Pipe) -> None:
    pipe.writer.write(lines(0, 10000))
    dropped = pipe.writer.dropped
    assert dropped > 5000
    kept = 10000 - dropped
    seen = pipe.read()
    pipe.writer.write([line(10000)])
    seen += pipe.rest()
    assert seen == b"".join([*lines(0, kept), notice(dropped), line(10000)])
    assert (pipe.writer.dropped, pipe.writer.dropped_in_all) == (0, dropped)


def test_dropped_lines_are_counted_without_another_line(pipe: Pipe) -> None:
    pipe.writer.write(lines(0, 10000))
    dropped = pipe.writer.dropped
    assert pipe.rest().endswith(line(9999 - dropped) + notice(dropped))
    assert pipe.rest() == b"" and pipe.writer.dropped == 0


def test_the_notice_waits_for_room_when_the_last_line_filled_the_pipe(pipe: Pipe) -> None:
    # Lines of a page each, so that each one read makes room for one.
    count = 200
    pipe.writer.write(lines(0, count, LINE_LIMIT))
    assert pipe.writer.dropped
    came = b""
    while pipe.writer.waiting:
        page = pipe.read(LINE_LIMIT)
        assert page, "a writer that waits has filled the pipe"
        came += page
        pipe.writer.write([])
    # No line is written any more.
    came += pipe.read()
    assert accounted(came) == count and b"were dropped" in came


def test_each_write_has_a_poll_of_its_own() -> None:
    """With room for one write, two are not tried: the second would wait for the reader."""
    pipe = Pipe(2 * PAGE, os.O_DIRECT)
    os.write(pipe.write_end, b"x")
    pipe.writer.write(lines(0, 10, 4000))
    assert (pipe.read(), pipe.read(), pipe.read()) == (b"x", line(0, 4000), b"")
    pipe.writer.write(())
    assert (pipe.read(), pipe.read(), pipe.read()) == (line(1, 4000), line(2, 4000), b"")
    pipe.close()


def test_writes_are_as_long_as_possible() -> None:
    pipe = Pipe(flags=os.O_DIRECT)
    pipe.writer.write(
        [*lines(0, 40), line(40, LINE_LIMIT - 100), line(41), line(42, LINE_LIMIT), line(43)]
    )
    assert [len(pipe.read()) for _ in range(5)] == [
        4000,
        LINE_LIMIT - 100 + 100,
        LINE_LIMIT,
        100,
        0,
    ]
    pipe.close()


# a closed reader


def test_without_a_reader_lines_are_dropped_and_counted(tmp_path: Path) -> None:
    """A FIFO may get another reader, which gets the count of all that was lost, also of notices."""
    os.mkfifo(tmp_path / "fifo")
    first = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_end = os.open(tmp_path / "fifo", os.O_WRONLY)
    writer = LineWriter(write_end, notice)
    writer.write(lines(0, 1000))
    arrived = numbers(os.read(first, 1 << 20))
    os.close(first)
    for number in range(1000, 1010):
        writer.write([line(number)])
        assert not writer.waiting
    second = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer.write([line(1010)])
    data = os.read(second, 1 << 20)
    assert (
        len(arrived) + accounted(data) == 1011 and data.endswith(line(1010)) and writer.dropped == 0
    )
    # Lines, once each, though notices about them were lost as well.
    assert writer.dropped_in_all == 1010 - len(arrived)
    os.close(second), os.close(write_end)


def test_a_writer_does_not_wait_for_a_closed_reader_of_a_full_pipe(pipe: Pipe) -> None:
    pipe.writer.write(lines(0, 2000))
    assert pipe.writer.waiting
    os.close(pipe.read_end)
    pipe.writer.write([line(2000)])
    assert not pipe.writer.waiting and pipe.writer.dropped > 1000
    start = time.monotonic()
    pipe.writer.close()
    assert time.monotonic() - start < CLOSE_TIMEOUT / 2


def test_a_closed_terminal_is_no_error() -> None:
    terminal, its_end = pty.openpty()
    writer = LineWriter(its_end, notice)
    os.close(terminal)
    with pytest.raises(OSError) as caught:
        os.write(its_end, b"x")
    assert caught.value.errno == errno.EIO
    writer.write(lines(0, 3))
    assert not writer.waiting and writer.dropped == 3
    writer.close()
    os.close(its_end)


# terminals and sockets


def test_a_terminal_that_accepts_half_a_line_gets_the_other_half_later() -> None:
    terminal, its_end = pty.openpty()
    writer = LineWriter(its_end, notice)
    os.set_blocking(terminal, False)
    writer.write(lines(0, 50, 4000))
    assert writer.waiting
    data = b""
    end = time.monotonic() + 10
    while (
        writer.waiting or not data.endswith(line(49, 4000)[:-1] + b"\r\n")
    ) and time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            data += os.read(terminal, 1000)
        writer.write(())
    assert data == b"".join(lines(0, 50, 4000)).replace(b"\n", b"\r\n")
    writer.close()
    # This opens it again.
    writer.write([line(50)])
    assert select.select([terminal], [], [], 5)[0] and os.read(terminal, 1000) == line(50).replace(
        b"\n", b"\r\n"
    )
    writer.close(), os.close(terminal), os.close(its_end)


def test_lines_wait_for_a_full_socket() -> None:
    """The socket of systemd's journal is one."""
    reader, sock = socket.socketpair()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    writer = LineWriter(sock.fileno(), notice)
    writer.write(lines(0, 2000))
    assert writer.waiting and writer.dropped == 0
    data = b""
    while len(data) < 200_000:
        data += reader.recv(1 << 20)
        writer.write(())
    assert data == b"".join(lines(0, 2000))
    reader.close(), sock.close()


@pytest.mark.parametrize("make", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_the_given_descriptor_is_never_made_non_blocking(make) -> None:
    reader, fd = make()
    before = fcntl.fcntl(fd, fcntl.F_GETFL)
    writer = LineWriter(fd, notice)
    writer.write(lines(0, 3000))
    writer.close()
    assert fcntl.fcntl(fd, fcntl.F_GETFL) == before and not before & os.O_NONBLOCK
    os.close(reader), os.close(fd)


def test_a_descriptor_that_is_already_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_end, False)
    pipe.writer.write(lines(0, 3000))
    assert pipe.writer.dropped == 0
    assert pipe.rest() == b"".join(lines(0, 3000))


# closing


def test_at_the_end_a_slow_reader_gets_the_waiting_lines(pipe: Pipe) -> None:
    os.set_blocking(pipe.read_end, True)
    pipe.writer.write(lines(0, 3000))
    parts: list[bytes] = []

    def read_slowly() -> None:
        while sum(map(len, parts)) < 300_000:
            parts.append(os.read(pipe.read_end, PAGE))

    reader = threading.Thread(target=read_slowly)
    reader.start()
    pipe.writer.close()
    reader.join(10)
    assert b"".join(parts) == b"".join(lines(0, 3000))


def test_at_the_end_the_wait_for_a_reader_is_at_most_a_second(pipe: Pipe) -> None:
    pipe.writer.write(lines(0, 3000))
    start = time.monotonic()
    pipe.writer.close()
    assert CLOSE_TIMEOUT <= time.monotonic() - start < CLOSE_TIMEOUT + 1
