"""A program on a terminal of its own, as a person has it: type, read, press Ctrl-C."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from typing import Any

CTRL_C = "\x03"


class Terminal:
    """A program whose stdin, stdout and stderr are the terminal.

    As a context manager, it kills the program if that still runs.
    """

    def __init__(
        self, command: list[str], rows: int = 50, columns: int = 100, **options: Any
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # setsid --ctty: without a controlling terminal Ctrl-C is a character like any other.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, **options
        )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.screen = ""  # all that was ever written there

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Close it, as a window is closed: the kernel sends SIGHUP. May be called twice."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def expect(self, pattern: str, seconds: float = 10) -> re.Match[str]:
        """Read until the screen has `pattern`."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            assert self._read(end - time.monotonic()), f"no {pattern!r} in {self.screen!r}"
        return found

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self, seconds: float = 10) -> int:
        """The exit code, with all that was written until then read."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(max(0.1, end - time.monotonic()))

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0, seconds))[0]:
            return False
        try:
            received = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other side open any more
            return False
        self.screen += self._decoder.decode(received)
        return bool(received)
