"""A program on a terminal of its own: a test types, reads the screen and presses Ctrl-C."""

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

from forked_process import ForkedProcess

CTRL_C = "\x03"


class Terminal:
    """A program whose stdin, stdout and stderr are the terminal.

    As a context manager, it kills a program that is still running. `module`: the module from whose
    process `python COMMAND` is forked, as in forked_process.py, or "" for a command of its own.
    """

    def __init__(
        self,
        command: list[str],
        rows: int = 50,
        columns: int = 100,
        module: str = "",
        **options: Any,
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process: subprocess.Popen[bytes] | ForkedProcess
        # setsid --ctty: without a controlling terminal, Ctrl-C is an ordinary character.
        if module:
            self.process = ForkedProcess(
                module,
                command,
                [slave] * 3,
                cwd=str(options["cwd"]),
                environ=options["env"],
                new_session=True,
                terminal=True,
                traced=False,
            )
        else:
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, **options
            )
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        # All output so far.
        self.screen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Close the terminal, so that the kernel sends SIGHUP. May be called twice."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def expect(self, pattern: str, seconds: float = 10) -> re.Match[str]:
        """Read until the screen contains `pattern`. Return the match."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            assert self._read(end - time.monotonic()), f"no {pattern!r} in {self.screen!r}"
        return found

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self, seconds: float = 10) -> int:
        """Read all output until the program ends. Return the exit code."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(max(0.1, end - time.monotonic()))

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0, seconds))[0]:
            return False
        try:
            received = os.read(self._master, 65536)
        # EIO: no process has the other end open any more.
        except OSError:
            return False
        self.screen += self._decoder.decode(received)
        return bool(received)
