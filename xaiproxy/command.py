"""How every command of ours parses its line and ends: one sentence on stderr and an exit code of sysexits.h."""

import argparse
import os
import resource
import sys
from collections.abc import Callable
from typing import NoReturn

from xaiproxy import errors


class ArgumentParser(argparse.ArgumentParser):
    """argparse with exit code 64 for a wrong command line, and worked examples kept as they are written."""

    def __init__(self, **arguments):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        self.exit(errors.EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def run(name: str, body: "Callable[[], int | None]") -> int:
    """Return body's exit code, or the one of the Error it raised, whose sentence is then printed."""
    _forbid_core_dumps()
    try:
        status = body() or 0
        _flush_stdout()
        return status
    except errors.Error as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return errors.EXIT_INTERRUPTED


def _forbid_core_dumps() -> None:
    """They would hold tokens. 1 byte, not 0, has the kernel hand none to a program such as systemd-coredump either."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it would fail once more at the very end
        raise errors.Error(f"it is done, but the result cannot be printed: {error.strerror}") from error
