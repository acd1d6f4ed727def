"""bin/soak: run xaiproxy against the simulated xAI for minutes, under faults or load, and count
what was lost.

Everything runs on loopback, in a temporary folder, without your settings and logins. Exit status: 0
nothing was lost; 1 something was; 130 interrupted. Ctrl-C ends everything that was started.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import signal
import sys
import tempfile
from typing import Any

from . import load, login
from .processes import SIGNALS

USAGE, INTERRUPTED = 64, 130


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(USAGE, f"soak: {message}; see bin/soak --help\n")


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1440:
        raise ValueError
    return value


def parser() -> argparse.ArgumentParser:
    options = Parser(
        prog="bin/soak",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--login", nargs="?", type=minutes, const=10.0, metavar="MINUTES", help=login.HELP
    )
    what.add_argument(
        "--load", nargs="?", type=minutes, const=5.0, metavar="MINUTES", help=load.HELP
    )
    return options


def interrupt(*_: Any) -> None:
    # A second signal must not keep the first from ending everything that was started.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    options = parser().parse_args()
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="xaiproxy-soak-") as folder,
            contextlib.ExitStack() as running,
        ):
            soak, length = (
                (login.soak, options.login) if options.login else (load.soak, options.load)
            )
            return soak(pathlib.Path(folder), running, 60 * length)
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
