"""`python -m xaiproxy.sandbox`. gevent patches the standard library before the rest is imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xaiproxy.command import ArgumentParser


def parser() -> ArgumentParser:
    from xaiproxy.sandbox import command

    return command.parser()


def main(arguments: list[str] | None = None) -> int:
    from gevent import events, monkey

    # As in xaiproxy/__main__.py.
    events.notify_and_call_entry_points = events.notify
    monkey.patch_all()
    from xaiproxy.sandbox import command

    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
