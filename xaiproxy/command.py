"""How every command parses its arguments and ends: one sentence on stderr and an exit code."""

import argparse
import contextlib
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import IO, Any, NoReturn

from xaiproxy import __version__, errors

STDERR_TIMEOUT = 1.0  # seconds for the reader of a full stderr to make room for a sentence
RESULT_LIMIT = 1 << 20  # bytes; no command prints more
MOST_WORKERS = 64


class ArgumentParser(argparse.ArgumentParser):
    """argparse with --version, exit code 64 for wrong arguments, and a help that begins with
    examples.

    `examples`: worked examples, printed verbatim
    """

    def __init__(self, examples: str, **arguments: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments
        )
        self.examples = examples
        self.add_argument("--version", action="version", version=__version__)

    def format_help(self) -> str:
        return f"{self.examples}\n{super().format_help()}"

    def parse_args(self, *arguments: Any, **keywords: Any) -> Any:
        """Open the standard streams, which must come first in every command, and parse."""
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


def add_serving_options(parser: ArgumentParser) -> None:
    """Add the options of the commands that serve."""
    parser.add_argument("--bind", metavar="ADDRESS", help="IP address, or unix:/path, to listen on")
    parser.add_argument("-p", "--port", help="TCP port to listen on")
    add_token_path(parser)


def add_token_path(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--token-path", metavar="FILE", help="the token file (default: XAI_PROXY_TOKEN_PATH)"
    )


def serving_settings(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Return the options of the commands that serve as settings."""
    return {
        "XAI_PROXY_BIND": arguments.bind,
        "XAI_PROXY_PORT": arguments.port,
        "XAI_PROXY_TOKEN_PATH": arguments.token_path,
    }


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` to `most`."""

    # Imported by the commands that have such arguments, and by no other.
    from xaiproxy import setting_types

    number = setting_types.whole(least, most)

    def parse(text: str) -> int:
        try:
            return number(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {error}") from None

    return parse


def open_standard_streams() -> None:
    """Open each of stdin, stdout and stderr that is closed, before another file gets its number.

    stdin is then at its end. Writes to stdout fail, so that no result is lost unnoticed, and stderr
    discards everything.

    stdout gets a buffer that holds every result, even with PYTHONUNBUFFERED: flush_results fails if
    it cannot be written.
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free descriptor, which is this one.
            os.set_inheritable(os.open(os.devnull, flags), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    if sys.stdout is sys.__stdout__:
        encoding = sys.stdout.encoding if sys.stdout else None
        sys.stdout = os.fdopen(1, "w", RESULT_LIMIT, encoding=encoding, closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", errors="backslashreplace", closefd=False)


def hangup() -> int:
    """The signal that SIGHUP stands for: SIGTERM if it means a closed terminal, else SIGHUP.

    Call it before a handler of SIGHUP is installed, because nohup(1) has SIGHUP ignored.
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
    """Return the exit code of `body`, or that of the Error it raises, whose sentence is printed."""
    _forbid_core_dumps()
    # Even with umask 0, other users cannot write to files that are created.
    os.umask(os.umask(0o077) | 0o022)
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
    """Print it on stderr, unless that fails, or is a full pipe without a reader."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(STDERR_TIMEOUT * 1000):
        with contextlib.suppress(OSError):
            print(sentence, file=sys.stderr)
        _flush(sys.stderr)


def _forbid_core_dumps() -> None:
    """Core dumps would hold tokens.

    With 1 byte, not 0, the kernel pipes none to a program such as systemd-coredump either.
    """
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))


def flush_results(outcome: str = "it is done, but") -> None:
    """Write what was printed to stdout. Raises an Error, which begins with `outcome`."""
    if error := _flush(sys.stdout):
        raise errors.Error(f"{outcome} the result cannot be printed: {error.strerror}") from error


def _flush(stream: IO[str]) -> OSError | None:
    """Return the failure, if any; the unwritten rest is discarded and cannot fail again at exit."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
