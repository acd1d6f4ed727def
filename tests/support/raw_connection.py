"""One end of a raw HTTP/1.1 connection, on which every wait has a timeout."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator

# The default fields of a response whose connection stays open.
KEPT = b"Connection: keep-alive\r\nKeep-Alive: timeout=595\r\n"
# In seconds. By default, a test waits this long for an event.
TIMEOUT = 8.0
# SO_LINGER that turns close() into a reset.
RESET = struct.pack("ii", 1, 0)


def readable(sockets: Iterable[socket.socket], seconds: float = 0) -> list[socket.socket]:
    """Wait until some of the sockets have bytes or EOF to read, and return those."""
    by_number = {sock.fileno(): sock for sock in sockets}
    # Not select(), which takes no descriptor above 1023.
    poll = select.poll()
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(seconds * 1000)]


@dataclasses.dataclass
class Message:
    """A request or a response.

    `head`: its bytes as received, with the empty line. `body`: its bytes without framing.
    """

    head: bytes
    body: bytes = b""
    chunks: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def line(self) -> str:
        return self.head.decode("latin-1").partition("\r\n")[0]

    @property
    def fields(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:-2]
        return [(name, value) for name, _, value in (line.partition(": ") for line in lines)]

    def values(self, name: str) -> list[str]:
        return [value for field, value in self.fields if field.lower() == name.lower()]

    def value(self, name: str) -> str | None:
        """Return the only value of a field, or None without that field."""
        values = self.values(name)
        assert len(values) < 2, f"{len(values)} fields {name}"
        return values[0] if values else None

    @property
    def status(self) -> int:
        return int(self.line.split(" ", 2)[1])

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        return self.line.split(" ")[1]

    @property
    def token(self) -> str:
        return (self.value("Authorization") or "").removeprefix("Bearer ")


class RawConnection:
    def __init__(self, sock: socket.socket):
        self.sock = sock
        sock.settimeout(TIMEOUT)
        # A UNIX socket has no such option.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # Send

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    @contextlib.contextmanager
    def sending(self, data: bytes) -> Iterator[None]:
        """Send in another thread while the block runs."""
        thread = threading.Thread(target=self.send, args=(data,))
        thread.start()
        yield
        thread.join()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close with a FIN, or with a RST if there are unread bytes."""
        self.sock.close()

    def reset(self) -> None:
        """Close with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.sock.close()

    # Receive

    def _more(self) -> bool:
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def until(self, end: bytes) -> bytes:
        """Return everything up to `end`, and `end`."""
        while end not in self.buffer:
            assert self._more(), f"closed after {self.buffer!r}, before {end!r}"
        data, _, rest = self.buffer.partition(end)
        self.buffer = rest
        return data + end

    def exactly(self, size: int) -> bytes:
        parts = [self.buffer[:size]]
        missing = size - len(parts[0])
        self.buffer = self.buffer[size:]
        while missing:
            data = self.sock.recv(min(missing, 1 << 20))
            assert data, f"closed {missing} bytes before the end"
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def head(self) -> Message:
        return Message(self.until(b"\r\n\r\n"))

    def chunk(self) -> bytes:
        """Return the next chunk's data, or b"" after the last one and its trailers."""
        size = int(self.until(b"\r\n").partition(b";")[0], 16)
        if size == 0:
            while self.until(b"\r\n") != b"\r\n":
                pass
            return b""
        data = self.exactly(size)
        assert self.exactly(2) == b"\r\n"
        return data

    def message(self, *, body: bool = True) -> Message:
        """Return a whole request or response.

        `body`: False for the response to a HEAD request.
        """
        message = self.head()
        length = message.value("Content-Length")
        if not body or message.head.startswith((b"HTTP/1.1 1", b"HTTP/1.1 204", b"HTTP/1.1 304")):
            pass
        elif message.value("Transfer-Encoding") == "chunked":
            while chunk := self.chunk():
                message.chunks.append(chunk)
            message.body = b"".join(message.chunks)
        elif length is not None:
            message.body = self.exactly(int(length))
        elif message.head.startswith(b"HTTP/"):
            message.body = self.rest()
        return message

    def rest(self) -> bytes:
        """Read until EOF. Raises ConnectionResetError after a reset."""
        end = time.monotonic() + 5 * TIMEOUT
        parts, self.buffer = [self.buffer], b""
        while data := self.sock.recv(1 << 18):
            assert time.monotonic() < end, "the peer sends bytes without end"
            parts.append(data)
        return b"".join(parts)

    def was_reset(self, seconds: float) -> bool:
        """Wait for a reset. Return whether it came."""
        poll = select.poll()
        # Without events, it reports POLLERR and POLLHUP alone.
        poll.register(self.sock, 0)
        return bool(poll.poll(seconds * 1000))

    def silent(self) -> bool:
        """Whether there is nothing to read, neither bytes nor EOF."""
        return not self.buffer and not readable([self.sock])

    def closed_within(self, seconds: float = 1.0) -> bool:
        """Wait for the peer to close or reset. Return False if it does not, or sends bytes."""
        try:
            self.sock.settimeout(seconds)
            return not self.buffer and not self.sock.recv(1)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError:
            return True
        finally:
            if self.sock.fileno() >= 0:
                self.sock.settimeout(TIMEOUT)
