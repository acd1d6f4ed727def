"""Run xaiproxy against the simulated xAI for minutes, and count what is lost.

Everything runs on loopback, in a temporary folder, without your settings and
logins. Ctrl-C ends everything that was started.

Exit status: 0 nothing was lost; 1 something was; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import signal
import sys
import tempfile
from typing import Any

from xaiproxy import command

from . import cluster, load, login, proxies, workers
from .processes import SIGNALS

INTERRUPTED = 130
EXAMPLES = """\
  bin/soak --login 3    kill the programs of one login; eight minutes
  bin/soak --load 2     thousands of streams and clients; five minutes
  bin/soak --cluster 3  refreshers, a Secret and its proxies; five minutes
  bin/soak --proxies    50 proxies with copies of a token; eleven minutes
  bin/soak --workers    replace and kill two workers; eight minutes
"""
# argparse puts a group on one line, however long.
USAGE = """\
bin/soak (--login | --load | --cluster | --proxies) [MIN]
       bin/soak --workers [N]
"""


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1440:
        raise ValueError
    return value


def parser() -> argparse.ArgumentParser:
    options = command.ArgumentParser(EXAMPLES, prog="bin/soak", usage=USAGE, description=__doc__)
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--login", nargs="?", type=minutes, const=10.0, metavar="MIN", help=login.HELP
    )
    what.add_argument("--load", nargs="?", type=minutes, const=5.0, metavar="MIN", help=load.HELP)
    what.add_argument(
        "--cluster", nargs="?", type=minutes, const=10.0, metavar="MIN", help=cluster.HELP
    )
    what.add_argument(
        "--proxies", nargs="?", type=minutes, const=10.0, metavar="MIN", help=proxies.HELP
    )
    what.add_argument(
        "--workers",
        nargs="?",
        type=command.whole(1, 1000),
        const=10,
        metavar="N",
        help=workers.HELP,
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
            if options.workers:
                return workers.soak(pathlib.Path(folder), running, options.workers)
            for soak, length in (
                (login.soak, options.login),
                (cluster.soak, options.cluster),
                (load.soak, options.load),
                (proxies.soak, options.proxies),
            ):
                if length:
                    return int(soak(pathlib.Path(folder), running, 60 * length))
            raise AssertionError("one option is required")
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
