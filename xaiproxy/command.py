"""How every command of ours parses its line and ends: one sentence on stderr and an exit code of sysexits.h."""

import argparse
import contextlib
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from xaiproxy import __version__, errors

PATIENCE = 1.0  # seconds that the reader of a full stderr gets to make room for a sentence
RESULT_LIMIT = 1 << 20  # bytes; what a command prints is shorter


class ArgumentParser(argparse.ArgumentParser):
    """argparse with --version, exit code 64 for a wrong command line, and worked examples kept as they are written."""

    def __init__(self, **arguments):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments
        )
        self.add_argument("--version", action="version", version=__version__)

    def parse_args(self, *arguments, **keywords) -> argparse.Namespace:
        """What every command does first."""
        open_standard_streams()
        return super().parse_args(*arguments, **keywords)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        try:
            flush_results()
        except errors.Error as error:
            status, message = error.exit_code, f"{self.prog}: {error}"
        if message:
            say(message)
        sys.exit(status)

    def error(self, message: str) -> NoReturn:
        self.exit(errors.EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help")


def open_standard_streams() -> None:
    """Open each of stdin, stdout and stderr that is closed: the next file to be opened would take its place.

    stdin is then at its end. Writes to stdout fail, so that no result is lost in silence; stderr takes everything.

    stdout gets a buffer that holds all results, also with PYTHONUNBUFFERED: what could not be written stays in it, and
    flush_results fails.
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, flags), True
            )  # the lowest free descriptor: this one
    sys.stdin = sys.stdin or open(0, closefd=False)
    if sys.stdout is sys.__stdout__:
        encoding = sys.stdout and sys.stdout.encoding
        sys.stdout = open(1, "w", RESULT_LIMIT, encoding=encoding, closefd=False)
    sys.stderr = sys.stderr or open(2, "w", errors="backslashreplace", closefd=False)


def hangup() -> int:
    """The signal that SIGHUP amounts to: SIGTERM if it means that the terminal was closed, else itself.

    To be called before a handler of SIGHUP is installed: nohup(1) has it ignored.
    """
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal():
        return signal.SIGTERM
    return signal.SIGHUP


def _has_terminal() -> bool:
    """Whether the process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def run(name: str, body: Callable[[], int | None]) -> int:
    """Return body's exit code, or the one of the Error it raised, whose sentence is then printed."""
    _forbid_core_dumps()
    os.umask(
        os.umask(0o077) | 0o022
    )  # nothing that is made can be written by others, also where the umask is 0
    try:
        status = body() or 0
        flush_results()
    except errors.Error as error:
        status = error.exit_code
        say(f"{name}: {error}")
    except KeyboardInterrupt:
        status = errors.EXIT_INTERRUPTED
        say(f"\n{name}: interrupted")
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    return status


def say(sentence: str) -> None:
    """Print it on stderr. The command goes on if that fails, and after PATIENCE if a full pipe is not read."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(PATIENCE * 1000):
        with contextlib.suppress(OSError):
            print(sentence, file=sys.stderr)
        _flush(sys.stderr)


def _forbid_core_dumps() -> None:
    """They would hold tokens. 1 byte, not 0, has the kernel hand none to a program such as systemd-coredump either."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))


def flush_results(outcome: str = "it is done, but") -> None:
    """Write out what was printed to stdout. Raises an Error, which begins with `outcome`, if that fails."""
    if error := _flush(sys.stdout):
        raise errors.Error(f"{outcome} the result cannot be printed: {error.strerror}") from error


def _flush(stream: TextIO) -> OSError | None:
    """The failure, if there is one; what it leaves in the buffer cannot fail once more at the end of the process."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
